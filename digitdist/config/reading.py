"""Reading a configuration: defaults, YAML files and ``key=value`` merged and checked; every mistake is reported at once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import stat
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from digitdist.config.checks import check_combinations, expand_user
from digitdist.config.interpolation import Unresolvable, count, escape, map_text, resolve, unescape
from digitdist.config.keys import FOLDERS, GROUPS, KEYS, Key, nearest_key
from digitdist.config.schema import Config
from digitdist.config.values import MAX_LEVELS, fit, printable, shown
from digitdist.config.yaml_core import describe_problem, dump_yaml, parse_yaml
from digitdist.errors import UserError

MAX_BYTES = 2**20  # of a file
MAX_MISTAKES = 20  # that are told
NULLS = ("null", "Null", "NULL", "~")
PLACES = ("run.dir", "checkpoint.resume")  # as they were when a run was trained; it may lie elsewhere now

Values = dict[str, Any]  # by dotted key; arguments of a class are one mapping


def load_config(files: Sequence[str] = (), overrides: Sequence[str] = ()) -> Config:
    """The configuration that `read_config` reads.

    Raises:
        UserError: with every mistake found.
    """
    config, mistakes = read_config(files, overrides)
    if mistakes:
        raise UserError(*mistakes)
    return config


def read_config(files: Sequence[str], overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The defaults, then each YAML file, then each ``key=value``: the later one wins; ``${…}`` is resolved.

    Returns it with every mistake found, each naming key, value, what is allowed and the nearest valid key. A key with a
    mistake keeps its default.
    """
    mistakes: list[str] = []
    values: Values = {}
    for file in files:
        path = Path(os.path.expanduser(file))
        if not os.path.isfile(path):
            path = shipped_configs().get(file, path)
        try:
            pairs = _read_yaml(path, f"--config {file}")
        except UserError as error:
            mistakes += error.mistakes
        else:
            mistakes += _put_all(values, pairs)
    mistakes += _put_all(values, _read_overrides(overrides, mistakes))
    config, wrong = _settle(values)
    return config, _few([*mistakes, *wrong.values(), *check_combinations(config), *_check_size(config)])


def load_stored_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a training has stored as `file` in its run's folder, changed by `overrides`.

    What is stored is data: nothing in it is resolved. Where the run lies now is its ``run.dir``, and it resumes nothing.

    Raises:
        UserError: with every mistake found; those of the file name it.
    """
    config, mistakes = read_stored_config(file, overrides)
    if mistakes:
        raise UserError(*mistakes)
    return config


def read_stored_config(file: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """The same as `load_stored_config`, with the mistakes; a key with a mistake has its default."""
    values: Values = {}
    mistakes: list[str] = []
    try:
        stored = [(name, map_text(value, escape)) for name, value in stored_values(file).items() if name not in PLACES]
        mistakes += [f"{printable(str(file))}: {mistake}" for mistake in _put_all(values, stored)]
    except UserError as error:
        mistakes += error.mistakes
    own = _read_overrides(overrides, mistakes)
    mistakes += _put_all(values, own)
    config, wrong = _settle(values)
    if "run.dir" not in values:
        config.run.dir = os.path.dirname(os.path.dirname(os.path.abspath(file)))
    found = [*wrong.values(), *check_combinations(config)]
    yours = tuple(f"{name}=" for name, _ in own)
    return config, _few([*mistakes, *(text if text.startswith(yours) else f"{printable(str(file))}: {text}" for text in found)])


def stored_values(file: Path) -> Values:
    """What a training has stored as `file`, by dotted key, unchecked: keys and values may be those of another version.

    Raises:
        UserError: it cannot be read, or is not the YAML of a configuration.
    """
    return {name: map_text(value, unescape) for name, value in _read_yaml(file, str(file))}


def dump_config(config: Config) -> bytes:
    """The whole configuration as YAML, in UTF-8, which `load_config` and `load_stored_config` read as what it is."""
    return dump_yaml(map_text(dataclasses.asdict(config), escape)).encode()


def shipped_configs() -> dict[str, Path]:
    """The configuration files that ship with the package, by name (``sweep.yaml`` is W&B's, not a configuration)."""
    folder = Path(str(resources.files("digitdist.config") / "shipped"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml")) if file.stem != "sweep"}


def _read_yaml(path: Path, label: str) -> list[tuple[str, Any]]:
    """The values of a YAML file by dotted key, once each; those of text keys are text as it is written there."""
    try:
        tree, as_text = parse_yaml(_read_text(path))
    except OSError as error:
        advice = f"give the path of a YAML file, or one of {', '.join(shipped_configs())}"
        raise UserError(f"{printable(label)}: {error.strerror}; {advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{printable(label)} is not text in UTF-8; write it anew as YAML in UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{printable(label)} is not valid YAML: {shown(describe_problem(error))}") from None
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise UserError(f"{printable(label)} holds a {type(tree).__name__}; it must hold a YAML mapping of keys")
    texts = dict(_flatten(as_text))
    pairs = [(name, texts[name] if name in KEYS and KEYS[name].holds_text else value) for name, value in _flatten(tree)]
    times = Counter(name for name, _ in pairs)
    twice = sorted(name for name in times if times[name] > 1 or any(upper in times for upper in _above(name)))
    if twice:
        raise UserError(f"{printable(label)} gives {shown(', '.join(twice))} twice; write each key once")
    return pairs


def _read_text(path: Path) -> str:
    """The text of a regular file of at most `MAX_BYTES`; nothing else is waited for."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(None, "it is not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(None, f"it has more than {MAX_BYTES:,} bytes")
    return content.decode("utf-8-sig")


def _flatten(tree: dict[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The values of a YAML tree by dotted key; a mapping of the user's (model.args) and an empty one stay whole."""
    flat: list[tuple[str, Any]] = []
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and value and not (name in KEYS and KEYS[name].is_mapping):
            flat += _flatten(value, name + ".")
        elif not (name in GROUPS and (value is None or value == {})):  # an empty group sets nothing
            flat.append((name, value))
    return flat


def _above(name: str) -> list[str]:
    """The dotted names above `name`: a and a.b of a.b.c."""
    return list(itertools.accumulate(name.split(".")[: MAX_LEVELS + 3], "{}.{}".format))[:-1]


def _read_overrides(overrides: Sequence[str], mistakes: list[str]) -> list[tuple[str, Any]]:
    """The values of ``key=value``, as YAML; a text key takes its text as it is. Mistakes are added to `mistakes`."""
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        name, equals, value = text.partition("=")
        name = name.strip()
        key = KEYS.get(name)
        if not equals:
            mistakes.append(f"{shown(repr(text))} is not key=value; write for example data.batch_size=256")
        elif key and not key.is_list and not key.is_mapping:
            pairs.append((name, None if key.holds_text and value in NULLS else value))
        else:
            try:
                pairs.append((name, parse_yaml(value)[1 if key and key.is_list else 0]))
            except (yaml.YAMLError, ValueError) as error:
                if key and not key.is_mapping:
                    pairs.append((name, value))
                    continue
                problem = shown(describe_problem(error))
                mistakes.append(f"{shown(text)} is not valid YAML ({problem}); text with such characters needs quotes")
    return pairs


def _put_all(values: Values, pairs: Sequence[tuple[str, Any]]) -> list[str]:
    """Puts each value of `pairs` in its place in `values`; returns the mistakes in their names."""
    mistakes: list[str] = []
    for name, value in pairs:
        key = _key_of(name)
        if key is None:
            hint = len(mistakes) < MAX_MISTAKES  # a search through all keys
            mistakes.append(_unknown(name, value) if hint else f"there is no key {shown(name)!r}")
        elif key.is_mapping:
            parts = name.removeprefix(key.name).split(".")[1:]
            if not all(parts) or len(parts) > MAX_LEVELS:
                reason = f"nested more than {MAX_LEVELS} deep" if all(parts) else "empty"
                mistakes.append(f"{shown(name)}={shown(value)}: an argument's name is {reason}; write {key.name}.NAME=value")
                continue
            values[key.name] = _merged(
                values.get(key.name), functools.reduce(lambda inner, part: {part: inner}, parts[::-1], value)
            )
        else:
            values[name] = value
    return mistakes


def _key_of(name: str) -> Key | None:
    """The key that `name` sets, whole or an entry of its mapping."""
    return KEYS.get(name) or next((key for key in KEYS.values() if key.is_mapping and name.startswith(key.name + ".")), None)


def _unknown(name: str, value: Any) -> str:
    given = f"{shown(name)}={shown(value)}"
    if name in GROUPS:
        return f"{given}: {name} is a group of keys; set one of them, such as {nearest_key(name + '.')}"
    return f"{given}: there is no key {shown(name)!r}; did you mean {nearest_key(name)!r}? (--help lists all)"


def _merged(old: Any, new: Any) -> Any:
    """Two mappings entry by entry, at every depth; an empty one, as anything else, takes the place of what was there."""
    if not (isinstance(old, dict) and isinstance(new, dict) and new):
        return new
    return old | {name: _merged(old.get(name), value) for name, value in new.items()}


def _settle(values: Values) -> tuple[Config, dict[str, str]]:
    """The configuration of `values`, and what is wrong with each of them that does not fit."""
    wrong: dict[str, str] = {}
    settled = {name: key.default for name, key in KEYS.items()}

    def put(name: str, value: Any, given: Any) -> None:
        key = KEYS[name]
        try:
            fitting = fit(key, value)
            settled[name] = expand_user(fitting) if name in FOLDERS else fitting
        except ValueError as error:
            reason = f" ({shown(error)})" if str(error) else ""
            wrong[name] = f"{name}={shown(given)} is not allowed{reason}; {name} takes {key.allowed}"

    unresolved = {name: value for name, value in values.items() if count(value)}
    for name in values.keys() - unresolved.keys():
        put(name, map_text(values[name], unescape), values[name])
    for name, value in (resolve(settled, unresolved) if unresolved else {}).items():
        if isinstance(value, Unresolvable):
            advice = r"name a key, or a variable as ${oc.env:NAME}, and write \${ for the two characters"
            wrong[name] = f"{name}={shown(values[name])} cannot be resolved ({shown(value)}); {advice}"
        else:
            put(name, value, values[name])
    config = Config()
    for name, value in settled.items():
        *groups, last = name.split(".")
        setattr(functools.reduce(getattr, groups, config), last, value)
    return config, {name: wrong[name] for name in values if name in wrong}


def _check_size(config: Config) -> list[str]:
    """A mistake where the configuration could not be read back from the file that a run keeps of it."""
    if len(repr(config)) < MAX_BYTES // 20:
        return []
    content = dump_config(config)
    try:
        parse_yaml(content.decode())
        problem = f"{len(content):,} bytes, and a run keeps at most {MAX_BYTES:,}" if len(content) > MAX_BYTES else None
    except yaml.YAMLError as error:
        problem = describe_problem(error)
    return [f"the configuration as a whole is too large: {problem}; give less in it"] if problem else []


def _few(mistakes: list[str]) -> list[str]:
    more = len(mistakes) - MAX_MISTAKES
    return mistakes if more <= 0 else [*mistakes[:MAX_MISTAKES], f"and {more:,} more mistakes"]
