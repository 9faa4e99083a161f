"""A run's model as one file that needs nothing of this package, compared with the run before it is kept.

A new format is two functions and a line in `FORMATS`.
"""

from digitdist.export.formats import FORMATS
from digitdist.export.parity import export

__all__ = ["FORMATS", "export"]
