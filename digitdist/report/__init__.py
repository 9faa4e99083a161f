"""What a person looks at: plots and one HTML page of a run or of a study, and a page that compares several runs.

A new plot is a function in `plots.py`, a line in `write_report` and one in ``templates/run.html.j2``.
"""

from digitdist.report.comparison import write_comparison
from digitdist.report.page import html_environment
from digitdist.report.run_page import write_report
from digitdist.report.study import (
    COLUMNS,
    Study,
    as_study,
    compare,
    finite,
    obstacle,
    read_study,
    summary,
    summary_row,
    verdict,
)
from digitdist.report.study_page import write_study_report

__all__ = [
    "COLUMNS",
    "Study",
    "as_study",
    "compare",
    "finite",
    "html_environment",
    "obstacle",
    "read_study",
    "summary",
    "summary_row",
    "verdict",
    "write_comparison",
    "write_report",
    "write_study_report",
]
