"""What a run's folder keeps for W&B beside ``metrics.jsonl``, in ``wandb/``, so that all of it can be sent at any time:
``run.json`` has its id, names and configuration there, ``media.jsonl`` a chart or table a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digitdist.files import atomic_write
from digitdist.runs.metrics import read_metrics
from digitdist.runs.wandb_media import Media

OPTIONS, MEDIA = "run.json", "media.jsonl"
NAMES = ("id", "project", "entity", "group", "job_type", "name", "notes", "tags", "config")  # in the former


def begin_record(folder: Path, run_id: str, options: Mapping[str, Any]) -> None:
    """Keeps how the run of `folder` is named at W&B, and drops the charts of steps that are now taken again.

    Raises:
        OSError: they cannot be written.
    """
    place = folder / "wandb"
    place.mkdir(exist_ok=True)
    atomic_write(place / OPTIONS, json.dumps({"id": run_id, **options}).encode() + b"\n")
    if (place / MEDIA).exists():
        last = max((event["step"] for event in read_metrics(folder)), default=-1)
        kept = [line for line in _media_lines(folder) if line["step"] <= last]
        atomic_write(place / MEDIA, b"".join(json.dumps(line).encode() + b"\n" for line in kept))


def read_options(folder: Path) -> dict[str, Any] | None:
    """The arguments of ``wandb.init`` that a training has kept; None where none has, or they are damaged."""
    try:
        options = json.loads((folder / "wandb" / OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(options, dict) or not isinstance(options.get("id"), str):
        return None
    return {name: options.get(name) for name in NAMES}


def keep_media(folder: Path, step: int, media: Mapping[str, Media]) -> None:
    """Raises OSError where they cannot be written."""
    with (folder / "wandb" / MEDIA).open("ab") as file:
        for name, content in media.items():
            file.write(json.dumps({"step": step, "name": name, "media": content}).encode() + b"\n")


def stored_rows(folder: Path) -> dict[int, tuple[dict[str, Any], dict[str, Media]]]:
    """All metrics and all media of each step, by rising step; where one was recorded twice, the later one."""
    rows: dict[int, tuple[dict[str, Any], dict[str, Media]]] = {}
    for event in read_metrics(folder):
        rows.setdefault(event["step"], ({}, {}))[0].update(event)
    for line in _media_lines(folder):
        rows.setdefault(line["step"], ({}, {}))[1][line["name"]] = line["media"]
    return dict(sorted(rows.items()))


def _media_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``media.jsonl`` that are whole."""
    try:
        lines = (folder / "wandb" / MEDIA).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for text in lines:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # cut short by a crash
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and {"name", "media"} <= line.keys():
            found.append(line)
    return found
