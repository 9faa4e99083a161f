"""A trained model in a program of one's own: `load`, and the folder in which a model is passed on.

What a run's own folder holds is read by `digitdist.runs`.
"""

from digitdist.loading.folder import CARD_FILES, card_content, load_folder
from digitdist.loading.loading import load
from digitdist.loading.trained import TrainedModel

__all__ = ["CARD_FILES", "TrainedModel", "card_content", "load", "load_folder"]
