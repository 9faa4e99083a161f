"""A run's folder: opened and resumed, moved between hosts, found again, and what is recorded in it and in W&B.

A new metric needs nothing here: whatever a training logs is recorded.
"""

from digitdist.runs.attempts import read_attempts, record_end
from digitdist.runs.ensembles import check_held_out, count_runs, is_override, load_runs, split_overrides
from digitdist.runs.finding import StoredRun, find_run, find_run_or_study, load_run, read_info, runs_of
from digitdist.runs.finished import is_trained
from digitdist.runs.folder import CONFIG, DATA_SET, ENVIRONMENT, PREDICTIONS, RESULT, Run
from digitdist.runs.metrics import METRICS, last_event, read_metrics
from digitdist.runs.moving import fetch_run
from digitdist.runs.opening import CHANGE_ADVICE, open_run
from digitdist.runs.origin import made_here, mark_run
from digitdist.runs.studies import has_result, holds_runs, is_in_use, seed_folder, seeds_in, studies_in
from digitdist.runs.tracker import Tracker, start_tracker
from digitdist.runs.wandb_media import Media, confusion_chart, image_table
from digitdist.runs.wandb_server import has_wandb_key
from digitdist.runs.wandb_settings import wandb_mistakes
from digitdist.runs.wandb_sync import sync_wandb

__all__ = [
    "CHANGE_ADVICE",
    "CONFIG",
    "DATA_SET",
    "ENVIRONMENT",
    "METRICS",
    "PREDICTIONS",
    "RESULT",
    "Media",
    "Run",
    "StoredRun",
    "Tracker",
    "check_held_out",
    "confusion_chart",
    "count_runs",
    "fetch_run",
    "find_run",
    "find_run_or_study",
    "has_result",
    "has_wandb_key",
    "holds_runs",
    "image_table",
    "is_in_use",
    "is_override",
    "is_trained",
    "last_event",
    "load_run",
    "load_runs",
    "made_here",
    "mark_run",
    "open_run",
    "read_attempts",
    "read_info",
    "read_metrics",
    "record_end",
    "runs_of",
    "seed_folder",
    "seeds_in",
    "split_overrides",
    "start_tracker",
    "studies_in",
    "sync_wandb",
    "wandb_mistakes",
]
