"""A grid: every combination of some values, a study of each."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from digitdist.config import ENDS, KEYS, Config
from digitdist.errors import UserError

MAX_NAME = 120  # characters of a combination's folder
OF_IMAGES = ("data.name", "data.root", "data.target", "data.args", "data.validation", "data.validation_seed")
OTHER = re.compile(r"[^\w.=,+-]+")  # what a folder's name does not have


def combinations(axes: Sequence[str], folder: Path) -> dict[Path, list[str]]:
    """The ``key=value`` arguments of each combination of `axes`, such as ``optim.lr=0.1,0.2``, by the folder of its study.

    Raises:
        UserError: an axis is not ``key=value,value``, stands there twice, or gives combinations that cannot be ranked.
    """
    values = {}
    for axis in axes:
        name, equals, text = axis.partition("=")
        found = list(dict.fromkeys(split_values(text)))
        if not equals or not name or not all(found):
            raise UserError(f"--grid {axis} is not key=value,value; write for example optim.lr=0.001,0.002")
        _check_rankable(name)
        if name in values:
            raise UserError(f"--grid has {name} twice; write all of its values once, such as {name}=1,2")
        values[name] = [f"{name}={value}" for value in found]
    return {folder / _folder_name(combination): list(combination) for combination in itertools.product(*values.values())}


def is_axis(word: str) -> bool:
    """Whether a word gives several values, as an axis does, and not one, as ``key=value`` does."""
    return len(split_values(word)) > 1


def _check_rankable(name: str) -> None:
    """Refuses a key whose values hold out other images, or all give the same result."""
    if name in OF_IMAGES or name.startswith("data.args."):
        raise UserError(
            f"--grid {name} is not allowed: its combinations hold out other images, which do not rank them; make a study of"
            " each value"
        )
    if name in KEYS and not KEYS[name].alters_result and name not in ENDS:
        raise UserError(f"--grid {name} is not allowed: it does not alter the result; give keys that do, such as optim.lr")


def split_values(text: str) -> list[str]:
    """The values of an axis: `text` between its commas, but not at those in brackets, braces or quotes."""
    values, depth, quote, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and not depth:
            values.append(text[start:place])
            start = place + 1
    return [*values, text[start:]]


def check_held_out(config: Config) -> None:
    """Refuses to choose by test images.

    Raises:
        UserError: the training holds no images out.
    """
    if not config.data.validation:
        raise UserError(
            "--grid chooses by held-out images, and data.validation=0 holds none out; set for example data.validation=5000"
        )


def _folder_name(combination: Sequence[str]) -> str:
    """The combination as the name of a folder, told apart by a hash where it has other characters, or is long."""
    text = ",".join(combination)
    name = OTHER.sub("_", text)[:MAX_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
