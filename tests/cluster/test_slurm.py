"""Slurm's script on a real Slurm with two nodes: a job that is stopped, requeued or loses a node ends at the same bits.

And every script in launch/ is clean.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import slurm as cluster
from helpers.launching import QUIET, ROOT, python
from helpers.runs import assert_same_run, attempts, events, reached, result

SCRIPTS = sorted(file for file in (ROOT / "launch").rglob("*") if file.suffix in (".sh", ".sbatch"))
SCRIPT = str(ROOT / "launch/slurm/train.sbatch")
STEPS = ("data.batch_size=1000", "train.epochs=1", "train.log_every=1", "checkpoint.every_steps=20")
EXACT = (*QUIET, *STEPS, "sync.mode=exact")

pytestmark = pytest.mark.timeout(300)
on_slurm = pytest.mark.cluster
long = pytest.mark.soak  # what CI, which has 40 minutes, leaves out


@pytest.fixture(scope="module")
def slurm() -> Iterator[cluster.Slurm]:
    reason = cluster.missing()
    if reason:
        pytest.skip(reason)
    with cluster.running() as running:
        yield running


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """The folder of the same run of 60 steps by one plain process."""
    place = tmp_path_factory.mktemp("unbroken")
    (place / "data").symlink_to(mnist_root)
    done = python("-m", "digitdist.train", *EXACT, "run.name=a", cwd=place)
    assert done.code == 0, done.err
    return place / "runs/a"


@on_slurm
@pytest.mark.parametrize(
    ("shape", "world_size"),
    [
        pytest.param("--nodes=2", 2, marks=long),
        ("--nodes=2 --gpus-per-node=2", 4),
        pytest.param("--nodes=1 --ntasks-per-node=2", 2, marks=long),
    ],
)
def test_a_job_of_any_shape_ends_at_the_bits_of_one_process(slurm, place, unbroken, shape, world_size):
    job = slurm.sbatch(*shape.split(), SCRIPT, *EXACT, cwd=place)
    assert slurm.finish(job) == "COMPLETED", slurm.output(job)
    assert result(place / f"runs/{job}")["world_size"] == world_size
    assert_same_run(place / f"runs/{job}", unbroken)


@on_slurm
@pytest.mark.parametrize("receiver", ["the steps", "the batch shell"])
def test_usr1_saves_requeues_and_the_job_resumes(slurm, place, unbroken, receiver):
    """As by --signal=USR1@120 and --signal=B:USR1@120."""
    job = slurm.sbatch("--nodes=2", SCRIPT, *EXACT, cwd=place)
    folder = place / f"runs/{job}"
    slurm.wait(job, lambda: reached(folder) >= 10)
    slurm.run("scancel", *(["--batch"] if receiver == "the batch shell" else []), "--signal=USR1", job)
    slurm.wait(job, lambda: slurm.job(job)["Restarts"] == "1")
    assert attempts(folder)[0]["stopped"]
    assert not (folder / "result.json").exists()
    assert slurm.finish(job) == "COMPLETED", slurm.output(job)
    assert [attempt["step"] for attempt in attempts(folder)] == [0, json.loads(first_after(folder))["step"] - 1]
    assert slurm.job(job)["Restarts"] == "1"
    assert_same_run(folder, unbroken)


def first_after(folder: Path) -> str:
    """The first metric line of a run's second attempt."""
    began = attempts(folder)[1]["step"]
    return next(line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] > began)


@on_slurm
@long
def test_usr1_before_the_training_has_begun_loses_nothing(slurm, place, unbroken):
    job = slurm.sbatch("--nodes=2", SCRIPT, *EXACT, cwd=place)
    slurm.wait(job, lambda: f"{job}.0" in slurm.run("squeue", "--steps", "--noheader", "--format=%i"))
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait(job, lambda: slurm.job(job)["Restarts"] == "1")
    assert slurm.finish(job) == "COMPLETED", slurm.output(job)
    assert_same_run(place / f"runs/{job}", unbroken)


@on_slurm
@long
def test_the_time_limit_only_interrupts(slurm, place):
    """Slurm looks at its limits, which are whole minutes, twice a minute, and signals up to a minute early."""
    arguments = (*EXACT, "train.epochs=100")
    job = slurm.sbatch("--nodes=2", "--time=1", "--signal=USR1@1", SCRIPT, *arguments, cwd=place)
    folder = place / f"runs/{job}"
    slurm.wait(job, lambda: (folder / "environment.json").exists() and attempts(folder)[-1]["step"] > 0)
    *before, last = attempts(folder)
    assert all(attempt["stopped"] for attempt in before)
    slurm.wait(job, lambda: reached(folder) >= last["step"] + 5)
    slurm.run("scancel", job)
    slurm.finish(job)
    steps = [event["step"] for event in events(folder)]
    assert steps == sorted(steps)


@on_slurm
def test_a_lost_node_requeues_the_job(slurm, place, unbroken):
    job = slurm.sbatch("--nodes=2", SCRIPT, *EXACT, cwd=place)
    folder = place / f"runs/{job}"
    slurm.wait(job, lambda: reached(folder) >= 30)
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        slurm.wait(job, lambda: slurm.job(job)["Restarts"] == "1")
    finally:
        slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    assert slurm.finish(job) == "COMPLETED", slurm.output(job)
    assert attempts(folder)[1]["step"] >= 20
    assert_same_run(folder, unbroken)


@on_slurm
@long
def test_a_killed_process_comes_back_within_the_job(slurm, place, unbroken):
    job = slurm.sbatch("--nodes=2", SCRIPT, *EXACT, cwd=place, env={"DIGITDIST_FAULT": "kill rank=1 step=30 phase=backward"})
    assert slurm.finish(job) == "COMPLETED", slurm.output(job)
    assert slurm.job(job)["Restarts"] == "0"
    assert [attempt["step"] for attempt in attempts(place / f"runs/{job}")] == [0, 20]
    assert_same_run(place / f"runs/{job}", unbroken)


@on_slurm
def test_a_cancelled_job_is_saved_and_stays_cancelled(slurm, place):
    job = slurm.sbatch("--nodes=2", SCRIPT, *EXACT, cwd=place)
    folder = place / f"runs/{job}"
    slurm.wait(job, lambda: reached(folder) >= 10)
    slurm.run("scancel", job)
    assert slurm.finish(job) == "CANCELLED"
    slurm.wait(job, lambda: "stopped" in attempts(folder)[-1])
    assert slurm.job(job)["Restarts"] == "0"


@on_slurm
@pytest.mark.parametrize("mistake", ["train.epoch=1", "--sweep nothing.txt"])
def test_a_mistake_fails_at_once_and_is_reported_once(slurm, place, mistake):
    job = slurm.sbatch("--nodes=2", SCRIPT, *mistake.split(), cwd=place)
    assert slurm.finish(job) == "FAILED"
    fields = slurm.job(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0")
    (reported,) = [line for line in slurm.output(job).splitlines() if line.startswith("error:")]
    assert mistake.split()[-1] in reported


@on_slurm
def test_an_array_is_a_sweep(slurm, place):
    (place / "sweep.txt").write_text("# two of them\noptim.lr=0.002 data.batch_size=500\n\noptim.lr=0.003\n")
    job = slurm.sbatch("--array=0-1", SCRIPT, "--sweep", "sweep.txt", *QUIET, "train.max_steps=3", cwd=place)
    seeds = slurm.sbatch("--array=7", SCRIPT, *QUIET, "train.max_steps=3", "run.name=seven", cwd=place)
    for one in (f"{job}_0", f"{job}_1", f"{seeds}_7"):
        assert slurm.finish(one) == "COMPLETED", slurm.output(one)
    first, second, seven = (
        yaml.safe_load((place / f"runs/{name}/config.yaml").read_text()) for name in (f"{job}_0", f"{job}_1", "seven")
    )
    assert (first["optim"]["lr"], first["data"]["batch_size"], first["seed"]) == (0.002, 500, 0)
    assert (second["optim"]["lr"], second["data"]["batch_size"], second["seed"]) == (0.003, 100, 0)
    assert seven["seed"] == 7


@on_slurm
def test_a_study_as_an_array_is_collected_afterwards(slurm, place):
    """One task is asked to stop midway, requeues itself, and trains no run twice."""
    study = ("a", "--seeds", "4", *QUIET, "data.batch_size=1000", "train.max_steps=60", "train.log_every=1")
    job = slurm.sbatch("--array=0-1", str(ROOT / "launch/slurm/study.sbatch"), *study, cwd=place)
    slurm.wait(f"{job}_1", lambda: (place / "runs/a/seed-1").exists() and reached(place / "runs/a/seed-1") >= 5)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    for one in (f"{job}_0", f"{job}_1"):
        assert slurm.finish(one) == "COMPLETED", slurm.output(one)
    counts = [len(attempts(place / f"runs/a/seed-{seed}")) for seed in range(4)]
    assert counts == [1, 2, 1, 1]
    done = python("-m", "digitdist.study", *study, cwd=place)
    assert done.code == 0, done.err
    assert [len(attempts(place / f"runs/a/seed-{seed}")) for seed in range(4)] == counts
    assert "a  " in done.out.splitlines()[-1]
    assert result(place / "runs/a/seed-3")["steps"] == 60


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_finds_nothing_wrong_with_it(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing_wrong_with_it(script: Path):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
