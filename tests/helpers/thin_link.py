"""What each strategy costs over a slow link: bytes, seconds and accuracy, as a table. Needs root and Linux.

    cd tests && python -m helpers.thin_link [--rate 10mbit] [--repeats 3] [key=value ...]

Two hosts (network namespaces) with one thread each train one epoch at a time, in turn over the plain and the shaped link.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from helpers.hosts import Host, ends, network
from helpers.launching import QUIET
from helpers.runs import result

MODES = {
    "ddp": (),
    "ddp, bf16": ("sync.compress=bf16",),
    "ddp, fp16": ("sync.compress=fp16",),
    "ddp, PowerSGD": ("sync.compress=powersgd",),
    "exact": ("sync.mode=exact",),
    **{f"local, every {n}": ("sync.mode=local", f"sync.every={n}") for n in (10, 50, 100)},
    **{f"local, every {n}, overlap": ("sync.mode=local", f"sync.every={n}", "sync.overlap=true") for n in (10, 50, 100)},
}


def trained(hosts: list[Host], name: str, options: list[str]) -> tuple[dict, int]:
    """The result of a training on all hosts, and the bytes that the first one has sent."""
    before = hosts[0].sent()
    started = []
    for number, host in enumerate(hosts):
        environment = {"RANK": str(number), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "h0", "MASTER_PORT": "29500"}
        command = ("python", "-m", "digitdist.train", *QUIET, "train.threads=1", f"run.name={name}", *options)
        started.append(host.start(*command, env=environment))
    for outcome in ends(started, timeout=3000):
        if outcome.code:
            sys.exit(outcome.err)
    return result(hosts[0].folder / "runs" / name), hosts[0].sent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rate", default="10mbit", help="of the shaped link (default: 10mbit)")
    parser.add_argument("--repeats", type=int, default=3, help="epochs timed of each (default: 3)")
    parser.add_argument("--epochs", type=int, default=9, help="of the training whose accuracy is reported (default: 9)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings whose accuracy is reported (default: 3)")
    parser.add_argument("--only", default="", help="modes whose name begins so")
    arguments = parser.parse_args()
    print("| mode | bytes a step | s an epoch | s an epoch, shaped | speed kept | accuracy |\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("a", "b")]
        for place in folders:
            place.mkdir()
        with network(folders) as hosts:
            for mode, extra in MODES.items():
                if mode.startswith(arguments.only):
                    print(row(hosts, mode, [*extra, *arguments.overrides], arguments), flush=True)


def row(hosts: list[Host], mode: str, options: list[str], arguments: argparse.Namespace) -> str:
    once = ["train.epochs=1", "train.eval_every=0", "checkpoint.every_steps=0", *options]
    free, shaped, sent = [], [], []
    for repeat in range(arguments.repeats):
        done, sizes = trained(hosts, f"{mode}-free-{repeat}", once)
        free.append(done["train_seconds"])
        sent.append(sizes / done["steps"])
        for host in hosts:
            host.shape(arguments.rate)
        shaped.append(trained(hosts, f"{mode}-shaped-{repeat}", once)[0]["train_seconds"])
        for host in hosts:
            host.unshape()
    kept = [100 * a / b for a, b in zip(free, shaped, strict=True)]
    right = []
    for seed in range(arguments.seeds):
        whole = [f"train.epochs={arguments.epochs}", "train.eval_every=0", f"seed={seed}", *options]
        right.append(100 * trained(hosts, f"{mode}-{seed}", whole)[0]["test_accuracy"])
    seconds = [f"{statistics.median(times):.1f}" for times in (free, shaped)]
    cells = [mode, f"{statistics.median(sent):,.0f}", *seconds, spread(kept, "{:.0f}"), spread(right, "{:.2f}")]
    return f"| {' | '.join(cells)} |"


def spread(percent: list[float], form: str) -> str:
    """Median, least and greatest in words."""
    if not percent:
        return ""
    middle, low, high = (form.format(x) for x in (statistics.median(percent), min(percent), max(percent)))
    return f"{middle} % ({low} to {high})"


if __name__ == "__main__":
    main()
