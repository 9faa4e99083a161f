"""The simulated device: every mode with every option has the CPU's bits on it, and the host waits for it only where it must."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers.data_sets import write_folder
from helpers.launching import QUIET, ROOT, Outcome, python, torchrun, worlds
from helpers.runs import assert_same_run, result
from helpers.simulated_device import unsupported
from helpers.variants import soak

from digitdist.data import Splits

pytestmark = [pytest.mark.skipif(bool(unsupported()), reason=unsupported()), pytest.mark.timeout(600)]

Options = tuple[str, ...]
DEVICE = str(ROOT / "tests/helpers/simulated_device.py")
SHORT: Options = (  # lines, evaluations, checkpoints, comparisons of weights and rounds each at steps of their own
    *("train.max_steps=16", "data.batch_size=26", "train.log_every=6", "train.eval_every=2", "checkpoint.every_steps=12"),
    *("sync.check_every=7", "sync.every=4", "data.eval_batch_size=64", "train.threads=1", "train.precision=fp32"),
)
MODES: dict[str, Options] = {
    "ddp": ("sync.mode=ddp",),
    "exact": ("sync.mode=exact",),
    "local": ("sync.mode=local",),
    "overlap": ("sync.mode=local", "sync.overlap=true"),
}
# Every option is in one of these, and each of these runs in every mode, and with 1, 2 and 3 processes in one mode or another.
GREY: Options = (
    *("data.name=folder", "data.root=digits", "data.focus=3", "model.name=cnn", "train.accumulate=2"),
    *("optim.name=sgd", "optim.lr=0.02", "optim.clip_norm=0.5", "optim.ema=0.9"),
)
COLOUR: Options = (
    *("data.target=helpers.data_sets.Blocks", "data.validation=20", "model.name=cnn_batchnorm", "train.label_smoothing=0.1"),
    *("schedule.name=step", "schedule.step_epochs=0.5"),
    *("augment.shift=2", "augment.rotate=10", "augment.scale=0.1", "augment.shear=0.1"),
)
STREAMED: Options = (
    *("data.target=helpers.data_sets.Jittered", "data.workers=1", "model.name=convnet", "optim.ema=0.9"),
    *("optim.name=adamw", "optim.weight_decay=0.01", "schedule.name=cosine", "schedule.warmup_steps=3"),
    "train.profile=9",  # whose end, for which the host waits, comes 3 steps later than that: at step 12, where more is due
)
COLUMNS: Options = (
    *("data.name=folder", "data.root=digits", "data.image=resize", "data.channels=3", "data.size=24", "data.focus=2"),
    *("data.validation=20", "model.name=columns", "schedule.name=onecycle", "augment.shift=2", "augment.rotate=10"),
    *("optim.clip_norm=0.5", "train.accumulate=3", "train.label_smoothing=0.1"),
)
ROUNDED: Options = ("data.target=helpers.data_sets.Blocks", "model.name=convnet", "train.precision=bf16", "optim.ema=0.9")
OPTIONS = {"grey": GREY, "colour": COLOUR, "streamed": STREAMED, "columns": COLUMNS, "rounded": ROUNDED}
COMPRESSED = {2: ("bf16", "powersgd"), 3: ("fp16",)}
WAITS = (
    *("x.sum().item()", "bool((x > 0).all())", "x.tolist()", "repr(x)", "x.cpu()", "host.copy_(x)", "x[x > 0]", "x.nonzero()"),
    *("host.to(device)", "host.to(device, non_blocking=True)", "x.copy_(host)", "torch.tensor([1.0], device=device)"),
    *("x[index]", "x.new_tensor([1.0])", "torch.accelerator.synchronize()", "module.current_stream().synchronize()"),
)
GOES_ON = (
    *("x + 1", "x * torch.tensor(2.0)", "x[places]", "torch.full((2,), 3.0, device=device)", "x.new_zeros(2)", "x[1:].sum()"),
    *("host.pin_memory().to(device, non_blocking=True)", "x.copy_(host.pin_memory(), non_blocking=True)"),
    *("x.to('cpu', non_blocking=True)", "module.Event().query()"),
)
REFUSES = (
    "x + host",
    "torch.cat([x, host])",
    "torch.dot(host, x)",
    "x.numpy()",
    "torch.rand(2, device=device)",
    "x.unsqueeze_(0)",
)
AWKWARD = (  # not those with noise of the host's, an LSTM, which has kernels for GPUs alone, or a hook on a parameter
    *("Convolution", "Volume", "UnusedParameter", "Frozen", "NoGradient", "Double", "Integers", "Mask", "ExtraState"),
    *("ExtraTensor", "Spectral", "SpectralHook", "WeightNorm", "InstanceNorm", "Tied", "View", "Lazy", "Custom", "DoubleNorm"),
    *("Half", "StochasticDepth", "AlwaysDropout", "RunningMean", "ListOfParameters", "Transformer", "Checkpointed"),
    "ReentrantlyCheckpointed",
)


def table(world_size: int) -> dict[str, Options]:
    """The runs of `world_size` processes by name."""
    cases = [
        (f"{mode} {name}", (*MODES[mode], *OPTIONS[name]))
        for row, name in enumerate(OPTIONS)
        for column, mode in enumerate(MODES)
        if (row + column) % 3 + 1 == world_size
    ]
    cases += [(f"ddp {kind}", (*MODES["ddp"], *GREY, f"sync.compress={kind}")) for kind in COMPRESSED.get(world_size, ())]
    return {name: (*SHORT, *options) for name, options in cases}


def launch(
    place: Path, world_size: int, *arguments: str, simulated: bool, note: str = "", timeout: float = 400, **env: str
) -> Outcome:
    """A module with its arguments, on so many processes, on the simulated device or on the CPU."""
    env |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "XDG_CACHE_HOME": str(place / "cache")}
    env |= {} if simulated else {"ACCELERATE_USE_CPU": "true"}
    env |= {"SIMULATED_TRANSFERS": note} if note else {}
    command = (DEVICE if simulated else "-m", *arguments)
    if arguments[0].startswith("helpers."):
        module = ["helpers.simulated_device"] if simulated else []
        return worlds([world_size], *module, *arguments, cwd=place, env=env, timeout=timeout)[world_size]
    if world_size == 1:
        done = python(*command, cwd=place, env=env, timeout=timeout)
    else:
        done = torchrun(world_size, *command, cwd=place, env=env, timeout=timeout)
    assert done.code == 0, done.out[-2000:] + done.err[-6000:]
    return done


def train(place: Path, world_size: int, runs: Iterable[tuple[str, Options]], simulated: bool) -> Path:
    """Trains runs one after another in one launch; returns the folder that they are in."""
    folder = place / ("simulated" if simulated else "cpu")
    own = {name: [*QUIET, *options, f"run.dir={folder}", f"run.name={name}"] for name, options in runs}
    file = place / "runs.json"
    file.write_text(json.dumps({name: {"arguments": arguments, "watch": "nothing"} for name, arguments in own.items()}))
    launch(place, world_size, "helpers.device_worker", str(file), simulated=simulated, note="waits" if simulated else "")
    assert not any(json.loads(file.with_suffix(".rank0").read_text()).values()), "none has ended with an error"
    return folder


def transfers(place: Path, name: str, rank: int) -> list[dict]:
    return [json.loads(line) for line in (place / f"waits.{name}.rank{rank}").read_text().splitlines()]


def waits(place: Path, name: str, world_size: int) -> list[dict]:
    """Where a host waited for the device in a step in which nothing was due."""
    lines = [line for rank in range(world_size) for line in transfers(place, name, rank)]
    found = [line for line in lines if line["step"] and not line["due"]]
    if "powersgd" in name:  # whose first matrices torch draws on the host
        theirs = [line for line in found if "powerSGD_hook" in line["where"]]
        assert len({line["step"] for line in theirs}) == 1
        return [line for line in found if line not in theirs]
    return found


def check(place: Path, world_size: int, runs: dict[str, Options]) -> None:
    """Asserts that each run has the CPU's bits, and that the host does not wait where nothing is due."""
    cpu = train(place, world_size, runs.items(), simulated=False)
    simulated = train(place, world_size, runs.items(), simulated=True)
    for name in runs:
        assert result(simulated / name)["device"] == "sim"
        assert_same_run(simulated / name, cpu / name)
    assert {name: found for name in runs if (found := waits(place, name, world_size))} == {}


def test_the_device_waits_and_refuses_where_a_real_one_does(tmp_path: Path):
    expected = dict.fromkeys(WAITS, "waits") | dict.fromkeys(GOES_ON, "goes on") | dict.fromkeys(REFUSES, "refuses")
    done = launch(tmp_path, 1, "helpers.device_probe", *expected, simulated=True, note="probe")
    assert json.loads(done.out) == expected


@pytest.mark.slow
def test_two_short_runs_have_the_cpus_bits_and_the_host_waits_only_where_something_is_due(tmp_path: Path):
    options = (*SHORT, "train.max_steps=8", *COLOUR, "optim.clip_norm=0.5", "optim.ema=0.9")
    runs = {"ddp": (*options, "model.name=cnn"), "exact": (*options, "sync.mode=exact")}  # with dropout, and with BatchNorm
    check(tmp_path, 1, runs)
    for name in runs:  # a line at 6, a comparison of weights at 7, all at the end
        assert {line["step"] for line in transfers(tmp_path, name, 0)} == {0, 6, 7, 8}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, soak(2), 3])
def test_in_every_mode_with_every_option_runs_have_the_cpus_bits_and_the_host_waits_only_where_something_is_due(
    tmp_path: Path, splits: Splits, world_size: int
):
    write_folder(tmp_path / "digits", splits)
    check(tmp_path, world_size, table(world_size))


@pytest.mark.slow
def test_a_run_that_is_gone_on_with_ends_as_the_unbroken_one(tmp_path: Path, splits: Splits):
    write_folder(tmp_path / "digits", splits)
    due = ("train.log_every=7", "train.eval_every=2", "checkpoint.every_steps=14")  # all of it where a run is broken off
    options = {mode: (*SHORT, *MODES[mode], *GREY, *due) for mode in ("ddp", "exact", "local", "overlap")}
    begun = {f"broken {mode}": (*own, "train.max_steps=14") for mode, own in options.items()}
    folder = train(tmp_path, 2, (options | begun).items(), simulated=True)
    # A run in exact mode may also have begun on a CPU, and on another number of processes.
    cpu = train(tmp_path, 1, [("broken cpu", (*options["exact"], "train.max_steps=14"))], simulated=False)
    (cpu / "broken cpu").rename(folder / "broken cpu")
    rest = {f"broken {mode}": own for mode, own in (options | {"cpu": options["exact"]}).items()}
    train(tmp_path, 2, rest.items(), simulated=True)
    for name in rest:
        assert result(folder / name)["steps"] == 16
        assert_same_run(folder / name, folder / name.removeprefix("broken ").replace("cpu", "exact"))


@pytest.mark.slow
def test_the_other_commands_take_a_run_and_evaluate_counts_as_on_the_cpu(tmp_path: Path, splits: Splits):
    write_folder(tmp_path / "digits", splits)
    run = str(train(tmp_path, 1, [("a", (*SHORT, *GREY, "train.max_steps=40"))], simulated=True) / "a")
    here = launch(tmp_path, 2, "digitdist.evaluate", run, "--json", simulated=True).out
    assert json.loads(here) == json.loads(launch(tmp_path, 1, "digitdist.evaluate", run, "--json", simulated=False).out)
    assert json.loads(here)["correct"] == result(Path(run))["test_correct"] > 10
    files = [str(file) for file in sorted((tmp_path / "digits/test").glob("*/*.png"))]
    told = launch(tmp_path, 1, "digitdist.predict", run, *files, "--json", simulated=True).out.splitlines()
    assert sum(json.loads(line)["class"] in json.loads(line)["file"] for line in told) == json.loads(here)["correct"]
    for form in ("safetensors", "onnx"):
        counted = launch(tmp_path, 1, "digitdist.export", run, "--format", form, simulated=True).out
        assert f"{json.loads(here)['correct']}/40 correct" in counted
    launch(tmp_path, 1, "digitdist.report", run, simulated=True)
    assert "simulated device" in (Path(run) / "report.html").read_text()


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_awkward_networks_have_the_cpus_bits_and_the_host_waits_only_where_something_is_due(tmp_path: Path, mnist_root: Path):
    options = "train.log_every=100:train.eval_every=0:sync.check_every=0:train.precision=fp32"
    cases = [f"{name}:{mode}:{options}" for name in AWKWARD for mode in ("ddp", "exact", "local")]
    found = []
    for simulated in (False, True):
        worker = ("helpers.network_worker", str(mnist_root), f"runs {simulated}", *cases)
        note = "awkward" if simulated else ""
        done = launch(tmp_path, 2, *worker, simulated=simulated, note=note, timeout=700, ACCELERATE_MIXED_PRECISION="fp32")
        found.append(json.loads(done.out.splitlines()[-1]))
    for case in cases:
        cpu, simulated = (both[case] for both in found)
        assert (simulated["weights"], simulated["losses"]) == (cpu["weights"], cpu["losses"]), case
    assert waits(tmp_path, "awkward", 2) == []
