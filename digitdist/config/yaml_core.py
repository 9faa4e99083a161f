"""YAML's scalars as YAML 1.2's core schema has them: 1e-1, 5e-4, .5 and 0o17 are numbers, yes, on and no are text.

PyYAML itself follows YAML 1.1.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
NULL = re.compile(r"~|null|Null|NULL|")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _CoreLoader(yaml.SafeLoader):
    """Reads scalars by the core schema."""


class _TextLoader(yaml.SafeLoader):
    """Reads what is to be text: numbers as YAML 1.1 has them, so that a name such as 1e3 stays as it is."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of 1.2 would take for anything else."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _fraction(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    return float(re.sub(r"\.(?=inf|nan)", "", text))


def _add(kind: type, name: str, form: re.Pattern[str], first: str) -> None:
    whole = re.compile(f"(?:{form.pattern})$")
    kind.add_implicit_resolver(f"tag:yaml.org,2002:{name}", whole, [*first])  # type: ignore[attr-defined]


_CoreLoader.yaml_implicit_resolvers = {}
_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_CoreLoader, _TextLoader, _Dumper):
    _add(_kind, "bool", BOOL, "tTfF")
_add(_CoreLoader, "null", NULL, "~nN")
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:null", NULL, [""])  # an empty scalar has no first character
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])
for _kind in (_CoreLoader, _Dumper):
    _add(_kind, "int", INT, "-+0123456789")
    _add(_kind, "float", FLOAT, "-+.0123456789")
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _number)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _fraction)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, its scalars by the core schema.

    Raises:
        yaml.YAMLError: it is not valid YAML.
    """
    return yaml.load(text, _CoreLoader)


def parse_text(text: str) -> Any:
    """The same for values that are to be text: there 1e3 and 2026-01-01 are not numbers or dates."""
    return yaml.load(text, _TextLoader)


def dump_yaml(tree: Any) -> str:
    """`tree` as YAML that both YAML 1.1 and the core schema read as `tree`."""
    return yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
