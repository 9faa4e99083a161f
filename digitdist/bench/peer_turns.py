"""The trainer beside the peers, in turn: an epoch on one process and on several, and the time to 99 % of the test images."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

from digitdist.bench.launching import launch, result_of_training
from digitdist.bench.one_epoch import measure_one_epoch
from digitdist.bench.peers import NEED_LIGHTNING, PEERS, measure_as_peer, num_steps
from digitdist.distributed import describe_instructions, device_name
from digitdist.errors import Fault, UserError
from digitdist.train import Setup, prepare

OURS = "digitdist"
ONE_EPOCH, FAST = "one-epoch recipe", "fast"
TAKEN = ("seed", "data.root", "data.batch_size", "optim.lr", "train.max_steps", "train.threads")  # what all can be told
OF_RECIPES = ("seed", "data.root", "train.max_steps", "train.threads")
SAME = ("train.precision=fp32", "train.epochs=1", "train.eval_every=0", "checkpoint.every_steps=0", "checkpoint.resume=never")


def measure_peers(world_size: int, overrides: list[str], repeats: int) -> dict[str, Any]:
    """Every measurement, as plain values: ``repeats`` turns, in each of which everybody has a fresh process, or several.

    The time to 99 % is that of whole trainings of a fixed length: seconds of training of the recipe `fast`, by the trainer's
    own command, and of the one-epoch recipe (`one_epoch.py`), with the accuracy that each seed reaches. Of the configuration it
    takes `OF_RECIPES`; the n-th turn has the n-th seed from `seed` on. Test images are used for nothing else.

    Raises:
        UserError: the configuration holds what not all can be told, or cannot be dealt evenly to the processes.
        Fault: one of them has failed, or has not trained on the images of all; the message says why.
    """
    setup, steps = _checked(world_size, overrides)
    images = steps * setup.config.data.batch_size
    missing = [] if importlib.util.find_spec("lightning") else list(NEED_LIGHTNING)
    if missing:
        lacking = " and ".join(missing)
        _show(f"{lacking} are not measured: pip install 'digitdist[peers]' installs them")
    worlds = sorted({1, world_size})
    names = [name for name in PEERS if name not in missing] + [OURS]
    epochs: dict[str, dict[str, list[Any]]] = {str(size): {name: [] for name in names} for size in worlds}
    recipes: dict[str, list[Any]] = {ONE_EPOCH: [], FAST: []}
    for turn in range(repeats):
        for size in worlds:
            for name in names:
                measured = _epoch_of(name, size, overrides, steps)
                if measured["images"] != images:
                    raise Fault(f"{name} trained on {measured['images']:,} images on {size} processes, not on {images:,}")
                epochs[str(size)][name].append(measured)
                _show(f"turn {turn + 1}, {size} process{'' if size == 1 else 'es'}, {name}: {measured['seconds']:.2f} s")
        for name, turns in recipes.items():
            turns.append(_recipe(name, setup.config.seed + turn, overrides))
            _show(f"turn {turn + 1}, {name}: {turns[-1]['seconds']:.2f} s, {100 * turns[-1]['accuracy']:.2f} %")
    return {"setting": _setting(setup, steps, worlds), "missing": missing, "epochs": epochs, "recipes": recipes}


def measure_part(name: str, overrides: list[str]) -> dict[str, Any]:
    """What a process that `measure_peers` has started measures. Collective: every rank must call it."""
    return measure_one_epoch(overrides) if name == ONE_EPOCH else measure_as_peer(name, overrides)


def _show(line: str) -> None:
    """A line beside the result, at once: whoever interrupts a long measurement keeps what was measured."""
    print(line, file=sys.stderr, flush=True)


def _checked(world_size: int, overrides: list[str]) -> tuple[Setup, int]:
    """The setup of one process, and how many steps everybody takes."""
    setup = prepare([], overrides)
    batch_size, num_images = setup.config.data.batch_size, len(setup.splits.train)
    others = [text for text in overrides if text.partition("=")[0].strip() not in TAKEN]
    mistakes = [f"{text} is not allowed with --peers, whom it cannot be told; it takes {', '.join(TAKEN)}" for text in others]
    if setup.plan.world.size > 1:
        mistakes.append("--peers starts its processes by itself; leave out the launcher, and say --world N")
    if batch_size % world_size:
        mistakes.append(
            f"data.batch_size={batch_size} does not fit --world {world_size}: the peers give each process as many images of a"
            f" step; take a multiple of {world_size}, such as data.batch_size={-(-batch_size // world_size) * world_size}"
        )
    if batch_size > num_images:
        mistakes.append(f"data.batch_size={batch_size} is not allowed with --peers; it takes at most {num_images}, an epoch")
    if mistakes:
        raise UserError(*mistakes)
    return setup, num_steps(setup.config, num_images)


def _epoch_of(name: str, world_size: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """Seconds and images of an epoch on `world_size` processes, by a peer or by the trainer's own command."""
    if name != OURS:
        return _part(name, world_size, overrides)
    result = result_of_training([*overrides, *SAME, f"train.max_steps={steps}"], world_size)
    seconds = result["train_seconds"]
    return {"seconds": seconds, "images": round(result["images_per_second"] * seconds)}


def _recipe(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds of training and accuracy of one training of a recipe, on one process."""
    own = [text for text in overrides if text.partition("=")[0].strip() in OF_RECIPES] + [f"seed={seed}"]
    if name == ONE_EPOCH:
        return _part(name, 1, own)
    result = result_of_training(["--config", name, *own])
    return {"seconds": result["train_seconds"], "accuracy": result["test_accuracy"], "precision": result["precision"]}


def _part(name: str, world_size: int, overrides: list[str]) -> dict[str, Any]:
    output = launch(["-m", "digitdist.bench", "--peer", name, *overrides], world_size)
    return json.loads(output.splitlines()[-1])


def _setting(setup: Setup, steps: int, worlds: list[int]) -> dict[str, Any]:
    config, plan = setup.config, setup.plan
    return {
        "device": device_name(plan.device_type),
        "instructions": describe_instructions() if plan.cpu else "",
        "model": config.model.name,
        "batch_size": config.data.batch_size,
        "steps": steps,
        "threads": {str(size): config.train.threads or max(1, plan.threads // size) for size in worlds},
    }
