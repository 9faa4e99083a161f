"""The configuration that a run's folder holds is data: it reads back as what it was, and nothing in it acts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from digitdist.config import Config, as_dict, dump_config, load_config, load_stored_config, read_stored_config, stored_values
from digitdist.errors import UserError

STRANGE = [
    r"\${a}",
    r"\\\${a}",
    r"\${oc.env:HOME}",
    "$",
    "$5 ($x) $$",
    "what???",
    "????",
    r"a\b",
    "\\",
    r"C:\${x}\\",
    "}{",
    r"\${",
]
STRANGE += [
    "a\u2028b",
    "a\x85b",
    "a\n\nb ",
    "\ufeffx",
    "\x00\x1b",
    "'\"",
    "😀",
    " x ",
    "#",
    "- a",
    "a: b",
    "!!x",
    "&a",
    "*a",
    "null",
    "",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "runs/x").mkdir(parents=True)
    return tmp_path / "runs/x/config.yaml"


def reported(file: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_stored_config(file, overrides)
    return caught.value.mistakes


@pytest.mark.parametrize("text", STRANGE)
def test_any_text_survives_any_number_of_round_trips(file: Path, text: str):
    loaded = load_config((), [f"tracking.notes={text}"])
    notes = loaded.tracking.notes
    loaded.tracking.tags, loaded.model.args = [str(notes)], {"a": {"b": [notes]}, str(notes) or "empty": notes}
    wanted = as_dict(loaded)
    for reader in (load_stored_config, load_stored_config, lambda file: load_config([str(file)])):
        file.write_bytes(dump_config(loaded))
        loaded = reader(file)
        loaded.run.dir = "runs"
        assert as_dict(loaded) == wanted


def test_a_stored_interpolation_is_text(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "geheim")
    file.write_text("tracking: {notes: '${oc.env:SECRET}', tags: ['${oc.env:SECRET}']}\nmodel: {args: {a: '${seed}'}}\n")
    loaded = load_stored_config(file)
    assert (loaded.tracking.notes, loaded.tracking.tags) == ("${oc.env:SECRET}", ["${oc.env:SECRET}"])
    assert loaded.model.args == {"a": "${seed}"}
    assert stored_values(file)["tracking.notes"] == "${oc.env:SECRET}"
    loaded = load_stored_config(file, ["tracking.name=${tracking.notes}", "model.args.b=${oc.env:SECRET}"])
    assert loaded.tracking.name == "${oc.env:SECRET}", "it refers to a value, which is text"
    assert loaded.model.args == {"a": "${seed}", "b": "geheim"}, "the command line is one's own"


def test_a_stored_run_is_where_it_lies_now_and_resumes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_text("run: {dir: /elsewhere/x}\ncheckpoint: {resume: /nowhere}\n")
    monkeypatch.chdir(file.parent)
    for name in (file, Path("config.yaml")):
        loaded = load_stored_config(name)
        assert (loaded.run.dir, loaded.checkpoint.resume) == (str(file.parent.parent), "auto")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("optim: {rho: 1}", "there is no key 'optim.rho'"),
        ("seed: x", "seed=x is not allowed"),
        ("data: {batch_size: 0}", "data.batch_size=0 is not allowed"),
        ("seed: 1\nseed: 2", "the key 'seed' stands twice"),
        ("model: {target: !!python/object/apply:os.system [id]}", "python/object/apply"),
        ("- 1", "must hold a YAML mapping"),
        ("a: [" * 100_000, "nested more than 40 deep"),
        ("\0", "is not valid YAML"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"#" * (2**20 + 1), "more than 1,048,576 bytes"),
    ],
)
def test_what_does_not_fit_is_a_mistake_that_names_the_file(file: Path, content: str | bytes, part: str):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (mistake,) = reported(file)
    assert mistake.startswith(str(file))
    assert part in mistake
    assert isinstance(read_stored_config(file)[0], Config)


def test_a_mistake_of_the_command_line_does_not_name_the_file(file: Path):
    file.write_text("seed: 3\n")
    assert [mistake.split("=")[0] for mistake in reported(file, "data.batch_size=0", "run.name=a/b")] == [
        "data.batch_size",
        "run.name",
    ]


def test_only_a_regular_file_is_read(file: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "nothing"):
        file.unlink(missing_ok=True)
        file.symlink_to(target)
        (mistake,) = reported(file)
        assert mistake.startswith(str(file))
