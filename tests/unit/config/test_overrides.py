"""A configuration as a command line."""

from __future__ import annotations

import pytest

from digitdist.config import KEYS, as_overrides, load_config


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("seed=7", "optim.lr=1e-5", "train.max_steps=3", "train.threads=2", "data.in_memory=false"),
        ("model.name=convnet", "model.args={channels: [8, 16], stem: 3, note: 'a: b'}", "tracking.tags=[a, 'b, c']"),
        (r"model.target=a.B", r"model.args.text=\${optim.lr} ü", r"tracking.notes=\${oc.env:HOME} # no comment"),
        ("run.name=017", "tracking.project=true", "schedule.name=cosine", "sync.overlap=true"),
    ],
)
def test_the_key_value_of_a_configuration_give_it_again(given: tuple[str, ...]):
    config = load_config((), given)
    overrides = as_overrides(config, KEYS)
    assert load_config((), overrides) == config
    assert len(overrides) == len({text.partition("=")[0] for text in overrides}) <= len(given) + 1
    assert as_overrides(config, ("seed",)) == [text for text in overrides if text.startswith("seed=")]
