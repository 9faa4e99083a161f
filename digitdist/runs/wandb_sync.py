"""Sends the offline W&B runs of a run's folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from digitdist.errors import UserError, in_one_line
from digitdist.runs.wandb_server import why_offline


def sync_wandb(folder: Path, report: Callable[[str], None]) -> None:
    """Sends what a run's folder holds for W&B by ``wandb sync``; the segments of one run become one run there.

    Raises:
        UserError: there is nothing to send, no key or no server, or it fails.
    """
    segments = sorted((folder / "wandb").glob("offline-run-*"))
    if not segments:
        raise UserError(f"{folder}: there is no offline W&B run to send; train with tracking.wandb=offline or auto")
    reason = why_offline()
    if reason:
        raise UserError(f"{folder} cannot be sent to W&B: {reason}")
    command = [sys.executable, "-m", "wandb", "sync", *map(str, segments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{folder} cannot be sent to W&B: {in_one_line(done.stdout)}")
    report(f"{folder}: {len(segments)} segment{'s' if len(segments) > 1 else ''} of its W&B run sent")
