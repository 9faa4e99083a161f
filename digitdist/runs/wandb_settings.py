"""What the user has told wandb by environment variables and settings files: read as wandb reads it, without importing it."""

from __future__ import annotations

import configparser
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from digitdist.config import TrackingConfig

# Each value that wandb takes, and what it means there.
MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
BAD_IN_RUN_ID = set(":;,#?/'")
NO = ("", "0", "false", "no", "off", "n", "f")


def chosen_mode() -> tuple[str, str | None]:
    """The mode that variables and files ask for, ``online`` where nothing does, and what is wrong with the one they name.

    What wandb would not take, or cannot be read, is ``offline``: nothing is sent that somebody may have meant to keep.
    """
    if os.environ.get("WANDB_DISABLED", "").strip().lower() not in NO:  # other libraries' word for it
        return "disabled", None
    if "WANDB_MODE" in os.environ:
        return _meaning(os.environ["WANDB_MODE"], "WANDB_MODE")
    for file in settings_files():
        try:
            settings = _read(file)
        except (OSError, ValueError, configparser.Error):
            return "offline", f"{file} cannot be read"
        if "mode" in settings:
            return _meaning(settings["mode"], f"{file}: mode")
        if settings.get("disabled", "").strip().lower() not in NO:  # so did `wandb offline` once
            return "offline", None
    return "online", None


def _meaning(mode: str, where: str) -> tuple[str, str | None]:
    return (MODES[mode], None) if mode in MODES else ("offline", f"{where}={mode} is none of {', '.join(MODES)}")


def wandb_setting(name: str, variable: str | None = None) -> str | None:
    """A setting of wandb's that is not empty: of an environment variable (WANDB_ and its name), else of a settings file."""
    value = os.environ.get(variable or f"WANDB_{name.upper()}")
    for file in settings_files():
        try:
            value = value or _read(file).get(name)
        except (OSError, ValueError, configparser.Error):  # wandb leaves such a file out
            continue
    return value or None


def settings_files() -> Iterator[Path]:
    """Those of the working directory and of the user, first the one that counts before the others."""
    for place in dict.fromkeys((Path.cwd(), Path(os.environ.get("WANDB_DIR") or ".").expanduser())):
        yield place / ".wandb" / "settings"
        yield place / "wandb" / "settings"
    yield Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"


def _read(file: Path) -> Mapping[str, str]:
    """The settings in a file; none where there is no file."""
    if not file.exists():
        return {}
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(file.read_text(encoding="utf-8"), str(file))
    return dict(parser["default"]) if parser.has_section("default") else {}


def init_options(tracking: TrackingConfig, run_name: str) -> dict[str, Any]:
    """What names the run at W&B, as arguments of ``wandb.init``: the configuration's, else wandb's own settings."""
    default = TrackingConfig()
    project = tracking.project if tracking.project != default.project else wandb_setting("project") or default.project
    tags = os.environ.get("WANDB_TAGS", "")
    return {
        "project": project,
        "entity": tracking.entity or wandb_setting("entity"),
        "group": tracking.group or wandb_setting("run_group"),
        "job_type": wandb_setting("run_job_type", "WANDB_JOB_TYPE"),
        "name": tracking.name or wandb_setting("run_name", "WANDB_NAME") or run_name,
        "notes": tracking.notes or wandb_setting("run_notes", "WANDB_NOTES"),
        "tags": tracking.tags or [tag.strip() for tag in tags.split(",") if tag.strip()] or None,
    }


def wandb_mistakes(tracking: TrackingConfig) -> list[str]:
    """What wandb would refuse of the names that the run is to have there, found before anything is made."""
    if tracking.wandb == "disabled" or (tracking.wandb == "auto" and chosen_mode()[0] == "disabled"):
        return []
    options = init_options(tracking, "run")
    variable = os.environ.get("WANDB_PROJECT")
    where = "tracking.project" if options["project"] == tracking.project else "WANDB_PROJECT"
    found = [_bad_project(where, options["project"])]
    if variable and variable != options["project"]:  # wandb reads it though it has no say
        found.append(_bad_project("WANDB_PROJECT", variable))
    found.append(_bad_run_id(os.environ.get("WANDB_RUN_ID", "")))
    where = "tracking.tags" if tracking.tags else "WANDB_TAGS"
    found += [
        f"{where}: the tag {tag!r} has {len(tag)} characters; W&B takes 1 to 64; shorten it"
        for tag in options["tags"] or ()
        if not 1 <= len(tag) <= 64
    ]
    return [mistake for mistake in found if mistake]


def _bad_project(where: str, name: str) -> str | None:
    bad = sorted(set(name) & set("/\\#?%:"))
    if bad:
        return f"{where}={name}: W&B takes no {' '.join(bad)} in a project's name; give another"
    if not 1 <= len(name) <= 128:
        return f"{where}={name}: W&B takes a project's name of 1 to 128 characters; give another"
    return None


def _bad_run_id(name: str) -> str | None:
    bad = sorted(set(name) & BAD_IN_RUN_ID)
    if bad:
        return f"WANDB_RUN_ID={name}: W&B takes no {' '.join(bad)} in a run's id; give another, or unset it"
    if name != name.strip():
        return f"WANDB_RUN_ID={name!r}: W&B takes no spaces around a run's id; give another, or unset it"
    return None
