"""The configs in launch/: those for CPUs are run, those for GPUs are loaded by Accelerate's own parser."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from helpers.launching import QUIET, ROOT, accelerate
from helpers.runs import only_run, result

CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))
SHORT = ("-m", "digitdist.train", "train.max_steps=3", *QUIET)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_loads_it(file: Path):
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert f"accelerate launch --config_file launch/{file.name}" in file.read_text().splitlines()[0]
    assert config.num_machines == (2 if file.stem == "two_hosts" else 1)
    assert config.use_cpu == ("cpu" in file.stem)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world_size"), [("cpu_processes", 2), ("one_cpu", 1), ("many_gpus", 2)])
def test_it_trains_here(place: Path, name: str, world_size: int):
    """Also the one for many GPUs, where there are none: N processes on CPUs, as one run."""
    done = accelerate("--config_file", str(ROOT / f"launch/{name}.yaml"), *SHORT, "train.precision=fp32", cwd=place)
    assert done.code == 0, done.err
    assert result(only_run(place))["world_size"] == world_size
