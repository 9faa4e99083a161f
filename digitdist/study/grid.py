"""A grid: every combination of some values, a study of each."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from digitdist.config import Config
from digitdist.errors import UserError

MAX_NAME = 120  # characters of a combination's folder
OTHER = re.compile(r"[^\w.=,+-]+")  # what a folder's name does not have


def combinations(axes: Sequence[str], folder: Path) -> dict[Path, list[str]]:
    """The ``key=value`` arguments of each combination of `axes`, such as ``optim.lr=0.1,0.2``, by the folder of its study.

    Raises:
        UserError: an axis is not ``key=value,value``, or stands there twice.
    """
    values = {}
    for axis in axes:
        name, equals, text = axis.partition("=")
        found = list(dict.fromkeys(split_values(text)))
        if not equals or not name or not all(found):
            raise UserError(f"--grid {axis} is not key=value,value; write for example optim.lr=0.001,0.002")
        if name in values:
            raise UserError(f"--grid has {name} twice; write all of its values once, such as {name}=1,2")
        values[name] = [f"{name}={value}" for value in found]
    return {folder / _folder_name(combination): list(combination) for combination in itertools.product(*values.values())}


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
