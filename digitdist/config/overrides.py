"""A configuration as the ``key=value`` of a command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from digitdist.config.interpolation import escape, map_text
from digitdist.config.keys import KEYS, as_dict
from digitdist.config.schema import Config


def as_overrides(config: Config, names: Iterable[str]) -> list[str]:
    """``key=value`` for each key among `names` that is not at its default; `read_config` reads it as what it is."""
    values = as_dict(config)
    return [f"{name}={_as_text(map_text(values[name], escape))}" for name in names if values[name] != KEYS[name].default]


def _as_text(value: Any) -> str:
    """Text as it is, all else in JSON, which YAML includes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
