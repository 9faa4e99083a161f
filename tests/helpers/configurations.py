"""Random configurations, each with what it means by the words of ``configs/README.md``, and not by the code that reads it."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.launching import ROOT

HOME, FROM_ENVIRONMENT = "/home/fuzz", "0.25"
WRONG = object()  # in place of a value that is refused
NULLS = ("null", "Null", "NULL", "~")
NUMBERS = [
    *(
        "0",
        "1",
        "2",
        "-1",
        "+3",
        "007",
        "28",
        "100",
        "4096",
        "4097",
        "1048576",
        "1048577",
        "10000000000000",
        "9" * 30,
        "9" * 101,
    ),
    *(
        "0o17",
        "0x1F",
        "0X1F",
        "0o8",
        "0b11",
        "1_000",
        "1:30",
        "1,000",
        "٣",
        "1e3",
        "1E2",
        "1e-1",
        "5e-4",
        ".5",
        "3.",
        "0.5",
        "-0.0",
    ),
    *(
        "+.5",
        "1.5e+2",
        "1e400",
        "-1e400",
        "5e-324",
        "1e-400",
        ".inf",
        "-.INF",
        "+.inf",
        ".nan",
        ".NaN",
        "nan",
        "inf",
        "Infinity",
    ),
    *("1.5.2", "--1", "1e", "e3", "0x", ".", "1 2", "½", "-0", "1e+09", "true", "False", "TRUE", "yes", "on", "null", "~", ""),
]
TEXTS = [
    *(
        "a",
        "x y",
        "naïve",
        "数字",
        "😀",
        "e\u0301",
        "a\u200bb",
        "\u202eabc",
        "$",
        "$HOME",
        "$$",
        "a$b",
        "1e3",
        "017",
        "true",
        "no",
    ),
    *(
        "2026-01-01",
        "null ",
        " lead",
        "#x",
        "a: b",
        "a #b",
        "'q'",
        '"',
        "\\",
        "a\\nb",
        "- a",
        "!!x",
        "&a",
        "*a",
        "%d",
        "@x",
        "`",
        "|",
    ),
    *(
        ">",
        "?",
        "{",
        "[a",
        "a]",
        "}{",
        "<<",
        "---",
        "...",
        "=",
        "a=b",
        "??",
        "????",
        "x???",
        "a" * 300,
        "\t",
        "a\tb",
        "\x7f",
        "\x01",
    ),
    *(
        "\u2028",
        "a\u2029b",
        "\x85",
        "\ufeff",
        "a\nb",
        "\r\n",
        "ß",
        "\U0001f468\u200d\U0001f469",
        ".",
        "..",
        "a/b",
        "~",
        "~/x",
        "~nobody-9/x",
    ),
]
RISKY = ("???", "\ud800", "${nope}", "${", "a${b", "${oc.env:FUZZ_NOT_SET}", "${nosuch:1}", "${run.name}${nope}")


@dataclass
class Key:
    """A row of the page's table: what the key is when nobody sets it, and what it takes."""

    name: str
    default: Any
    takes: str

    @property
    def nullable(self) -> bool:
        return self.takes.endswith(" or null")

    @property
    def kind(self) -> str:
        kinds = ("a whole number", "a number", "true or false", "one of", "text", "a list of texts", "a mapping")
        return next(kind for kind in kinds if self.takes.startswith(kind))

    @property
    def choices(self) -> list[str]:
        return self.takes.removeprefix("one of ").split(", ") if self.kind == "one of" else []

    def in_range(self, number: float) -> bool:
        bounds = {words: float(bound) for words, bound in re.findall(r"(at least|above|at most) (\S+)", self.takes)}
        return (
            math.isfinite(number)
            and number >= bounds.get("at least", -math.inf)
            and number <= bounds.get("at most", math.inf)
            and number > bounds.get("above", -math.inf)
        )


def keys_of_the_page() -> dict[str, Key]:
    page = (ROOT / "configs/README.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| `(.*?)` \| .* \| (.*?) \| (?:yes|no|in \w+ mode) \|$", page, re.M)
    return {name: Key(name, _default(default, takes), takes) for name, default, takes in rows}


def _default(text: str, takes: str) -> Any:
    if takes.startswith(("text", "one of")):
        return None if text == "null" and takes.endswith("null") else text
    return json.loads(text)


NOT_IN_YAML = re.compile("[\x7f\x85\u2028\u2029\ud800-\udfff]")  # unless they are escaped
KEYS = keys_of_the_page()


def core_schema(text: str) -> Any:
    """The value of a plain scalar by chapter 10.3.2 of YAML 1.2; the text itself where it is one."""
    if text in (*NULLS, ""):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    for form, base in ((r"0o[0-7]+", 8), (r"0x[0-9a-fA-F]+", 16), (r"[-+]?[0-9]+", 10)):
        if re.fullmatch(form, text):
            return int(text[2:] if base != 10 else text, base) if len(text) <= 100 else WRONG
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


@dataclass
class Written:
    """A value as somebody writes it: its text; whether a file has it in quotes; what it means where that is not in its text."""

    text: str
    quoted: bool = False
    value: Any = field(default=None)  # of lists, mappings and interpolations


def meaning(key: Key, written: Written, in_file: bool) -> Any:
    """What `key` becomes; `WRONG` where it is refused."""
    text = written.text
    if key.kind in ("a list of texts", "a mapping") or written.value is not None:
        return written.value
    if key.kind in ("a whole number", "a number", "true or false"):
        plain = text.strip(" \t\r\n")
        if not plain and (text or written.quoted or not in_file):
            return WRONG
        value = core_schema(plain)
        if value is None:
            return None if key.nullable else WRONG
        if key.kind == "true or false":
            return value if isinstance(value, bool) else WRONG
        if isinstance(value, (bool, str)) or value is WRONG or (key.kind == "a whole number" and isinstance(value, float)):
            return WRONG
        return (float if key.kind == "a number" else int)(value) if key.in_range(value) else WRONG
    if not written.quoted and (text in NULLS or (in_file and not text)):
        return None if key.nullable else WRONG
    return _text(key, text)


def _text(key: Key, text: str) -> Any:
    if key.choices:
        text = "no" if "no" in key.choices and text.lower() == "false" else text
        return text if text in key.choices else WRONG
    if key.name == "run.name":
        breaks = any(c in text for c in "\n\r\t\x85\u2028\u2029\x7f\x01")
        return (
            WRONG
            if not text.strip() or text in (".", "..") or set(text) & set("/\\") or breaks or len(text.encode()) > 255
            else text
        )
    if key.name in ("data.root", "run.dir", "checkpoint.resume"):
        if not text or text.startswith("~nobody-9") or (key.name == "checkpoint.resume" and text not in ("auto", "never")):
            return WRONG if key.name != "checkpoint.resume" or text not in (".", "..") else text
        if any(len(part.encode()) > 255 for part in text.split("/")):
            return WRONG
        return HOME + text[1:] if re.match(r"~(/|$)", text) else text
    return text


@dataclass
class Configuration:
    """Files and overrides, and what they mean: each key's value, and those keys of which one is refused."""

    files: list[str]
    overrides: list[str]
    values: dict[str, Any]
    wrong: set[str]
    broken: list[str]  # files that are not the YAML of a configuration

    @property
    def excluded(self) -> bool:
        """Whether legal values exclude each other."""
        v = {name: KEYS[name].default if value is WRONG else value for name, value in self.values.items()}
        folder = v["data.name"] == "folder" and v["data.image"] == "resize" and v["data.target"] is None
        exact = v["sync.mode"] == "exact"
        return bool(
            (v["sync.mode"] != "ddp" and (v["sync.compress"] != "none" or v["sync.batch_norm"]))
            or (v["train.compile"] != "none" and exact)
            or (v["train.compile"] in ("reduce-overhead", "max-autotune") and v["train.accumulate"] > 1)
            or (v["data.args"] and v["data.target"] is None)
            or v["data.channels"] == 2
            or ((v["data.size"], v["data.channels"]) != (28, 1) and not folder)
            or v["train.accumulate"] > v["data.batch_size"]
            or (exact and v["sync.shards"] * v["train.accumulate"] > 65536)
            or (v["train.patience"] and not (v["data.validation"] and v["train.eval_every"]))
        )


def random_configuration(random: random.Random, folder: Path) -> Configuration:
    """One with up to two files in `folder`, and up to three ``key=value``."""
    raw: dict[str, Any] = {}  # of each key, the meaning of what came last
    files, broken = [], []
    for number in range(random.choice((0, 1, 1, 2))):
        chosen = {name: _written(KEYS[name], random) for name in random.sample([*KEYS], random.choice((1, 2, 3, 5)))}
        file = folder / f"{number}.yaml"
        file.write_bytes(_in_yaml(chosen, random))
        files.append(str(file))
        text = file.read_bytes().decode("utf-8", "surrogatepass")
        if NOT_IN_YAML.search(text) or re.search(r": [0-9]{101}", text):
            broken.append(str(file))
        for name, written in chosen.items():
            raw[name] = _merged(KEYS[name], raw.get(name, {}), meaning(KEYS[name], written, in_file=True))
    overrides, unreadable = [], set()  # which no later value mends
    for name in random.choices([*KEYS], k=random.choice((0, 1, 1, 2, 3)) if files else random.choice((1, 2, 3))):
        written = _written(KEYS[name], random)
        overrides.append(f"{name}={written.text}")
        if KEYS[name].kind in ("a list of texts", "a mapping") and NOT_IN_YAML.search(written.text):
            unreadable.add(name)
        plain = Written(written.text, value=written.value)
        raw[name] = _merged(KEYS[name], raw.get(name, {}), meaning(KEYS[name], plain, in_file=False))
    wrong = unreadable | {name for name, value in raw.items() if value is WRONG}
    return Configuration(files, overrides, {name: key.default for name, key in KEYS.items()} | raw, wrong, broken)


def _merged(key: Key, old: Any, new: Any) -> Any:
    if key.kind != "a mapping" or new is WRONG or old is WRONG or not new:
        return new
    both = {
        name for name in old.keys() & new.keys() if isinstance(old[name], dict) and isinstance(new[name], dict) and new[name]
    }
    return old | new | {name: _merged(key, old[name], new[name]) for name in both}


def _written(key: Key, random: random.Random) -> Written:
    """A value of `key`, legal about as often as not."""
    if key.kind == "a mapping":
        value = random.choice((3, [1], "x", None)) if random.random() < 0.1 else _arguments(random, 2)
        return Written(_flow(value), value=value if isinstance(value, dict) else WRONG)
    if key.kind == "a list of texts":
        items = random.choices([*(t for t in TEXTS if "~nobody" not in t), *NUMBERS[:40]], k=random.choice((0, 1, 3)))
        if random.random() < 0.2:
            return Written(random.choice(("a", "[[a]]", "{a: b}", "[null]", "3", '["${nope}"]', '["???"]')), value=WRONG)
        return Written(json.dumps(items, ensure_ascii=False), value=items)
    if random.random() < 0.015:
        return Written(random.choice(RISKY), quoted=True, value=WRONG)
    if random.random() < 0.015:
        return Written(r"a\${b}", quoted=True, value=_text(key, "a${b}") if key.kind in ("text", "one of") else WRONG)
    if random.random() < 0.015:
        value = meaning(key, Written(FROM_ENVIRONMENT), in_file=False)
        return Written("${oc.env:FUZZ_NUMBER}", quoted=True, value=WRONG if value is None else value)
    pools: list[list[str]] = [NUMBERS, TEXTS]
    likely = {
        "a whole number": ["1", "2", "100", "0o17", "0x1F", "+3", "28", "28", "1"],
        "a number": ["1", "0.5", ".5", "1e-1", "5e-4", "3.", "0x1"],
        "true or false": ["true", "false", "True", "FALSE"],
        "one of": key.choices,
        "text": ["auto", "never", *TEXTS],
    }[key.kind]
    return Written(random.choice(random.choice((*[likely] * 12, *pools))), quoted=random.random() < 0.3)


def _arguments(random: random.Random, depth: int) -> dict[str, Any]:
    """Arguments whose texts hold no dollar, and whose numbers are finite."""
    plain = [
        None,
        True,
        False,
        0,
        -7,
        10**20,
        0.1,
        1e-7,
        -2.5,
        "",
        "1e3",
        "yes",
        "017",
        "~",
        "null",
        "naïve",
        "a: b",
        "\u2028",
        "a\nb",
    ]
    result: dict[str, Any] = {}
    for name in random.sample(["width", "a", "数", "x y", "1", "a.b", "true"], random.choice((0, 1, 2, 3))):
        nested = random.random() if depth else 1
        result[name] = (
            _arguments(random, depth - 1)
            if nested < 0.25
            else random.choices(plain, k=2)
            if nested < 0.4
            else random.choice(plain)
        )
    return result


def _flow(value: Any) -> str:
    """A value in YAML's flow style, as JSON writes it."""
    return json.dumps(value, ensure_ascii=False)


def _in_yaml(chosen: dict[str, Written], random: random.Random) -> bytes:
    """The text of a file: dotted or nested, in block or flow style, with comments, a byte order mark, either end of lines."""
    groups: dict[str, list[str]] = {}
    for name, written in chosen.items():
        group, _, last = name.rpartition(".")
        structured = KEYS[name].kind in ("a list of texts", "a mapping")
        plain = re.fullmatch(r"[\w.+~-][\w.+/~-]*", written.text, re.A) and written.text != "---"
        if not structured and not plain and written.text:
            written.quoted = True
        text = (
            written.text if structured or not written.quoted else json.dumps(written.text, ensure_ascii=written.text.isascii())
        )
        groups.setdefault(group, []).append(f"{last}: {text}")
    style, lines = random.choice(("block", "flow", "dotted")), []
    for group, entries in groups.items():
        if not group:
            lines += entries
        elif style == "flow":
            lines.append(f"{group}: {{{', '.join(entries)}}}")
        elif style == "dotted":
            lines += [f"{group}.{entry}" for entry in entries]
        else:
            lines += [f"{group}:", *(f"  {entry}  # {group}" for entry in entries)]
    text = random.choice(("", "# a comment\n", "---\n")) + "\n".join(lines) + "\n"
    return random.choice(("", "", "\ufeff")).encode() + text.replace("\n", random.choice(("\n", "\r\n"))).encode(
        "utf-8", "surrogatepass"
    )
