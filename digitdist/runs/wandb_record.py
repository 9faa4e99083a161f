"""What a run's folder keeps for W&B beside ``metrics.jsonl``, in ``wandb/``, so that all of it can be sent at any time:
``run.json`` has its id, names and configuration there, ``media.jsonl`` a chart or table a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from digitdist.errors import in_one_line
from digitdist.files import atomic_write, parse_json, read_plain
from digitdist.runs.metrics import read_json_lines, read_metrics
from digitdist.runs.wandb_media import Media, is_whole

OPTIONS, MEDIA = "run.json", "media.jsonl"
NAMES = ("id", "project", "entity", "group", "job_type", "name", "notes", "tags", "config")  # in the former


def begin_record(folder: Path, run_id: str, options: Mapping[str, Any], report: Callable[[str], None] = lambda _: None) -> None:
    """Keeps how the run of `folder` is named at W&B, and drops the charts of steps that are now taken again, and those that are
    damaged, of which `report` gets a line.

    Raises:
        OSError: they cannot be written.
    """
    place = folder / "wandb"
    place.mkdir(exist_ok=True)
    atomic_write(place / OPTIONS, json.dumps({"id": run_id, **options}).encode() + b"\n")
    if (place / MEDIA).exists():
        last = max((event["step"] for event in read_metrics(folder)), default=-1)
        kept = [line for line in _media_lines(folder, report) if line["step"] <= last]
        atomic_write(place / MEDIA, b"".join(json.dumps(line).encode() + b"\n" for line in kept))


def read_options(folder: Path) -> dict[str, Any] | None:
    """The arguments of ``wandb.init`` that a training has kept; None where none has, or they are damaged."""
    try:
        options = parse_json(read_plain(folder / "wandb" / OPTIONS))
    except (OSError, ValueError):
        return None
    if not isinstance(options, dict) or not isinstance(options.get("id"), str):
        return None
    kinds = {"config": dict, "tags": list}
    return {name: value if isinstance(value := options.get(name), kinds.get(name, str)) else None for name in NAMES}


def keep_media(folder: Path, step: int, media: Mapping[str, Media]) -> None:
    """Raises OSError where they cannot be written."""
    with (folder / "wandb" / MEDIA).open("ab") as file:
        for name, content in media.items():
            file.write(json.dumps({"step": step, "name": name, "media": content}).encode() + b"\n")


def stored_rows(
    folder: Path, report: Callable[[str], None] = lambda _: None
) -> dict[int, tuple[dict[str, Any], dict[str, Media]]]:
    """All metrics and all media of each step, by rising step; where one was recorded twice, the later one. `report` gets a line
    where damage is left out."""
    rows: dict[int, tuple[dict[str, Any], dict[str, Media]]] = {}
    for event in read_metrics(folder, report):
        rows.setdefault(event["step"], ({}, {}))[0].update(event)
    try:
        for line in _media_lines(folder, report):
            rows.setdefault(line["step"], ({}, {}))[1][line["name"]] = line["media"]
    except OSError as error:
        report(f"{folder / 'wandb' / MEDIA} is damaged and left out ({in_one_line(error.strerror)})")
    return dict(sorted(rows.items()))


def _media_lines(folder: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """The whole lines of ``media.jsonl``, but for a last one that was cut short. Raises OSError where it cannot be read."""
    return read_json_lines(folder / "wandb" / MEDIA, _is_media, report)


def _is_media(value: dict[str, Any]) -> bool:
    return isinstance(value.get("name"), str) and is_whole(value.get("media"))
