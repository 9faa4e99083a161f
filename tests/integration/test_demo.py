"""The page to draw on, in a browser, as a person uses it: by mouse, finger and keyboard."""

from __future__ import annotations

import itertools
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import Browser
from helpers.launching import CLEAN, QUIET, python
from helpers.strokes import DIGITS, Stroke, in_steps
from PIL import Image

from digitdist.data import Splits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WIDTHS = (400, 1200)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with a run of the recipe `fast`, and MNIST."""
    place = tmp_path_factory.mktemp("place")
    (place / "data").symlink_to(mnist_root)
    done = python("-m", "digitdist.train", "--config", "fast", *QUIET, "run.name=quick", cwd=place)
    assert done.code == 0, done.err
    return place


def start(place: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A command that serves the page, and the page's address."""
    command = [sys.executable, "-m", "digitdist.demo", *arguments]
    streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=place, env=CLEAN, text=True, **streams)
    assert process.stdout
    line = process.stdout.readline()
    found = re.match(r"(http://127\.0\.0\.1:\d+/) shows the page", line)
    if not found:
        process.kill()
        raise AssertionError((line, process.communicate()))
    return process, found[1]


def end(process: subprocess.Popen[str]) -> None:
    """Ends a command by ^C, after which it says so in a line and nothing else."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out.strip(), err) == (0, "the page is not served any more", "")


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    process, url = start(place, "quick", "--port", "0")
    yield url
    end(process)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def on_screen(browser: Browser, stroke: Stroke) -> Stroke:
    """A stroke in the paper's square as places in the window."""
    left, top, side = browser.evaluate("(({left, top, width}) => [left, top, width])(paper.getBoundingClientRect())")
    return [(left + side * x, top + side * y) for x, y in in_steps(stroke)]


def draw(browser: Browser, *strokes: Stroke, finger: bool = False) -> None:
    for stroke in strokes:
        first, *others = on_screen(browser, stroke)
        if finger:
            browser.finger("Start", first)
            for point in others:
                browser.finger("Move", point)
            browser.finger("End")
        else:
            browser.mouse("Pressed", *first)
            for point in others:
                browser.mouse("Moved", *point)
            browser.mouse("Released", *others[-1])


def text(browser: Browser, name: str) -> str:
    """What an element of the page says once the last answer has come."""
    browser.wait_for("find('prediction').getAttribute('aria-busy') !== 'true'")
    return browser.evaluate(f"find({name!r}).textContent")


def bars(browser: Browser) -> list[float]:
    """The lengths of the bars as the page has them, 0 to 1."""
    return browser.evaluate("[...document.querySelectorAll('.bar')].map(bar => parseFloat(bar.style.width) / 100)")


def shown_images(browser: Browser) -> int:
    return browser.evaluate("[...document.querySelectorAll('figure img')].filter(image => image.naturalWidth === 28).length")


@pytest.mark.parametrize("finger", [False, True], ids=["mouse", "finger"])
def test_drawn_strokes_of_all_ten_digits_are_read_right(browser: Browser, url: str, finger: bool):
    browser.open(url, WIDTHS[0] if finger else WIDTHS[1], 900, touch=finger)
    said = {}
    for digit, strokes in DIGITS.items():
        draw(browser, *strokes, finger=finger)
        said[digit] = text(browser, "verdict")
        assert max(range(10), key=bars(browser).__getitem__) == int(digit)
        assert sum(bars(browser)) == pytest.approx(1, abs=0.01)
        assert shown_images(browser) == 6, "what the network sees, and five training images"
        assert browser.evaluate("scrollY") == 0, "a finger draws, and does not scroll"
        browser.evaluate("find('clear').click()")
    assert [words.split(", ")[0] for words in said.values()] == list(said), said
    assert browser.errors == []


def test_the_bars_move_while_a_stroke_is_drawn(browser: Browser, url: str):
    browser.open(url, WIDTHS[1], 900)
    points = on_screen(browser, DIGITS["2"][0])
    browser.mouse("Pressed", *points[0])
    seen = []
    for point in points[1:]:
        browser.mouse("Moved", *point)
        text(browser, "verdict")
        seen.append(tuple(bars(browser)))
    assert len(set(seen)) > 10
    browser.mouse("Released", *points[-1])


def test_undo_takes_back_the_last_thing_and_clear_all(browser: Browser, url: str):
    browser.open(url, WIDTHS[1], 900)
    assert (text(browser, "verdict"), sum(bars(browser)), shown_images(browser)) == ("Nothing drawn yet", 0, 0)
    first, second = DIGITS["4"]
    draw(browser, first)
    before = text(browser, "verdict"), bars(browser)
    draw(browser, second)
    assert text(browser, "verdict").startswith("4, ")
    browser.evaluate("find('undo').click()")
    assert (text(browser, "verdict"), bars(browser)) == before
    browser.evaluate("find('clear').click()")
    assert (text(browser, "verdict"), sum(bars(browser)), shown_images(browser)) == ("Nothing drawn yet", 0, 0)
    browser.key("z", modifiers=2)
    assert (text(browser, "verdict"), bars(browser)) == before, "also of clearing"
    browser.evaluate("find('undo').click()")
    assert text(browser, "verdict") == "Nothing drawn yet"
    assert browser.evaluate("find('undo').disabled && find('clear').disabled")


def test_a_picture_is_uploaded_and_what_is_none_is_told(browser: Browser, url: str, splits: Splits, tmp_path: Path):
    browser.open(url, WIDTHS[1], 900)
    label = splits.test.labels[0].item()
    Image.fromarray(splits.test.images[0].numpy()).resize((300, 300)).save(tmp_path / "digit.png")
    browser.choose_file("#file", tmp_path / "digit.png")
    browser.wait_for("done.length === 1")
    assert text(browser, "verdict").startswith(f"{label}, ")
    (tmp_path / "notes.txt").write_text("hello")
    browser.choose_file("#file", tmp_path / "notes.txt")
    browser.wait_for("done.length === 2")
    assert text(browser, "message") == "No prediction: it is not an image of a known format"
    assert (text(browser, "verdict"), sum(bars(browser)), shown_images(browser)) == ("No prediction", 0, 0)
    browser.key("z", modifiers=2)
    assert text(browser, "verdict").startswith(f"{label}, ")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**25 + 1)
    browser.choose_file("#file", tmp_path / "large.png")
    browser.wait_for("done.length === 2")
    assert text(browser, "message") == "No prediction: the picture is larger than 32 MiB"
    draw(browser, *DIGITS["7"])
    assert text(browser, "verdict").startswith("7, "), "a stroke after it is a drawing again"


def test_every_button_is_reached_and_pressed_by_the_keyboard(browser: Browser, url: str):
    browser.open(url, WIDTHS[1], 900)
    draw(browser, *DIGITS["1"])
    assert text(browser, "verdict").startswith("1, ")
    reached = []
    for _ in range(3):
        browser.key("Tab")
        reached.append(browser.evaluate("document.activeElement.id"))
    assert reached == ["undo", "clear", "upload"]
    browser.evaluate("find('clear').focus()")
    browser.key("Enter", "\r")
    assert text(browser, "verdict") == "Nothing drawn yet"


@pytest.mark.parametrize(("width", "dark"), [*itertools.product(WIDTHS, [False, True])])
def test_the_page_fits_its_window_in_light_and_dark(browser: Browser, url: str, tmp_path: Path, width: int, dark: bool):
    browser.open(url, width, 900, dark=dark)
    draw(browser, *DIGITS["5"])
    text(browser, "verdict")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    texts = "[...document.querySelectorAll('button, h1, h2, p, th, .percent')].filter(e => e.clientWidth > 1)"  # that are seen
    assert browser.evaluate(f"{texts}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)") == []
    browser.screenshot(tmp_path / "page.png")
    corner = Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2))
    assert (corner < 50) == dark
    assert browser.errors == []


def test_the_example_of_the_help_serves_the_page_and_a_second_one_says_that_the_port_is_in_use(place: Path):
    example = python("-m", "digitdist.demo", "--help", cwd=place).out.strip().splitlines()[-1]
    assert example.startswith("example: python -m digitdist.demo ")
    process, url = start(place, *example.split()[4:], "--port", "0")
    port = url.rstrip("/").rpartition(":")[2]
    done = python("-m", "digitdist.demo", "quick", "--port", port, cwd=place)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert done.errors[0].startswith(f"error: --port {port} cannot be had: it is in use; give another")
    end(process)


def test_a_run_without_its_training_images_is_shown_without_them(place: Path, tmp_path: Path, browser: Browser):
    shutil.copytree(place / "runs/quick", tmp_path / "alone", ignore=shutil.ignore_patterns(".origin"))
    form = (tmp_path / "alone/data_set.json").read_text().replace("0.1307", "0.1308")
    (tmp_path / "alone/data_set.json").write_text(form)
    process, url = start(tmp_path, "alone", "--port", "0", f"data.root={place / 'data'}")
    browser.open(url, WIDTHS[1], 900)
    draw(browser, *DIGITS["3"])
    assert text(browser, "verdict").startswith("3, ")
    assert shown_images(browser) == 1
    assert "which the run was not trained on" in browser.evaluate("document.body.textContent")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out.strip()) == (0, "the page is not served any more")
    assert re.fullmatch(r"No training images: data\.root=.* has mnist, which .*\n", err)
