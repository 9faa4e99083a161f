"""What is printed is expendable: whatever becomes of it, a training goes to its end with every result there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launching import CLEAN, QUIET, Outcome, python
from helpers.runs import raw_events, result

pytestmark = pytest.mark.slow
TRAIN = ("-m", "digitdist.train", *QUIET, "train.log_every=1", "train.max_steps=12", "data.eval_batch_size=5000")
FILES = ("result.json", "predictions.npz", "metrics.jsonl", "config.yaml")


def in_a_shell(place: Path, line: str, *options: str, env: dict[str, str] | None = None) -> Outcome:
    """The outcome of a shell's line in which TRAIN stands for the command."""
    command = shlex.join([sys.executable, *TRAIN, *options])
    shell = ["bash", "-o", "pipefail", "-c", line.replace("TRAIN", command)]
    done = subprocess.run(shell, cwd=place, env=CLEAN | (env or {}), capture_output=True, text=True, timeout=100)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("TRAIN | head -2", "stdout takes no more (Broken pipe)"),
        ("TRAIN > /dev/full", "stdout takes no more (No space left on device)"),
        ("TRAIN >&- 2>&-", ""),
        ("TRAIN 2>&1 | true", ""),
    ],
)
def test_it_trains_to_the_end_whatever_becomes_of_its_output(place: Path, line: str, said: str):
    done = in_a_shell(place, line, "run.name=a", "train.unknown=1")
    assert done.code == 2
    assert not (place / "runs").exists()
    done = in_a_shell(place, line, "run.name=a")
    assert (done.code, done.err) == (0, f"{said}; the command goes on without it\n" if said else "")
    assert all((place / "runs/a" / name).stat().st_size for name in FILES)
    assert [event["step"] for event in raw_events(place / "runs/a")] == [*range(1, 13), 12]
    assert result(place / "runs/a")["steps"] == 12


def test_what_a_terminals_encoding_lacks_is_written_as_an_escape(place: Path):
    done = python(*TRAIN, "run.name=zahl-π", cwd=place, env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert "files in runs/zahl-\\u03c0" in done.out
    assert result(place / "runs/zahl-π")["steps"] == 12


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("| true", 0, ""),
        (">&-", 0, ""),
        (
            "> /dev/full",
            2,
            "error: no space is left for what is printed; make room, or print it elsewhere\n",
        ),
    ],
)
def test_a_command_whose_only_product_is_what_it_prints_ends_with_0_where_nobody_reads_on(
    place: Path, end: str, code: int, said: str
):
    command = shlex.join([sys.executable, "-m", "digitdist.data", "data.name=mnist"])
    shell = ["bash", "-o", "pipefail", "-c", f"{command} {end}"]
    done = subprocess.run(shell, cwd=place, env=CLEAN, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (code, said)
