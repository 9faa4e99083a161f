"""The tests of GPUs: what each needs, and the table of claims that ends them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import on_device
from helpers.claims import Tried, table
from helpers.on_device import Trainings
from helpers.trainings import GROUPS

TRIED = pytest.StashKey[list[Tried]]()
NUMBERS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TRIED] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that cannot be tried here, before anything is made for it."""
    item.stash[NUMBERS] = []
    needs = item.get_closest_marker("needs")
    gpus, cuda = (needs.kwargs.get(name) for name in ("gpus", "cuda")) if needs else (None, None)
    found = on_device.num_devices()
    if not found:
        pytest.skip("no GPU is here")
    if gpus and found < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    if cuda and on_device.device_type() != "cuda" and not on_device.SIMULATED:
        pytest.skip(f"needs CUDA: {cuda}")


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Trainings:
    """All that is trained to be looked at."""
    place = tmp_path_factory.mktemp("trainings")
    (place / "data").symlink_to(mnist_root)
    return Trainings(place, GROUPS)


@pytest.fixture(scope="session")
def unbroken(trainings: Trainings) -> Path:
    """A run of `helpers.trainings.EXACT_EVERYTHING` that nothing has happened to."""
    trainings.found("exact runs")
    return trainings.runs / "everything, again"


@pytest.fixture
def report(request: pytest.FixtureRequest) -> on_device.Report:
    """Notes a number that a test has measured, for the table."""
    return request.node.stash[NUMBERS].append


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        outcome, reason = "fails", ""
    elif report.skipped:
        outcome, reason = "not tried", str(report.longrepr[2]).removeprefix("Skipped: ")
    elif report.when == "call":
        outcome, reason = "holds", ""
    else:
        return report
    tried = item.config.stash[TRIED]
    for marker in item.iter_markers("claim"):
        tried.append(Tried(marker.args[0], item.nodeid.rpartition("/")[2], outcome, reason, item.stash.get(NUMBERS, [])))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tried = terminalreporter.config.stash.get(TRIED, [])
    if tried:
        terminalreporter.section(f"claims about GPUs: {on_device.description()}")
        for line in table(tried):
            terminalreporter.write_line(line)
