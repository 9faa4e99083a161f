"""Several hosts, each with a network, a name and a folder of its own, and what is wrong between them."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import Host, ends, network, why_not
from helpers.launching import BIN, QUIET, ROOT, Outcome, python
from helpers.runs import attempts, events, reached, result, wait_until

import digitdist

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
SHORT = (*QUIET, "sync.mode=exact", "data.batch_size=1000", "train.epochs=0.2", "run.name=x")
LONG = (*QUIET, "sync.mode=exact", "data.batch_size=500", "train.epochs=5", "checkpoint.every_steps=20", "train.log_every=5")
HOSTS_SH = str(ROOT / "launch" / "hosts.sh")


@pytest.fixture
def folders(tmp_path: Path, mnist_root: Path) -> list[Path]:
    """A folder for each of three hosts, which sees no other's, with MNIST in it."""
    made = [tmp_path / f"of-h{n}" for n in range(3)]
    for folder in made:
        folder.mkdir()
        (folder / "data").symlink_to(mnist_root)
    return made


@pytest.fixture
def two(folders: list[Path]) -> Iterator[list[Host]]:
    with network(folders[:2]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """The unbroken trainings on one process: runs/x of SHORT, runs/long of LONG."""
    place = tmp_path_factory.mktemp("one")
    (place / "data").symlink_to(mnist_root)
    for options in (SHORT, (*LONG, "run.name=long")):
        assert python("-m", "digitdist.train", *options, cwd=place, timeout=250).code == 0
    return place / "runs"


def rank(host: Host, number: int, world_size: int, *options: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """One process that gets its rank from a scheduler without a launcher."""
    numbers = {"RANK": number, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables = {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "h0", "MASTER_PORT": "29500"}
    return host.start("python", "-m", "digitdist.train", *options, env=variables | (env or {}))


def refused(outcomes: list[Outcome], *words: str) -> None:
    """Each process ended with exit code 2 and one line that holds all `words`, and none has made a run."""
    for outcome in outcomes:
        assert outcome.code == 2, outcome.err
        assert len(outcome.errors) == 1
        assert "Traceback" not in outcome.err
        for word in words:
            assert word in outcome.errors[0]


def hash_of(folder: Path) -> str:
    return result(folder)["weights_sha256"]


def test_two_hosts_give_the_weights_of_one_process_and_the_main_ranks_host_holds_the_run(two: list[Host], one_process: Path):
    outcomes = ends([host.start(HOSTS_SH, "2", "h0", *SHORT) for host in two])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    holder = next(host for host in two if (host.folder / "runs" / "x").exists())
    (other,) = (host for host in two if host is not holder)
    assert any(f"runs/x on {holder.name}, not seen by {other.name} starts" in outcome.out for outcome in outcomes)
    assert not (other.folder / "runs").exists()
    assert hash_of(holder.folder / "runs" / "x") == hash_of(one_process / "x")
    assert events(holder.folder / "runs" / "x") == events(one_process / "x")


@pytest.mark.parametrize("first", ["10.77.0.1", "h0", "first", "without a launcher"])
def test_hosts_meet_where_each_knows_itself_as_debians_127_0_1_1(folders: list[Path], first: str):
    began = time.monotonic()
    with network(folders[:2], own_name="127.0.1.1") as hosts:
        short = (*SHORT, "train.max_steps=2")
        if first == "without a launcher":  # by ranks, whose MASTER_ADDR is the first host's name
            started = [rank(host, number, 2, *short) for number, host in enumerate(hosts)]
        else:
            started = [host.start(HOSTS_SH, "2", first, *short) for host in hosts]
        outcomes = ends(started)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert time.monotonic() - began < 90, "torchrun gives up after 3 to 4 minutes"
    (run,) = (folder / "runs" / "x" for folder in folders if (folder / "runs" / "x").exists())
    assert result(run)["world_size"] == 2


def test_three_hosts_with_a_shared_folder_give_the_weights_of_one_process(folders: list[Path], one_process: Path):
    with network([folders[0]] * 3) as hosts:
        outcomes = ends([host.start(HOSTS_SH, "3", "h0", *SHORT) for host in hosts])
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert not any("not seen by" in outcome.out for outcome in outcomes)
    assert result(folders[0] / "runs" / "x")["world_size"] == 3
    assert hash_of(folders[0] / "runs" / "x") == hash_of(one_process / "x")


def test_accelerate_launch_with_the_two_hosts_file_gives_the_weights_of_one_process(two: list[Host], one_process: Path):
    launch = [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "launch" / "two_hosts.yaml")]
    started = [
        host.start(*launch, "--main_process_ip", "h0", "--machine_rank", str(number), "-m", "digitdist.train", *SHORT)
        for number, host in enumerate(two)
    ]
    assert [outcome.code for outcome in ends(started)] == [0, 0]
    assert hash_of(two[0].folder / "runs" / "x") == hash_of(one_process / "x")


@pytest.mark.parametrize("named", [pytest.param(True, marks=pytest.mark.soak), False])
def test_a_host_is_lost_and_given_back_and_the_run_is_resumed_by_itself(two: list[Host], one_process: Path, named: bool):
    first, second = two
    options = [*LONG, "sync.timeout_s=20", *(["run.name=long"] if named else [])]
    start = (HOSTS_SH, "1:2", "h0", *options)
    agents = [host.start(*start) for host in two]
    run = wait_until(lambda: next((first.folder / "runs").glob("*"), None) or next((second.folder / "runs").glob("*"), None))
    wait_until(lambda: reached(run) >= 30)
    second.kill()
    second.cut()
    at = reached(run)
    here = wait_until(lambda: next((first.folder / "runs").glob("*"), None))
    wait_until(lambda: reached(here) > at + 20)
    second.join()
    agents[1] = second.start(*start)
    assert [outcome.code for outcome in ends(agents, timeout=200)] == [0, 0]
    last = next(host.folder / "runs" / here.name for host in two if (host.folder / "runs" / here.name / "result.json").exists())
    assert hash_of(last) == hash_of(one_process / "long")
    assert events(last) == events(one_process / "long")
    assert [attempt["world_size"] for attempt in attempts(last)] == [2, 1, 2]


def test_a_run_is_resumed_where_another_host_has_the_main_rank(two: list[Host], one_process: Path):
    begun = ends([rank(host, number, 2, *SHORT, "train.max_steps=5") for number, host in enumerate(two)])
    assert [outcome.code for outcome in begun] == [0, 0]
    second_first = {"MASTER_ADDR": "h1"}
    resumed = ends([rank(host, number, 2, *SHORT, env=second_first) for number, host in enumerate(reversed(two))])
    assert [outcome.code for outcome in resumed] == [0, 0]
    assert "fetched from host h0, which has it up to step 5" in resumed[0].out
    assert hash_of(two[1].folder / "runs" / "x") == hash_of(one_process / "x")
    assert [e for e in events(two[1].folder / "runs" / "x") if e["step"] > 5] == [
        e for e in events(one_process / "x") if e["step"] > 5
    ]


def test_hosts_with_another_configuration_are_refused_with_both_values(two: list[Host]):
    started = [rank(host, n, 2, *SHORT, f"data.batch_size={1000 + n}") for n, host in enumerate(two)]
    refused(ends(started), "data.batch_size is 1000 at rank 0 on h0", "and 1001 at rank 1 on h1")
    assert not any((host.folder / "runs").exists() for host in two)


def test_hosts_with_another_version_of_the_code_are_refused(two: list[Host], tmp_path: Path):
    shutil.copytree(Path(digitdist.__file__).parent, tmp_path / "other" / "digitdist")
    with (tmp_path / "other" / "digitdist" / "optim.py").open("a") as file:
        file.write("# edited on this host\n")
    started = [rank(two[0], 0, 2, *SHORT), rank(two[1], 1, 2, *SHORT, env={"PYTHONPATH": str(tmp_path / "other")})]
    refused(ends(started), "digitdist is version", "at rank 0 on h0", "at rank 1 on h1")


def test_hosts_with_other_data_are_refused(two: list[Host]):
    for number, host in enumerate(two):
        (host.folder / "data").unlink()
        write_fashion_mnist(host.folder / "data" / "FashionMNIST" / "raw", first_pixel=number)
    started = [rank(host, n, 2, *SHORT, "data.name=fashion_mnist") for n, host in enumerate(two)]
    refused(ends(started), "data is fashion_mnist of SHA-256", "at rank 0 on h0", "at rank 1 on h1")


def write_fashion_mnist(folder: Path, first_pixel: int) -> None:
    """A data set of 20 images a split, as torchvision keeps it."""
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = bytes([first_pixel]) + bytes(20 * 28 * 28 - 1)
        sizes = b"".join(n.to_bytes(4, "big") for n in (20, 28, 28))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (20).to_bytes(4, "big") + bytes(range(10)) * 2)


def test_hosts_that_expect_another_world_size_are_refused(two: list[Host]):
    refused(
        ends([rank(two[0], 0, 2, *SHORT), rank(two[1], 1, 3, *SHORT)]), "WORLD_SIZE is 2 at rank 0 on h0 and 3 at rank 1 on h1"
    )


def test_two_hosts_of_one_rank_are_refused(two: list[Host]):
    others = {"LOCAL_WORLD_SIZE": "1"}
    started = [rank(two[0], 0, 3, *SHORT), *(rank(host, 1, 3, *SHORT, env=others) for host in two)]
    refused(ends(started), "two processes say that they are rank 1", "h0", "h1")


def test_a_mistake_on_one_host_is_reported_by_all(two: list[Host]):
    started = [rank(two[0], 0, 2, *SHORT), rank(two[1], 1, 2, *SHORT, "train.epochs=none")]
    refused(ends(started), "rank 1 on h1: train.epochs=none is not allowed")


@pytest.mark.parametrize(
    ("comes", "words"),
    [
        (0, ["rank 1 (of host 1) has not come within sync.join_timeout_s=5", "rank 0 on h0"]),
        (1, ["rank 1 on h1", "rank 0 has not answered at h0:29500 within sync.join_timeout_s=5"]),
    ],
)
def test_a_host_that_does_not_come_is_named(two: list[Host], comes: int, words: list[str]):
    start = time.monotonic()
    refused(ends([rank(two[comes], comes, 2, *SHORT, "sync.join_timeout_s=5")]), *words)
    assert time.monotonic() - start < 40
