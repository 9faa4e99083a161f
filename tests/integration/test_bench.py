from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from helpers.launching import ROOT, python
from helpers.variants import soak

from digitdist.bench.roofline import STEPS, Work, rows
from digitdist.bench.table import table
from digitdist.bench.worlds import ONE_SHARD_A_RANK


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_loop_is_measured_in_turn_beside_the_bare_one(place: Path):
    options = ("--json", "--repeats", "1", "--world", "2", "model.target=helpers.networks.Light", "train.threads=1")
    done = python("-m", "digitdist.bench", *options, cwd=place, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, timeout=350)
    assert done.code == 0, done.err
    measured = json.loads(done.out)
    rates = measured["images_per_second"]
    one = {"bare loop", "bare loop, its images indexed", "bare loop, its images from the loader", "trainer"}
    one |= {"plain torchvision way", "train.compile=default"}
    assert one | {"bare forward", "bare forward, its images normalised", "evaluation"} <= set(rates)
    bare = {"2 bare loops", "bare loops, a one-number all-reduce each step", "bare loops, gradient-sized all-reduce"}
    assert set(measured["world"]) == bare | {"ddp", "exact", ONE_SHARD_A_RANK}
    assert all(rate > 0 for values in (rates | measured["world"]).values() for rate in values)
    assert measured["phases"]["compute"] < measured["phases"]["total"]
    assert len(measured["start_up"]["command to first step"]["s"]) == 3
    memory = {name: values["mb"] for name, values in measured["start_up"].items()}
    assert all(100 < mb < 4000 for values in memory.values() for mb in values)


def test_the_table_has_ratios_of_the_same_turn_and_says_what_helps():
    speeds = {"bare loop": [100.0, 50.0], "bare loop, its images indexed": [95.0, 49.0], "trainer": [90.0, 48.0]}
    speeds |= {"plain torchvision way": [10.0, 10.0], "bare forward": [300.0, 300.0], "evaluation": [297.0, 270.0]}
    speeds |= {"bare loop, its images from the loader": [93.0, 48.0]}
    speeds |= {"bare forward, its images normalised": [298.0, 280.0]}
    speeds |= {"data.batch_size=400": [200.0, 100.0], "train.compile=default": [50.0, 25.0]}
    one = {"setting": "cnn", "images_per_second": speeds, "start_up": {"command to first step": {"s": [3.0], "mb": [600]}}}
    one["phases"] = {"total": 10.0, "compute": 8.0, "optimizer": 1.5, "data": 0.5, "sync": 0.0}
    lines = table(one, 1, {}).splitlines()
    assert any("trainer" in line and "0.93 (0.90 to 0.96)" in line for line in lines)
    assert any("evaluation" in line and "0.95 (0.90 to 0.99)" in line for line in lines)
    assert any("data.batch_size=400" in line and line.endswith("2.00 of the speed: helps") for line in lines)
    assert any("3.00 s   peak 600 MB" in line for line in lines)
    assert any("train.compile=default" in line and line.endswith("0.50 of the speed: costs") for line in lines)
    assert lines[-1] == "this machine is limited by compute: 80 % of a step"


def test_the_roofline_of_an_operation_is_its_arithmetic_or_its_memory_whichever_takes_longer():
    turn = {
        "convolution 2×3": Work(flops=STEPS * 2_000_000, bytes=STEPS * 1000, seconds=STEPS * 0.004),
        "relu 2×3": Work(flops=0, bytes=STEPS * 3_000_000, seconds=STEPS * 0.006),
    }
    head, relu, convolution, both, last = rows([turn, turn], flops=1e9, bandwidth=1e9, step=0.011)
    assert head.split() == ["operation,", "its", "largest", "tensor", "ms", "of", "all", "GFLOP/s", "GB/s", "×", "roofline"]
    assert relu.split() == ["relu", "2×3", "6.000", "60.0%", "0", "0", "2.0"]
    assert convolution.split() == ["convolution", "2×3", "4.000", "40.0%", "0", "0", "2.0"]
    assert both.split() == ["all", "2", "operations", "10.000", "100%", "2.0"]
    assert last == "a step takes 11.000 ms, of which 5.000 ms is what the roofline allows"


@pytest.mark.slow
def test_the_roofline_counts_what_the_default_network_needs(place: Path):
    done = python("-m", "digitdist.bench", "--roofline", "--repeats", "1", "data.batch_size=10", cwd=place)
    assert done.code == 0, done.err
    first, _, *found = done.out.splitlines()
    assert re.match(r"cnn, batch 10, fp32, \d threads, .+: \d+ GFLOP/s in a matrix product, \d+ GB/s in a sum", first)
    assert any(line.startswith("convolution_backward 10×10×12×12 ") for line in found)
    assert re.match(r"a step takes [\d.]+ ms, of which [\d.]+ ms is what the roofline allows", found[-1])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [1, soak(2)])
def test_peers_train_on_as_many_images_and_those_that_are_missing_are_named(place: Path, world_size: int):
    world = ("--world", str(world_size))
    options = ("--peers", "--json", "--repeats", "1", *world, "data.batch_size=50", "train.max_steps=3")
    done = python("-m", "digitdist.bench", *options, cwd=place, timeout=350)
    assert done.code == 0, done.err
    has_lightning = importlib.util.find_spec("lightning") is not None
    line = "Lightning and Fabric are not measured: pip install 'digitdist[peers]' installs them"
    assert done.err.splitlines().count(line) == (0 if has_lightning else 1)
    measured = json.loads(done.out)
    assert measured["missing"] == ([] if has_lightning else ["Lightning", "Fabric"])
    names = {"plain loop", "Accelerate", "digitdist"} | ({"Lightning", "Fabric"} if has_lightning else set())
    assert set(measured["epochs"]) == {"1", str(world_size)}
    for loops in measured["epochs"].values():
        assert set(loops) == names
        assert all(turn["images"] == 150 and turn["seconds"] > 0 for (turn,) in loops.values())
    for name in ("one-epoch recipe", "fast"):
        (turn,) = measured["recipes"][name]
        assert turn["seconds"] > 0
        assert 0.05 < turn["accuracy"] < 0.9  # of three steps


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_recipes_are_measured_by_the_trainers_own_command(place: Path):
    done = python("-m", "digitdist.bench", "--recipes", "--seeds", "1", "train.max_steps=2", cwd=place, timeout=250)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    for name, (head, row, whole) in (("fast", lines[:3]), ("sharp", lines[3:])):
        assert head.split()[:4] == ["test", "images", "runs", "mean"]
        assert re.match(rf"{name} +1 +\d+\.\d+ % +none +none +\d+\.\d+ % +\d+\.\d+ % +\d+\.\d+$", row), row
        assert re.match(r"the whole command \d+\.\d s$", whole)


@pytest.mark.slow
def test_a_recipe_that_cannot_be_trained_is_refused_and_says_why(place: Path):
    done = python("-m", "digitdist.bench", "--recipes", "--seeds", "1", "optim.lr=0", cwd=place)
    assert done.code == 2
    assert done.errors[0].startswith("error: optim.lr=0 is not allowed")


def test_seeds_are_at_least_one(place: Path):
    done = python("-m", "digitdist.bench", "--recipes", "--seeds", "0", cwd=place)
    assert (done.code, done.errors) == (2, ["error: --seeds 0 is not allowed; it takes a whole number from 1 on"])
