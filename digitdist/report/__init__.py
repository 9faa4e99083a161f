"""What a person looks at: plots and one HTML page of a run, and a page that compares several runs.

A new plot is a function in `plots.py`, a line in `write_report` and one in ``templates/run.html.j2``.
"""

from digitdist.report.comparison import write_comparison
from digitdist.report.run_page import write_report

__all__ = ["write_comparison", "write_report"]
