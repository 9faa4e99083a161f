"""Bringing a run to the host of the main rank, where hosts share no folder."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from digitdist.checkpoint import MANIFEST, Checkpoint, UnreadableCheckpoint, folder_name, newest_good
from digitdist.config import Config
from digitdist.distributed import Plan
from digitdist.files import atomic_write
from digitdist.runs.attempts import is_restart, run_of_launchers
from digitdist.runs.clearing import RUN_FILES
from digitdist.runs.wandb_record import MEDIA
from digitdist.world import print_main


def fetch_run(config: Config, plan: Plan, launchers: list[float]) -> None:
    """Copies the run to the main rank's host from a host that has come further with it. Collective: every rank must call it.

    The main rank's host holds the run; a launcher that restarts may give the main rank to another host.
    """
    world, runs = plan.world, Path(config.run.dir)
    if not world.several_hosts:
        return
    name = config.run.name or run_of_launchers(runs, launchers)
    stored = None
    if name and world.local_rank == 0 and (config.checkpoint.resume != "never" or is_restart(runs / name, launchers)):
        with contextlib.suppress(UnreadableCheckpoint):  # the main rank tells of its own
            stored = newest_good(runs / name / "checkpoints", lambda _: None)
    views = gather_object([(stored.step if stored else -1, name, platform.node())])
    holder = max(range(world.size), key=lambda rank: (views[rank][0], -rank))
    step, name, host = views[holder]
    if step <= views[0][0]:
        return
    files = [_files(runs / name, stored) if stored and world.rank == holder else {}]
    broadcast_object_list(files, from_process=holder)
    if world.rank == 0:
        for path, content in files[0].items():
            (runs / name / path).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(runs / name / path, content)
        print_main(f"{runs / name}: fetched from host {host}, which has it up to step {step:,}")


def _files(folder: Path, stored: Checkpoint) -> dict[str, bytes]:
    """The files that a run needs to be resumed elsewhere: path to content, in the order in which to write them."""
    steps = {stored.step, stored.state["best"]["step"] if stored.state["best"] else stored.step}
    inner = [file for step in steps for file in (folder / "checkpoints" / folder_name(step)).glob("*")]
    inner.sort(key=lambda file: file.name == MANIFEST)  # last: without it the others are not a checkpoint yet
    files = [*(folder / name for name in (*RUN_FILES, f"wandb/{MEDIA}")), *inner]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.exists()}
