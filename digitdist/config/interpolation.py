"""``${…}`` in a value: OmegaConf resolves it. ``\\${`` is a plain ``${``, and a ``$`` without a brace is a dollar."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

OPENING = re.compile(r"(\\*)\$\{")
MAX_INTERPOLATIONS = 40  # they may refer to each other, so that their number is an exponent


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with each text in it changed; names of entries stay."""
    if isinstance(value, dict):
        return {name: map_text(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def texts_in(value: Any) -> list[str]:
    """Each text in `value`, without the names of entries."""
    found: list[str] = []
    map_text(value, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def escape(text: str) -> str:
    """What must be written for `text` to be read as it is."""
    return OPENING.sub(lambda found: found[1] * 2 + r"\${", text)


def unescape(text: str) -> str:
    """The text that is meant where nothing is resolved: a ``${`` without its backslash stays as well."""
    return OPENING.sub(lambda found: found[0] if len(found[1]) % 2 == 0 else found[1][: len(found[1]) // 2] + "${", text)


def count(value: Any) -> int:
    """How many ``${…}`` of `value` are to be resolved."""
    return sum(len(found[1]) % 2 == 0 for text in texts_in(value) for found in OPENING.finditer(text))


def resolve(settled: dict[str, Any], unresolved: dict[str, Any]) -> dict[str, Any]:
    """The values of `unresolved`, by dotted key; in place of a value its `Unresolvable` where it has none.

    `settled`: all other values of the configuration, to which ``${…}`` may refer.
    """
    found: dict[str, Any] = {name: problem for name, value in unresolved.items() if (problem := _misspelt(value))}
    if sum(map(count, unresolved.values())) > MAX_INTERPOLATIONS:
        return dict.fromkeys(unresolved, Unresolvable(f"a configuration takes at most {MAX_INTERPOLATIONS} of them"))
    tree = {name: map_text(value, escape) for name, value in settled.items()}
    nested: dict[str, Any] = {}
    for name, value in (tree | {name: value for name, value in unresolved.items() if name not in found}).items():
        group, _, last = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[last] = value
    config = OmegaConf.create(nested)
    for name in unresolved.keys() - found.keys():
        group, _, last = name.rpartition(".")
        try:
            value = (config[group] if group else config)[last]
            found[name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except Exception as error:  # a resolver may raise anything
            found[name] = Unresolvable(error)
    return found


class Unresolvable(Exception):
    """Why a ``${…}`` has no value."""

    def __str__(self) -> str:
        lines = str(self.args[0]).splitlines()
        return lines[0] if lines else type(self.args[0]).__name__


def _misspelt(value: Any) -> Unresolvable | None:
    try:
        OmegaConf.create({"": value})
    except (OmegaConfBaseException, RecursionError) as error:
        return Unresolvable(error)
    return None
