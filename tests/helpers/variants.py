"""Cases of a test for which CI has no time."""

from __future__ import annotations

from typing import Any

import pytest


def soak(*values: Any) -> Any:
    """A case that ``pytest -m soak`` runs, and CI does not."""
    return pytest.param(*values, marks=pytest.mark.soak)
