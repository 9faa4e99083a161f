"""The loss of each training image when it was last trained on, by which a focused pass chooses its images."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from digitdist.checkpoint import Tensors
from digitdist.data.datasets import AnySet

LOSS_HISTORY = "hardness"  # the name of its file in checkpoints, whose format is kept


class NullLossHistory:
    """Stands in where no pass is focused."""

    def record(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        pass

    def synchronise(self) -> None:
        pass

    def ranking(self) -> None:
        return None

    def state(self) -> dict[str, Tensors]:
        return {}

    def restore(self, stored: dict[str, Tensors], is_main: bool) -> None:
        pass


class LossHistory:
    """What all ranks know from before this pass (`known`), and what this rank has recorded since (`recent`).

    Both are float32 [largest index + 1]: infinite in `known` for images not yet seen, NaN in `recent` for those not seen since.
    """

    def __init__(self, images: AnySet):
        self.indices = images.indices
        self.known = torch.full((int(self.indices.max()) + 1,), math.inf, device=self.indices.device)
        self.recent = torch.full_like(self.known, math.nan)

    def record(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Records the cross-entropy of images just trained on: `logits` float32 [n, classes], the others int64 [n]."""
        self.recent[indices] = F.cross_entropy(logits.detach(), labels, reduction="none")

    def synchronise(self) -> None:
        """Makes known what all ranks have recorded. Collective: every rank must call it."""
        recent = self._recent_of_all_ranks()
        self.known = torch.where(recent.isnan(), self.known, recent)
        self.recent.fill_(math.nan)

    def ranking(self) -> Tensor:
        """The positions of all images by falling loss, those not yet seen first: int64 [num_images]."""
        return self.known[self.indices].argsort(descending=True, stable=True)

    def state(self) -> dict[str, Tensors]:
        """A group of tensors of a checkpoint. Collective: every rank must call it."""
        return {LOSS_HISTORY: {"known": self.known, "noted": self._recent_of_all_ranks()}}

    def restore(self, stored: dict[str, Tensors], is_main: bool) -> None:
        """Restores what `state` returned, if it is of the same images."""
        history = stored.get(LOSS_HISTORY, {})
        if len(history.get("known", ())) == len(self.known):
            self.known.copy_(history["known"])
            if is_main:
                self.recent.copy_(history["noted"])

    def _recent_of_all_ranks(self) -> Tensor:
        """No image is seen twice in a pass, so the sum over ranks is what one of them has recorded. Collective."""
        both = torch.stack([self.recent.nan_to_num(), (~self.recent.isnan()).float()])
        if dist.is_initialized():
            dist.all_reduce(both)
        return torch.where(both[1] > 0, both[0], math.nan)
