"""The training itself: `train`, its loop, what is due when, what a checkpoint holds, and what is recorded and shown.

To record something new, add it to `Recorder.log`; what a step does is in `Trainer.train_step` and in the strategies.
"""

from digitdist.train.command import train
from digitdist.train.setup import Setup, prepare
from digitdist.train.trainer import Trainer

__all__ = ["Setup", "Trainer", "prepare", "train"]
