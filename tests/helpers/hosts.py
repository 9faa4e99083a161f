"""Hosts on one machine: network namespaces with names and addresses of their own, joined by veth pairs at a bridge."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from helpers.launching import BIN, CLEAN, Outcome

INSIDE = 'hostname "$1"; mount --bind "$2" /etc/hosts; cd "$3"; shift 3; exec "$@"'


def why_not() -> str | None:
    """Why hosts cannot be made here, if so."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} missing (Debian: iproute2, util-linux)"
    probe = ("unshare", "--net", "--uts", "--mount", "ip", "link", "add", "probe", "type", "bridge")
    denied = subprocess.run(probe, capture_output=True, text=True)
    return f"the kernel gives no namespaces or bridges: {denied.stderr.strip()}" if denied.returncode else None


@dataclass
class Host:
    """One host: commands that run in it see its name, its address, and the folder it works in."""

    name: str
    address: str
    folder: Path
    names: Path  # its /etc/hosts
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return f"dd-{self.name}"

    def start(self, *command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        inside = ["unshare", "--uts", "--mount", "bash", "-c", INSIDE, "host", self.name, str(self.names), str(self.folder)]
        whole = ["ip", "netns", "exec", self.namespace, *inside, *command]
        settings = CLEAN | {"PATH": f"{BIN}:{os.environ['PATH']}"} | (env or {})
        self.running.append(
            subprocess.Popen(
                whole, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        )
        return self.running[-1]

    def kill(self) -> None:
        """Ends every process of this host, at once."""
        kill_all(self.namespace)

    def cut(self) -> None:
        """Cuts its link to all others."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")

    def join(self) -> None:
        ip("-n", self.namespace, "link", "set", "eth0", "up")

    def shape(self, rate: str) -> None:
        """Limits what it sends, such as to 10mbit."""
        tbf = ("tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        subprocess.run(["tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root", *tbf], check=True)

    def unshape(self) -> None:
        subprocess.run(["tc", "-n", self.namespace, "qdisc", "delete", "dev", "eth0", "root"], check=True)

    def sent(self) -> int:
        """Bytes that it has sent so far."""
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        command = ["ip", "netns", "exec", self.namespace, "cat", counter]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def kill_all(namespace: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(int(pid), signal.SIGKILL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def network(folders: Sequence[Path], own_name: str = "") -> Iterator[list[Host]]:
    """As many hosts as folders, h0, h1, …, each working in one of them; the same folder is a shared one.

    `own_name`: the address that the ``/etc/hosts`` of each gives its own name, if not the one by which others know it; Debian's
    installer writes 127.0.1.1. The first host is also called ``first``, at that other address.
    """
    hosts = []
    addresses = {f"h{n}": f"10.77.0.{n + 1}" for n in range(len(folders))}
    names = {}
    for name in addresses:
        lines = [f"{own_name if own_name and other == name else at} {other}" for other, at in addresses.items()]
        names[name] = folders[0].parent / f"hosts-of-{name}"
        names[name].write_text("\n".join(["127.0.0.1 localhost", *lines, f"{addresses['h0']} first"]) + "\n")
    for left in Path("/run/netns").glob("dd-*"):  # of a test that was killed
        kill_all(left.name)
        ip("netns", "delete", left.name)
    ip("netns", "add", "dd-switch")
    try:
        ip("-n", "dd-switch", "link", "add", "bridge", "type", "bridge")
        ip("-n", "dd-switch", "link", "set", "bridge", "up")
        for number, folder in enumerate(folders):
            host = Host(f"h{number}", addresses[f"h{number}"], folder, names[f"h{number}"])
            ip("netns", "add", host.namespace)
            hosts.append(host)
            port = ("netns", "dd-switch", "name", f"port{number}")
            ip("link", "add", "eth0", "netns", host.namespace, "type", "veth", "peer", *port)
            ip("-n", "dd-switch", "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.namespace, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            for process in host.running:
                process.communicate()
            ip("netns", "delete", host.namespace)
        ip("netns", "delete", "dd-switch")


def ends(processes: Sequence[subprocess.Popen[str]], timeout: float = 100) -> list[Outcome]:
    """How each of these has ended, once all have."""
    outcomes = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        outcomes.append(Outcome(process.returncode, out, err))
    return outcomes
