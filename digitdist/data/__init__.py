"""Data sets, what is done to their pixels, the order of a training, and the loaders that give each rank its share.

A new data set is an entry of `DATA_SETS` and, where torchvision does not have it, a reader in a file of its own.
"""

from digitdist.data.datasets import DATA_SETS, Batch, DataSetInfo, ImageSet, Share, Splits
from digitdist.data.loaders import TrainingSampler, evaluation_loader, prepare_loader
from digitdist.data.loading import load_splits
from digitdist.data.loss_history import LossHistory, NullLossHistory
from digitdist.data.order import Order
from digitdist.data.randomness import derive_seed, seed_generators
from digitdist.data.sharding import Sharding
from digitdist.data.transforms import augment, normalise

__all__ = [
    "DATA_SETS",
    "Batch",
    "DataSetInfo",
    "ImageSet",
    "LossHistory",
    "NullLossHistory",
    "Order",
    "Sharding",
    "Share",
    "Splits",
    "TrainingSampler",
    "augment",
    "derive_seed",
    "evaluation_loader",
    "load_splits",
    "normalise",
    "prepare_loader",
    "seed_generators",
]
