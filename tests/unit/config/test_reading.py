from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.launching import ROOT

from digitdist import config
from digitdist.config import KEYS, load_config
from digitdist.config.reading import _flatten
from digitdist.errors import UserError


def mistakes(*overrides: str, files: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_config(files, overrides)
    return caught.value.mistakes


def test_defaults_are_those_of_the_design():
    values = config.as_dict(load_config())
    wanted = {
        "seed": 0,
        "data.name": "mnist",
        "data.root": "data",
        "data.batch_size": 100,
        "data.eval_batch_size": 1000,
        "data.validation": 0,
        "model.name": "cnn",
        "optim.name": "adam",
        "optim.lr": 0.001,
        "optim.weight_decay": 0.0,
        "schedule.name": "constant",
        "train.epochs": 9.0,
        "train.max_steps": None,
        "train.accumulate": 1,
        "train.precision": "auto",
        "train.threads": None,
        "train.log_every": 20,
        "train.eval_every": 1,
        "sync.mode": "ddp",
        "sync.shards": 8,
        "checkpoint.every_steps": 600,
        "checkpoint.keep": 3,
        "checkpoint.resume": "auto",
        "run.dir": "runs",
        "run.name": None,
        "tracking.wandb": "auto",
    }
    assert {key: values[key] for key in wanted} == wanted


def test_later_files_win_over_earlier_ones_and_overrides_over_both(tmp_path: Path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("seed: 1\ndata: {batch_size: 10}\noptim: {lr: 0.1}\n")
    second.write_text("data: {batch_size: 20}\noptim:\n  lr: 2e-1\n")
    loaded = load_config([str(first), str(second)], ["optim.lr=3e-1"])
    assert (loaded.seed, loaded.data.batch_size, loaded.optim.lr) == (1, 20, 0.3)


def test_a_saved_configuration_loads_as_itself(tmp_path: Path):
    loaded = load_config((), ["model.args.width=3", "run.name=12", "train.precision=no", "train.max_steps=7"])
    (tmp_path / "c.yaml").write_bytes(config.dump_config(loaded))
    assert load_config([str(tmp_path / "c.yaml")]) == loaded


@pytest.mark.parametrize("text", ["precision: no", "precision: 'no'"])
def test_no_is_a_precision_in_yaml_too(tmp_path: Path, text: str):
    (tmp_path / "c.yaml").write_text(f"train:\n  {text}\n")
    assert load_config([str(tmp_path / "c.yaml")]).train.precision == "no"


@pytest.mark.parametrize(
    ("override", "value"),
    [("run.name=123", "123"), ("run.name=a=b", "a=b"), ("run.name=null", None), ("run.name=2026-01-01", "2026-01-01")],
)
def test_a_text_key_takes_the_text_as_it_is(override: str, value: str | None):
    assert load_config((), [override]).run.name == value


def test_arguments_of_the_network_keep_their_types():
    assert load_config((), ["model.args.width=3", "model.args.wide=true"]).model.args == {"width": 3, "wide": True}
    assert load_config((), ["model.args={a: [1, 2]}"]).model.args == {"a": [1, 2]}


NUMBERS = {"1e-1": 0.1, "5e-4": 5e-4, ".5": 0.5, "0o17": 15, "0x1F": 31, "017": 17, "-3": -3, "1e3": 1000.0, "3.": 3.0}
NOT_NUMBERS = {"true": True, "False": False, "null": None, "~": None} | {
    text: text for text in ("yes", "no", "on", "off", "1:30", "2026-01-01", "1_000", "0b11", "e3", "nan", "inf")
}


@pytest.mark.parametrize(("text", "value"), (NUMBERS | NOT_NUMBERS).items())
def test_values_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object):
    (tmp_path / "c.yaml").write_text(f"model: {{args: {{a: {text}, b: [{text}]}}}}\n")
    overrides = (f"model.args.a={text}", f"model.args.b=[{text}]")
    for loaded in (load_config([str(tmp_path / "c.yaml")]), load_config((), overrides)):
        assert loaded.model.args == {"a": value, "b": [value]}
        assert type(loaded.model.args["a"]) is type(value)


@pytest.mark.parametrize("text", ["1e3", "0o17", "yes", "5e-4", "1:30", "017", "2026-01-01", "null", "a: b"])
def test_text_stays_text_through_a_saved_configuration(tmp_path: Path, text: str):
    loaded = load_config((), [f"tracking.name={text}", f"model.args={{a: '{text}'}}"])
    (tmp_path / "c.yaml").write_bytes(config.dump_config(loaded))
    assert load_config([str(tmp_path / "c.yaml")]) == loaded
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["model"]["args"] == {"a": text}, "for a reader of YAML 1.1 too"


def test_a_text_key_of_a_file_takes_text_that_looks_like_a_number(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("run: {name: 1e3}\ntracking: {tags: [5e-4, no], name: no, notes: 2026-01-01}\n")
    loaded = load_config([str(tmp_path / "c.yaml")])
    assert (loaded.run.name, loaded.tracking.tags) == ("1e3", ["5e-4", "no"])
    assert (loaded.tracking.name, loaded.tracking.notes) == ("no", "2026-01-01")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.batch_size=0", ["data.batch_size=0", "at least 1"]),
        ("data.batch_size=1.5", ["data.batch_size=1.5", "a whole number"]),
        ("data.batch_size=null", ["data.batch_size=null", "a whole number"]),
        ("data.batch_size=", ["data.batch_size=", "a whole number"]),
        ("data.batchsize=5", ["'data.batchsize'", "'data.batch_size'"]),
        ("batch_size=5", ["'batch_size'", "'data.batch_size'"]),
        ("train.lr=5", ["'train.lr'", "'optim.lr'"]),
        ("data.batch_size.x=5", ["'data.batch_size.x'", "'data.batch_size'"]),
        ("data=5", ["data is a group"]),
        ("optim.lr=nan", ["optim.lr=nan", "above 0"]),
        ("optim.lr=inf", ["optim.lr=inf", "above 0"]),
        ("optim.lr=fast", ["optim.lr=fast", "a number"]),
        ("train.epochs=0", ["train.epochs=0", "above 0"]),
        ("data.name=cifar", ["data.name=cifar", "fashion_mnist"]),
        ("train.precision=fp64", ["fp64", "bf16"]),
        ("checkpoint.allow_change=perhaps", ["perhaps", "true or false"]),
        ("run.name=a/b", ["run.name='a/b'", "no slash"]),
        ("run.name=", ["run.name=''"]),
        ("run.name=${x}", ["run.name=${x}"]),
        ("checkpoint.resume=/nowhere", ["/nowhere", "auto, never"]),
        ("model.args=3", ["model.args=3", "a mapping"]),
        ("tracking.tags=a", ["tracking.tags=a", "a list of texts"]),
        ("tracking.tags=[[1]]", ["tracking.tags=[['1']]", "a list of texts"]),
        ("loud", ["'loud' is not key=value"]),
        ("optim.lr=yes", ["optim.lr=yes", "a number"]),
    ],
)
def test_a_mistake_is_reported_with_its_value_and_what_is_allowed(override: str, parts: list[str]):
    (reported,) = mistakes(override)
    assert all(part in reported for part in parts), reported


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.ge is not None or key.gt is not None])
def test_every_range_is_enforced(name: str):
    key = KEYS[name]
    below = key.gt if key.gt is not None else key.ge - 1
    assert name in mistakes(f"{name}={below}")[0]
    if key.le is not None:
        assert name in mistakes(f"{name}={key.le + max(1, key.le // 1000)}")[0]


def test_a_list_is_given_as_in_yaml():
    assert load_config((), ["tracking.tags=[a, 1]"]).tracking.tags == ["a", "1"]


def test_several_mistakes_are_reported_together(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("data: {batch_size: true}\noptm: {lr: 1}\n")
    reported = mistakes("seed=-1", "run.name=..", files=(str(tmp_path / "c.yaml"), "none.yaml"))
    assert len(reported) == 5


@pytest.mark.parametrize("text", ["a: [b", "- 3", "just text"])
def test_a_file_that_is_not_a_mapping_is_named(tmp_path: Path, text: str):
    (tmp_path / "c.yaml").write_text(text)
    (reported,) = mistakes(files=(str(tmp_path / "c.yaml"),))
    assert "c.yaml" in reported


def test_the_default_configuration_is_spelt_out():
    file = ROOT / "configs" / "default.yaml"
    assert load_config([str(file)]) == load_config()
    flat = dict(_flatten(yaml.safe_load(file.read_text())))
    assert flat.keys() == KEYS.keys()


CONFIGURATIONS = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs/sweep.yaml"})  # that one is W&B's


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_each_configuration_says_how_to_start_it(file: Path):
    first = file.read_text().splitlines()[0]
    assert first == f"# accelerate launch -m digitdist.train --config configs/{file.name}"
    load_config([str(file)])


def test_changes_are_named_if_they_alter_the_result():
    old, new = (
        config.as_dict(load_config()),
        config.as_dict(load_config((), ["seed=1", "train.epochs=20", "run.name=x", "train.threads=3"])),
    )
    assert config.result_changes(old, new) == ["seed was 0 and is now 1"]


@pytest.mark.parametrize(("mode", "name"), [("exact", "train.threads"), ("ddp", "sync.batch_norm")])
def test_a_key_may_alter_the_result_in_one_mode_alone(mode: str, name: str):
    assert KEYS[name].alters_result_in(mode)
    assert not KEYS[name].alters_result_in("local")


@pytest.mark.parametrize(("mode", "reason"), [("exact", "each shard"), ("local", "do not meet")])
def test_batchnorm_over_ranks_is_for_ddp_alone(mode: str, reason: str):
    (reported,) = mistakes("sync.batch_norm=true", f"sync.mode={mode}")
    assert reason in reported


def test_a_key_that_an_older_version_did_not_have_had_its_default_then():
    new = config.as_dict(load_config())
    old = {name: value for name, value in new.items() if name != "sync.batch_norm"}
    assert config.result_changes(old, new) == []
    assert config.result_changes(old, new | {"sync.batch_norm": True}) == ["sync.batch_norm was False and is now True"]


def test_an_unknown_key_of_an_older_version_counts_as_a_change():
    new = config.as_dict(load_config())
    assert config.result_changes(new | {"optim.rho": 1}, new) == ["optim.rho was 1 and is now None"]


def test_a_shipped_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert set(config.shipped_configs()) == {file.stem for file in CONFIGURATIONS}
    assert load_config(["quick"]) == load_config([str(ROOT / "configs/quick.yaml")])
    (tmp_path / "quick").write_text("seed: 5\n")
    assert load_config(["quick"]).seed == 5, "a file of one's own wins"
    (reported,) = mistakes(files=("quack",))
    assert "one of best, default, fast, quick, sharp" in reported


def test_help_names_every_key():
    assert all(name in config.describe_keys() for name in KEYS)


def test_the_default_configuration_explains_each_key_as_the_schema_does():
    lines = (ROOT / "configs/default.yaml").read_text().splitlines()
    assert [key.name for key in KEYS.values() if not any(line.endswith(f"# {key.help}") for line in lines)] == []


def test_the_page_of_configurations_has_every_key_as_the_schema_does():
    page = (ROOT / "configs/README.md").read_text()
    for key in KEYS.values():
        alters = {True: "yes", False: "no"}[key.alters_result] if isinstance(key.alters_result, bool) else "mode"
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key.name}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:4] == [key.help, key.allowed]
        assert alters in cells[4]
        default = "null" if key.default is None else str(key.default)
        assert cells[1] in (f"`{default}`", f"`{default.lower()}`")


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_not_combined_with_accumulation(mode: str):
    (reported,) = mistakes(f"train.compile={mode}", "train.accumulate=2")
    assert "set compile to default, or accumulate to 1" in reported
    load_config((), [f"train.compile={mode}"])
