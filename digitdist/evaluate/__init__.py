"""The accuracy of a network as a proven count: predictions of all ranks, each image once, and their statistics.

A new statistic is a function with its source, in `statistics.py`, or over runs in `means.py`.
"""

from digitdist.evaluate.ensemble import mean_probabilities
from digitdist.evaluate.evaluating import chunked_loader, evaluate
from digitdist.evaluate.means import Difference, Mean, mean_interval, welch
from digitdist.evaluate.result import Evaluation, load_predictions, save_predictions
from digitdist.evaluate.saved import SavedPredictions, saved_predictions
from digitdist.evaluate.statistics import SIGNIFICANT, calibration, holm, mcnemar, p_in_words, share_in_words, wilson_interval

__all__ = [
    "SIGNIFICANT",
    "Difference",
    "Evaluation",
    "Mean",
    "SavedPredictions",
    "calibration",
    "chunked_loader",
    "evaluate",
    "holm",
    "load_predictions",
    "mcnemar",
    "mean_interval",
    "mean_probabilities",
    "p_in_words",
    "save_predictions",
    "saved_predictions",
    "share_in_words",
    "welch",
    "wilson_interval",
]
