"""Pages: one HTML file each, which needs no network and no script, and in which every text is escaped."""

from __future__ import annotations

import base64
import errno
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from digitdist.config import KEYS
from digitdist.errors import UserError, in_one_line
from digitdist.files import atomic_write
from digitdist.report.plots import Plot


@dataclass(frozen=True)
class Picture:
    """A plot as a page shows it: its image as a ``data:`` address, or empty where there is none."""

    title: str
    alt: str
    caption: str
    source: str


def draw(title: str, make: Callable[[], Plot], file: Path | None = None) -> Picture:
    """What `make` plots as a picture, and as `file` too; the file of a plot that does not exist any more is removed.

    Where values that somebody has written cannot be plotted, the picture named `title` says so.

    Raises:
        OSError: the file cannot be written, or its folder is a link.
    """
    try:
        plot, content = _plotted(make())
    except (OSError, UserError):
        raise
    except Exception as error:  # matplotlib raises anything
        plot, content = Plot(title, "", f"No picture: {type(error).__name__}: {in_one_line(error)}."), None
    if file and file.parent.is_symlink():
        raise OSError(errno.ELOOP, "is a link out of the run's folder", str(file.parent))
    if content is None:
        if file:
            file.unlink(missing_ok=True)
        return Picture(plot.title, plot.alt, plot.caption, "")
    if file:
        file.parent.mkdir(exist_ok=True)
        atomic_write(file, content)
    return Picture(plot.title, plot.alt, plot.caption, f"data:image/png;base64,{base64.b64encode(content).decode()}")


def _plotted(plot: Plot) -> tuple[Plot, bytes | None]:
    """A plot and its PNG, or None where it has no figure."""
    if plot.figure is None:
        return plot, None
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png")
    return plot, buffer.getvalue()


def write_page(file: Path, template: str, **values: Any) -> None:
    """Fills in ``templates/TEMPLATE.html.j2`` and writes it as `file`.

    Raises:
        OSError: the file cannot be written.
    """
    environment = html_environment("digitdist.report")
    atomic_write(file, environment.get_template(f"{template}.html.j2").render(values).encode(errors="backslashreplace"))


def percent(correct: int, total: int) -> str:
    return f"{100 * correct / total:.2f} %" if total else "none"


def rate(result: dict[str, Any]) -> str:
    return f"{result['images_per_second']:,.0f}" if result["images_per_second"] else "none"


def plain(value: object) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def setting(name: str, value: object) -> dict[str, str | None]:
    """A key of the configuration, its value, and its default where that differs."""
    default = KEYS[name].default if name in KEYS else None
    return {"name": name, "value": plain(value), "default": None if value == default else plain(default)}


@cache
def html_environment(package: str) -> jinja2.Environment:
    """Of the templates of a package, in which every text is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
