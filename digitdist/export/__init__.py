"""A run's model, or that of several, as one file that needs nothing of this package, compared with it before it is kept.

A new format is two functions and a line in `FORMATS`.
"""

from digitdist.export.ensembles import export_ensemble
from digitdist.export.formats import FORMATS
from digitdist.export.parity import export

__all__ = ["FORMATS", "export", "export_ensemble"]
