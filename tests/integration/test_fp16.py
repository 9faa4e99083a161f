"""Training in fp16 with a loss scale, on CPUs: what Accelerate makes on a GPU is put in by helpers/fp16_on_cpu.py."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.launching import QUIET, ROOT, Outcome, torchrun, worlds
from helpers.runs import events, result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FP16 = str(ROOT / "tests/helpers/fp16_on_cpu.py")
FIRST_SCALE = 2.0**16
MODES = {
    "ddp": ["sync.mode=ddp"],
    "exact": ["sync.mode=exact"],
    "local": ["sync.mode=local", "sync.every=3"],
    "overlap": ["sync.mode=local", "sync.every=3", "sync.overlap=true"],
}
SYNCHRONOUS = ("ddp", "exact")
WORLDS = (1, 2)
LAST, SAVED = 18, 9
OVERFLOWS = (1, 5)  # on all ranks
OVERFLOW_OF_ONE = 8  # on the last rank alone
# The steps whose loss a line has: with sync.overlap it is that of the round before, and of this one where ranks are made equal.
ROUNDS = {
    "local": {end: (end - 2, end) for end in range(3, LAST + 1, 3)},
    "overlap": {6: (1, 3), 9: (7, 9), 12: (7, 9), 15: (10, 12), 18: (16, 18)},
}
MOMENTUM = [
    *("train.precision=fp16", "optim.name=sgd", "optim.lr=0.05", "optim.momentum=0.8", "optim.ema=0.9"),
    f"checkpoint.every_steps={SAVED}",
]
PLAIN = ["train.precision=fp16", "optim.name=sgd", "optim.lr=0.1", "optim.momentum=0"]
ADAM = ["train.precision=fp16", "optim.lr=0.002", "optim.clip_norm=0.5", "train.accumulate=2", "optim.weight_decay=0.1"]

Case = tuple[list[str], str, list[int]]  # options, overflows, last step of each attempt


def cases(world_size: int) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for mode, options in MODES.items():
        overflow = f"1 5 8@{world_size - 1}"
        found[mode] = ([*MOMENTUM, *options], overflow, [LAST])
        if world_size < 3:
            found[f"{mode} resumed"] = ([*MOMENTUM, *options], overflow, [SAVED, LAST])
            found[f"{mode} adam"] = ([*ADAM, *options], "1 5", [6])
            found[f"{mode} clipped"] = ([*PLAIN, "optim.clip_norm=0.01", *options], "", [2])
        if world_size > 1:
            found[f"{mode} few"] = ([*PLAIN, "data.batch_size=2", *options], "", [8])
            found[f"{mode} bf16"] = (["train.precision=bf16", *options], "", [3])
    for mode in SYNCHRONOUS:
        found[f"{mode} plain"] = ([*PLAIN, *MODES[mode]], "2", [3])
    return found


@pytest.fixture(scope="module")
def outcome(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What all cases come to on a world, which is launched where it is first asked for."""

    @functools.cache
    def launch(world_size: int) -> Outcome:
        arguments = (str(mnist_root), str(tmp_path_factory.mktemp("runs")), json.dumps(cases(world_size)))
        command = ("helpers.fp16_on_cpu", "helpers.fp16_worker", *arguments)
        return worlds([world_size], *command, cwd=ROOT, env={"FP16_GROWTH_INTERVAL": "3"}, timeout=280)[world_size]

    def outcome(world_size: int) -> dict[str, Any]:
        return json.loads(launch(world_size).out.splitlines()[-1])

    return outcome


def mean_loss(found: dict[str, Any], first: int, last: int) -> float:
    """The mean over all images of some steps, of all ranks, from float64 sums."""
    steps = range(first - 1, last)
    total = sum(rank[step]["loss"] for rank in found["ranks"] for step in steps)
    return total / sum(found["ranks"][0][step]["count"] for step in steps)


def skipped(rank: list[dict[str, Any]]) -> list[int]:
    """The steps in which a rank's weights and its optimizer's state stayed as they were, to the bit."""
    same = [a["weights"] == b["weights"] and a["optimizer"] == b["optimizer"] for a, b in itertools.pairwise(rank)]
    return [step for step, unmoved in enumerate([rank[0]["moved"] == 0, *same], start=1) if unmoved]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [*WORLDS, 3])
def test_layers_compute_in_float16_and_the_loss_falls(outcome, world_size: int, mode: str):
    found = outcome(world_size)[mode]
    assert found["layers"] == ["torch.float16"]
    assert (found["result"]["precision"], found["result"]["world_size"]) == ("fp16", world_size)
    assert all(step["finite"] for rank in found["ranks"] for step in rank)
    assert mean_loss(found, LAST - 4, LAST) < mean_loss(found, 1, 5) - 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_logged_loss_is_the_mean_over_the_global_batch_and_not_rounded(outcome, world_size: int, mode: str):
    found = outcome(world_size)[mode]
    steps = ROUNDS.get(mode, {step: (step, step) for step in range(1, LAST + 1)})
    assert {int(step) for step in found["lines"]} == set(steps)
    for step, (first, last) in steps.items():
        assert found["lines"][str(step)]["train/loss"] == pytest.approx(mean_loss(found, first, last), rel=1e-6), step


@pytest.mark.parametrize("mode", MODES)
def test_nor_is_it_rounded_in_bf16_on_two_processes(outcome, mode: str):
    found = outcome(2)[f"{mode} bf16"]
    first = 3 if mode in SYNCHRONOUS else 1
    assert found["layers"] == ["torch.bfloat16"]
    assert found["lines"]["3"]["train/loss"] == pytest.approx(mean_loss(found, first, 3), rel=1e-6)


@pytest.mark.parametrize("name", ["exact", "exact adam", "exact clipped", "exact few", "exact plain"])
def test_exact_has_the_same_bits_on_any_world_also_where_a_step_overflows(outcome, name: str):
    found = [outcome(world_size)[name] for world_size in (*WORLDS, 3) if name in cases(world_size)]
    for key in ("weights", "optimizer", "scale"):
        assert len({json.dumps([step[key] for step in rank]) for one in found for rank in one["ranks"]}) == 1, key
    assert all(one["lines"] == found[0]["lines"] for one in found)
    assert len({one["result"]["weights_sha256"] for one in found}) == 1
    assert len(found) > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [*WORLDS, 3])
def test_a_step_that_overflows_leaves_weights_and_momentum_as_they_were(outcome, world_size: int, mode: str):
    ranks = outcome(world_size)[mode]["ranks"]
    for number, rank in enumerate(ranks):
        skips_alone = mode in SYNCHRONOUS or number == len(ranks) - 1  # in local mode the other ranks take their step
        assert skipped(rank[:SAVED]) == [*OVERFLOWS, *[OVERFLOW_OF_ONE] * skips_alone]
        scales = [FIRST_SCALE, *(step["scale"] for step in rank[:SAVED])]
        falls = [step for step, (before, after) in enumerate(itertools.pairwise(scales), start=1) if after < before]
        assert falls == skipped(rank[:SAVED])
        assert all(after in (before, before / 2, before * 2) for before, after in itertools.pairwise(scales))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_adam_does_not_count_a_step_that_overflows(outcome, world_size: int, mode: str):
    for rank in outcome(world_size)[f"{mode} adam"]["ranks"]:
        assert skipped(rank) == list(OVERFLOWS)
        assert all(step["finite"] for step in rank)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(outcome, world_size: int, mode: str):
    unbroken, resumed = outcome(world_size)[mode], outcome(world_size)[f"{mode} resumed"]
    for a, b in zip(unbroken["ranks"], resumed["ranks"], strict=True):
        assert [step | {"average_off": 0} for step in a] == [step | {"average_off": 0} for step in b]
    assert unbroken["lines"] == resumed["lines"]
    if mode not in SYNCHRONOUS and world_size > 1:
        assert len({rank[SAVED - 1]["scale"] for rank in unbroken["ranks"]}) == 2, "each rank has a scale of its own there"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_gradient_is_clipped_as_it_is_and_not_as_it_was_scaled(outcome, world_size: int, mode: str):
    for rank in outcome(world_size)[f"{mode} clipped"]["ranks"]:
        assert rank[0]["moved"] == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("mode", SYNCHRONOUS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_logged_gradient_norm_is_not_scaled_and_missing_where_it_overflows(outcome, world_size: int, mode: str):
    found = outcome(world_size)[f"{mode} plain"]
    for step in (1, 3):
        norm = found["ranks"][0][step - 1]["moved"] / 0.1
        assert found["lines"][str(step)]["train/gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert "train/gradient_norm" not in found["lines"]["2"]


@pytest.mark.parametrize("mode", SYNCHRONOUS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_moving_average_takes_in_the_weights_after_every_step_skipped_or_not(outcome, world_size: int, mode: str):
    for rank in outcome(world_size)[mode]["ranks"]:
        assert max(step["average_off"] for step in rank) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_without_images_in_the_first_step_takes_part(outcome, world_size: int, mode: str):
    ranks = outcome(world_size)[f"{mode} few"]["ranks"]
    assert all(rank[-1]["weights"] == ranks[0][-1]["weights"] for rank in ranks)
    assert any(step["moved"] for step in ranks[0])


@pytest.fixture
def launch(place: Path) -> Callable[..., Outcome]:
    """Launches the command in `place`."""

    def launch(world_size: int, *options: str, overflow: str = "") -> Outcome:
        network = "model.target=helpers.networks.Light"
        arguments = (FP16, "digitdist.train", *QUIET, "train.precision=fp16", "run.name=a", network, *options)
        return torchrun(world_size, *arguments, cwd=place, env={"FP16_OVERFLOW": overflow})

    return launch


def test_the_command_trains_in_fp16(launch: Callable[..., Outcome], place: Path):
    done = launch(1, "train.max_steps=40", overflow="3")
    assert done.code == 0, done.err
    assert "precision  fp16" in done.out
    assert result(place / "runs/a")["precision"] == "fp16"
    assert [line["step"] for line in events(place / "runs/a") if "train/loss" in line] == [20, 40]


@pytest.mark.parametrize(("mode", "ranks"), [("ddp", "0, 1"), ("local", "1")])
def test_a_run_in_which_every_step_overflows_ends(launch: Callable[..., Outcome], mode: str, ranks: str):
    always = " ".join(f"{step}@1" for step in range(1, 61))
    done = launch(2, f"sync.mode={mode}", "sync.every=10", "train.max_steps=60", overflow=always)
    assert done.code == 1
    assert f"step 40: gradients are not finite in fp16, on rank {ranks}, though the loss is scaled by" in done.err
