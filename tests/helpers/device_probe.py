"""What an accelerator does with each expression of the command line: ``python -m helpers.device_probe EXPRESSION...``.

It prints a JSON object, expression to ``refuses``, ``waits`` or ``goes on``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

device = torch.device("sim")
module = torch.get_device_module(device)
host, index = torch.ones(3), torch.tensor([0, 2])
x, places = torch.ones(3, device=device), torch.arange(2, device=device)


def read_late(lag: int) -> list[tuple[bool, float]]:
    """Whether a copy to the host has come, and its first number, before it has and when it has."""
    os.environ["SIMULATED_LAG"] = str(lag)
    late, event = x.to("cpu", non_blocking=True), module.Event()
    event.record()
    return [(event.query(), late[0].nan_to_num(7).item()) for _ in range(lag + 1)]


def outcome(expression: str) -> str:
    notes = Path(os.environ["SIMULATED_TRANSFERS"] + ".rank0")
    notes.write_text("")
    try:
        eval(expression)
    except (RuntimeError, TypeError):
        return "refuses"
    return "waits" if notes.read_text() else "goes on"


if __name__ == "__main__":
    assert read_late(2) == [(False, 7.0), (False, 7.0), (True, 1.0)]
    print(json.dumps({expression: outcome(expression) for expression in sys.argv[1:]}))
