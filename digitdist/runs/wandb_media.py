"""Charts and tables for W&B: plain data that a file can keep, from which W&B's own objects are made when they are sent."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Media = Mapping[str, Any]  # what JSON can hold
NO_MEDIA: Mapping[str, Media] = {}


def confusion_chart(counts: np.ndarray, classes: Sequence[str]) -> Media:
    """A chart of `counts`, int [n, n]: how many images of class ``row`` were predicted as ``column``."""
    return {"kind": "confusion", "classes": list(classes), "counts": counts.tolist()}


def image_table(images: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> Media:
    """A table of `images`, uint8 [n, h, w] or [n, h, w, 3], with further columns of n values each."""
    return {"kind": "images", "images": [_png(image) for image in images], "columns": {k: list(v) for k, v in columns.items()}}


def is_whole(media: Any) -> bool:
    """Whether it is a chart or table that `draw` can make, as not all is that a damaged file holds."""
    try:
        if media["kind"] == "confusion":
            return np.array(media["counts"], dtype=np.int64).shape == 2 * (len(media["classes"]),)
        rows = len([_pixels(image) for image in media["images"]])
        return media["kind"] == "images" and all(len(values) == rows for values in media["columns"].values())
    except Exception:  # whatever damage raises
        return False


def draw(wandb: Any, media: Media) -> Any:
    """W&B's object of a chart or table; `wandb` is the module."""
    if media["kind"] == "confusion":
        return _draw_confusion(wandb, media)
    images = [wandb.Image(_pixels(image)) for image in media["images"]]
    rows = zip(images, *media["columns"].values(), strict=True)
    return wandb.Table(columns=["image", *media["columns"]], data=[list(row) for row in rows])


def _draw_confusion(wandb: Any, media: Media) -> Any:
    columns = ["Actual", "Predicted", "nPredictions"]  # those of W&B's own chart, which counts images one by one
    classes = media["classes"]
    rows = [[classes[i], classes[j], int(count)] for (i, j), count in np.ndenumerate(np.array(media["counts"]))]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=rows),
        {column: column for column in columns},
        {"title": "confusion"},
    )


def _png(image: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def _pixels(png: str) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(png)), formats=["png"]) as image:
        return np.array(image)
