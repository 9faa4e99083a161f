"""A real Slurm for the tests: a controller and two nodes of it on this machine, with keys, ports and folders of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from helpers.launching import BIN, CLEAN

NODES = ("n1", "n2")
LIMIT_S = 240  # for what a job is to do next, also on a busy machine
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmdSpoolDir={place}/%n
StateSaveLocation={place}/state
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=0
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "Slurm's daemons need root on Linux"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge" if absent else None


class Slurm:
    """Its commands, and what it knows of a job."""

    def __init__(self, place: Path):
        self.place = place
        path = f"{BIN}:{os.environ['PATH']}"
        self.env = CLEAN | {"SLURM_CONF": str(place / "slurm.conf"), "PATH": path}

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """The output of a command such as scontrol."""
        done = subprocess.run(command, cwd=cwd, env=self.env | (env or {}), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.logs())
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submits to the one partition there is; returns the job's id."""
        return self.run("sbatch", "--parsable", "--partition=test", *arguments, cwd=cwd, env=env).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, seen: Callable[[], bool]) -> None:
        """Until `seen`."""
        deadline = time.monotonic() + LIMIT_S
        while not seen():
            assert time.monotonic() < deadline, (self.job(job), self.output(job), self.logs())
            time.sleep(0.1)

    def finish(self, job: str) -> str:
        """The state in which the job has ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(job, lambda: self.job(job)["JobState"] in over)
        return self.job(job)["JobState"]

    def output(self, job: str) -> str:
        file = Path(self.job(job)["StdOut"])
        return file.read_text() if file.exists() else ""

    def logs(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(self.place.glob("*.log")))


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """Slurm with two idle nodes; at the end nothing of it is left, of its jobs neither."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, contextlib.ExitStack() as stack:
        place = Path(folder)
        slurm = Slurm(place)
        (place / "slurm.conf").write_text(CONF.format(place=place, host=socket.gethostname(), ports=_free_ports(3)))
        # Devices that Slurm counts, and that no library takes for a GPU.
        (place / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (place / "munge.key").write_bytes(os.urandom(128))
        (place / "munge.key").chmod(0o400)
        place.chmod(0o755)
        files = [f"--{name}-file={place}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        _daemon(stack, slurm, "munged", "--foreground", "--force", f"--socket={place}/munge.socket", *files)
        _until(lambda: (place / "munge.socket").exists(), slurm)
        _daemon(stack, slurm, "slurmctld", "-D")
        for node in NODES:
            _daemon(stack, slurm, "slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--Node", "--format=%T"]
        asked = lambda: subprocess.run(idle, env=slurm.env, capture_output=True, text=True).stdout.split()  # noqa: E731
        _until(lambda: asked() == ["idle", "idle"], slurm)
        stack.callback(_end_jobs, slurm)
        yield slurm


def _daemon(stack: contextlib.ExitStack, slurm: Slurm, name: str, *arguments: str) -> None:
    with (slurm.place / f"{name}.log").open("a") as log:
        process = subprocess.Popen([name, *arguments], env=slurm.env, stdout=log, stderr=log, start_new_session=True)
    stack.callback(_end, process)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_jobs(slurm: Slurm) -> None:
    """Cancels what still runs, and kills what outlives that: all that carries this Slurm's configuration."""
    subprocess.run(["scancel", "--user=root"], env=slurm.env, check=False)
    ours = slurm.env["SLURM_CONF"]

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "SLURM_JOB_ID" in (env := process.environ()) and env.get("SLURM_CONF") == ours:
                    found.append(process)
        return found

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left():
        with contextlib.suppress(psutil.Error):
            process.kill()


def _until(seen: Callable[[], bool], slurm: Slurm) -> None:
    deadline = time.monotonic() + 30
    while not seen():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
