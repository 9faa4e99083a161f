"""Where a step's time goes, operation by operation, beside the least that this machine needs for each: its roofline.

After Williams, Waterman and Patterson, Roofline: An Insightful Visual Performance Model for Multicore Architectures, 2009.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from digitdist.bench.loops import AUTOCAST, Variant, bare_loop, setting
from digitdist.distributed import start_accelerator
from digitdist.errors import UserError
from digitdist.train import prepare

STEPS = 20  # a turn
MATRIX = 1024  # rows and columns of the product that shows how many operations a second there may be
VECTOR = 1 << 20  # numbers of the sum that shows how many bytes: activations mostly stay in a cache, as these do
SHOWN = 12  # operations in the table


@dataclass
class Work:
    """What the calls of one operation with the same shapes take in a turn: floating-point operations, bytes, seconds."""

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Timed(TorchDispatchMode):
    """Times each operation that reaches a kernel, also those of backward passes. `work`: by name and largest shape."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}.values()
        if func.is_view or not tensors:
            return out
        shape = max((tuple(tensor.shape) for tensor in tensors), key=lambda shape: torch.Size(shape).numel())
        work = self.work.setdefault(f"{func.overloadpacket.__name__} {'×'.join(map(str, shape))}", Work())
        count = flop_registry.get(func.overloadpacket)
        work.flops += count(*args, **kwargs, out_val=out) if count else 0
        work.bytes += sum(tensor.nbytes for tensor in tensors)
        work.seconds += seconds
        return out


def measure_roofline(overrides: list[str], repeats: int) -> None:
    """Prints a table of the operations of a step, the longest first: median time over `repeats` turns, share of the step,
    and how many times as long it takes as the roofline says.

    Raises:
        UserError: the step runs on another device than a CPU, whose host does not see how long an operation takes.
    """
    setup = prepare([], overrides)
    if setup.plan.device_type != "cpu":
        raise UserError(f"--roofline measures a CPU, and this is a {setup.plan.device_type}; its own profiler shows more")
    loop = bare_loop(setup, start_accelerator(setup.config, setup.plan), Variant())
    dtype = AUTOCAST.get(setup.plan.precision, torch.float32)
    turns: list[dict[str, Work]] = []
    peaks, plain = [], []
    for _ in range(repeats):
        peaks.append(peak(dtype))
        plain.append(setup.config.data.batch_size / loop(STEPS))
        with Timed() as timed:
            loop(STEPS)
        turns.append(timed.work)
    flops, bandwidth = (statistics.median(values) for values in zip(*peaks, strict=True))
    print(f"{setting(setup)}: {flops / 1e9:.0f} GFLOP/s in a matrix product, {bandwidth / 1e9:.0f} GB/s in a sum")
    print("\n".join(rows(turns, flops, bandwidth, statistics.median(plain))), flush=True)


def peak(dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second in a matrix product, and bytes a second in a sum of vectors."""
    matrix, vector = torch.randn(MATRIX, MATRIX).to(dtype), torch.zeros(VECTOR)
    return 2 * MATRIX**3 / _seconds(lambda: matrix @ matrix), 3 * vector.nbytes / _seconds(lambda: vector.add_(vector, alpha=2))


def _seconds(compute: Callable[[], Any]) -> float:
    """The shortest of a few calls."""
    compute()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rows(turns: list[dict[str, Work]], flops: float, bandwidth: float, step: float) -> list[str]:
    """The table. `flops` and `bandwidth`: a second, of this machine; `step`: seconds of one that nobody times inside."""
    names = set.intersection(*(set(turn) for turn in turns))
    seconds = {name: statistics.median(turn[name].seconds for turn in turns) / STEPS for name in names}
    bounds = {name: max(work.flops / flops, work.bytes / bandwidth) / STEPS for name, work in turns[0].items() if name in names}
    lines = [f"{'operation, its largest tensor':48} {'ms':>7} {'of all':>7} {'GFLOP/s':>8} {'GB/s':>6} {'× roofline':>11}"]
    for name in sorted(names, key=lambda name: -seconds[name])[:SHOWN]:
        work, own = turns[0][name], seconds[name]
        rates = f"{work.flops / STEPS / own / 1e9:8.0f} {work.bytes / STEPS / own / 1e9:6.0f}"
        lines.append(f"{name:48} {1e3 * own:7.3f} {own / sum(seconds.values()):7.1%} {rates} {own / bounds[name]:11.1f}")
    total, bound = sum(seconds.values()), sum(bounds.values())
    lines.append(f"{'all ' + str(len(names)) + ' operations':48} {1e3 * total:7.3f} {1:7.0%} {total / bound:33.1f}")
    lines.append(f"a step takes {1e3 * step:.3f} ms, of which {1e3 * bound:.3f} ms is what the roofline allows")
    return lines
