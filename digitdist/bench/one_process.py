"""One process: the trainer, its evaluation and its start, beside the bare loop and what it would do with other settings."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from digitdist.bench.launching import launch
from digitdist.bench.loops import (
    OF_EVALUATION,
    QUIET,
    Loop,
    Variant,
    bare_loop,
    evaluation_loops,
    in_turn,
    setting,
    trainer_loop,
)
from digitdist.bench.peers import plain_way
from digitdist.distributed import Plan, start_accelerator
from digitdist.runs import RESULT, read_metrics
from digitdist.train import prepare

BARE = "bare loop"
INDEXED = "bare loop, its images indexed"
LOADED = "bare loop, its images from the loader"
ONE_IMAGE = "one image a step, one thread"
PLAIN = "plain torchvision way"
TURN_S = 0.5  # seconds of one measurement of a loop
IMPORTS = """
import time, torch, accelerate
ended = time.time()
from digitdist.distributed import peak_memory_mb
print(ended, peak_memory_mb(torch.device("cpu"))["host"] or "nan")
"""


def measure_one_process(overrides: list[str], repeats: int) -> dict[str, Any]:
    """Every measurement of one process, as plain values."""
    setup = prepare([], overrides)
    config, plan = setup.config, setup.plan
    accelerator = start_accelerator(config, plan)
    phases: list[dict[str, float]] = []
    size = config.data.batch_size
    variants = {BARE: Variant(), INDEXED: Variant(source="indexed"), LOADED: Variant(source="loader")}
    loops: dict[str, Loop] = {name: bare_loop(setup, accelerator, variant) for name, variant in variants.items()}
    loops["trainer"] = partial(trainer_loop, overrides, phases)
    loops |= evaluation_loops(setup, accelerator)
    loops |= {name: bare_loop(setup, accelerator, variant) for name, variant in _alternatives(size, plan).items()}
    per_step = {**dict.fromkeys(loops, size), **dict.fromkeys(OF_EVALUATION, len(setup.splits.test)), ONE_IMAGE: 1}
    steps = {name: max(1, round(TURN_S * loop(3) / per_step[name])) for name, loop in loops.items()}
    rates = in_turn(loops, steps, repeats)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:  # unaffected by our settings
        rates[PLAIN] = [fresh.submit(plain_way, overrides, 30).result() for _ in range(repeats)]
    starts = [start_up(overrides) for _ in range(3)]
    return {
        "shards": config.sync.shards,
        "setting": setting(setup),
        "images_per_second": rates,
        "start_up": {name: {"s": [s[name][0] for s in starts], "mb": [s[name][1] for s in starts]} for name in starts[0]},
        "phases": {name: sum(p[name] for p in phases) for name in phases[0] if name != "slowest_rank"},
    }


def _alternatives(size: int, plan: Plan) -> dict[str, Variant]:
    """Other settings that might be faster, by the key that sets them."""
    alternatives = {
        f"data.batch_size={4 * size}": Variant(batch_size=4 * size),
        "another layout than channels-last": Variant(channels_last=False),
        "train.compile=default": Variant(compiled=True),
    }
    alternatives |= {f"train.threads={n}": Variant(threads=n) for n in {1, os.cpu_count() or 1} - {plan.threads}}
    alternatives |= {f"train.precision={p}": Variant(precision=p) for p in {"fp32", "bf16"} - {plan.precision}}
    return alternatives | {ONE_IMAGE: Variant(batch_size=1, threads=1)}


def start_up(overrides: list[str], env: dict[str, str] | None = None) -> dict[str, tuple[float, float]]:
    """Of the command up to the line of its first step, and of a process that imports torch and accelerate: seconds, and peak
    memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run.dir={folder}", "run.name=a", "train.max_steps=1", "train.eval_every=0", *QUIET]
        began = time.time()
        launch(["-m", "digitdist.train", *overrides, *fixed], env=env)
        first = read_metrics(Path(folder) / "a")[0]["time"] - began
        (memory,) = json.loads((Path(folder) / "a" / RESULT).read_text())["peak_memory_mb"]
    began = time.time()
    ended, used = launch(["-c", IMPORTS]).split()
    host = memory["host"] or math.nan  # where the kernel tells none
    return {"command to first step": (first, host), "import torch, accelerate": (float(ended) - began, float(used))}
