"""A run's model as one file that needs nothing of this package, or as a folder with its card, compared before it is kept.

A new format is two functions and a line in `FORMATS`; the text of the card is ``templates/card.md.j2``.
"""

from digitdist.export.formats import FORMATS
from digitdist.export.parity import export

__all__ = ["FORMATS", "export"]
