"""Run on every rank by `helpers.on_device.train`: trains as the command does, several times in the same processes.

    python -m helpers.device_worker WATCH CASES.json

Each rank writes what it has found in each case, as JSON, beside that file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from digitdist.distributed import run_command
from digitdist.errors import UserError
from digitdist.train import train
from helpers.watchers import WATCHERS


def main() -> None:
    watch, file = sys.argv[1], Path(sys.argv[2])
    found: dict[str, Any] = {}
    for name, arguments in json.loads(file.read_text()).items():
        with pytest.MonkeyPatch.context() as patch:
            found[name] = WATCHERS[watch](patch)
            try:
                train(arguments)
            except UserError as error:
                found[name] = {"error": str(error)}
    file.with_suffix(f".rank{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


if __name__ == "__main__":
    run_command(main)
