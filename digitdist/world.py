"""What the launcher has told this process through environment variables: its rank, the world size, restarts.

Nothing here needs a process group or imports torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from digitdist.errors import UserError

OTHER_STARTERS = (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE"), ("MPI", "PMI_SIZE"))


@dataclass(frozen=True)
class World:
    """This process's rank among all processes and among those of its host, and how many there are of each."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def several_hosts(self) -> bool:
        return self.size > self.local_size


def read_world() -> World:
    """The world that torchrun or `accelerate launch` has put into the environment; one process without them.

    Raises:
        UserError: the variables contradict each other, or several copies were started without them.
    """
    if "WORLD_SIZE" not in os.environ:
        _refuse_unconnected_copies()
        return World(0, 1, 0, 1)
    size, rank = _number("WORLD_SIZE"), _number("RANK")
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", "WORLD_SIZE")
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} contradict each other;"
            " start with torchrun or accelerate launch"
        )
    if size > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError(
            f"WORLD_SIZE={size}, but MASTER_ADDR or MASTER_PORT is not set; start with torchrun or accelerate launch"
        )
    return World(rank, size, local_rank, local_size)


def is_main() -> bool:
    """True for the main rank, as the launcher's environment says."""
    return os.environ.get("RANK", "0") == "0"


def print_main(text: str) -> None:
    """Prints a line on the main rank alone."""
    if is_main():
        print(text, flush=True)


def under_torchelastic() -> bool:
    """True where torchrun, or `accelerate launch` with several processes, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """How often the launcher has restarted its workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def max_restarts() -> int:
    """How often the launcher may restart its workers."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def environment_flag(name: str) -> bool:
    """True where the environment variable `name` says yes, in the spellings that Accelerate takes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _refuse_unconnected_copies() -> None:
    for starter, name in OTHER_STARTERS:
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"{starter} started {os.environ[name]} copies ({name}), but WORLD_SIZE is not set, so that each would train"
                " by itself; start one torchrun or accelerate launch per host"
            )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes, but starts only one on a host without GPUs;"
            " add --multi_gpu, which starts them on CPUs too"
        )


def _number(name: str, instead: str | None = None) -> int:
    """A launcher's variable as a whole number; where it is not set, that of `instead`, or 0 in a world of one."""
    size = os.environ["WORLD_SIZE"]
    text = os.environ.get(name, os.environ.get(instead or "", "0" if size == "1" else ""))
    if not text.isdecimal():
        raise UserError(f"WORLD_SIZE={size}, but {name}={text!r} is not a whole number; start with torchrun")
    return int(text)
