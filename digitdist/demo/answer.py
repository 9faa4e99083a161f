"""What the page is told of a picture: what the network sees of it, how probable each class is, and its nearest neighbours."""

from __future__ import annotations

import base64
import io
from threading import Lock
from typing import Any

from PIL import Image
from torch import Tensor

from digitdist.data import displayable, open_picture, picture_form
from digitdist.demo.features import FeatureModel, TrainingFeatures
from digitdist.errors import UserError

NUM_NEIGHBOURS = 5


class Answerer:
    """Answers about pictures, by the network of a run; several threads may ask at once."""

    def __init__(self, model: FeatureModel, training: TrainingFeatures | None):
        self.model, self.training = model, training
        self._lock = Lock()  # the network keeps what it has seen last

    def __call__(self, content: bytes) -> dict[str, Any]:
        """About a picture, of the formats that `predict` takes: `image`, what the network sees of it, `probabilities`, and
        `neighbours` with image, class, index and cosine; all that JSON can hold, images as ``data:`` addresses.

        Raises:
            UserError: it is no picture, holds no digit or several, or the network gives no numbers for it.
        """
        info = self.model.info
        image = picture_form(open_picture(content), info)
        with self._lock:
            (probabilities,), (features,) = self.model(image[None])
        if not bool(probabilities.isfinite().all()):
            raise UserError("the network gives no finite numbers for it")
        nearest = self.training.nearest(features, NUM_NEIGHBOURS) if self.training else []
        return {
            "image": data_address(image),
            "probabilities": probabilities.tolist(),
            "neighbours": [
                {"image": data_address(one.image), "class": info.classes[one.label], "index": one.index, "cosine": one.cosine}
                for one in nearest
            ],
        }


def data_address(image: Tensor) -> str:
    """A raw image, uint8 [h, w] or [3, h, w], as a PNG in a ``data:`` address."""
    buffer = io.BytesIO()
    Image.fromarray(displayable(image[None])[0]).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
