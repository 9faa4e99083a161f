"""Distributed training of handwritten-digit CNNs: the same weights on any number of processes, an exact accuracy."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from digitdist.loading import TrainedModel

__version__ = "0.2.0"

if sys.platform == "win32":  # said before an import fails of what Windows does not have
    print("error: digitdist does not run on Windows itself; run it on Linux, macOS or WSL", file=sys.stderr)
    sys.exit(2)

from digitdist.process_start import is_command, prepare_process

if is_command():
    prepare_process()


def load(source: str | os.PathLike[str], *, checkpoint: str = "last", trust: bool = False) -> TrainedModel:
    """A trained model: see `digitdist.loading.load`, which this is; torch is imported only when it is called."""
    from digitdist.loading import load

    return load(source, checkpoint=checkpoint, trust=trust)
