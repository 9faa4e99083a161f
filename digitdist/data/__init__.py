"""Data sets, ours and users', what is done to their pixels, the order of a training, and the loaders of each rank's share.

A new data set is an entry of `DATA_SETS` and, where torchvision does not have it, a reader in a file of its own.
"""

from digitdist.data.datasets import AnySet, Batch, ImageSet, Share, Splits, StreamedSet, spread
from digitdist.data.forms import picture_form
from digitdist.data.info import DATA_SETS, DataSetInfo
from digitdist.data.loaders import TrainingSampler, evaluation_loader, prepare_loader
from digitdist.data.loading import held_out_seed, known_info, load_splits
from digitdist.data.loss_history import LOSS_HISTORY, LossHistory, NullLossHistory
from digitdist.data.mnist_form import mnist_form
from digitdist.data.order import Order
from digitdist.data.packaged_mnist import read_mnist
from digitdist.data.picture import list_pictures, open_picture, read_picture, upright_picture
from digitdist.data.randomness import derive_seed, seed_generators
from digitdist.data.sharding import Sharding
from digitdist.data.transforms import augment, black, displayable, normalise

__all__ = [
    "DATA_SETS",
    "LOSS_HISTORY",
    "AnySet",
    "Batch",
    "DataSetInfo",
    "ImageSet",
    "LossHistory",
    "NullLossHistory",
    "Order",
    "Sharding",
    "Share",
    "Splits",
    "StreamedSet",
    "TrainingSampler",
    "augment",
    "black",
    "derive_seed",
    "displayable",
    "evaluation_loader",
    "held_out_seed",
    "known_info",
    "list_pictures",
    "load_splits",
    "mnist_form",
    "normalise",
    "open_picture",
    "picture_form",
    "prepare_loader",
    "read_mnist",
    "read_picture",
    "seed_generators",
    "spread",
    "upright_picture",
]
