"""Distributed training of handwritten-digit CNNs: the same weights on any number of processes, an exact accuracy."""

import sys

__version__ = "0.2.0"

if sys.platform == "win32":  # said before an import fails of what Windows does not have
    print("error: digitdist does not run on Windows itself; run it on Linux, macOS or WSL", file=sys.stderr)
    sys.exit(2)

from digitdist.process_start import is_command, prepare_process

if is_command():
    prepare_process()
