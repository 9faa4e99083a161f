"""What a key makes of a value that was read for it: of its type and in its range, or a mistake."""

from __future__ import annotations

from typing import Any

import yaml

from digitdist.config.interpolation import texts_in
from digitdist.config.keys import Key
from digitdist.config.yaml_core import MAX_DEPTH, describe_problem, parse_scalar

MAX_SHOWN = 200
MAX_LEVELS = MAX_DEPTH - 8  # of arguments, which are some levels down in a file
MISSING = "???"


def fit(key: Key, value: Any) -> Any:
    """`value` as `key` holds it. Text that stands for a number or a truth value is read as YAML.

    Raises:
        ValueError: the key does not take it. The message is empty where `key.allowed` says enough.
    """
    if _is_deeper(value, MAX_LEVELS):
        raise ValueError(f"it is nested more than {MAX_LEVELS} deep")
    for text in texts_in(value):
        if text == MISSING:
            raise ValueError("??? stands for a value that is still to be given")
        if not _is_unicode(text):
            raise ValueError("it is not valid Unicode")
    if key.is_mapping:
        return _arguments(value)
    if isinstance(value, str) and not key.holds_text:
        value = _scalar(value)
    if value is None and key.takes(type(None)):
        return None
    if key.is_list:
        return [_text(item) for item in value] if isinstance(value, list) else _refuse()
    if key.holds_text:
        text = _text(value)
        if "no" in key.choices and text.lower() == "false":
            return "no"  # what a writer of YAML 1.1 makes of it
        return text if not key.choices or text in key.choices else _refuse()
    if isinstance(value, bool) or key.takes(bool):
        return value if isinstance(value, bool) and key.takes(bool) else _refuse()
    return _number(key, value)


def printable(text: str) -> str:
    """`text` on one line, with escapes in place of what is not to be printed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """`value` in a message: on one line, and cut where it is long."""
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    text = printable(text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(item, levels - 1) for item in inner)


def _refuse() -> Any:
    raise ValueError


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _scalar(text: str) -> Any:
    try:
        return parse_scalar(text)
    except yaml.YAMLError as error:
        raise ValueError(describe_problem(error)) from None


def _text(value: Any) -> str:
    if isinstance(value, bool):  # these come from another key by ${…}
        return str(value).lower()
    return str(value) if isinstance(value, (str, int, float)) else _refuse()


def _number(key: Key, value: Any) -> int | float:
    try:
        number = float(value) if key.takes(float) and isinstance(value, (int, float)) else value
    except OverflowError:
        return _refuse()
    takes = type(number) is (float if key.takes(float) else int)
    return number if takes and key.in_range(number) else _refuse()


def _arguments(value: Any) -> dict[str, Any]:
    """A mapping of arguments; its keys are Python's names of them."""
    if not isinstance(value, dict):
        return _refuse()
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"the name of an argument must be text, not {name}")
    for name in _names(value):
        if not _is_unicode(name):
            raise ValueError("it is not valid Unicode")
    return value


def _names(value: Any) -> list[str]:
    items = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [name for name in value if isinstance(name, str)] if isinstance(value, dict) else []
    return own + [name for item in items for name in _names(item)]
