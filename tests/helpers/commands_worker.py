"""Run by tests: several commands in one process, each as ``python -m`` runs it.

    python -m helpers.commands_worker COMMANDS.json

The file is a list of command lines, module first. Printed is a list of exit code, output and errors of each, as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path


def run(command: list[str]) -> tuple[int, str, str]:
    sys.argv, code = command, 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps([run(command) for command in json.loads(Path(sys.argv[1]).read_text())]))
