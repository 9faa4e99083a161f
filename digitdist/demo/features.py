"""Features of images: what the last layer of a network is given; and which training images are nearest in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from digitdist.data import AnySet, DataSetInfo, StreamedSet, spread
from digitdist.predict import predict

CHUNK = 500  # images of one forward pass
MAX_IMAGES = 60_000  # training images that are compared,
MAX_STREAMED = 5_000  # of a data set that is read item by item,
MAX_BYTES = 2**30  # and memory for their features
LOGITS = -1  # beside the numbers of layers


class FeatureModel:
    """A network in `eval` mode that gives the features of images beside their probabilities.

    Features are the inputs of its linear layers with one output a class, one after another: it has several of them where it
    averages columns. Of a network without any, its logits take their place. `description` says which, in words.
    """

    def __init__(self, model: nn.Module, info: DataSetInfo, precision: str):
        self.model, self.info, self.precision = model, info, precision
        self._seen: dict[int, Tensor] = {}
        model.register_forward_hook(lambda module, inputs, logits: self._seen.update({LOGITS: logits}))
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == info.num_classes]
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._keep, number))
        samples = torch.zeros(2, *info.raw_shape, dtype=torch.uint8)
        predict(model, samples, info, precision)
        # A layer may be called in another form, such as once a patch.
        self._from_layers = len(self._seen) > 1 and all(len(part) == len(samples) for part in self._seen.values())
        self.size = self(samples)[1].shape[1]
        kind = "features before the last linear layer" if self._from_layers else "logits, as no linear layer gives its classes"
        self.description = f"{self.size:,} {kind}"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, float32 [n, classes], and features of length 1, float32 [n, size], of raw images."""
        self._seen.clear()
        probabilities = predict(self.model, images, self.info, self.precision)
        logits = self._seen.pop(LOGITS)
        parts = self._seen.values() if self._from_layers else [logits]
        return probabilities, F.normalize(torch.cat([part.flatten(1).float() for part in parts], 1).nan_to_num())

    def _keep(self, number: int, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].ndim > 1:
            self._seen[number] = inputs[0]


@dataclass(frozen=True)
class Neighbour:
    """A training image: raw, uint8 [h, w] or [3, h, w], its label and index, and the cosine of its features and others'."""

    image: Tensor
    label: int
    index: int
    cosine: float


class TrainingFeatures:
    """The features of `images`, computed once, with a progress bar on a terminal; of many images, of some that are
    evenly spread over all."""

    def __init__(self, model: FeatureModel, images: AnySet):
        self.images = images
        most = MAX_STREAMED if isinstance(images, StreamedSet) else MAX_IMAGES
        self.positions = spread(len(images), max(1, min(most, MAX_BYTES // (4 * model.size))))
        self.features = torch.empty(len(self.positions), model.size)
        with tqdm(total=len(self.positions), desc="training images", unit=" images", disable=None, leave=False) as bar:
            for positions, features in zip(self.positions.split(CHUNK), self.features.split(CHUNK), strict=True):
                features.copy_(model(images.read(positions).images)[1])
                bar.update(len(positions))

    def __len__(self) -> int:
        return len(self.positions)

    def nearest(self, features: Tensor, count: int) -> list[Neighbour]:
        """The `count` images whose features have the greatest cosine with `features`, float32 [size], the nearest first."""
        cosines, places = (self.features @ features).topk(min(count, len(self)))
        found = self.images.read(self.positions[places])
        rows = zip(found.images, found.labels.tolist(), found.indices.tolist(), cosines.tolist(), strict=True)
        return [Neighbour(*row) for row in rows]
