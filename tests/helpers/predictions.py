"""Two sets of predictions of the same images, which rounding may set apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def assert_close(file: Path, other: Path, tolerance: float) -> None:
    """The same images and labels; probabilities within `tolerance`; and another class only where the first two are that close.

    Each file is a ``predictions.npz``, which has the probability of the predicted class alone: if both networks give each class
    the same probability but for `tolerance`, they predict two classes only where each has at most one half of what there is.
    """
    ours, theirs = np.load(file), np.load(other)
    assert np.array_equal(ours["index"], theirs["index"])
    assert np.array_equal(ours["label"], theirs["label"])
    ours_p, theirs_p = (saved["probability"].astype(np.float64) for saved in (ours, theirs))
    assert np.abs(ours_p - theirs_p).max() <= tolerance
    differ = ours["prediction"] != theirs["prediction"]
    assert np.maximum(ours_p, theirs_p)[differ].max(initial=0) <= 0.5 + tolerance
