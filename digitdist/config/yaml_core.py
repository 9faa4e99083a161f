"""YAML as the whole package reads and writes it: the core schema of YAML 1.2, without what has no place in a configuration.

1e-1, 5e-4, .5 and 0o17 are numbers; yes, on, no and 2026-01-01 are text (PyYAML itself follows YAML 1.1). Refused are the same
key twice in a mapping, keys that are neither text nor whole numbers, tags of other types, and values that are nested without
end, too deep, or grow beyond all bounds as they are repeated by aliases.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError, SafeConstructor

from digitdist.errors import in_one_line

MAX_DEPTH, MAX_VALUES, MAX_DIGITS = 40, 10_000, 100
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
NULL = re.compile(r"~|null|Null|NULL|")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
PREFIX = "tag:yaml.org,2002:"
BREAKS = re.compile(r"[\x85\u2028\u2029]")  # ends of lines in YAML 1.1, but not in YAML 1.2


class _CoreLoader(yaml.SafeLoader):
    """Reads one document; scalars by the core schema."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, f"it is nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            merge = key.tag == PREFIX + "merge"
            name = None if not isinstance(key, yaml.ScalarNode) else key.value if merge else self.construct_object(key)
            if type(name) not in (str, int):
                raise ComposerError(None, None, "a key must be text or a whole number", key.start_mark)
            if str(name) in names:
                raise ComposerError(None, None, f"the key {name!r} stands twice in one mapping", key.start_mark)
            names.add(str(name))
        return node


class _TextConstructor(SafeConstructor):
    """Makes text of each scalar but null, as it is written: 1e3, 017 and true."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of 1.2 would take for anything else, and repeats what is there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _number(loader: Any, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > MAX_DIGITS:
        raise ConstructorError(None, None, f"a whole number of more than {MAX_DIGITS} digits", node.start_mark)
    try:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    except ValueError:  # by a tag
        raise ConstructorError(None, None, f"{text!r} is not a whole number", node.start_mark) from None


def _fraction(loader: Any, node: yaml.ScalarNode) -> float:
    if not FLOAT.fullmatch(node.value):  # by a tag
        raise ConstructorError(None, None, f"{node.value!r} is not a number", node.start_mark)
    return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


def _truth(loader: Any, node: yaml.ScalarNode) -> bool:
    if not BOOL.fullmatch(node.value):  # by a tag
        raise ConstructorError(None, None, f"{node.value!r} is not true or false", node.start_mark)
    return node.value.lower() == "true"


def _written(loader: Any, node: yaml.ScalarNode) -> str:
    return node.value


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(PREFIX + "str", text, style='"' if BREAKS.search(text) else None)


def _add(kind: type, name: str, form: re.Pattern[str], first: str) -> None:
    whole = re.compile(f"(?:{form.pattern})$")
    kind.add_implicit_resolver(PREFIX + name, whole, [*first])  # type: ignore[attr-defined]


def _constructors(base: Any, **own: Any) -> dict[str | None, Any]:
    """Of the core schema's types alone: what has another tag is refused."""
    plain = ("null", "str", "seq", "map")
    kept = {PREFIX + name: base.yaml_constructors[PREFIX + name] for name in plain}
    return kept | {PREFIX + name: make for name, make in own.items()} | {None: base.construct_undefined}


_CoreLoader.yaml_implicit_resolvers = {}
for _kind in (_CoreLoader, _Dumper):
    _add(_kind, "bool", BOOL, "tTfF")
    _add(_kind, "int", INT, "-+0123456789")
    _add(_kind, "float", FLOAT, "-+.0123456789")
_add(_CoreLoader, "null", NULL, "~nN")
_CoreLoader.add_implicit_resolver(PREFIX + "null", NULL, [""])  # an empty scalar has no first character
_CoreLoader.add_implicit_resolver(PREFIX + "merge", re.compile("<<$"), ["<"])
_CoreLoader.yaml_constructors = _constructors(yaml.SafeLoader, bool=_truth, int=_number, float=_fraction)
_TextConstructor.yaml_constructors = _constructors(SafeConstructor, bool=_written, int=_written, float=_written)
_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str) -> tuple[Any, Any]:
    """The value of a YAML document, and the same with each scalar but null as the text that is written there.

    Raises:
        yaml.YAMLError: it is not valid YAML, or one of what is refused here.
    """
    if found := BREAKS.search(text) or re.match("\ufeff", text):
        raise yaml.YAMLError(f"the character U+{ord(found[0]):04X}; write it as an escape in double quotes")
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _measure(node, 0, {})
        return loader.construct_document(node), _TextConstructor().construct_document(node)
    finally:
        loader.dispose()


def parse_scalar(text: str) -> Any:
    """The value of a plain scalar, but for an empty one, which stays text.

    Raises:
        yaml.YAMLError: a number has too many digits.
    """
    loader, plain = _CoreLoader(""), text.strip(" \t\r\n")
    tag = loader.resolve(yaml.ScalarNode, plain, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, plain)) if plain and tag in loader.yaml_constructors else text


def _measure(node: yaml.Node, level: int, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """How many values `node` holds, and how deep they are nested, where each alias counts as what it repeats."""
    if level + known.get(node, (0, 0))[1] > MAX_DEPTH:
        raise ComposerError(None, None, f"it is nested more than {MAX_DEPTH} deep", node.start_mark)
    if node not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for pair in inner for child in pair] if isinstance(node, yaml.MappingNode) else inner
        sizes = [_measure(child, level + 1, known) for child in children]
        known[node] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if known[node][0] > MAX_VALUES:
            raise ComposerError(None, None, f"it holds more than {MAX_VALUES:,} values", node.start_mark)
    return known[node]


def describe_problem(error: Exception) -> str:
    """What is wrong, and in which line and column."""
    if not isinstance(error, yaml.MarkedYAMLError) or not error.problem:
        return in_one_line(error)
    mark, problem = error.problem_mark, error.problem
    problem = f"{error.context} {problem}" if problem.startswith("but ") else problem
    return in_one_line(problem) + (f", in line {mark.line + 1}, column {mark.column + 1}" if mark else "")


def dump_yaml(tree: Any) -> str:
    """`tree` as YAML that both YAML 1.1 and the core schema read as `tree`."""
    return yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
