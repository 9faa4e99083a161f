"""What is measured in one process: the bare loop and its variants, the trainer, evaluation, and the plain torchvision way."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from digitdist.data import ImageSet, Order, Sharding, Share, TrainingSampler, normalise, prepare_loader
from digitdist.distributed import Heartbeat, device_name, run_on_main, start_accelerator, use_deterministic_algorithms
from digitdist.evaluate import chunked_loader, evaluate
from digitdist.models import build_model
from digitdist.optim import build_optimizer
from digitdist.runs import open_run, read_metrics
from digitdist.train import Setup, Trainer, prepare

QUIET = ("tracking.wandb=disabled", "run.report=false", "checkpoint.every_steps=0", "checkpoint.resume=never")
OF_EVALUATION = ("bare forward", "bare forward, its images normalised", "evaluation")

Loop = Callable[[int], float]  # takes so many steps, and returns images a second
Rates = dict[str, list[float]]  # images a second of each loop, one number a turn
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """How a bare loop differs from the plainest one. None: as configured.

    `source`: where its images come from: ``ready`` in memory and normalised, ``indexed`` from the data set, or from the
    ``loader`` that Accelerate prepares. `all_reduce`: numbers that ranks sum up after each step.
    """

    batch_size: int | None = None
    threads: int | None = None
    precision: str | None = None
    channels_last: bool = True
    compiled: bool = False
    source: Literal["ready", "indexed", "loader"] = "ready"
    all_reduce: int = 0


def bare_loop(setup: Setup, accelerator: Accelerator, variant: Variant) -> Loop:
    """Forward, backward and update, and nothing else: the most that PyTorch gives this network here."""
    config, device = setup.config, accelerator.device
    size = variant.batch_size or config.data.batch_size
    layout = setup.traits.layout if variant.channels_last else torch.contiguous_format
    model = build_model(config.model, config.seed, setup.splits.info).to(device).to(memory_format=layout)
    optimizer = build_optimizer(model, config.optim)
    if variant.compiled:
        model.compile()
    kind = AUTOCAST.get(variant.precision or setup.plan.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=kind == torch.float16)
    batches = _endless_batches(setup, accelerator, variant, size, layout)

    def loop(steps: int) -> float:
        torch.set_num_threads(variant.threads or setup.plan.threads)
        start = time.perf_counter()
        for pixels, labels in itertools.islice(batches, steps):
            with torch.autocast(device.type, kind, enabled=kind is not None):
                loss = F.cross_entropy(model(pixels), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if variant.all_reduce:
                dist.all_reduce(torch.zeros(variant.all_reduce, device=device))
        await_device(device)
        return steps * size / (time.perf_counter() - start)

    loop(3)  # whatever is made on first use
    return loop


def _endless_batches(
    setup: Setup, accelerator: Accelerator, variant: Variant, size: int, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised pixels and labels of one batch after another, from where `variant` says."""
    info, device = setup.splits.info, accelerator.device
    kept = min(len(setup.splits.train), max(20 * size, 2000))
    images = ImageSet(*setup.splits.train.read(torch.arange(kept))).to(device)
    if variant.source == "loader":
        order = Order(kept - kept % size, size, seed=0)
        sampler = TrainingSampler(order, Sharding.of_all_ranks(1, 1), device)
        loader = prepare_loader(accelerator, images, sampler)
        while True:
            sampler.begin(0, order.steps_per_epoch, None)
            for batch in loader:
                yield normalise(batch.images, info), batch.labels
    pixels = normalise(images.images, info).contiguous(memory_format=layout)
    positions = torch.randperm(kept).to(device)
    for step in itertools.count():
        first = step * size % (kept - size + 1)
        span = slice(first, first + size)
        if variant.source == "indexed":
            batch = images.__getitems__(Share(positions[span]))
            yield normalise(batch.images, info), batch.labels
        else:
            yield pixels[span], images.labels[span]


def setting(setup: Setup) -> str:
    """What is measured, and on what."""
    config, plan = setup.config, setup.plan
    of = f"{config.model.name}, batch {config.data.batch_size}, {plan.precision}, {plan.threads} threads"
    return f"{of}, {device_name(plan.device_type)}"


def await_device(device: torch.device) -> None:
    """Waits for what the host has asked of `device`."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def trainer_loop(overrides: list[str], phases: list[dict[str, float]], steps: int) -> float:
    """Images a second of the trainer itself, in a run that is removed; adds the seconds of its phases to `phases`.

    Collective: every rank must call it.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fixed = [f"run.dir={folder}", "train.eval_every=0", f"train.max_steps={steps}", *QUIET]
        setup = prepare([], [*overrides, *fixed])
        accelerator = start_accelerator(setup.config, setup.plan)
        run = run_on_main(accelerator, lambda: open_run(setup.config, setup.plan, setup.splits, setup.ending, []))
        trainer = Trainer(setup, accelerator, run, Heartbeat(run.heartbeat, setup.plan.world))
        trainer.train()
        use_deterministic_algorithms(False)  # which exact mode switches on
        if accelerator.is_main_process:
            lines = [line for line in read_metrics(run.folder) if "time/total" in line]
            phases += [{key[5:]: value for key, value in line.items() if key.startswith("time/")} for line in lines]
        return setup.order.images_seen(steps) / trainer.state.train_seconds


def evaluation_loops(setup: Setup, accelerator: Accelerator) -> dict[str, Loop]:
    """The bare forward pass over the test images, chunk by chunk; with their normalisation; and the whole evaluation."""
    config, device = setup.config, accelerator.device
    model = build_model(config.model, config.seed, setup.splits.info)
    model.to(device).to(memory_format=setup.traits.layout).eval()
    size = -(-config.data.eval_batch_size // config.sync.shards)
    info, whole_split = setup.splits.info, setup.splits.test
    test = ImageSet(*whole_split.read(torch.arange(len(whole_split)))).to(device)
    raw, ready = test.images.split(size), normalise(test.images, info).split(size)
    loader = chunked_loader(accelerator, test, config)

    def whole(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            evaluate(accelerator, model, loader, info)
        return steps * len(test) / (time.perf_counter() - start)

    def forward(chunks: Sequence[Tensor], network: Callable[[Tensor], Tensor], steps: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode(), accelerator.autocast():
            for _ in range(steps):
                for chunk in chunks:
                    network(chunk)
        await_device(device)
        return steps * len(test) / (time.perf_counter() - start)

    normalising = partial(forward, raw, lambda chunk: model(normalise(chunk, info)))
    return dict(zip(OF_EVALUATION, (partial(forward, ready, model), normalising, whole), strict=True))


def in_turn(loops: dict[str, Loop], steps: dict[str, int], repeats: int) -> Rates:
    """Each loop's images a second, `repeats` times, one after another in each turn."""
    rates: Rates = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            rates[name].append(loop(steps[name]))
    return rates
