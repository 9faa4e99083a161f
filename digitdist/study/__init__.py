"""A study: the same training over many seeds, or over a grid of values, with its mean, interval and comparisons.

What a study has found is read and compared in `report`; here its runs are planned, trained side by side, and told.
"""

from digitdist.study.planning import Training, plan_study
from digitdist.study.progress import Progress
from digitdist.study.running import Outcome, train_all
from digitdist.study.slots import Slot, make_slots
from digitdist.study.table import study_table

__all__ = ["Outcome", "Progress", "Slot", "Training", "make_slots", "plan_study", "study_table", "train_all"]
