"""Reading a configuration: defaults, YAML files and ``key=value`` merged and checked; every mistake is reported at once."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from digitdist.config.checks import check_combinations
from digitdist.config.keys import GROUPS, KEYS, Key, nearest_key
from digitdist.config.schema import Config
from digitdist.config.yaml_core import dump_yaml, parse_text, parse_yaml
from digitdist.errors import UserError, in_one_line
from digitdist.files import atomic_write


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
    """The defaults, then each YAML file, then each ``key=value``: the later one wins.

    Returns it with every mistake found, each naming key, value, what is allowed and the nearest valid key. A key with a
    mistake keeps its former value.
    """
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    for file in files:
        try:
            values |= _read_yaml(file)
        except UserError as error:
            mistakes += error.mistakes
    for text in overrides:
        name, equals, value = text.partition("=")
        if equals:
            values[name.strip()] = _parse(name.strip(), value)
        else:
            mistakes.append(f"{text!r} is not key=value; write for example data.batch_size=256")

    tree, wrong = _merge(values)
    if wrong:
        tree, _ = _merge({name: value for name, value in values.items() if name not in wrong})
    config = typing.cast(Config, OmegaConf.to_object(tree))
    return config, [*mistakes, *wrong.values(), *check_combinations(config)]


def save_config(config: Config, file: Path) -> None:
    """Writes the whole resolved configuration as YAML, which `load_config` reads."""
    atomic_write(file, dump_yaml(OmegaConf.to_container(OmegaConf.structured(config))).encode())


def shipped_configs() -> dict[str, Path]:
    """The configuration files that ship with the package, by name (``sweep.yaml`` is W&B's, not a configuration)."""
    folder = Path(str(resources.files("digitdist.config") / "shipped"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml")) if file.stem != "sweep"}


def _read_yaml(file: str) -> dict[str, Any]:
    """The values of a YAML file by dotted key; those of text keys are read as text, so that 1e3 is no number there."""
    shipped = shipped_configs()
    path = shipped[file] if file in shipped and not Path(file).is_file() else Path(file)
    try:
        text = path.read_text()
        tree, as_text = parse_yaml(text), parse_text(text)
    except OSError as error:
        raise UserError(
            f"--config {file}: {error.strerror}; give the path of a YAML file, or one of {', '.join(shipped)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is not valid YAML: {in_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"--config {file} holds a {type(tree).__name__}; it must hold a YAML mapping of keys")
    texts = {name: value for name, value in _flatten(as_text).items() if name in KEYS and KEYS[name].holds_text}
    return _flatten(tree) | texts


def _flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a YAML tree by dotted key; a mapping of the user's (model.args) and an empty one stay whole."""
    flat: dict[str, Any] = {}
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and value and not (name in KEYS and KEYS[name].is_mapping):
            flat |= _flatten(value, name + ".")
        elif not (name in GROUPS and (value is None or value == {})):  # an empty group sets nothing
            flat[name] = value
    return flat


def _parse(name: str, text: str) -> Any:
    """The value of a ``key=value``: plain text where the key holds text, else as in YAML."""
    key = KEYS.get(name)
    if key and not key.is_mapping and not key.is_list:
        return None if text in ("null", "~") and key.takes(type(None)) else text
    try:
        return parse_text(text) if key and key.is_list else parse_yaml(text)
    except yaml.YAMLError:
        return text


def _key_of(name: str) -> Key | None:
    """The key that `name` sets, whole or an entry of its mapping."""
    return KEYS.get(name) or next((key for key in KEYS.values() if key.is_mapping and name.startswith(key.name + ".")), None)


def _merge(values: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The defaults with `values` put in, and what is wrong with each value that does not fit."""
    tree = OmegaConf.structured(Config)
    wrong = {name: mistake for name, value in values.items() if (mistake := _set(tree, name, value))}
    return tree, wrong


def _set(tree: Any, name: str, value: Any) -> str | None:
    """Puts one value into the tree; returns what is wrong with it, if anything."""
    key = _key_of(name)
    if key is None:
        if name in GROUPS:
            return f"{name}={value}: {name} is a group of keys; set one of them, such as {nearest_key(name + '.')}"
        return f"{name}={value}: there is no key {name!r}; did you mean {nearest_key(name)!r}? (--help lists all)"
    wrong = f"{name}={value} is not allowed; {key.name} takes {key.allowed}"
    if key.choices and value is False and "no" in key.choices:
        value = "no"  # what a writer of YAML 1.1 makes of it
    if isinstance(value, bool) and not key.takes(bool) and not key.is_mapping:
        return wrong
    if key.is_list and not (isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value)):
        return wrong
    try:
        OmegaConf.update(tree, name, value, merge=key.name == name, force_add=key.is_mapping and key.name != name)
        number = OmegaConf.select(tree, name)
    except (OmegaConfBaseException, ValueError):
        return wrong
    if isinstance(number, (int, float)) and not key.is_mapping and not key.in_range(number):
        return wrong
    return None
