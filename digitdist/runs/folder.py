"""The folder of a run that is being trained."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from digitdist.checkpoint import Checkpoint

CONFIG, RESULT, PREDICTIONS, LOCK = "config.yaml", "result.json", "predictions.npz", ".lock"
ENVIRONMENT, DATA_SET = "environment.json", "data_set.json"


@dataclass
class Run:
    """A run's folder, opened by the main rank for this attempt and known to all ranks."""

    folder: Path
    host: str  # the main rank's, which holds the folder
    token: str  # of this attempt
    wandb_id: str = ""
    stored: Checkpoint | None = None  # what is resumed
    finished: bool = False
    resuming: str = ""  # what to do to resume it
    lock: FileLock | None = field(default=None, repr=False)  # held on the main rank alone, until closed or the process ends

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lock": None}  # what is sent to the other ranks

    def close(self) -> None:
        """Lets another training work in the folder."""
        if self.lock:
            self.lock.release()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def stop_file(self) -> Path:
        return self.folder / "STOP"

    @property
    def heartbeat(self) -> Path:
        """The file of this host's ranks: in the run's folder on the main rank's host, else in the temporary folder, since two
        hosts cannot map one file together."""
        here = platform.node() == self.host and self.visible
        return self.folder / self.heartbeat_name if here else Path(tempfile.gettempdir()) / f"digitdist{self.heartbeat_name}"

    @property
    def visible(self) -> bool:
        """Whether this host sees the folder that the main rank has opened."""
        return (self.folder / self.heartbeat_name).exists()

    @property
    def heartbeat_name(self) -> str:
        return f".heartbeat-{self.token}"
