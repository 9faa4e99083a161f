"""The grammar of a configuration as `configs/README.md` states it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from digitdist.config import KEYS, as_dict, dump_config, load_config, load_stored_config, result_changes
from digitdist.errors import UserError
from digitdist.runs import find_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


def mistake(*overrides: str, files: tuple[Path, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_config([str(file) for file in files], overrides)
    (text,) = caught.value.mistakes
    return text


@pytest.mark.parametrize("name", ["tracking.notes", "tracking.tags", "model.args.x", "data.root", "optim.lr", "model.args.x.y"])
@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("???", "still to be given"),
        ("${nope}", "'nope' not found"),
        ("${oc.env:DIGITDIST_NOT_SET}", "DIGITDIST_NOT_SET"),
        ("${nosuch:1}", "nosuch"),
        ("${", "cannot be resolved"),
        ("a ${ b", "cannot be resolved"),
        ("${tracking.entity.x}", "cannot be resolved"),
        ("\ud800", "Unicode"),
    ],
)
def test_what_has_no_value_is_told_with_its_key(file: Path, name: str, value: str, part: str):
    quoted = '["' + value + '"]' if name == "tracking.tags" else '"' + value + '"'
    if value == "\ud800":
        quoted = quoted.replace(value, "\\ud800")
    file.write_text(f"{name}: {quoted}\n")
    for told in (mistake(files=(file,)), mistake(f"{name}={quoted if '[' in quoted or 'args' in name else value}")):
        assert told.startswith(name.split(".x")[0] + "=")
        assert part in told or (name == "optim.lr" and "optim.lr takes a number" in told)


def test_interpolations_that_refer_to_each_other_without_end_are_told():
    assert "Recursive" in mistake("tracking.notes=${tracking.notes}")
    bomb = [f"model.args.a{n}=" + f"${{model.args.a{n + 1}}}" * 10 for n in range(9)]
    assert "at most 40" in mistake(*bomb, "model.args.a9=ha")


def test_an_interpolation_is_the_value_it_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RATE", "1e-1")
    loaded = load_config(
        (),
        [
            *(
                "optim.lr=${oc.env:RATE}",
                "seed=0x1F",
                "tracking.name=s${seed}",
                "tracking.group=${seed}",
                "data.workers=${seed}",
            ),
            *("model.args.depth=${data.size}", "model.args.text=a-${.depth}", "model.args.all=[1, '${seed}']"),
            "tracking.tags=['${model.name}', '${oc.env:RATE}']",
        ],
    )
    assert (loaded.optim.lr, loaded.tracking.name, loaded.tracking.group, loaded.data.workers) == (0.1, "s31", "31", 31)
    assert loaded.model.args == {"depth": 28, "text": "a-28", "all": [1, 31]}
    assert loaded.tracking.tags == ["cnn", "1e-1"]
    assert "train.threads takes a whole number" in mistake("train.threads=${optim.lr}")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"\${seed}", "${seed}"),
        (r"\\${seed}", r"\0"),
        (r"\\\${seed}", r"\${seed}"),
        ("$", "$"),
        ("$seed", "$seed"),
        ("a$$ {", "a$$ {"),
    ],
)
def test_a_backslash_before_it_makes_an_interpolation_text_and_a_dollar_is_a_dollar(file: Path, written: str, text: str):
    file.write_text(f"tracking: {{notes: '{written}'}}\nmodel: {{args: {{a: ['{written}']}}}}\n")
    for loaded in (load_config([str(file)]), load_config((), [f"tracking.notes={written}", f"model.args.a=['{written}']"])):
        assert (loaded.tracking.notes, loaded.model.args) == (text, {"a": [text]})


TWICE = {
    "seed: 1\nseed: 2": "the key 'seed' stands twice",
    "optim: {lr: 0.1}\noptim: {lr: 0.2}": "the key 'optim' stands twice",
    "optim: {lr: 0.1, beta1: 0.5, lr: 0.2}": "the key 'lr' stands twice",
    "model: {args: {a: {b: 1, b: 2}}}": "the key 'b' stands twice",
    "model: {args: {1: a, 0x1: b}}": "the key 1 stands twice",
    "optim.lr: 0.1\noptim: {lr: 0.2}": "optim.lr twice",
    "model.args.a: 1\nmodel: {args: {b: 2}}": "model.args.a twice",
}


@pytest.mark.parametrize("text", TWICE)
def test_the_same_key_twice_in_one_file_is_refused(file: Path, text: str):
    file.write_text(text)
    assert TWICE[text] in mistake(files=(file,))
    assert str(file) in mistake(files=(file,))


def test_the_same_key_twice_in_a_mapping_of_the_command_line_is_refused_and_an_override_again_wins():
    assert "the key 'a' stands twice" in mistake("model.args={a: 1, a: 2}")
    assert load_config((), ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


def test_a_merge_key_is_no_key_twice(file: Path):
    file.write_text("model:\n  args:\n    a: &x {p: 1, q: 2}\n    b: {<<: *x, q: 3}\n    c: {<<: [*x, {r: 4}]}\n")
    args = load_config([str(file)]).model.args
    assert args == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": {"p": 1, "q": 2, "r": 4}}


def test_arguments_merge_entry_by_entry_wherever_they_are_given(tmp_path: Path):
    first, second, third = (tmp_path / f"{n}.yaml" for n in range(3))
    first.write_text("model: {args: {stem: 3, deep: {a: 1, b: 2}, list: [1, 2]}}\n")
    second.write_text("model: {args: {width: 8, deep: {b: 3}, list: [3]}}\n")
    merged = {"stem": 3, "width": 8, "deep": {"a": 1, "b": 3}, "list": [3]}
    files = [str(first), str(second)]
    assert load_config(files).model.args == merged
    assert load_config(files[:1], ["model.args={width: 8, deep: {b: 3}, list: [3]}"]).model.args == merged
    assert load_config(files[:1], ["model.args.width=8", "model.args.deep.b=3", "model.args.list=[3]"]).model.args == merged
    third.write_text("model: {args: {}}\n")
    assert load_config([*files, str(third)], ["model.args.width=1"]).model.args == {"width": 1}, "an empty mapping empties it"
    assert load_config(files, ["model.args={}", "model.args.deep.c=1"]).model.args == {"deep": {"c": 1}}
    data = ["data.target=a.B", "data.args={a: 1}", "data.args={b: 2}"]
    assert load_config((), data).data.args == {"a": 1, "b": 2}


@pytest.mark.parametrize(("name", "extra"), [("data.root", "x"), ("run.dir", "x"), ("checkpoint.resume", "")])
def test_a_tilde_in_a_folder_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"{name}: ~/{extra}\n")
    for loaded in (load_config(["c.yaml"]), load_config(["~/c.yaml"]), load_config((), [f"{name}=~/{extra}"])):
        assert as_dict(loaded)[name] == f"{tmp_path}/{extra}"
    assert os.path.isdir(as_dict(load_config((), [f"{name}=~root"]))[name])
    assert "no home of ~no-such-user is known" in mistake(f"{name}=~no-such-user/x")
    if name != "checkpoint.resume":
        assert as_dict(load_config((), [f"{name}=./~x"]))[name] == "./~x"
    assert [*tmp_path.iterdir()] == [tmp_path / "c.yaml"]


def test_a_tilde_in_a_run_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").touch()
    assert find_run("~/mine") == tmp_path / "mine"
    with pytest.raises(UserError):
        find_run("~no-such-user/mine")


@pytest.mark.parametrize("name", ["data.root", "run.dir", "checkpoint.resume", "run.name"])
@pytest.mark.parametrize("value", ["", "a" * 256, "ä" * 128, "a\0b"])
def test_what_cannot_be_a_folder_is_refused(name: str, value: str):
    assert name in mistake(f"{name}={value}")


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\u2028b", "a\u2029b", "a\x85b", "a\x1bb", "a\x7fb"])
def test_a_name_has_no_line_break_and_no_control_character(value: str):
    assert mistake(f"run.name={value}").isprintable()


FILES = {
    b"\xef\xbb\xbfseed: 3\n": 3,
    b"seed: 3\r\nrun:\r\n  name: a\r\n": 3,
    b"": 0,
    b"# only a comment": 0,
    b"---\n": 0,
    b"--- {}\n...\n": 0,
    b"null\n": 0,
    b"data: {}\ntrain:\n": 0,
    b"%YAML 1.2\n---\nseed: 3\n": 3,
    b'{"seed": 3, "run": {"name": "a"}}': 3,
    b"seed: !!int 3\n": 3,
    b"seed: &s 3\n": 3,
    b"a: 1\n---\nb: 2\n": "single document",
    b"seed: 3\n\x00": "special characters",
    b"\x89PNG\r\n\x1a\n\x00": "UTF-8",
    "seed: 3".encode("utf-16"): "UTF-8",
    "tracking: {notes: né}".encode("latin-1"): "UTF-8",
    "tracking: {notes: a\u2028b}".encode(): "U+2028",
    b"seed: !!python/object/apply:os.getpid []": "python/object",
    b"model: {args: {a: !!python/name:os.system }}": "python/name",
    b"model: {args: {a: !mine 3}}": "!mine",
    b"model: {args: {a: !!binary aGk=}}": "binary",
    b"model: {args: {a: !!timestamp 2026-01-01}}": "timestamp",
    b"model: {args: {a: !!set {b}}}": "set",
    b"model: {args: {a: !!int x}}": "not a whole number",
    b"model: {args: {a: !!float x}}": "not a number",
    b"model: {args: {a: !!bool 3}}": "not true or false",
    b"model: {args: {a: " + b"9" * 5000 + b"}}": "more than 100 digits",
    b"model: {args: {a: 0x" + b"f" * 5000 + b"}}": "more than 100 digits",
    b"model: {args: {3: a}}": "the name of an argument must be text",
    b"model: {args: {a: {null: a}}}": "a key must be text or a whole number",
    b"model: {args: {a: {1.5: a}}}": "a key must be text or a whole number",
    b"model: {args: {a: {true: a}}}": "a key must be text or a whole number",
    b"[a, b]: 3": "a key must be text or a whole number",
    b"? {a: b}\n: 3": "a key must be text or a whole number",
    b"3: 4": "there is no key '3'",
    b"&a [*a]": "nested more than 40 deep",
    b"model: {args: &a {x: *a}}": "nested more than 40 deep",
    b"model: {args: {x: *nothing}}": "undefined alias",
    b"[" * 100_000: "nested more than 40 deep",
    b"{a: " * 100_000: "nested more than 40 deep",
    b"- " * 100_000: "nested more than 40 deep",
    b"\n".join(b" " * n + b"a:" for n in range(1000)): "nested more than 40 deep",
    b"- a": "must hold a YAML mapping",
    b"#" * 2**20 + b"\n": "more than 1,048,576 bytes",
    b"seed: 3\n\tx: 4": "is not valid YAML",
}


@pytest.mark.parametrize("content", FILES, ids=lambda content: ascii(content[:24]))
def test_a_file_is_read_or_refused_whatever_is_in_it(file: Path, content: bytes):
    file.write_bytes(content)
    wanted, start = FILES[content], time.monotonic()
    if isinstance(wanted, int):
        assert load_config([str(file)]).seed == wanted
    else:
        assert wanted in mistake(files=(file,))
        assert mistake(files=(file,)).isprintable()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("key", ["x: &x0 [a, b]", "<<: &x0 {k: v}"])
def test_aliases_that_grow_beyond_bounds_are_refused(file: Path, key: str):
    lists = [f"  x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 9)}]" for n in range(9)]
    maps = [f"  x{n + 1}: &x{n + 1} {{<<: [{', '.join([f'*x{n}'] * 9)}]}}" for n in range(9)]
    lines = lists if key.startswith("x") else maps
    first = "  x: &x0 [a, b]" if key.startswith("x") else "  x: &x0 {k: v}"
    file.write_text("\n".join(["model.args:", first, *lines]))
    assert "more than 10,000 values" in mistake(files=(file,))


def test_only_a_regular_file_is_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "nothing", tmp_path / ("a" * 300), Path("a\0b")):
        told = mistake(files=(path,))
        assert told.startswith("--config ")
        assert told.isprintable()


def test_a_thousand_mistakes_are_told_in_a_few_lines(file: Path):
    file.write_text("\n".join(f"key{n}: {n}" for n in range(1000)))
    with pytest.raises(UserError) as caught:
        load_config([str(file)])
    assert len(caught.value.mistakes) == 21
    assert caught.value.mistakes[-1] == "and 980 more mistakes"
    assert len(mistake("x" * 100_000 + "=1")) < 1000
    assert len(mistake("tracking.wandb=" + "x" * 100_000)) < 1000


COUNTED = [name for name, key in KEYS.items() if (key.ge, key.gt) != (None, None)]


@pytest.mark.parametrize("name", COUNTED)
def test_every_number_has_a_range(name: str):
    for value in ("1e400", "1" + "0" * 50, "9" * 5000, ".inf", "-.inf", ".nan", "-1e300", "-1", "-" + "9" * 200):
        told = mistake(f"{name}={value}")
        assert told.startswith(f"{name}=")
        assert KEYS[name].allowed in told


@pytest.mark.parametrize("name", COUNTED)
def test_a_negative_zero_is_zero(name: str):
    if KEYS[name].ge == 0:
        assert as_dict(load_config((), [f"{name}=-0"]))[name] == 0


def test_micro_batches_are_no_more_than_images_and_shards():
    assert "at most 4096" in mistake("train.accumulate=1000000000")
    assert "data.batch_size=100; it takes at most that" in mistake("train.accumulate=101")
    assert "their product is at most 65536" in mistake(
        *("train.accumulate=17", "sync.mode=exact", "sync.shards=4096"),
    )
    load_config((), ["train.accumulate=100", "data.batch_size=100"])


def test_arguments_that_json_has_kept_are_no_change():
    new = as_dict(load_config((), ["model.args={a: {1: x}, b: .nan, c: .inf}"]))
    kept = new | {"model.args": {"a": {"1": "x"}, "b": float("nan"), "c": float("inf")}}
    assert result_changes(kept, new) == []
    assert len(result_changes(kept | {"model.args": {"a": {"1": "y"}}}, new)) == 1


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("run.report=yes", "true or false"),
        ("run.report=1", "true or false"),
        ("data.batch_size=1_000", "a whole number"),
        ("data.batch_size=1e3", "a whole number"),
        ("optim.lr=Infinity", "a number"),
        ("optim.lr=1:30", "a number"),
        ("run.dir=null", "takes text"),
        ("train.max_steps=", "a whole number"),
        ("model.args.a=[1", "is not valid YAML"),
        ("model.args.=3", "name is empty"),
        ("model.args.a..b=3", "name is empty"),
        ("tracking.tags=[a, null]", "a list of texts"),
        ("tracking.tags={a: b}", "a list of texts"),
        ("=3", "there is no key ''"),
    ],
)
def test_what_is_not_of_the_grammar_is_refused(override: str, part: str):
    assert part in mistake(override)


def test_text_is_as_it_is_written_in_files_too(file: Path):
    file.write_text(
        "run: {name: 017}\ntracking: {name: 0x1F, group: 1:30, entity: true, notes: 1_000, tags: [1e3, .5, true, 'null']}\n"
    )
    loaded = load_config([str(file)])
    assert (loaded.run.name, loaded.tracking.name, loaded.tracking.group) == ("017", "0x1F", "1:30")
    assert (loaded.tracking.entity, loaded.tracking.notes) == ("true", "1_000")
    assert loaded.tracking.tags == ["1e3", ".5", "true", "null"]


def test_a_number_may_stand_in_quotes_and_in_every_notation(file: Path):
    file.write_text(
        "data: {batch_size: '0x10', eval_batch_size: 0o17}\noptim: {lr: '5e-4', weight_decay: 1}\ntrain: {max_steps: 'null'}\n"
    )
    loaded = load_config([str(file)], ["train.accumulate=0o7", "run.report=FALSE"])
    assert (loaded.data.batch_size, loaded.data.eval_batch_size, loaded.optim.lr) == (16, 15, 0.0005)
    assert (loaded.optim.weight_decay, loaded.train.max_steps, loaded.train.accumulate) == (1.0, None, 7)
    assert loaded.run.report is False
    assert isinstance(loaded.optim.weight_decay, float)


def test_what_is_taken_can_be_read_back_however_deep(file: Path, tmp_path: Path):
    deep = "model.args." + ".".join(["a"] * 32)
    (tmp_path / "runs/x").mkdir(parents=True)
    stored = tmp_path / "runs/x/config.yaml"
    loaded = load_config((), [f"{deep}=1"])
    stored.write_bytes(dump_config(loaded))
    assert load_stored_config(stored).model.args == loaded.model.args
    assert "nested more than 32 deep" in mistake(f"{deep}.a=1")
    assert "nested more than 32 deep" in mistake("model.args." + "a." * 20_000 + "a=1")
    assert "nested more than 32 deep" in mistake(f"{deep}={{a: 1}}")
    assert "nested more than 32 deep" in mistake(f"{deep}=${{data.args}}", "data.target=a.B", "data.args={a: 1}")


@pytest.mark.slow
def test_what_is_too_large_to_be_read_back_is_refused(file: Path):
    file.write_text("model: {args: {x: [" + "1, " * 9_000 + "]}}")
    assert len(load_config([str(file)]).model.args["x"]) == 9_000
    assert "too large" in mistake("model.args.y=[" + "1, " * 9_000 + "]", files=(file,))
    assert "too large" in mistake("tracking.notes=" + "x" * 2**20)
    file.write_text("\n".join(f"model.args.a{n}: 1" for n in range(4_000)))
    assert len(load_config([str(file)]).model.args) == 4_000
