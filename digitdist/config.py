"""The configuration: a typed schema that holds the defaults; YAML files and ``key=value`` merged, checked and saved.

Every mistake is found before anything is started, and all mistakes are told together, in one ``UserError``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import functools
import math
import os
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(Exception):
    """The user's mistakes, each with its value, what is allowed and what to do. The command ends with exit code 2."""

    def __init__(self, *mistakes: str):
        super().__init__(*mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "\n       ".join(self.mistakes)  # aligned under the first one, which follows "error: "


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes options anywhere between ``key=value``, whose mistakes are told as all others are, and
    whose help is printed once for all ranks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        return self.parse_intermixed_args(*arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what is allowed")

    def print_help(self, file: Any = None) -> None:
        if is_main():
            super().print_help(file)


def is_main() -> bool:
    """True for the main rank, as the launcher's environment tells it."""
    return os.environ.get("RANK", "0") == "0"


def key(default: Any, meaning: str, *, low: float | None = None, above: float | None = None, high: float | None = None) -> Any:
    """A configuration key: its default, what it means, and its range (``low <= x``, ``above < x``, ``x <= high``)."""
    metadata = {"meaning": meaning, "low": low, "above": above, "high": high}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    name: Literal["mnist", "fashion_mnist", "kmnist", "qmnist", "emnist_digits", "usps"] = key(
        "mnist", "data set; mnist ships with the package, the others are downloaded by torchvision"
    )
    root: str = key("data", "folder where data sets are kept")
    batch_size: int = key(100, "global batch: images of one step, over all ranks and micro-batches", low=1)
    eval_batch_size: int = key(1000, "global batch of an evaluation, cut into sync.shards parts", low=1)
    validation: int = key(0, "training images held out for choosing; a fixed choice by seed", low=0)
    focus: int = key(
        1, "passes of each epoch after the first, over the images of the highest losses and some others; 1: all, once", low=1
    )


@dataclass
class AugmentConfig:
    shift: float = key(0.0, "largest random shift of a training image, in pixels", low=0, high=14)
    rotate: float = key(0.0, "largest random rotation, in degrees", low=0, high=180)
    scale: float = key(0.0, "largest random change of size, as a fraction", low=0, high=0.9)
    shear: float = key(0.0, "largest random slant, in pixels to the side a pixel of height", low=0, high=2)


@dataclass
class ModelConfig:
    name: str = key("cnn", "a name in digitdist.models.MODELS")
    target: str | None = key(None, "your own model instead: package.module.Class, images [n,1,28,28] to logits [n,10]")
    args: dict[str, Any] = key({}, "keyword arguments for the model's class")


@dataclass
class OptimConfig:
    name: Literal["adam", "adamw", "sgd"] = key("adam", "optimizer")
    lr: float = key(0.001, "learning rate, the peak of the schedule", above=0)
    weight_decay: float = key(0.0, "L2 penalty (adam, sgd) or decoupled decay (adamw)", low=0)
    momentum: float = key(0.9, "momentum of sgd", low=0, high=0.9999)
    beta1: float = key(0.9, "decay of Adam's first moment", low=0, high=0.9999)
    beta2: float = key(0.999, "decay of Adam's second moment", low=0, high=0.999999)
    clip_norm: float = key(0.0, "largest L2 norm of a step's gradient; 0: not clipped", low=0)
    ema: float = key(0.0, "decay of the moving average of weights that is then evaluated; 0: none", low=0, high=0.999999)


@dataclass
class ScheduleConfig:
    name: Literal["constant", "step", "cosine", "onecycle"] = key("constant", "learning rate over steps")
    warmup_steps: int = key(0, "steps of linear warm-up from 0 (onecycle has its own)", low=0)
    step_epochs: float = key(1.0, "step: epochs between two drops", above=0)
    gamma: float = key(0.7, "step: factor of a drop", above=0, high=1)
    peak: float = key(0.3, "onecycle: where the peak lies, as a fraction of all steps", above=0, high=0.99)
    final: float = key(0.0, "cosine, onecycle: last rate as a fraction of optim.lr", low=0, high=1)


@dataclass
class TrainConfig:
    epochs: float = key(9.0, "passes over the training set; may be fractional", above=0)
    max_steps: int | None = key(None, "stops earlier, after so many steps", low=1)
    accumulate: int = key(1, "micro-batches a step, to save memory; the step stays that of the global batch", low=1)
    precision: Literal["auto", "fp32", "no", "bf16", "fp16", "fp8"] = key(
        "auto", "auto: what accelerate launch was told, else the device's best"
    )
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = key(
        "none", "torch.compile in that mode, reduce-overhead: with CUDA graphs; takes a while before the first step"
    )
    threads: int | None = key(None, "threads a process; default: cores / local ranks, in exact mode 1", low=1, high=1024)
    label_smoothing: float = key(0.0, "label smoothing of the training loss", low=0, high=0.99)
    log_every: int = key(20, "steps between two log lines", low=1)
    profile: int = key(0, "steps to profile after a short warm-up, into trace.json of the run's folder; 0: none", low=0)
    eval_every: int = key(1, "epochs between two evaluations; 0: only at the end", low=0)


@dataclass
class SyncConfig:
    mode: Literal["ddp", "exact", "local"] = key(
        "ddp", "how ranks agree; exact: equal bits for any world size; local: every so many steps, for thin links (DiLoCo)"
    )
    shards: int = key(8, "exact: fixed parts of a global batch, the largest world size", low=1, high=4096)
    every: int = key(50, "local: steps that a rank takes by itself between two meetings", low=1)
    outer_lr: float = key(1.0, "local: rate of the outer step; 1 with outer_momentum=0 is plain averaging", above=0)
    outer_momentum: float = key(0.5, "local: Nesterov momentum of the outer step", low=0, high=0.9999)
    overlap: bool = key(False, "local: go on while the ranks exchange; the outer step is then a round late")
    compress: Literal["none", "bf16", "fp16", "powersgd"] = key("none", "ddp: how gradients are sent, for thin links")
    check_every: int = key(200, "steps between two comparisons of the weights of all ranks; 0: never", low=0)
    join_timeout_s: float = key(600.0, "seconds to wait at the start for every rank", above=0)
    timeout_s: float = key(300.0, "seconds after which a rank that does not answer ends the run", above=0)


@dataclass
class CheckpointConfig:
    every_steps: int = key(600, "steps between two checkpoints; 0: only at the end", low=0)
    keep: int = key(3, "how many of the last are kept", low=1)
    resume: str = key("auto", "auto: go on with the run of that name; never: start over; or a checkpoint's folder")
    allow_change: bool = key(False, "go on although a key that alters the result has changed")


@dataclass
class RunConfig:
    dir: str = key("runs", "folder of all runs")
    name: str | None = key(None, "folder of this run in run.dir; default: the time")
    report: bool = key(True, "write plots and report.html at the end")


@dataclass
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = key(
        "auto", "W&B; auto: online with a key and a reachable server, else offline"
    )
    project: str = key("digitdist", "W&B project")
    entity: str | None = key(None, "W&B entity (user or team)")
    group: str | None = key(None, "W&B group of runs")
    tags: list[str] = key([], "W&B tags, such as [a, b]")
    name: str | None = key(None, "the run's name in W&B; default: that of its folder")
    notes: str | None = key(None, "W&B notes")
    artifacts: bool = key(False, "the final weights as a W&B artifact, with the result as its metadata")


@dataclass
class Config:
    seed: int = key(0, "the only source of randomness", low=0, high=2**32 - 1)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


HARMLESS = {  # keys that leave a run's weights as they are: they may change when it goes on
    *("data.root", "data.eval_batch_size", "train.epochs", "train.max_steps", "train.threads", "train.log_every"),
    *("train.eval_every", "sync.check_every", "sync.join_timeout_s", "sync.timeout_s"),
    *("checkpoint.every_steps", "checkpoint.keep"),
    *("checkpoint.resume", "checkpoint.allow_change", "run.dir", "run.name", "run.report"),
    *("train.profile", "tracking.wandb", "tracking.project", "tracking.entity", "tracking.group", "tracking.tags"),
    *("tracking.name", "tracking.notes", "tracking.artifacts"),
}


@dataclass(frozen=True)
class Key:
    """One leaf of the schema: its dotted name, its type, and what its field says of it."""

    name: str
    type: Any
    default: Any
    meaning: str
    low: float | None
    above: float | None
    high: float | None

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def free(self) -> bool:
        """True for a mapping whose own keys are the user's."""
        return typing.get_origin(self.type) is dict

    @property
    def many(self) -> bool:
        """True for a list of texts."""
        return typing.get_origin(self.type) is list

    def takes(self, kind: type) -> bool:
        return self.type is kind or kind in typing.get_args(self.type)

    @property
    def allowed(self) -> str:
        """What may stand there, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.free or self.many:
            return "a mapping" if self.free else "a list of texts"
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        words = next(word for kind, word in kinds.items() if self.takes(kind))
        bounds = [
            f"{label} {bound:g}" if abs(bound) < 1e6 else f"{label} {int(bound)}"
            for label, bound in (("at least", self.low), ("above", self.above), ("at most", self.high))
            if bound is not None
        ]
        return " ".join([words, " and ".join(bounds)]).strip() + (" or null" if self.takes(type(None)) else "")


def _leaves(schema: type, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        name = prefix + item.name
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _leaves(hints[item.name], name + ".")
        else:
            default = item.default_factory() if callable(item.default_factory) else item.default
            yield Key(name, hints[item.name], default, **item.metadata)


KEYS: dict[str, Key] = {leaf.name: leaf for leaf in _leaves(Config)}
GROUPS = {name.rpartition(".")[0] for name in KEYS} - {""}


def load(files: Sequence[str] = (), overrides: Sequence[str] = ()) -> Config:
    """What `read` gives.

    Raises:
        UserError: with every mistake found.
    """
    config, mistakes = read(files, overrides)
    if mistakes:
        raise UserError(*mistakes)
    return config


def read(files: Sequence[str], overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The defaults, then each YAML file, then each ``key=value``: the later one wins.

    Beside it, every mistake found, naming key, value, what is allowed and the nearest valid key; such a key is left as it was.
    """
    mistakes: list[str] = []
    values: list[tuple[str, Any]] = []
    for file in files:
        try:
            values += _flatten(_read_yaml(file))
        except UserError as error:
            mistakes += error.mistakes
    for text in overrides:
        name, equals, value = text.partition("=")
        if equals:
            values.append((name.strip(), _parse(name.strip(), value)))
        else:
            mistakes.append(f"{text!r} is not key=value; write for example data.batch_size=256")

    tree = OmegaConf.structured(Config)
    for name, value in dict(values).items():
        before = copy.deepcopy(tree)
        mistake = _set(tree, name, value)
        if mistake:
            mistakes.append(mistake)
            tree = before
    config = typing.cast(Config, OmegaConf.to_object(tree))
    return config, mistakes + _check_names(config)


def save(config: Config, file: Path) -> None:
    """Writes the whole resolved configuration as YAML, which `load` reads."""
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration flat: dotted key to plain value."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in KEYS}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys that alter the result and differ, each with its old and new value, for a run that goes on."""
    # One thread count has one rounding; in local mode the ranks also meet before an evaluation and a checkpoint.
    altering = {"exact": {"train.threads"}, "local": {"train.eval_every", "checkpoint.every_steps"}}
    harmless = HARMLESS - altering.get(new["sync.mode"], set())
    names = sorted((old.keys() | new.keys()) - harmless)
    return [f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def describe() -> str:
    """Every key with its default and meaning, for ``--help``."""
    lines = ["configuration keys (key=value):"]
    for leaf in KEYS.values():
        default = "null" if leaf.default is None else leaf.default
        lines.append(f"  {f'{leaf.name}={default}':34} {leaf.meaning}")
        lines.append(f"  {'':34}   ({leaf.allowed})")
    return "\n".join(lines)


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"--config {file} holds a {type(tree).__name__}; a YAML mapping of keys is wanted")
    return tree


def _flatten(tree: dict[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a YAML tree as dotted keys; a free mapping (model.args) and an empty one stay whole."""
    flat: list[tuple[str, Any]] = []
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and value and not (name in KEYS and KEYS[name].free):
            flat += _flatten(value, name + ".")
        elif not (name in GROUPS and (value is None or value == {})):  # a group with nothing under it says nothing
            flat.append((name, value))
    return flat


def _parse(name: str, text: str) -> Any:
    """The value of a ``key=value``: plain text where the key holds text, else as in YAML."""
    leaf = KEYS.get(name)
    if leaf and not leaf.free and not leaf.many:
        return None if text in ("null", "~") and leaf.takes(type(None)) else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(tree: Any, name: str, value: Any) -> str | None:
    """Puts one value into the tree; returns what is wrong with it, if anything."""
    leaf = KEYS.get(name) or next((k for k in KEYS.values() if k.free and name.startswith(k.name + ".")), None)
    if leaf is None:
        if name in GROUPS:
            return f"{name}={value}: {name} is a group of keys; set one of them, such as {_nearest(name + '.')}"
        return f"{name}={value}: there is no key {name!r}; did you mean {_nearest(name)!r}? (--help lists all)"
    wrong = f"{name}={value} is not allowed; {leaf.name} takes {leaf.allowed}"
    if leaf.choices and value is False and "no" in leaf.choices:
        value = "no"  # a bare `no` in YAML
    if isinstance(value, bool) and not leaf.takes(bool) and not leaf.free:
        return wrong
    if leaf.many and not (isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value)):
        return wrong
    try:
        OmegaConf.update(tree, name, value, merge=leaf.name == name, force_add=leaf.free and leaf.name != name)
        number = OmegaConf.select(tree, name)
    except (OmegaConfBaseException, ValueError):
        return wrong
    if isinstance(number, (int, float)) and not leaf.free and not _in_range(leaf, number):
        return wrong
    return None


def _in_range(leaf: Key, number: float) -> bool:
    return (
        math.isfinite(number)
        and (leaf.low is None or number >= leaf.low)
        and (leaf.above is None or number > leaf.above)
        and (leaf.high is None or number <= leaf.high)
    )


def _nearest(name: str) -> str:
    """The valid key most like `name`: by the whole dotted key, or by its last part when it is at the wrong level."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.99 * last)

    return max(KEYS, key=likeness)


def _check_names(config: Config) -> list[str]:
    """What no type or range can tell: names and paths."""
    mistakes = []
    name, resume = config.run.name, config.checkpoint.resume
    if name is not None and (not name.strip() or name in (".", "..") or set(name) & set("/\\\0\n")):
        mistakes.append(f"run.name={name!r} is not allowed; it names one folder in run.dir, so no slash and not empty")
    if config.sync.compress != "none" and config.sync.mode != "ddp":
        mistakes.append(
            f"sync.compress={config.sync.compress} is not allowed with sync.mode={config.sync.mode}; it takes none there,"
            " since only ddp sends a gradient that may be rounded"
        )
    if config.train.compile != "none" and config.sync.mode == "exact":
        mistakes.append(
            f"train.compile={config.train.compile} is not allowed with sync.mode=exact; it takes none there, since what is"
            " compiled, and so the rounding, follows from the shapes that a process has met"
        )
    folders = {"data.root": Path(config.data.root)}
    if is_main():  # whose host holds the run
        folders["run.dir"] = Path(config.run.dir)
        if resume not in ("auto", "never") and not Path(resume).is_dir():
            mistakes.append(f"checkpoint.resume={resume}: there is no such folder; give auto, never or a checkpoint's folder")
    for label, folder in folders.items():
        there = nearest_folder(folder)
        if not there.is_dir():
            mistakes.append(f"{label}={folder}: {there} is a file; give a folder")
    return mistakes


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest of the folders above it that is there."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
