"""Launches on this machine's GPUs; in a dry run (DIGITDIST_TEST_DEVICE=simulated) on simulated ones in their place.

A dry run proves nothing about a GPU. It shows that the tests of GPUs themselves run, and holds what does not depend on one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from digitdist.distributed import device_name
from digitdist.distributed.device import accelerator_type, lacks
from helpers.launching import BIN, CLEAN, HIDING, QUIET, ROOT, SHOWN, Outcome, run_in, start_process

SIMULATED = os.environ.get("DIGITDIST_TEST_DEVICE") == "simulated"
SIMULATOR = ROOT / "tests/helpers/simulated_device.py"
SIMULATED_DEVICES = 2
# 610 images to train on, so that an epoch's last batch is a short one.
FEW = (*QUIET, "data.target=helpers.data_sets.FewDigits", "data.batch_size=50", "train.log_every=5", "train.threads=1")
FP32 = "train.precision=fp32"
# A simulated device has no autocast.
PRECISIONS = [FP32] if SIMULATED else [FP32, "train.precision=bf16", "train.precision=fp16"]
BEST = FP32 if SIMULATED else "train.precision=auto"
WITH_MEMORY = ("cuda", "xpu")  # types of devices that have autocast to fp16, and a memory of their own

Cases = Mapping[str, Sequence[str]]
Report = Callable[[str], None]  # of a number, for the table


def device_type() -> str:
    """The type of device that a launch here trains on; "cpu" where there is no GPU, or where GPUs are hidden."""
    return "sim" if SIMULATED else accelerator_type() if num_devices() else "cpu"


def num_devices() -> int:
    """How many GPUs a launch here may use."""
    return SIMULATED_DEVICES if SIMULATED else torch.accelerator.device_count()


def description() -> str:
    """What the tests run on: the cards, and versions."""
    names = f"torch {torch.__version__}"
    if SIMULATED:
        return f"a dry run on {SIMULATED_DEVICES} simulated GPUs, {names}"
    if not num_devices():
        return f"no GPU, {names}"
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"{num_devices()} × {device_name(device_type())}, {names}{cuda}"


def has(precision: str) -> bool:
    """Whether a launch here can compute in bf16 or fp16."""
    return bool(num_devices()) and not SIMULATED and not lacks(precision, device_type())


def skip_without(precision: str) -> None:
    """Skips a test of a `train.precision=…` that this GPU does not have."""
    reason = lacks(precision.partition("=")[2], device_type())
    if reason and not SIMULATED:
        pytest.skip(reason)


def only_rehearsed(reason: str) -> None:
    """Ends a test in a dry run, where all of it has run that can: what it is about was not tried, for this reason."""
    if SIMULATED:
        pytest.skip(reason)


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a launch that may use the GPUs, and whose workers may be modules of tests/."""
    shown = {name: value for name, value in CLEAN.items() if name not in (*HIDING, "ACCELERATE_USE_CPU")} | SHOWN
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), CLEAN.get("PYTHONPATH"))))
    return shown | {"PYTHONPATH": path, "PATH": f"{BIN}{os.pathsep}{CLEAN['PATH']}"} | (env or {})


def command(module: str, *arguments: str, processes: int = 1) -> list[str]:
    """The command that runs `module` on the device, through torchrun where there are several processes."""
    program = [str(SIMULATOR), module] if SIMULATED else ["-m", module]
    start = [sys.executable] if processes == 1 else [str(BIN / "torchrun"), "--nproc_per_node", str(processes)]
    return [*start, *program, *arguments]


def launch(
    module: str,
    *arguments: str,
    cwd: Path,
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Outcome:
    """Runs `module` to its end on so many GPUs."""
    return run_in(environment(env), command(module, *arguments, processes=processes), cwd, timeout)


def start(
    module: str, *arguments: str, cwd: Path, processes: int = 1, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Starts `module` on so many GPUs, in a process group of its own."""
    return start_process(command(module, *arguments, processes=processes), cwd, environment(env))


def train(
    cases: Cases,
    cwd: Path,
    watch: str | Mapping[str, str] = "nothing",
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[dict[str, Any]]:
    """Trains with the arguments of each of `cases` in turn, in the same processes, as the run of that name unless they name
    another. `watch`, of all cases or of some by their names, is one of `helpers.watchers`.

    Returns, for each rank, what that has found in each case; or as ``error`` the text of a mistake or fault that ended it.
    """
    watches = dict.fromkeys(cases, watch) if isinstance(watch, str) else watch
    asked = {
        name: {"arguments": [f"run.name={name}", *arguments], "watch": watches.get(name, "nothing")}
        for name, arguments in cases.items()
    }
    file = cwd / "cases.json"
    file.write_text(json.dumps(asked))
    done = launch("helpers.device_worker", str(file), cwd=cwd, processes=processes, env=env, timeout=timeout)
    assert done.code == 0, done.err
    (cwd / "said.txt").write_text(done.out + done.err)
    return [json.loads(file.with_suffix(f".rank{rank}").read_text()) for rank in range(processes)]


@dataclass(frozen=True)
class Group:
    """Trainings that a test looks at, each with a name of its own, and the arguments of `train`."""

    cases: Cases
    watch: str | Mapping[str, str] = "nothing"
    env: Mapping[str, str] = field(default_factory=dict)


class Trainings:
    """Groups of trainings by their name and world size, made in one folder when they are asked for: each by itself, so that no
    claim fails for another one's fault. A dry run, which has not the time, makes all at once, the largest world first."""

    def __init__(self, place: Path, groups: Mapping[str, Mapping[int, Group]]):
        self.place, self.groups, self.runs = place, groups, place / "runs"
        self._found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._tried: set[tuple[str, int]] = set()
        self.said: dict[tuple[str, int], list[str]] = {}  # the lines that a launch has printed

    def found(self, name: str, size: int = 1) -> list[dict[str, Any]]:
        """What the ranks of a world have found in the cases of a group."""
        if (name, size) not in self._found:
            assert (name, size) not in self._tried, "its launch has failed, as another test says"
            wanted = [(n, s) for n, sizes in self.groups.items() for s in sizes] if SIMULATED else [(name, size)]
            self._tried.update(wanted)
            for world_size in sorted({s for _, s in wanted}, reverse=True):
                self._make([n for n, s in wanted if s == world_size], world_size)
        return self._found[name, size]

    def _make(self, names: Sequence[str], size: int) -> None:
        groups = {name: self.groups[name][size] for name in names}
        cases, watch, env = dict[str, Sequence[str]](), dict[str, str](), dict[str, str]()
        for group in groups.values():
            cases |= group.cases
            watch |= dict.fromkeys(group.cases, group.watch) if isinstance(group.watch, str) else group.watch
            env |= group.env
        found = train(cases, self.place, watch, size, env, timeout=1700)
        for name, group in groups.items():
            self.said[name, size] = (self.place / "said.txt").read_text().splitlines()
            self._found[name, size] = [{case: of_rank[case] for case in group.cases} for of_rank in found]


def commands(
    command_lines: Mapping[str, Sequence[str]], cwd: Path, on_cpu: bool = False, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What each of these commands prints, by its name: all in one process, on a GPU or on the CPU; asserts that none fails."""
    file = cwd / "commands.json"
    file.write_text(json.dumps(list(command_lines.values())))
    worker = ("helpers.commands_worker", str(file))
    program = [sys.executable, "-m", *worker] if on_cpu else command(*worker)
    hidden = HIDING | {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    done = run_in(environment({**hidden, **(env or {})}), program, cwd, timeout=300)
    assert done.code == 0, done.err
    outcomes = dict(zip(command_lines, json.loads(done.out), strict=True))
    for name, (code, _, err) in outcomes.items():
        assert code == 0, f"{name}: {err}"
    return {name: out for name, (_, out, _) in outcomes.items()}


def transfers(file: Path) -> list[dict[str, Any]]:
    """What simulated devices have brought to the host, where SIMULATED_TRANSFERS names this file: of all cases and ranks."""
    return [json.loads(line) for found in file.parent.glob(f"{file.name}.*.rank*") for line in found.read_text().splitlines()]


def environment_of_script(place: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Of a script that calls torchrun by its name: in a dry run one made in `place`, which has the simulated device."""
    settings = environment(env)
    if not SIMULATED:
        return settings
    script = place / "bin/torchrun"
    script.parent.mkdir()
    words = f'for word; do shift; [ "$word" = -m ] && word={SIMULATOR}; set -- "$@" "$word"; done'
    script.write_text(f'#!/usr/bin/env bash\n{words}\nexec {BIN}/torchrun "$@"\n')
    script.chmod(0o755)
    return settings | {"PATH": f"{script.parent}{os.pathsep}{settings['PATH']}"}
