"""The page as the server sends it, filled in for a run."""

from __future__ import annotations

from importlib import resources

from digitdist.data import DataSetInfo
from digitdist.demo.server import MAX_BYTES, Content
from digitdist.report import html_environment


def render_page(title: str, about: str, note: str, info: DataSetInfo, num_neighbours: int) -> dict[str, Content]:
    """The page, its style and its script, by path.

    It has a bar for each class of `info` and room for `num_neighbours` images; `about` is said of the run, `note` of the
    training images. Every text is escaped.
    """
    what = "digit" if all(name.isdecimal() and len(name) == 1 for name in info.classes) else "picture"
    html = (
        html_environment("digitdist.demo")
        .get_template("page.html.j2")
        .render(title=title, about=about, note=note, info=info, num_neighbours=num_neighbours, what=what, max_bytes=MAX_BYTES)
    )
    files = resources.files("digitdist.demo") / "templates"
    return {
        "/": Content("text/html; charset=utf-8", html.encode(errors="backslashreplace")),
        "/style.css": Content("text/css; charset=utf-8", (files / "style.css").read_bytes()),
        "/page.js": Content("text/javascript; charset=utf-8", (files / "page.js").read_bytes()),
    }
