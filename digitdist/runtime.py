"""Where a run happens: the launcher's world, device, precision, threads, signals, and the `Accelerator` over them.

What a launch gets wrong is found here, before a process group exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import mmap
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, is_bf16_available, is_fp8_available

from digitdist.config import Config, UserError, is_main

EXIT_FAULT, EXIT_MISTAKE, EXIT_STOPPED = 1, 2, 75
TELL_GRACE_S = 30.0
REFUSAL_S = 60.0  # in which the other ranks are told of a mistake
T = TypeVar("T")


class Fault(Exception):
    """A fault that ends the run and that every rank has seen at the same place: the main rank tells it."""


class Stopped(Exception):
    """The run was asked to stop and has been saved; the same command goes on with it."""


@dataclass(frozen=True)
class World:
    """The launcher's word on this process: its number among all and among those of its host."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def world() -> World:
    """The world that torchrun or `accelerate launch` put into the environment; one process without them.

    Raises:
        UserError: the variables contradict each other, or several copies were started without them.
    """
    env = os.environ
    if "WORLD_SIZE" not in env:
        for starter, name in (
            ("srun", "SLURM_STEP_NUM_TASKS"),
            ("mpirun", "OMPI_COMM_WORLD_SIZE"),
            ("MPI", "PMI_SIZE"),
        ):
            if env.get(name, "1") != "1":
                raise UserError(
                    f"{starter} started {env[name]} copies ({name}), but WORLD_SIZE is not set, so that each would train"
                    " by itself; start one torchrun or accelerate launch per host"
                )
        if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:  # so it says, and then starts one
            raise UserError(
                "accelerate launch was asked for several processes, but starts only one on a host without GPUs;"
                " add --multi_gpu, which starts them on CPUs too"
            )
        return World(0, 1, 0, 1)
    numbers = {}
    for name, default in (
        ("WORLD_SIZE", None),
        ("RANK", None),
        ("LOCAL_RANK", None),
        ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ):
        text = env.get(name, env.get(default or "", "0" if env["WORLD_SIZE"] == "1" else ""))
        if not text.isdecimal():
            raise UserError(f"WORLD_SIZE={env['WORLD_SIZE']}, but {name}={text!r} is no whole number; start with torchrun")
        numbers[name] = int(text)
    size, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    local_rank, local_size = numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"]
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} contradict each other;"
            " start with torchrun or accelerate launch"
        )
    if size > 1 and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
        raise UserError(
            f"WORLD_SIZE={size}, but MASTER_ADDR or MASTER_PORT is not set; start with torchrun or accelerate launch"
        )
    return World(rank, size, local_rank, local_size)


def say(text: str) -> None:
    """A line for the person who watches, from the main rank alone."""
    if is_main():
        print(text, flush=True)


@dataclass(frozen=True)
class Plan:
    """What a process will run on, decided from the configuration and the environment without touching a device."""

    world: World
    cpu: bool
    device_type: str
    precision: str
    threads: int
    notes: tuple[str, ...]


def plan(config: Config) -> Plan:
    """Decides device, precision and threads.

    Raises:
        UserError: with every mistake of the launch and of what was asked of this device.
    """
    mistakes: list[str] = []
    here = world()
    cpu = not torch.accelerator.is_available() or _flag("ACCELERATE_USE_CPU")
    device_type = "cpu" if cpu else _accelerator_type()
    if not cpu and here.local_size > torch.accelerator.device_count():
        mistakes.append(
            f"{here.local_size} processes on this host would share {torch.accelerator.device_count()} {device_type} device(s);"
            " start at most one process per device, or set ACCELERATE_USE_CPU=true to train on CPUs"
        )
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _flag(f"ACCELERATE_USE_{name}"):
            mistakes.append(f"accelerate launch asked for {name}, which is not supported; launch without it")
    if config.sync.mode == "exact" and here.size > config.sync.shards:
        mistakes.append(
            f"sync.mode=exact takes at most sync.shards={config.sync.shards} processes, {here.size} were started;"
            f" start fewer, or set sync.shards={here.size} (another number of shards gives other bits)"
        )
    precision, notes = "fp32", tuple[str, ...]()
    try:
        precision, notes = resolve_precision(config.train.precision, device_type)
    except UserError as error:
        mistakes += error.mistakes
    if config.train.compile != "none" and cpu and not shutil.which(os.environ.get("CXX", "g++")):
        mistakes.append(
            f"train.compile={config.train.compile} needs a C++ compiler on a CPU, and there is no"
            f" {os.environ.get('CXX', 'g++')}; install one, name it in CXX, or set train.compile=none"
        )
    if mistakes:
        raise UserError(*mistakes)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        notes += ("accelerate launch asked for a dynamo backend, which is not used; train.compile=default compiles",)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = 1 if config.sync.mode == "exact" else max(1, cores // here.local_size)
    return Plan(here, cpu, device_type, precision, config.train.threads or shared, notes)


def resolve_precision(asked: str, device_type: str) -> tuple[str, tuple[str, ...]]:
    """The effective precision (fp32, bf16, fp16 or fp8) and what to say of it.

    `auto` takes what `accelerate launch` was told (it puts ``no`` into the environment when it was told nothing, so ``no``
    counts as nothing), else the device's best.

    Raises:
        UserError: the precision asked for cannot be had on this device.
    """
    reasons = {
        "bf16": None if device_type == "cpu" or _has_bf16(device_type) else f"this {device_type} device has no bf16",
        "fp16": None if device_type in ("cuda", "xpu") else f"fp16 autocast does nothing on {device_type}",
        "fp8": None if device_type == "cuda" and is_fp8_available() else "fp8 needs a CUDA device and an fp8 library",
        "fp32": None,
    }
    possible = [name for name, reason in reasons.items() if reason is None]
    if asked == "no":
        asked = "fp32"
    if asked != "auto":
        if reasons[asked]:
            raise UserError(
                f"train.precision={asked} cannot be had: {reasons[asked]}; here it takes auto, {', '.join(sorted(possible))}"
            )
        return asked, ()
    best = "fp32" if device_type == "cpu" else next(name for name in ("bf16", "fp16", "fp32") if name in possible)
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in reasons:  # "no", or nothing that is known
        return best, ()
    if reasons[told]:
        return best, (f"accelerate launch asked for {told}: {reasons[told]}; training goes on in {best}",)
    return told, ()


def start(config: Config, plan: Plan) -> Accelerator:
    """Builds the `Accelerator`. Collective: every rank must call it; it makes the process group.

    Raises:
        UserError: the world that Accelerate made is not the launcher's.
    """
    _keep_freed_memory()
    if plan.world.size > plan.world.local_size:
        _name_interface(os.environ["MASTER_ADDR"])
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "NO"
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads))  # Accelerate warns where it is not set
    # Accelerate passes DistributedDataParallel an argument that has a new name.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    if config.sync.mode == "exact":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    accelerator = Accelerator(
        cpu=plan.cpu,
        mixed_precision="no" if plan.precision == "fp32" else plan.precision,
        # Said outright, since Accelerate would otherwise take it from the environment and divide the loss by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.sync.timeout_s)),
            # A rank's buffers matter only in evaluations and checkpoints, before which rank 0's are sent to all.
            DistributedDataParallelKwargs(
                broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=config.train.accumulate == 1
            ),
        ],
    )
    torch.set_num_threads(plan.threads)  # after Accelerate, which sets its own
    if plan.device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in linear layers too, as in convolutions
    if accelerator.num_processes != plan.world.size:
        raise UserError(
            f"the launcher started {plan.world.size} processes, Accelerate sees {accelerator.num_processes};"
            " start with torchrun or accelerate launch --multi_gpu"
        )
    return accelerator


_served: list[dist.Store] = []  # kept for as long as this process lives: the process group meets in the same store


def roll_call(world: World, card: dict[str, str], timeout_s: float, mistakes: Sequence[str] = ()) -> None:
    """Waits for every rank and compares what each says of itself: `card`, name to value. Collective: every rank must call it,
    before the process group is made, also one that has found `mistakes` of its own.

    Rank 0 alone judges, and gives its verdict at the first card that is wrong.

    Raises:
        UserError: the same on every rank: a rank has not come within `timeout_s`, two say that they are the same one, two
            differ in a value, or one has found a mistake.
    """
    if world.size == 1:
        return
    own = {"rank": world.rank, "host": platform.node(), "mistakes": mistakes, "WORLD_SIZE": str(world.size), **card}
    limit, address = timedelta(seconds=timeout_s), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then one store serves all restarts
    serves = world.rank == 0 and not agent
    try:
        _served.append(dist.TCPStore(*address, None, serves, limit, wait_for_workers=False, multi_tenant=True))
        store = dist.PrefixStore(f"roll call {restart_count() if agent else 0}", _served[0])
        store.set(f"card {store.add('cards', 1)}", json.dumps(own))
        if world.rank == 0:
            store.set("verdict", "\n".join(_judge(store, own, world, timeout_s)))
        store.wait(["verdict"], limit + timedelta(seconds=10))
        verdict = store.get("verdict").decode()
    except dist.DistError as error:
        raise UserError(_unmet(world, address, timeout_s, serves, error)) from None
    if verdict:
        with contextlib.suppress(dist.DistError):  # the others may be gone, or never come
            if world.rank:
                store.set(f"read {world.rank}", "")
            else:  # who serves the store leaves last
                store.wait([f"read {rank}" for rank in range(1, world.size)], timedelta(seconds=5))
        raise UserError(*verdict.split("\n"))


def refuse(error: UserError) -> NoReturn:
    """Raises `error` on every rank. Collective: a rank without an error of its own is in `roll_call`."""
    try:
        here = world()
    except UserError:
        raise error from None  # it has told that
    roll_call(here, {}, REFUSAL_S, error.mistakes)
    raise error


def _judge(store: dist.Store, own: dict[str, Any], world: World, timeout_s: float) -> list[str]:
    """What is wrong with the cards of all ranks, which rank 0 takes in the order in which they come; nothing if all is well."""
    if own["mistakes"]:
        return _told_by(own, world)
    hosts: dict[int, str] = {}  # of each rank that has come
    deadline = time.monotonic() + timeout_s
    for number in itertools.count(1):
        try:
            store.wait([f"card {number}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except dist.DistError:
            return [_missing(hosts, world, timeout_s)]
        card = json.loads(store.get(f"card {number}"))
        rank, host = card["rank"], card["host"]
        if card["mistakes"]:
            return _told_by(card, world)
        differing = [
            f"{name} is {own.get(name)} at rank 0 on {own['host']} and {card.get(name)} at rank {rank} on {host};"
            " it must be the same everywhere"
            for name in sorted((own.keys() | card.keys()) - {"rank", "host", "mistakes"})
            if own.get(name) != card.get(name)
        ]
        if differing:
            return differing
        if rank in hosts and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun numbers them itself, anew at each meeting
            return [f"two processes say that they are rank {rank}, on {hosts[rank]} and on {host}; give each host its own RANK"]
        hosts[rank] = host
        if len(hosts) == world.size:
            return []
    raise AssertionError


def _told_by(card: dict[str, Any], world: World) -> list[str]:
    """The mistakes of a rank, with its name where they may be those of its host alone."""
    prefix = f"rank {card['rank']} on {card['host']}: " if world.size > world.local_size else ""
    return [prefix + mistake for mistake in card["mistakes"]]


def _missing(hosts: dict[int, str], world: World, timeout_s: float) -> str:
    absent = [rank for rank in range(world.size) if rank not in hosts]
    names = [f"rank {rank}" for rank in absent]
    if world.local_size < world.size:
        names = [f"{name} (of host {rank // world.local_size})" for name, rank in zip(names, absent, strict=True)]
    there = ", ".join(f"rank {rank} on {host}" for rank, host in sorted(hosts.items()))
    return (
        f"{', '.join(names)} has not come within sync.join_timeout_s={timeout_s:g}; there are {there}:"
        " look whether the missing ones were started, and reach MASTER_ADDR and MASTER_PORT"
    )


def _unmet(world: World, address: tuple[str, int], timeout_s: float, serves: bool, error: Exception) -> str:
    """Why this rank has not met rank 0."""
    where = "{}:{}".format(*address)
    if serves and "EADDRINUSE" in str(error):
        return f"MASTER_PORT={address[1]} is taken on {platform.node()}; give a free port, the same on all hosts"
    return (
        f"rank {world.rank} on {platform.node()}: rank 0 has not answered at {where} within sync.join_timeout_s={timeout_s:g};"
        " look whether its host was started, this is its address, and the firewall lets the port through"
    )


def on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What `act` gives on the main rank, on every rank. Collective: every rank must call it.

    A `UserError`, `Fault` or `Stopped` that it raises there is raised on every rank.
    """
    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = act()
        except (UserError, Fault, Stopped) as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def peak_memory_mb(device: torch.device) -> dict[str, float | None]:
    """The most memory that this process has held so far: of its host, and of its device where that has its own."""
    if sys.platform == "linux":  # whose ru_maxrss begins with what the process held that has started this one
        status = Path("/proc/self/status").read_text()
        host = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    else:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"host": round(host / 2**20, 1), "device": None if held is None else round(held / 2**20, 1)}


def device_name(plan: Plan) -> str:
    """The maker's name for the device that a process of this plan runs on."""
    if plan.device_type in ("cuda", "xpu"):
        return getattr(torch, plan.device_type).get_device_name()
    if plan.device_type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return platform.machine()


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 as a flag that the trainer reads; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._is_main = is_main()
        self._first_s = self._looked_s = 0.0
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # a platform may lack some
                signal.signal(getattr(signal, name), self._handle)

    def wanted(self, stop_file: Path) -> bool:
        """True once this process has had a signal, or the main rank has seen `stop_file`, for which it looks twice a second."""
        now = time.monotonic()
        if self.signal_name is None and self._is_main and now - self._looked_s > 0.5:
            self._looked_s = now
            if stop_file.exists():
                self.signal_name = stop_file.name
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes a terminal's ^C on to processes that have had it from the terminal already.
        if number == signal.SIGINT and self.signal_name and time.monotonic() - self._first_s > 0.5:
            os._exit(128 + number)
        if self.signal_name is None:
            self.signal_name, self._first_s = signal.Signals(number).name, time.monotonic()


PHASES = ("start", "data", "forward", "backward", "sync", "update", "log", "eval", "save", "end")
TIMES = {"data": "data", "forward": "compute", "backward": "compute", "sync": "sync", "update": "optimizer"}
TIMES |= {"eval": "evaluation", "save": "checkpoint"}  # what a phase's seconds count as; else other


@dataclass(frozen=True)
class InjectedFault:
    """A fault that a test has asked for: at a rank, step and phase, when that phase of that step is entered the nth time.

    Read from DIGITDIST_FAULT, such as ``kill rank=1 step=30 phase=backward``; kinds: kill, raise, freeze, slow, full. After
    a launcher's restart it is over, unless ``always=1``.
    """

    kind: str
    rank: int
    step: int
    phase: str
    nth: int = 1
    always: int = 0

    @classmethod
    def from_environment(cls) -> InjectedFault | None:
        kind, *parts = os.environ.get("DIGITDIST_FAULT", "").split() or [""]
        values = dict(part.split("=") for part in parts)
        phase = values.pop("phase", "")
        fault = cls(kind=kind, phase=phase, **{name: int(value) for name, value in values.items()}) if kind else None
        return fault if fault and (fault.always or restart_count() == 0) else None

    def happen(self) -> None:
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "slow":
                time.sleep(2.0)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "raise":
                raise RuntimeError("a fault that a test has asked for")


@dataclass(frozen=True)
class Beat:
    """What is known of one rank: its process, where it is, whether it has raised an error or seen another's end."""

    rank: int
    pid: int
    host: int
    step: int
    phase: str
    state: int

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


class Heartbeat:
    """Where each rank of a host is, in a file that its processes map: to enter a phase costs one write to memory.

    What is in memory outlives the process that wrote it, so that those left can name the rank that ended a run. It also adds
    up the seconds of each phase.
    """

    RECORD = struct.Struct("<6q")  # pid, host, step, phase, state, unused
    RUNNING, RAISED, NOTICED = range(3)

    def __init__(self, file: Path, world: World):
        size = world.size * self.RECORD.size
        with file.open("a+b") as opened:
            if os.fstat(opened.fileno()).st_size < size:
                opened.truncate(size)
            self._map = mmap.mmap(opened.fileno(), size)
        self._world, self._host = world, zlib.crc32(platform.node().encode())
        self._fault, self._entered = InjectedFault.from_environment(), 0
        self.step, self._phase, self._state = 0, 0, self.RUNNING
        self._seconds = [0.0] * len(PHASES)
        self._since = self._lap = time.perf_counter()
        self._write()

    def enter(self, phase: str, since: float | None = None) -> None:
        """Begins a phase: data, forward, backward, sync, update, log, eval or save; `since` an earlier `perf_counter()`."""
        self._note_time(max(since or time.perf_counter(), self._since))
        self._phase = PHASES.index(phase)
        self._write()
        fault = self._fault
        if fault and (fault.rank, fault.step, fault.phase) == (self._world.rank, self.step, phase):
            self._entered += 1
            if self._entered == fault.nth:
                fault.happen()

    def lap(self) -> dict[str, float]:
        """Where the time has gone since the last lap: seconds in all (total), and of data, compute, sync and so on."""
        self._note_time(time.perf_counter())
        times = dict.fromkeys(("total", *TIMES.values(), "other"), 0.0)
        for phase, seconds in zip(PHASES, self._seconds, strict=True):
            times[TIMES.get(phase, "other")] += seconds
        times["total"], self._lap = self._since - self._lap, self._since
        self._seconds = [0.0] * len(PHASES)
        return times

    def __str__(self) -> str:
        return f"step {self.step}, phase {PHASES[self._phase]}"

    def mark(self, state: int) -> None:
        """Notes that this rank has raised an error of its own, or noticed that another is gone."""
        self._state = state
        self._write()

    def culprit(self) -> tuple[str, bool]:
        """Which rank of this host ended the run and where it was, and whether this rank is the one to tell it.

        It was killed, raised an error, is frozen, or is the furthest behind. A process that was just killed may take a
        moment to be seen as gone. The lowest rank that is left tells.
        """
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            beats = [beat for beat in read_beats(self._map) if beat.host == self._host]
            for how, is_it in (
                ("raised an error", lambda beat: beat.state == self.RAISED),
                ("was killed", lambda beat: beat.state == self.RUNNING and not _alive(beat.pid)),
                ("is frozen", lambda beat: _stopped(beat.pid)),
            ):
                guilty = [beat for beat in beats if is_it(beat)]
                if guilty:
                    left = min(beat.rank for beat in beats if beat not in guilty)
                    if how == "is frozen" and left == self._world.rank:
                        os.kill(guilty[0].pid, signal.SIGKILL)  # a launcher would wait half a minute for it
                    return f"rank {guilty[0].rank} {how} at {guilty[0]}", left == self._world.rank
            time.sleep(0.05)
        last = min(beats, key=lambda beat: (beat.step, PHASES.index(beat.phase), beat.rank == self._world.rank))
        if last.rank != self._world.rank:
            return f"rank {last.rank} did not answer, last seen at {last}", True
        return f"a rank of another host did not answer; rank {last.rank} was at {last}", True

    def _note_time(self, now: float) -> None:
        self._seconds[self._phase] += now - self._since
        self._since = now

    def _write(self) -> None:
        at = self._world.rank * self.RECORD.size
        self.RECORD.pack_into(self._map, at, os.getpid(), self._host, self.step, self._phase, self._state, 0)


def read_beats(content: bytes | mmap.mmap) -> list[Beat]:
    """The ranks that have written into a heartbeat file, in their order."""
    beats = []
    for rank, record in enumerate(Heartbeat.RECORD.iter_unpack(content)):
        pid, host, step, phase, state, _ = record
        if pid:
            beats.append(Beat(rank, pid, host, step, PHASES[phase], state))
    return beats


def restart_count() -> int:
    """How often the launcher has restarted its workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launcher_start() -> float | None:
    """When the launcher of this process was started, as seconds since 1970; None without one. The same after a restart."""
    return psutil.Process(os.getppid()).create_time() if "TORCHELASTIC_RUN_ID" in os.environ else None


def collective_failed(error: BaseException) -> bool:
    """True for the error of a collective in which another rank did not take part."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process with the exit code that its outcome has."""
    _die_with_the_launcher()
    try:
        main()
    except UserError as error:
        _tell(f"error: {error}")
        _end_the_launcher()
        _leave(EXIT_MISTAKE)
    except Stopped as stop:
        say(str(stop))
        _leave(EXIT_STOPPED)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `... | head`
        os._exit(0)
    except Fault:
        if not is_main():
            _wait_for_the_launcher()
        traceback.print_exc()
        _leave(EXIT_FAULT)
    except Exception:
        traceback.print_exc()
        _leave(EXIT_FAULT)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """Ends the process now.

    No exit handler may wait for a rank that is gone. And a thread of gloo that lets go of its last tensor while Python ends
    would abort the process: it asks for the lock of an interpreter that grants it to nobody any more.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(text: str) -> None:
    """Tells a mistake once a host: local rank 0 does.

    If the launcher does not end the others then, they know something that local rank 0 doesn't, and tell it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        _wait_for_the_launcher()
    print(text, file=sys.stderr, flush=True)


def _wait_for_the_launcher() -> None:
    """Leaves the word to a rank that may be slower than this one: the launcher ends all as soon as one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(TELL_GRACE_S)


def _end_the_launcher() -> None:
    """Has a launcher end that would start the workers again, which does not mend a mistake."""
    if restart_count() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        os.kill(os.getppid(), signal.SIGTERM)


def _die_with_the_launcher() -> None:
    """Has Linux kill this process when its launcher is killed: torchrun gives its workers sessions of their own, in which
    they would train on unseen, and hold the run's lock."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        parent, set_parent_death_signal = os.getppid(), 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_FAULT)


def _keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step, which needs as much, instead of faulting the same pages in anew.

    A third of a step's time on a CPU (measured: 8.0 against 5.4 ms at batch 100). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _name_interface(address: str) -> None:
    """Tells gloo the network interface by which `address` is reached, unless the user has: it would guess by the host's name,
    and hang where that leads to another one."""
    family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in (entry.address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _accelerator_type() -> str:
    device = torch.accelerator.current_accelerator()
    return device.type if device else "cpu"


def _has_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_bf16_available(ignore_tpu=True)
