from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from digitdist.bench import launching
from digitdist.bench.__main__ import main
from digitdist.bench.launching import launch
from digitdist.bench.peer_turns import measure_peers
from digitdist.bench.table import peers_table
from digitdist.errors import Fault, UserError


def timed(*seconds: float) -> list[dict[str, float]]:
    return [{"seconds": one, "images": 60_000} for one in seconds]


def recipe(*trainings: tuple[float, float], **more: str) -> list[dict]:
    return [{"seconds": seconds, "accuracy": accuracy} | more for seconds, accuracy in trainings]


def made_up() -> dict:
    setting = {"device": "a CPU", "instructions": "AVX2", "model": "cnn", "batch_size": 100, "steps": 600}
    epochs = {
        "1": {"plain loop": timed(20.0, 24.0, 15.0), "digitdist": timed(5.0, 8.0, 5.0)},
        "2": {"plain loop": timed(14.0, 14.0, 14.0), "digitdist": timed(4.0, 7.0, 7.0)},
    }
    recipes = {
        "one-epoch recipe": recipe((10.0, 0.991), (9.0, 0.989), (11.0, 0.991)),
        "fast": recipe((2.0, 0.99), (3.0, 0.98), (2.0, 0.99), precision="bf16"),
    }
    return {"setting": setting | {"threads": {"1": 2, "2": 1}}, "missing": [], "epochs": epochs, "recipes": recipes}


def test_the_table_of_peers_has_seconds_and_how_many_times_ours_of_the_same_turn():
    assert peers_table(made_up()).splitlines() == [
        "cnn, 60,000 images in batches of 100, fp32, a CPU, AVX2",
        "median, least and greatest of 3 turns",
        "",
        "1 process of 2 threads: seconds, and times those of digitdist",
        "  plain loop          20.00 (15.00 to 24.00) s     3.00 (3.00 to 4.00)",
        "  digitdist            5.00 (5.00 to 8.00) s     1.00 (1.00 to 1.00)",
        "",
        "2 processes of 1 thread each: seconds, and times those of digitdist",
        "  plain loop          14.00 (14.00 to 14.00) s     2.00 (2.00 to 3.50)",
        "  digitdist            7.00 (4.00 to 7.00) s     1.00 (1.00 to 1.00)",
        "",
        "to 99.0 % of the test images, on one process: seconds, times those of fast, and mean accuracy",
        "  one-epoch recipe    10.00 (9.00 to 11.00) s     5.00 (3.00 to 5.50)   99.03 %",
        "  fast in bf16         2.00 (2.00 to 3.00) s     1.00 (1.00 to 1.00)   98.67 %: not reached",
    ]


MISTAKES = {
    "of the peers": (2, ["sync.mode=exact", "train.epochs=2"], "sync.mode=exact is not allowed with --peers"),
    "of the batch": (3, [], r"data.batch_size=100 does not fit --world 3: .* such as data.batch_size=102"),
    "of an epoch": (1, ["data.batch_size=60001"], r"data.batch_size=60001 is not allowed with --peers; it takes at most 60000"),
    "of a key": (2, ["data.batchsize=7"], "there is no key 'data.batchsize'; did you mean 'data.batch_size'"),
}


@pytest.mark.parametrize(("world_size", "overrides", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_not_all_can_be_told_is_refused_before_anything_starts(
    world_size: int, overrides: list[str], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place)
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    with pytest.raises(UserError, match=message):
        measure_peers(world_size, overrides, 1)


def test_peers_start_their_processes_themselves(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    launcher = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="leave out the launcher, and say --world N"):
        measure_peers(2, [], 1)


def test_one_thing_is_measured_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--peers", "--recipes"])
    with pytest.raises(UserError, match="--recipes: not allowed with argument --peers; --help shows"):
        main()


def test_what_fails_ends_the_measurement_with_its_last_words():
    with pytest.raises(Fault, match=r"(?s)ended with exit code 3:.*no such thing"):
        launch(["-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


def test_an_interrupt_ends_what_was_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "END_GRACE_S", 0.1)  # for ^C of a terminal, of which there is none here
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    began = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(["-c", "import time; time.sleep(60)"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - began < 30
    assert not [child for child in psutil.Process().children() if "time.sleep(60)" in child.cmdline()[-1:]]
