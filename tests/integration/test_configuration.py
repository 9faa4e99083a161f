"""What the real command makes of configurations: one ``error:`` and no folder, or a run whose own file reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.launching import QUIET, Outcome, python

from digitdist.config import load_config, load_stored_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MANY = "model: {args: {x: '${nope}'}}\ntrain: {accumulate: 1000000000}\ntracking:\n  notes: ???\n"
REFUSED = {  # options, and parts of what is told
    ("--config=twice.yaml",): ("stands twice",),
    ("--config=many.yaml", "data.batch_size=" + "9" * 999, "run.dir=~no-such-user/x", "tracking.name=a\nerror: b"): (
        *("'nope' not found", "at most 4096", "still to be given", "100 digits", "no home of ~no-such-user"),
    ),
}
NOTES = r"\${x} costs 5 $, what???"


def train(place: Path, *arguments: str) -> Outcome:
    return python("-m", "digitdist.train", *QUIET, *arguments, cwd=place)


def test_what_is_refused_is_one_error_and_leaves_no_folder(tmp_path: Path):
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "many.yaml").write_text(MANY)
    before = sorted(tmp_path.iterdir())
    for arguments, parts in REFUSED.items():
        done = train(tmp_path, *arguments)
        assert (done.code, len(done.errors)) == (2, 1), done.err
        assert all(part in done.err for part in parts), done.err
        assert "Traceback" not in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_reads_its_own_configuration_back_and_a_command_takes_it_again(place: Path):
    texts = (f"tracking.notes={NOTES}", r"tracking.tags=['\${oc.env:HOME}', '$']", "tracking.name=${run.name}-${seed}")
    again = ("train.max_steps=1", "data.batch_size=7", "train.eval_every=0")
    done = python(
        "-m", "digitdist.train", *QUIET, *texts, *again, "run.name=first", "run.dir=~/runs", cwd=place, env={"HOME": str(place)}
    )
    assert done.code == 0, done.err
    file = place / "runs/first/config.yaml"
    stored = load_stored_config(file)
    assert stored.tracking.notes == r"${x} costs 5 $, what???"
    assert (stored.tracking.tags, stored.tracking.name) == (["${oc.env:HOME}", "$"], "first-0")
    assert load_config([str(file)]).run.dir == str(place / "runs")
    done = train(place, "--config", str(file), "run.name=second")
    assert done.code == 0, done.err
    second = load_stored_config(place / "runs/second/config.yaml")
    second.run.name = "first"
    assert second == stored
    done = python("-m", "digitdist.evaluate", "~/runs/first", cwd=place, env={"HOME": str(place)})
    assert done.code == 0, done.err
