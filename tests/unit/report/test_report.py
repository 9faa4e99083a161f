from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import launching
from helpers.browser import chromium_command
from helpers.runs import attempts, result

from digitdist import evaluate, report
from digitdist.data import DATA_SETS, ImageSet, Splits
from digitdist.errors import UserError
from digitdist.evaluate import Evaluation
from digitdist.report import plots
from digitdist.report.__main__ import main
from digitdist.report.comparison import compare_runs
from digitdist.report.record import Record, read_record

pytestmark = pytest.mark.slow

PLOTS = ["calibration.png", "confusion.png", "curves.png", "mistakes.png", "throughput.png"]
NASTY = "\"><script src=http://x.invalid/a.js></script>'&"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text as a person sees it."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with a short run `quick`, its like `other`, and what the command in its own help made of them."""
    place = tmp_path_factory.mktemp("place")
    (place / "data").symlink_to(mnist_root)
    short = ["train.max_steps=20", "train.log_every=5", f"data.root={mnist_root}", *launching.QUIET]
    done = launching.python("-m", "digitdist.train", *short, "run.name=quick", cwd=place)
    assert done.code == 0, done.err
    shutil.copytree(place / "runs/quick", place / "runs/other")
    config = place / "runs/other/config.yaml"
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.002"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", ["report", "--help"])
        with pytest.raises(SystemExit):
            main()
    example = re.search(r"example: python (.*)", shown.getvalue())
    assert example
    done = launching.python(*example[1].split(), cwd=place)
    assert done.code == 0, done.err
    return place


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of its own, which a test may change."""
    return Path(shutil.copytree(trained / "runs/quick", tmp_path / "quick", ignore=shutil.ignore_patterns("checkpoints")))


def predicted(folder: Path, label: list[int], prediction: list[int], first: int = 0) -> None:
    """Puts predictions into a run's folder, of the test images from `first` on."""
    index = np.arange(first, first + len(label))
    some = np.linspace(0.3, 0.9, len(label))
    evaluate.save_predictions(
        Evaluation(index, np.array(label), np.array(prediction), some, some, num_classes=10), folder / "predictions.npz"
    )


def with_predictions(run: Path, label: list[int], prediction: list[int], probability: list[float]) -> Record:
    columns = np.array(label), np.array(prediction), np.array(probability)
    made = Evaluation(np.arange(len(label)), *columns, np.full(len(label), np.nan), num_classes=10)
    return dataclasses.replace(read_record(run), predictions=made)


def test_the_example_of_the_help_makes_all_pages(trained: Path):
    assert (trained / "comparison.html").is_file()
    for name in ("quick", "other"):
        run = trained / "runs" / name
        assert sorted(path.name for path in (run / "plots").iterdir()) == PLOTS
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "plots").iterdir())
        assert not [*run.glob(".report*")]
        page, final = Page((run / "report.html").read_text()), result(run)
        low, high = evaluate.wilson_interval(final["test_correct"], 10000)
        assert f"{100 * low:.2f} to {100 * high:.2f} %" in page.text
        assert f"{final['test_correct']:,} of 10,000" in page.text
        assert final["weights_sha256"] in page.text
        assert [tag for tag, _ in page.tags].count("img") == len(PLOTS)
        assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
        assert "train.max_steps = 20 \n(default null)" in page.text
        assert torch.__version__ in page.text
    comparison = Page((trained / "comparison.html").read_text()).text
    assert re.search(r"quick \d+\.\d\d % and other \d+\.\d\d %: .*, p ", comparison)
    configuration = comparison[comparison.index("Configuration") :].split()
    assert configuration == ["Configuration", "key", "quick", "other", "optim.lr", "0.001", "0.002"]


def test_the_class_table_adds_up(trained: Path):
    html = (trained / "runs/quick/report.html").read_text()
    table = html[html.index("<h2>Classes") : html.index("<h2>Worst")]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    *classes, total = [[int(cell.replace(",", "")) for cell in row[1:3]] for row in rows]
    assert len(classes) == 10
    assert [sum(column) for column in zip(*classes, strict=True)] == total
    assert total == [10000, result(trained / "runs/quick")["test_correct"]]


def test_a_page_loads_nothing_and_escapes_everything(run: Path):
    run = run.rename(run.with_name('<img src=x onerror="a()"> & $x_{'))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("project: digitdist", f"project: {json.dumps(NASTY)}"))
    environment = json.loads((run / "environment.json").read_text())
    environment["starts"][0] |= {"fault": NASTY, "host": NASTY, "precision": NASTY}
    (run / "environment.json").write_text(json.dumps(environment))
    report.write_comparison([run, run], run.parent / "comparison.html")
    for file in (report.write_report(run), run.parent / "comparison.html"):
        page = Page(file.read_text())
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "link", "iframe", "object", "embed", "base", "a", "form"}
        for tag, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "background")]
            assert (attributes.get("src") or "data:").startswith("data:"), tag
        assert "url(" not in file.read_text()
        assert "@import" not in file.read_text()
        assert run.name in page.text
    assert Page((run / "report.html").read_text()).text.count(NASTY) == 4


def test_an_unfinished_run_has_a_page_with_what_there_is(run: Path):
    assert sorted(path.name for path in (run / "plots").iterdir()) == PLOTS
    for name in ("result.json", "predictions.npz"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    page = Page(report.write_report(run).read_text())
    assert "Not finished: step 10 is the last one logged." in page.text
    assert page.text.count("No predictions yet.") == 3
    assert "still running, or ended without a word" in page.text
    assert sorted(path.name for path in (run / "plots").iterdir()) == ["curves.png", "throughput.png"]


def test_a_folder_with_a_configuration_alone_has_a_page(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    page = Page(report.write_report(tmp_path).read_text())
    assert "nothing is logged yet" in page.text
    assert "seed = 3 \n(default 0)" in page.text


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl", "result.json", "predictions.npz"])
@pytest.mark.parametrize("content", [b"[1]\n", b"{\x00\xff\n", b"{}\n", b"null\n"])
def test_a_damaged_file_is_reported_and_the_others_are_shown(run: Path, name: str, content: bytes):
    (run / name).write_bytes(content)
    record = read_record(run)
    if (name, content) != ("config.yaml", b"{}\n"):
        assert f"{name} is damaged" in record.notes[0]
    parts = {"config.yaml": record.config, "environment.json": record.attempts, "metrics.jsonl": record.events}
    parts |= {"result.json": record.result, "predictions.npz": record.predictions}
    assert [part for part, value in parts.items() if not value] == [name]


def test_a_page_of_damaged_files_is_made(run: Path):
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "result.json", "predictions.npz"):
        (run / name).write_bytes(b"[1]\n")
    assert Page(report.write_report(run).read_text()).text.count("is damaged and left out") == 5


def test_predictions_cut_short_or_of_another_result_are_reported(run: Path):
    content = (run / "predictions.npz").read_bytes()
    (run / "predictions.npz").write_bytes(content[: len(content) // 2])
    assert "predictions.npz is damaged" in read_record(run).notes[0]
    predicted(run, [1, 2, 12], [1, 2, 3])
    assert "a class that does not exist" in read_record(run).notes[0]
    predicted(run, [1, 2, 3], [1, 2, 2])
    assert "2/3 correct, result.json says otherwise" in read_record(run).notes[0]


def test_the_worst_mistakes_come_first(run: Path, splits: Splits):
    label = splits.test.labels[:50].tolist()
    prediction = [(digit + 1) % 10 for digit in label[:40]] + label[40:]
    probability = [0.5 + 0.01 * i for i in range(50)]
    plot = plots.plot_mistakes(with_predictions(run, label, prediction, probability))
    assert plot.figure
    titles = [text.get_text() for text in plot.figure.axes[0].texts]
    assert titles == [f"{label[i]} → {prediction[i]}\n{probability[i]:.3f}" for i in range(39, 3, -1)]
    assert plot.caption.startswith("36 of 40 mistakes")
    few = plots.plot_mistakes(with_predictions(run, label[:3], [label[0], *prediction[1:3]], probability[:3]))
    assert few.caption.startswith("All 2 mistakes")
    none = plots.plot_mistakes(with_predictions(run, label, label, probability))
    assert (none.figure, none.caption) == (None, "There are none: every test image is predicted right.")


def test_without_the_test_images_the_page_says_why(run: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch):
    other = ImageSet(splits.test.images, splits.test.labels.flip(0))
    monkeypatch.setattr(plots, "load_splits", lambda *_, **__: dataclasses.replace(splits, test=other))
    assert "is not what this run was tested on" in plots.plot_mistakes(read_record(run)).caption

    def fail(*_: object, **__: object) -> Splits:
        raise UserError("data.name=mnist cannot be downloaded")

    monkeypatch.setattr(plots, "load_splits", fail)
    text = Page(report.write_report(run).read_text()).text
    assert "No picture, since the test images are not available here: data.name=mnist cannot be downloaded." in text
    assert not (run / "plots/mistakes.png").exists()


def test_attempts_are_shown_with_their_world_sizes(run: Path):
    (start,) = json.loads((run / "environment.json").read_text())["starts"]
    first = start | {"world_size": 3, "reached": 17, "fault": "rank 0 was killed at step 16, phase save"}
    second = start | {"world_size": 2, "step": 10}
    (run / "environment.json").write_text(json.dumps({"starts": [first, second]}))
    plot = plots.plot_throughput(read_record(run))
    assert plot.figure
    assert len(plot.figure.axes) == 2
    text = Page(report.write_report(run).read_text()).text
    assert "2 attempts, on 3, then 2 processes; restarts cost 7 steps that were taken again." in text
    for part in ("0 to 17", "10 to 20", "rank 0 was killed at step 16, phase save", "finished"):
        assert part in text


def test_two_runs_are_compared_in_words(run: Path, tmp_path: Path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    ones = [1] * 100
    predicted(run, ones, [1] * 99 + [0])
    predicted(other, ones, [0] * 9 + [1] * 91)
    records = [read_record(folder) for folder in (run, other)]
    (verdict,) = compare_runs(records, ["a", "b"])  # 9 against 1: 2 · (1 + 10) / 1024
    assert verdict.startswith("a 99.00 % and b 91.00 %: a is better, p = 0.021. Of 100 images, 9 only a got right, 1 only b.")
    assert verdict.endswith("Their weights are the same, bit for bit.")
    assert "b is better" in compare_runs(records[::-1], ["a", "b"])[0]
    predicted(other, ones, [0] * 2 + [1] * 98)
    assert "no difference shown, p = 1." in compare_runs([records[0], read_record(other)], ["a", "b"])[0]


def test_several_comparisons_are_corrected_for_their_number(run: Path, tmp_path: Path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    predicted(run, [1] * 100, [1] * 99 + [0])
    predicted(other, [1] * 100, [0] * 9 + [1] * 91)
    records = [read_record(folder) for folder in (run, other, run)]
    verdicts = compare_runs(records, ["a", "b", "c"])
    assert "no difference shown, p = 0.064 (Holm, 3 comparisons)" in verdicts[0]
    assert "p = 1 (Holm, 3 comparisons)" in verdicts[1]


def test_runs_that_cannot_be_compared_say_why(run: Path, tmp_path: Path):
    folders = [Path(shutil.copytree(run, tmp_path / name)) for name in ("fashion", "far", "new", "odd")]
    fashion, far, new, odd = folders
    config = (run / "config.yaml").read_text()
    (fashion / "config.yaml").write_text(config.replace("name: mnist", "name: fashion_mnist"))
    (fashion / "data_set.json").write_text(DATA_SETS["fashion_mnist"].to_json())
    predicted(run, [1, 2], [1, 2])
    predicted(far, [1, 2], [1, 2], first=2)
    predicted(odd, [1, 3], [1, 2])
    (new / "predictions.npz").unlink()
    report.write_comparison([run, *folders], tmp_path / "c.html")
    text = Page((tmp_path / "c.html").read_text()).text
    for name, why in (
        ("fashion", "mnist and fashion_mnist are different data sets"),
        ("far", "they have no test image in common"),
        ("new", "new has no predictions"),
        ("odd", "their test images have different labels"),
    ):
        assert f"quick and {name} cannot be compared: {why}." in text


def test_a_mistake_is_one_line_and_exit_code_2(trained: Path):
    done = launching.python("-m", "digitdist.report", "nosuch", cwd=trained)
    assert (done.code, len(done.errors)) == (2, 1)
    assert "in runs there are other, quick" in done.errors[0]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("arguments", [["RUN", "--output", "x.html"], [], ["RUN", "OTHER", "--output", "none/x.html"]])
def test_wrong_options_are_refused(arguments: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(trained / "runs/quick"), "OTHER": str(trained / "runs/other")}
    monkeypatch.setattr(sys, "argv", ["report", *[places.get(argument, argument) for argument in arguments]])
    monkeypatch.setattr("digitdist.report.__main__.write_report", lambda folder: folder)
    with pytest.raises(UserError):
        main()
    assert not [*tmp_path.iterdir()]


def chromium(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = chromium_command(tmp_path / "profile", *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("width", [900, 500])
def test_a_browser_shows_the_page(trained: Path, tmp_path: Path, width: int):
    page = trained / "runs/quick/report.html"
    chromium(tmp_path, f"--window-size={width},2400", f"--screenshot={tmp_path / 'page.png'}", page.as_uri())
    from matplotlib.image import imread

    pixels = imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[:2] == (2400, width)
    bands = pixels.reshape(8, 300, width, 3)
    assert (bands.std(axis=(1, 2, 3)) > 0.01).all(), "no part of the page is blank"


def test_no_table_needs_a_scroll_bar_at_a_width_of_1000_pixels(run: Path, tmp_path: Path):
    """Also with several attempts, long names and a fault; a script, which the page itself forbids, measures a copy of it."""
    (first,) = attempts(run)
    first |= {"host": "a-rather-long-name-of-a-host.cluster.example.org", "device_name": "AMD EPYC 9554P 64-Core Processor"}
    first |= {"cpu_instructions": "AVX-512 with bf16, AMX"}
    failed = first | {"fault": "rank 11 ended without a word at step 16, phase backward", "reached": 16, "world_size": 12}
    (run / "environment.json").write_text(json.dumps({"starts": [failed, first | {"step": 10}]}))
    html = report.write_report(run).read_text()
    assert "cpu (AMD EPYC 9554P 64-Core Processor, AVX-512 with bf16, AMX), fp32" in html
    overflow = "[...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth)"
    script = f"<script>document.title = JSON.stringify({overflow})</script></body>"
    html = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", html).replace("</body>", script)
    (tmp_path / "measured.html").write_text(html)
    shown = chromium(tmp_path, "--window-size=1000,800", "--dump-dom", (tmp_path / "measured.html").as_uri()).stdout
    assert re.search(r"<title>(.*?)</title>", shown)[1] == "[0,0,0]"


def test_report_sync_of_a_run_without_offline_data_says_so(place: Path):
    (place / "runs/a").mkdir(parents=True)
    (place / "runs/a/config.yaml").touch()
    done = launching.python("-m", "digitdist.report", "sync", "a", cwd=place)
    assert done.code == 2
    assert "there is no offline W&B run to send" in done.errors[0]


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.yaml").touch()

    def fail(folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("digitdist.report.__main__.write_report", fail)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(UserError, match="what a report writes: No space left on device; make room"):
        main()
