"""Each of thousands of configurations is taken with the right meaning, or refused in one message, with nothing made."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from helpers.configurations import FROM_ENVIRONMENT, HOME, KEYS, Configuration, random_configuration
from helpers.launching import ROOT

from digitdist import config
from digitdist.config import as_dict, dump_config, load_stored_config, read_config, read_stored_config

INDICATORS = [mark.encode() for mark in "-?:,[]{}#&*!|>'\"%@`\n\r\t \0~=$\\" + "\x85\u2028\ufeff"]
INDICATORS += [b"${", b"\\${", b"<<: ", b"*a", b"&a "]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv("FUZZ_NUMBER", FROM_ENVIRONMENT)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_the_page_has_every_key():
    assert KEYS.keys() == config.KEYS.keys()


def seeds(part: int, count: int) -> list[random.Random]:
    return [random.Random(f"{part} {number}") for number in range(count)]


@pytest.mark.parametrize("part", [*range(2), *(pytest.param(part, marks=pytest.mark.slow) for part in range(2, 12))])
def test_a_configuration_is_taken_with_the_right_meaning_or_refused(place: Path, part: int):
    outcomes = [check(random_configuration(seed, place), place) for seed in seeds(part, 250)]
    assert min(map(outcomes.count, ("taken", "refused"))) >= 75
    assert outcomes.count("excluded") >= 1


def check(made: Configuration, place: Path) -> str:
    loaded, mistakes = read_config(made.files, made.overrides)
    told = made.files, made.overrides, [Path(file).read_bytes() for file in made.files], mistakes
    assert not any("\n" in mistake or not mistake.isprintable() for mistake in mistakes), told
    assert [*(place / "work").iterdir()] == [], told
    if made.broken:
        assert all(any(file in mistake for mistake in mistakes) for file in made.broken), told
        return "refused"
    if made.wrong:
        first = " ".join(mistakes)
        assert all(name in first for name in made.wrong), (made.wrong, told)
        named = {found[1] for mistake in mistakes if (found := re.match(r"([a-z0-9_]+\.?[a-z0-9_]*)", mistake))}
        assert named <= made.wrong or made.excluded, (made.wrong, told)
        return "refused"
    if made.excluded:
        assert mistakes, told
        return "excluded"
    assert mistakes == [], told
    assert repr(as_dict(loaded)) == repr(made.values), told
    if len(made.overrides) != 2:  # the next is slow
        return "taken"
    stored = place / "run" / "x" / "config.yaml"
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_bytes(dump_config(loaded))
    again = load_stored_config(stored)
    again.run.dir, again.checkpoint.resume = loaded.run.dir, loaded.checkpoint.resume
    assert repr(again) == repr(loaded), told
    return "taken"


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 5))])
def test_whatever_is_in_a_file_is_a_configuration_or_a_mistake(place: Path, part: int):
    default = (ROOT / "configs/default.yaml").read_bytes()
    for seed in seeds(part, 200):
        made = random_configuration(seed, place)
        start = seed.randrange(len(default))
        content = bytearray(seed.choice([default[start : start + 300], *(Path(file).read_bytes() for file in made.files)]))
        for _ in range(seed.randint(1, 4)):
            where = seed.randrange(len(content) + 1)
            content[where : where + seed.randrange(3)] = seed.choice((seed.randbytes(2), seed.choice(INDICATORS)))
        (place / "0.yaml").write_bytes(content)
        for overrides in ([], [content.decode("utf-8", "surrogateescape")]):
            _, mistakes = read_config([str(place / "0.yaml")], overrides)
            assert all(mistake.isprintable() for mistake in mistakes), (content, mistakes)
        _, mistakes = read_stored_config(place / "0.yaml")
        assert all(mistake.isprintable() for mistake in mistakes), (content, mistakes)
    assert [*(place / "work").iterdir()] == []
