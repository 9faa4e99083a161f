"""What the launcher has told this process through environment variables: its rank, the world size, restarts.

Nothing here needs a process group or imports torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from digitdist.errors import UserError

OTHER_STARTERS = (
    *(("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE"), ("MPI", "PMI_SIZE")),
    ("mpirun", "MV2_COMM_WORLD_SIZE"),
)
MAX_SIZE = 2**20  # more processes than anybody starts
START = "start with torchrun or accelerate launch"


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
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"):
        _number(name, "0")
    if "WORLD_SIZE" not in os.environ:
        _refuse_unconnected_copies()
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
            if os.environ.get(name, alone) != alone:
                raise UserError(f"{name}={os.environ[name]!r}, but WORLD_SIZE is not set; unset {name}, or {START}")
        return World(0, 1, 0, 1)
    size = _number("WORLD_SIZE")
    rank, local_rank = (_number(name, "0" if size == 1 else None) for name in ("RANK", "LOCAL_RANK"))
    local_size = _number("LOCAL_WORLD_SIZE", str(size))
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} contradict each other;"
            f" {START}"
        )
    if size > MAX_SIZE:
        raise UserError(f"WORLD_SIZE={size} is not allowed; it takes 1 to {MAX_SIZE}; {START}")
    if size > 1 and not os.environ.get("MASTER_ADDR"):
        raise UserError(f"WORLD_SIZE={size}, but MASTER_ADDR is not set; {START}")
    if size > 1 and not 0 < _number("MASTER_PORT") < 2**16:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} is not allowed; it takes 1 to 65535; {START}")
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


def under_accelerate() -> bool:
    """True where `accelerate launch` has started this process, or one that it has started."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def several_hosts() -> bool:
    """Whether there are ranks of other hosts, as the launcher's environment says."""
    size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", size) != size


def restart_count() -> int:
    """How often the launcher has restarted its workers."""
    return _count("TORCHELASTIC_RESTART_COUNT")


def max_restarts() -> int:
    """How often the launcher may restart its workers."""
    return _count("TORCHELASTIC_MAX_RESTARTS")


def environment_flag(name: str) -> bool:
    """True where the environment variable `name` says yes, in the spellings that Accelerate takes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _count(name: str) -> int:
    text = os.environ.get(name, "0")
    return int(text) if text.isdecimal() else 0  # `read_world` refuses it


def _refuse_unconnected_copies() -> None:
    for starter, name in OTHER_STARTERS:
        if os.environ.get(name, "1") not in ("", "1"):
            raise UserError(
                f"{starter} started {os.environ[name]} copies ({name}), but WORLD_SIZE is not set, so that each would train"
                " by itself; start one torchrun or accelerate launch per host"
            )
    if under_accelerate() and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes, but starts only one on a host without GPUs, or with --cpu;"
            " add --multi_gpu, which starts them on CPUs too, and leave out --cpu, which Accelerate refuses beside it"
        )


def _number(name: str, default: str | None = None) -> int:
    """A launcher's variable, or `default` where it is not set, as a whole number."""
    text = os.environ.get(name, default)
    try:
        if text is not None and text == str(int(text)) and len(text) < 20:
            return int(text)
    except ValueError:
        pass
    size = os.environ.get("WORLD_SIZE", "")[:40]
    raise UserError(f"WORLD_SIZE={size}, but {name}={(text or '')[:40]!r} is not a whole number in plain digits; {START}")
