"""One session of a run at W&B, in the process of a training or of a later sync; it gets each step once, whichever sends it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digitdist.errors import EXIT_FAULT, EXIT_STOPPED
from digitdist.runs.wandb_media import NO_MEDIA, Media, draw

SETTINGS = {
    "silent": True,
    "console": "off",
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 1.0,  # the seconds of metrics that a kill may cost an offline run's file
}


def prepare_environment(place: Path, mode: str) -> None:
    """Sets what wandb reads from the environment; before it is imported. An artifact waits in `place`.

    Where wandb's own debug.log does not fit the disk, no line of it prints a traceback.
    """
    logging.raiseExceptions = False
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # wandb would take the empty text for a value
    os.environ["WANDB_MODE"] = mode  # for it refuses a value that it does not know, even where it is told another
    os.environ.setdefault("WANDB_DATA_DIR", str(place.resolve()))
    os.environ.setdefault("WANDB_SILENT", "true")  # wandb prints before it has seen its settings
    # At the end of the process, its telemetry waits 10 s for a server that hangs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


class Session:
    """A W&B run that is open; `wandb` is the module. Its methods raise whatever wandb raises.

    Online it begins after the last step that the server has, offline with the first: each offline folder has the whole run.
    """

    def __init__(self, wandb: Any, folder: Path, mode: str, options: Mapping[str, Any], settings: Mapping[str, Any]):
        self._wandb, self.mode, self._name = wandb, mode, str(options["name"])
        _wait_for_unused_name(folder / "wandb", options["id"])
        settings = {**SETTINGS, **settings}
        known = getattr(wandb.Settings, "model_fields", settings)
        self.run = wandb.init(
            **options,
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(**{name: value for name, value in settings.items() if name in known}),
        )
        self.run.define_metric("*", step_metric="step")
        self.files = Path(self.run.dir)  # where wandb keeps charts and tables until they are sent
        self.first_step: int = self.run.starting_step if mode == "online" else 0
        self._row: dict[str, Any] = {}
        self.num_rows = self.num_media = 0  # sent

    def replay(self, rows: Mapping[int, tuple[dict[str, Any], dict[str, Media]]]) -> None:
        """Sends what `stored_rows` has read."""
        for step, (values, media) in rows.items():
            self.add(values, step, media)

    def add(self, values: Mapping[str, Any], step: int, media: Mapping[str, Media] = NO_MEDIA) -> None:
        """Adds to the row of `step`, which is sent when a later step begins: W&B takes a step once."""
        if step < self.first_step:
            return
        if self._row and self._row["step"] != step:
            self._send()
        self._row |= {"step": step, **values, **{name: draw(self._wandb, content) for name, content in media.items()}}
        self.num_media += len(media)

    def _send(self) -> None:
        row, self._row = self._row, {}
        self.run.log(row, step=row["step"], commit=True)
        self.num_rows += 1

    def finish(self, result: Mapping[str, Any], weights: Path | None, stopped: bool) -> None:
        """Sends what is left, `result` as the summary, the file `weights` as an artifact, and how the training ended: with a
        result, stopped on request, or neither."""
        if self._row:
            self._send()
        if result:
            self.run.summary.update(dict(result))
        if weights:
            name = re.sub(r"[^\w.-]", "-", self._name, flags=re.ASCII)[:100]
            artifact = self._wandb.Artifact(f"{name}-weights", type="model", metadata=dict(result))
            artifact.add_file(str(weights), name="weights.safetensors")
            self.run.log_artifact(artifact)
        if stopped:  # a sweep queues it again, if its exit code is not 0
            self.run.mark_preempting()
        self.run.finish(exit_code=EXIT_STOPPED if stopped else 0 if result else EXIT_FAULT)

    def remove_older(self, place: Path) -> None:
        """Removes the folders of earlier offline sessions from `place`: this one has the whole run."""
        if (place / "last-step").exists():
            return  # they are an earlier version's, whose charts are nowhere else
        own = self.files.parent.name
        for older in place.glob("offline-run-*"):
            if older.name != own:
                shutil.rmtree(older, ignore_errors=True)


def _wait_for_unused_name(place: Path, run_id: str) -> None:
    """Waits until wandb would name its folder, by the second, as no other session of the run has been named."""
    while any((place / f"{kind}-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}").exists() for kind in ("run", "offline-run")):
        time.sleep(0.1)


def remove_service_folder() -> None:
    """Removes the temporary folder of wandb's own process, which has ended: 0.28 leaves it, and so does one that was killed."""
    for left in Path(tempfile.gettempdir()).glob(f"wandb-{os.getpid()}-*"):
        shutil.rmtree(left, ignore_errors=True)
