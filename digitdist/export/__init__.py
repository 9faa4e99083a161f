"""The model of a run, or of several, as one file that needs nothing of this package, or as a folder with its card; compared.

A new format is two functions and a line in `FORMATS`; the text of the card is ``templates/card.md.j2``.
"""

from digitdist.export.ensembles import export_ensemble
from digitdist.export.formats import FORMATS
from digitdist.export.parity import export

__all__ = ["FORMATS", "export", "export_ensemble"]
