"""The schema as a flat table of keys, each with what may stand there."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from digitdist.config.schema import Config

ENDS = ("train.epochs", "train.max_steps", "train.patience")  # by which a training ends; they may change when it is resumed
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key of the schema: its dotted name, its type, and what its field says of it."""

    name: str
    type: Any
    default: Any
    help: str
    ge: float | None
    gt: float | None
    le: float | None
    alters_result: bool | tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def is_mapping(self) -> bool:
        """True for a mapping whose own keys are the user's."""
        return typing.get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        """True for a list of texts."""
        return typing.get_origin(self.type) is list

    @property
    def holds_text(self) -> bool:
        """True for a text, a choice of texts, and a list of texts."""
        return not self.is_mapping and (bool(self.choices) or self.is_list or self.takes(str))

    def takes(self, kind: type) -> bool:
        return self.type is kind or kind in typing.get_args(self.type)

    def in_range(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
        )

    def alters_result_in(self, sync_mode: str) -> bool:
        """Whether the final weights of a training in `sync_mode` depend on this key."""
        return sync_mode in self.alters_result if isinstance(self.alters_result, tuple) else self.alters_result

    @property
    def allowed(self) -> str:
        """What may stand there, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.is_mapping or self.is_list:
            return "a mapping" if self.is_mapping else "a list of texts"
        kind = next(words for kind, words in KINDS.items() if self.takes(kind))
        bounds = [
            f"{label} {bound:g}" if isinstance(bound, float) else f"{label} {bound}"
            for label, bound in (("at least", self.ge), ("above", self.gt), ("at most", self.le))
            if bound is not None
        ]
        return " ".join([kind, " and ".join(bounds)]).strip() + (" or null" if self.takes(type(None)) else "")


def _keys(schema: type, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        name = prefix + item.name
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], name + ".")
        else:
            default = item.default_factory() if callable(item.default_factory) else item.default
            yield Key(name, hints[item.name], default, **item.metadata)


KEYS: dict[str, Key] = {key.name: key for key in _keys(Config)}
FOLDERS = ("data.root", "run.dir", "checkpoint.resume")  # whose ~ is expanded
GROUPS = {name.rpartition(".")[0] for name in KEYS} - {""}


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as a flat mapping of dotted keys to plain values."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in KEYS}


def result_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences of two flat configurations that alter the result, each with its old and new value.

    A key that `old` does not know yet had its default then.
    """
    old = {name: key.default for name, key in KEYS.items() if name in new} | old
    names = sorted(
        name
        for name in old.keys() | new.keys()
        if _differ(old.get(name), new.get(name)) and (name not in KEYS or KEYS[name].alters_result_in(new["sync.mode"]))
    )
    return [f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names]


def _differ(old: Any, new: Any) -> bool:
    """Whether two values differ, one of which JSON may have kept: with text for names, and not-a-number equal to itself."""
    return old != new and json.dumps(old) != json.dumps(new)


def nearest_key(name: str) -> str:
    """The valid key most like `name`: by the whole dotted key, or by its last part where that stands at the wrong level."""
    name = name[:100]  # of a longer one the search would take long

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.99 * last)

    return max(KEYS, key=likeness)


def describe_keys() -> str:
    """Every key with its default, meaning and range, for ``--help``."""
    lines = ["configuration keys (key=value):"]
    for key in KEYS.values():
        default = "null" if key.default is None else key.default
        lines.append(f"  {f'{key.name}={default}':34} {key.help}")
        lines.append(f"  {'':34}   ({key.allowed})")
    return "\n".join(lines)
