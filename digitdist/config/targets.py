"""A user's own class, named by a key such as ``model.target``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from digitdist.errors import UserError, in_one_line


def import_target(key: str, target: str) -> Callable[..., Any]:
    """What `target`, the value of `key`, names.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"{key}={target} cannot be imported ({in_one_line(error)}); give package.module.Class from PYTHONPATH"
        ) from None
