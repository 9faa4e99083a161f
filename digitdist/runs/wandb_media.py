"""Charts and tables for W&B. Each is a function that makes one from the module wandb, which only W&B's thread imports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Media = Callable[[Any], Any]
NO_MEDIA: Mapping[str, Media] = {}


def confusion_chart(counts: np.ndarray, classes: Sequence[str]) -> Media:
    """A chart of `counts`, int [n, n]: how many images of class ``row`` were predicted as ``column``."""
    columns = ["Actual", "Predicted", "nPredictions"]  # those of W&B's own chart, which counts images one by one
    rows = [[classes[i], classes[j], int(count)] for (i, j), count in np.ndenumerate(counts)]
    return lambda wandb: wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=rows),
        {column: column for column in columns},
        {"title": "confusion"},
    )


def image_table(images: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> Media:
    """A table of `images`, uint8 [n, h, w] or [n, h, w, 3], with further columns of n values each."""
    rows = list(zip(*columns.values(), strict=True))
    return lambda wandb: wandb.Table(
        columns=["image", *columns], data=[[wandb.Image(image), *row] for image, row in zip(images, rows, strict=True)]
    )
