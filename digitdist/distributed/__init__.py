"""The process and its peers: device and precision, the `Accelerator`, what ranks do together, and how a run ends.

Whatever depends on a launcher, a device, a signal or another rank's fate belongs here; what is trained does not.
"""

from digitdist.distributed.accelerator import autocast, prepare_module, start_accelerator
from digitdist.distributed.collectives import broadcast_tensors, check_equal, gather_rows, run_on_main, work_on_main
from digitdist.distributed.device import (
    describe_instructions,
    device_name,
    lacks,
    num_cores,
    peak_memory_mb,
    takes_pinned_memory,
    to_device,
)
from digitdist.distributed.failures import FailedRank, find_failed_rank, is_collective_failure, wait_for_others
from digitdist.distributed.heartbeat import LEFT, NOTICED, RAISED, Heartbeat, heartbeat_size, read_beats
from digitdist.distributed.launcher import STUDY, launcher_start_time
from digitdist.distributed.output import make_expendable
from digitdist.distributed.phases import PhaseTimer
from digitdist.distributed.plan import PRECISIONS, Plan, make_plan, planned_device
from digitdist.distributed.preflight import raise_on_all_ranks, run_preflight
from digitdist.distributed.process import is_command, run_command
from digitdist.distributed.quotas import cpu_quota
from digitdist.distributed.restoring import generators_kept, process_restored
from digitdist.distributed.shortcuts import SHORTCUTS, eager_optimizer, use_deterministic_algorithms
from digitdist.distributed.signals import StopRequest
from digitdist.distributed.watch import PeerWatch

__all__ = [
    "LEFT",
    "NOTICED",
    "PRECISIONS",
    "RAISED",
    "SHORTCUTS",
    "STUDY",
    "FailedRank",
    "Heartbeat",
    "PeerWatch",
    "PhaseTimer",
    "Plan",
    "StopRequest",
    "autocast",
    "broadcast_tensors",
    "check_equal",
    "cpu_quota",
    "describe_instructions",
    "device_name",
    "eager_optimizer",
    "find_failed_rank",
    "gather_rows",
    "generators_kept",
    "heartbeat_size",
    "is_collective_failure",
    "is_command",
    "lacks",
    "launcher_start_time",
    "make_expendable",
    "make_plan",
    "num_cores",
    "peak_memory_mb",
    "planned_device",
    "prepare_module",
    "process_restored",
    "raise_on_all_ranks",
    "read_beats",
    "run_command",
    "run_on_main",
    "run_preflight",
    "start_accelerator",
    "takes_pinned_memory",
    "to_device",
    "use_deterministic_algorithms",
    "wait_for_others",
    "work_on_main",
]
