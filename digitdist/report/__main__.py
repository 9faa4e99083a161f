"""The command ``python -m digitdist.report RUN...``: plots and pages of runs and studies."""

from __future__ import annotations

from pathlib import Path

from digitdist.config import Parser
from digitdist.distributed import make_expendable, run_command
from digitdist.errors import UserError
from digitdist.report.comparison import write_comparison
from digitdist.report.run_page import write_report
from digitdist.report.study_page import write_study_report
from digitdist.runs import CONFIG, find_run_or_study, seeds_in, sync_wandb


def main() -> None:
    """The command."""
    make_expendable("stdout")  # since its product is a file
    parser = Parser(
        "python -m digitdist.report",
        "Plots and one HTML page of each run or study, and of several runs a page that compares them.",
        "quick other --output comparison.html",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[sync] RUN", help="folders or names of runs and studies; after sync, runs to send to W&B"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the comparison of several runs (default: comparison.html)")
    arguments = parser.parse_args()
    if arguments.runs[0] == "sync" and len(arguments.runs) > 1:
        for name in arguments.runs[1:]:
            found = find_run_or_study(name)
            for run in [found] if (found / CONFIG).is_file() else seeds_in(found).values():
                sync_wandb(run, print)
        return
    named = {folder.resolve(): folder for folder in map(find_run_or_study, arguments.runs)}.values()
    folders = [folder for folder in named if (folder / CONFIG).is_file()]
    studies = [folder for folder in named if folder not in folders]
    if arguments.output and len(folders) < 2:
        parser.error("--output names the comparison of several runs; one run's page is report.html in its folder")
    try:
        pages = [write_report(folder) for folder in folders] + [write_study_report(folder) for folder in studies]
        if len(folders) > 1:
            pages.append(arguments.output or Path("comparison.html"))
            write_comparison(folders, pages[-1])
    except OSError as error:
        where = error.filename or "what a report writes"  # a full disk has no name
        raise UserError(f"{where}: {error.strerror}; make room, or give a place that you can write to") from None
    for page in pages:  # at the end, since whoever reads this may stop before
        print(page, flush=True)


if __name__ == "__main__":
    run_command(main)
