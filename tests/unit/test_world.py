from __future__ import annotations

import pytest

from digitdist import world
from digitdist.errors import UserError
from digitdist.world import World

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, World(0, 1, 0, 1)),
        ({"WORLD_SIZE": "1"}, World(0, 1, 0, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, World(0, 1, 0, 1)),
        ({"SLURM_STEP_NUM_TASKS": ""}, World(0, 1, 0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1, 2)),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, World(1, 2, 1, 2)),
    ],
)
def test_the_world_is_the_launchers(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], expected: World):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **env}.items():
        monkeypatch.setenv(name, value)
    assert world.read_world() == expected


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"WORLD_SIZE": "2"}, "RANK="),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "contradict"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "contradict"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "srun started 3 copies"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "add --multi_gpu, .* leave out --cpu"),
        ({"RANK": "1"}, "RANK='1', but WORLD_SIZE is not set"),
        ({"RANK": ""}, "RANK='', but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK='1', but WORLD_SIZE is not set"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE='2', but WORLD_SIZE is not set"),
        ({**TWO, "RANK": "-1"}, "RANK='-1' is not a whole number|contradict"),
        ({**TWO, "RANK": "01"}, "RANK='01' is not a whole number"),
        ({**TWO, "RANK": "1.0"}, "RANK='1.0' is not a whole number"),
        ({**TWO, "RANK": "²"}, "RANK='²' is not a whole number"),
        ({**TWO, "WORLD_SIZE": ""}, "WORLD_SIZE='' is not a whole number"),
        ({**TWO, "WORLD_SIZE": "0"}, "contradict"),
        ({**TWO, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9+' is not a whole number"),
        ({**TWO, "WORLD_SIZE": "9999999"}, "WORLD_SIZE=9999999 is not allowed"),
        ({**TWO, "LOCAL_RANK": "-1"}, "contradict"),
        ({**TWO, "LOCAL_WORLD_SIZE": "0"}, "contradict"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        ({**TWO, "MASTER_PORT": ""}, "MASTER_PORT='' is not a whole number"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not allowed"),
        ({**TWO, "TORCHELASTIC_RESTART_COUNT": "often"}, "TORCHELASTIC_RESTART_COUNT='often' is not a whole number"),
        ({"TORCHELASTIC_MAX_RESTARTS": ""}, "TORCHELASTIC_MAX_RESTARTS='' is not a whole number"),
    ],
)
def test_a_world_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], part: str):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=part):
        world.read_world()
