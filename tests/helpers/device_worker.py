"""Run on every rank of a world: trains as the command does, several times in the same processes.

    python -m helpers.device_worker CASES.json

The file has, by the name of each case, ``arguments`` and a ``watch`` of `helpers.watchers`. Each rank writes what that has
found, as JSON, beside the file. Where SIMULATED_TRANSFERS is set, the transfers of a case have the case's name too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from digitdist.distributed import run_command
from digitdist.errors import Fault, UserError
from digitdist.train import train
from helpers.watchers import WATCHERS


def main() -> None:
    file = Path(sys.argv[1])
    found: dict[str, Any] = {}
    for name, case in json.loads(file.read_text()).items():
        with pytest.MonkeyPatch.context() as patch:
            if transfers := os.environ.get("SIMULATED_TRANSFERS"):
                patch.setenv("SIMULATED_TRANSFERS", f"{transfers}.{name}")
            found[name] = WATCHERS[case["watch"]](patch)
            try:
                train(case["arguments"])
            except (UserError, Fault) as error:
                found[name] = {"error": str(error)}
            except Exception:
                print(f"in the case {name!r}:", file=sys.stderr)
                raise
    file.with_suffix(f".rank{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


if __name__ == "__main__":
    run_command(main)
