"""Speed on this machine, each figure beside the bare loop of the same network, measured in turn in one run.

python -m digitdist.bench [--world N] [--json] [key=value ...]
python -m digitdist.bench --recipes --seeds 20
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from digitdist import evaluate, optim, runtime, train
from digitdist.config import Config, Parser, UserError
from digitdist.data import SPECS, Splits, normalise
from digitdist.models import build
from digitdist.tracking import read_metrics

CONFIGS = Path(__file__).parent.parent / "configs"  # of a checkout
RECIPES = ("fast", "sharp")
ONE_IMAGE = "one image a step, one thread"
FETCHING = "bare loop, its images fetched"
OF_EVALUATION = ("bare forward", "bare forward, its images normalised", "evaluation")
MEETING = "bare loops that meet once a step"
A_SHARD_A_RANK = "exact, one shard a rank"
TURN_S = 0.5  # seconds that one measurement of a loop takes
IMPORTS = """
import time, torch, accelerate
ended = time.time()
from digitdist import runtime
print(ended, runtime.peak_memory_mb(torch.device("cpu"))["host"])
"""
QUIET = ("tracking.wandb=disabled", "run.report=false", "checkpoint.every_steps=0", "checkpoint.resume=never")

Loop = Callable[[int], float]  # takes so many steps, and gives images a second
Rates = dict[str, list[float]]  # images a second of each loop, one number a turn


def bare(config: Config, plan: runtime.Plan, splits: Splits, **changed: Any) -> Loop:
    """Forward, backward and update on tensors in memory, and nothing else: the most that PyTorch gives this network here.

    `changed` are another batch_size, threads or precision, channels_last=False, compiled=True, fetched=True (each batch is
    picked from the data set and normalised, as a training must), or meet=N: ranks then meet in an all-reduce of N numbers
    after each step.
    """
    size, threads = changed.get("batch_size", config.data.batch_size), changed.get("threads", plan.threads)
    layout = torch.channels_last if changed.get("channels_last", True) else torch.contiguous_format
    device = torch.device("cpu" if plan.cpu else plan.device_type)
    kept = min(len(splits.train), max(20 * size, 2000))
    spec, images = SPECS[config.data.name], splits.train.subset(torch.arange(kept)).to(device)
    pixels = normalise(images.images, spec).contiguous(memory_format=layout)
    places = torch.randperm(kept).to(device)
    model = build(config.model, config.seed).to(device).to(memory_format=layout)
    optimizer = optim.build(model, config.optim)
    if changed.get("compiled"):
        model.compile()
    precision = changed.get("precision", plan.precision)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def loop(steps: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        for step in range(steps):
            at = step * size % (kept - size + 1)
            batch, labels = pixels[at : at + size], images.labels[at : at + size]
            if changed.get("fetched"):
                raw, labels, _ = images.__getitems__(places[at : at + size])
                batch = normalise(raw, spec)
            with torch.autocast(device.type, kind, enabled=kind is not None):
                loss = F.cross_entropy(model(batch), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if changed.get("meet"):
                dist.all_reduce(torch.zeros(changed["meet"], device=device))
        await_device(device)
        return steps * size / (time.perf_counter() - start)

    loop(3)  # what is made on first use
    return loop


def await_device(device: torch.device) -> None:
    """Waits for what the host has asked of `device`."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def trainer(overrides: list[str], phases: list[dict[str, float]], steps: int) -> float:
    """Images a second of the trainer itself, in a run that is removed; notes the seconds of its phases. Collective: every
    rank must call it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fixed = [f"run.dir={folder}", "train.eval_every=0", f"train.max_steps={steps}", *QUIET]
        config, plan, splits, model = train.prepare([], [*overrides, *fixed])
        accelerator = runtime.start(config, plan)
        run = runtime.on_main(accelerator, lambda: train.open_run(config, plan, steps, [], []))
        one = train.Trainer(config, accelerator, splits, model, run, runtime.Heartbeat(run.heartbeat, plan.world))
        one.train()
        torch.use_deterministic_algorithms(False)  # which exact mode has switched on
        if accelerator.is_main_process:
            times = [line for line in read_metrics(run.folder) if "time/total" in line]
            phases += [{key[5:]: value for key, value in line.items() if key.startswith("time/")} for line in times]
        return one.order.images_seen(steps) / one.train_seconds


def evaluation(config: Config, accelerator: Accelerator, splits: Splits) -> dict[str, Loop]:
    """The bare forward pass over the test images, one chunk after another; that with the images normalised in it; and the
    whole evaluation."""
    model = build(config.model, config.seed).to(accelerator.device).to(memory_format=torch.channels_last).eval()
    size = -(-config.data.eval_batch_size // config.sync.shards)
    test, spec = splits.test.to(accelerator.device), SPECS[config.data.name]
    raw, ready = test.images.split(size), normalise(test.images, spec).split(size)

    def whole(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            evaluate.evaluate(accelerator, model, test, config)
        return steps * len(test) / (time.perf_counter() - start)

    def forward(chunks: Sequence[Tensor], network: Callable[[Tensor], Tensor], steps: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode(), accelerator.autocast():
            for _ in range(steps):
                for chunk in chunks:
                    network(chunk)
        await_device(accelerator.device)
        return steps * len(test) / (time.perf_counter() - start)

    normalising = partial(forward, raw, lambda chunk: model(normalise(chunk, spec)))
    return dict(zip(OF_EVALUATION, (partial(forward, ready, model), normalising, whole), strict=True))


def plain_way(config: Config, steps: int) -> float:
    """Images a second of torchvision's MNIST with `ToTensor` an image and one worker process, the loader's start left out."""
    import torchvision

    images = torchvision.datasets.MNIST(config.data.root, transform=torchvision.transforms.ToTensor())
    loader = iter(torch.utils.data.DataLoader(images, config.data.batch_size, shuffle=True, num_workers=1))
    model = build(config.model, config.seed)
    optimizer = torch.optim.Adam(model.parameters(), config.optim.lr)
    for step in range(steps + 3):
        if step == 3:
            start = time.perf_counter()
        pixels, labels = next(loader)
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return steps * config.data.batch_size / (time.perf_counter() - start)


def start_up(overrides: list[str]) -> dict[str, tuple[float, float]]:
    """Of the command up to its first step's line, and of a process that imports torch and accelerate: seconds, peak MB."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run.dir={folder}", "run.name=a", "train.max_steps=1", "train.eval_every=0", *QUIET]
        began = time.time()
        command = [sys.executable, "-m", "digitdist.train", *overrides, *fixed]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        first = read_metrics(Path(folder) / "a")[0]["time"] - began
        (memory,) = json.loads((Path(folder) / "a/result.json").read_text())["peak_memory_mb"]
    began = time.time()
    ended, held = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout.split()
    return {"command to first step": (first, memory["host"]), "import torch, accelerate": (float(ended) - began, float(held))}


def in_turn(loops: dict[str, Loop], steps: dict[str, int], repeats: int) -> Rates:
    """Each loop's images a second, `repeats` times, one after another in each turn."""
    gc.freeze()  # as the command does, before the trainers that are made here, which must go again
    rates: Rates = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            rates[name].append(loop(steps[name]))
    return rates


def measure_one(overrides: list[str], repeats: int) -> dict[str, Any]:
    """What one process does, beside what it would do with other settings."""
    config, plan, splits, _ = train.prepare([], overrides)
    accelerator = runtime.start(config, plan)
    phases: list[dict[str, float]] = []
    loops: dict[str, Loop] = {"bare loop": bare(config, plan, splits), FETCHING: bare(config, plan, splits, fetched=True)}
    loops["trainer"] = partial(trainer, overrides, phases)
    loops |= evaluation(config, accelerator, splits)
    size = config.data.batch_size
    variants: dict[str, dict[str, Any]] = {
        f"data.batch_size={4 * size}": {"batch_size": 4 * size},
        "another layout than channels-last": {"channels_last": False},
        "train.compile=default": {"compiled": True},
    }
    variants |= {f"train.threads={n}": {"threads": n} for n in {1, os.cpu_count() or 1} - {plan.threads}}
    variants |= {f"train.precision={p}": {"precision": p} for p in {"fp32", "bf16"} - {plan.precision}}
    variants[ONE_IMAGE] = {"batch_size": 1, "threads": 1}
    for name, changed in variants.items():
        loops[name] = bare(config, plan, splits, **changed)
    steps = {name: max(1, round(TURN_S * loop(3) / _images(name, size))) for name, loop in loops.items()}
    rates = in_turn(loops, steps, repeats)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:  # which nothing has touched
        rates["plain torchvision way"] = [fresh.submit(plain_way, config, 30).result() for _ in range(repeats)]
    starts = [start_up(overrides) for _ in range(3)]
    return {
        "shards": config.sync.shards,
        "setting": f"{config.model.name}, batch {size}, {plan.precision}, {plan.threads} threads, {runtime.device_name(plan)}",
        "images_per_second": rates,
        "start_up": {name: {"s": [s[name][0] for s in starts], "mb": [s[name][1] for s in starts]} for name in starts[0]},
        "phases": {name: sum(p[name] for p in phases) for name in phases[0] if name != "slowest_rank"},
    }


def measure_world(overrides: list[str], repeats: int) -> dict[str, Any] | None:
    """What the processes of a world do together; None off the main rank. Collective: every rank must call it."""
    config, plan, splits, _ = train.prepare([], overrides)
    accelerator = runtime.start(config, plan)
    share = {"batch_size": -(-config.data.batch_size // plan.world.size)}
    weights = sum(p.numel() for p in build(config.model, config.seed).parameters())
    single: dict[str, Loop] = {
        f"{plan.world.size} bare loops": bare(config, plan, splits, **share),
        MEETING: bare(config, plan, splits, **share, meet=1),
        "bare loops, gradient-sized all-reduce": bare(config, plan, splits, **share, meet=weights),
    }

    def together(loop: Loop, steps: int) -> float:
        accelerator.wait_for_everyone()
        return plan.world.size * min(gather_object([loop(steps)]))

    loops: dict[str, Loop] = {name: partial(together, loop) for name, loop in single.items()}
    loops["ddp"] = partial(trainer, [*overrides, "sync.mode=ddp"], [])
    loops["exact"] = partial(trainer, [*overrides, "sync.mode=exact"], [])
    loops[A_SHARD_A_RANK] = partial(trainer, [*overrides, "sync.mode=exact", f"sync.shards={plan.world.size}"], [])
    own = max(5, round(TURN_S * min(gather_object([single[f"{plan.world.size} bare loops"](5)])) / share["batch_size"]))
    rates = in_turn(loops, dict.fromkeys(loops, own), repeats)
    return {"images_per_second": rates} if accelerator.is_main_process else None


def of_world(world: int, overrides: list[str], repeats: int) -> Rates:
    """`measure_world` on as many processes, through torchrun."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "-m", "digitdist.bench", "--member"]
    command = [sys.executable, *launch, "--repeats", str(repeats), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise runtime.Fault(f"the world of {world} processes failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["images_per_second"]


def rows(rates: Rates, base: str) -> list[str]:
    """Each loop's median images a second, and its ratio to `base` in the same turn: median, least and greatest."""
    lines = []
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[base], strict=True)]
        spread = f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"  {name:38} {statistics.median(values):>10,.0f} images/s   {spread}")
    return lines


def in_words(one: dict[str, Any], world: int, rates: Rates) -> str:
    """The whole measurement as a table, and what it says of this machine."""
    speeds: Rates = one["images_per_second"]
    names = ("bare loop", FETCHING, "trainer", "plain torchvision way")
    lines = [one["setting"], "", "one process, and its ratio to the bare loop"]
    lines += rows({name: speeds[name] for name in names}, "bare loop")
    lines += rows({name: speeds[name] for name in OF_EVALUATION}, "bare forward")
    lines += [""]
    for name, values in one["start_up"].items():
        lines.append(f"  {name:38} {statistics.median(values['s']):10.2f} s   peak {statistics.median(values['mb']):.0f} MB")
    phases = one["phases"]
    shares = {name: s / phases["total"] for name, s in phases.items() if name != "total" and s / phases["total"] > 0.005}
    parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    lines += [f"  {'a step of the trainer':38} {parts}"]
    if rates:
        lines += ["", f"{world} processes, and their ratio to loops that meet in a one-number all-reduce"]
        lines += rows(rates, MEETING)
        passes, cost = -(-one["shards"] // world), 1e3 / statistics.median(speeds[ONE_IMAGE])
        lines.append(f"  in exact mode a rank runs {passes} shards one by one; a step of a single image takes {cost:.2f} ms")
    lines += ["", "what would help"]
    known = {ONE_IMAGE, *names, *OF_EVALUATION}
    gains = {
        name: statistics.median(v) / statistics.median(speeds["bare loop"]) for name, v in speeds.items() if name not in known
    }
    if rates:
        gains[f"{world} processes (ddp, beside the trainer)"] = statistics.median(rates["ddp"]) / statistics.median(
            speeds["trainer"]
        )
    for name, gain in sorted(gains.items(), key=lambda item: -item[1]):
        verdict = "helps" if gain > 1.05 else "does not help" if gain > 0.95 else "costs"
        lines.append(f"  {name:44} {gain:5.2f} of the speed: {verdict}")
    most = max(shares, key=lambda name: shares[name])
    lines.append(f"this machine is limited by {most}: {100 * shares[most]:.0f} % of a step")
    return "\n".join(lines)


def measure_recipes(seeds: int, overrides: list[str]) -> None:
    """Trains each of `RECIPES` with seeds 0 to seeds-1 by the trainer's own command, and prints what came out.

    Without W&B and without the page of plots, whose seconds are no part of a training.

    Raises:
        UserError: there are no recipes beside the package.
        Fault: a training has failed; it has told why.
    """
    for file in (CONFIGS / f"{name}.yaml" for name in RECIPES):
        if not file.is_file():
            raise UserError(f"--recipes: there is no {file}; the recipes are not installed, run it in a checkout")
        accuracies, train_seconds, wall_seconds = zip(
            *(run_recipe(file, seed, overrides) for seed in range(seeds)), strict=True
        )
        spread = 100 * statistics.stdev(accuracies) if seeds > 1 else math.nan
        print(
            f"{file.stem:6} test accuracy {100 * statistics.mean(accuracies):.3f} %, deviation {spread:.3f}, {seeds} seeds"
            f" ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f});"
            f" train_seconds {statistics.mean(train_seconds):.2f} ({min(train_seconds):.2f} to {max(train_seconds):.2f});"
            f" the whole command {statistics.mean(wall_seconds):.1f} s",
            flush=True,
        )


def run_recipe(file: Path, seed: int, overrides: list[str]) -> tuple[float, float, float]:
    """Test accuracy, `train_seconds` and the whole command's seconds of one training, in a run folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"seed={seed}", f"run.dir={folder}", "run.name=recipe", "run.report=false", "tracking.wandb=disabled"]
        command = [sys.executable, "-m", "digitdist.train", "--config", str(file), *overrides, *fixed]
        start = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        seconds = time.perf_counter() - start
        if code:
            raise runtime.Fault(f"{' '.join(command)} ended with exit code {code}")
        result = json.loads((Path(folder) / "recipe/result.json").read_text())
    return result["test_accuracy"], result["train_seconds"], seconds


def _images(name: str, batch_size: int) -> int:
    """Images of one step of a loop, as far as its length is concerned."""
    return {**dict.fromkeys(OF_EVALUATION, 10000), ONE_IMAGE: 1}.get(name, batch_size)


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.bench",
        description="The trainer, its evaluation and its start beside the bare loop, on this machine; and what would help.",
        epilog="example: python -m digitdist.bench --world 2 data.batch_size=1000",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as data.batch_size=1000")
    parser.add_argument("--world", type=int, default=2, metavar="N", help="processes measured together; 1: none (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="how often each is measured (default: 5)")
    parser.add_argument("--json", action="store_true", help="every measurement as one JSON object")
    parser.add_argument("--member", action="store_true", help="what torchrun starts for --world")
    parser.add_argument("--recipes", action="store_true", help=f"measure the recipes {', '.join(RECIPES)} of configs/ instead")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of --recipes: seeds 0 to N-1 (default: 20)")
    arguments = parser.parse_args()
    for name in ("world", "repeats", "seeds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} is not allowed; it takes a whole number from 1 on")
    if arguments.recipes:
        measure_recipes(arguments.seeds, arguments.overrides)
    elif arguments.member:
        measured = measure_world(arguments.overrides, arguments.repeats)
        if measured:
            print(json.dumps(measured), flush=True)
    else:
        one = measure_one(arguments.overrides, arguments.repeats)
        rates = of_world(arguments.world, arguments.overrides, arguments.repeats) if arguments.world > 1 else {}
        print(json.dumps(one | {"world": rates}) if arguments.json else in_words(one, arguments.world, rates), flush=True)


if __name__ == "__main__":
    runtime.run_command(main)
