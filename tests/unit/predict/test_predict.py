from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.launching import CLEAN, python
from PIL import Image, ImageDraw
from torch import Tensor, nn

from digitdist.data import DATA_SETS, Splits, mnist_form, open_picture
from digitdist.errors import EXIT_USER_ERROR, UserError
from digitdist.predict import predict
from digitdist.predict.__main__ import main

MNIST = DATA_SETS["mnist"]

Array = np.ndarray
pytestmark = pytest.mark.slow

NUM_TEST = 200


def file_of(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def form_of(picture: Image.Image | Array, kind: str = "PNG", **options: object) -> Tensor:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return mnist_form(open_picture(file_of(picture, kind, **options)))


def enlarged(pixels: Array) -> Array:
    return np.pad(pixels.repeat(5, 0).repeat(5, 1), ((10, 40), (70, 0)))


def coloured(pixels: Array, ink: tuple[int, int, int] = (200, 30, 40), paper: tuple[int, int, int] = (40, 120, 50)) -> Array:
    share = pixels[..., None] / 255
    return (share * np.array(ink) + (1 - share) * np.array(paper)).round().astype(np.uint8)


def photographed(pixels: Array) -> Array:
    """Dark ink on paper that is lit from one corner, with the noise of a camera."""
    share = enlarged(pixels) / 255
    y, x = np.mgrid[0 : 1 : share.shape[0] * 1j, 0 : 1 : share.shape[1] * 1j]
    light = 240 - 90 * x - 40 * y**2
    noise = np.random.default_rng(0).normal(0, 6, share.shape)
    return (light * (1 - 0.8 * share) + noise).clip(0, 255).astype(np.uint8)


def drawn(digit: str, width: int = 12, size: tuple[int, int] = (300, 200), mode: str = "L", ink: int = 0, paper: int = 255):
    """A digit in lines of `width` pixels, 120 high, off the centre."""
    lines = {
        "1": [[(110, 60), (130, 40), (125, 160)]],
        "2": [[(90, 65), (110, 42), (145, 45), (150, 75), (125, 110), (88, 158), (155, 155)]],
        "4": [[(105, 40), (85, 110), (150, 110)], [(138, 60), (130, 160)]],
        "7": [[(85, 45), (155, 42), (120, 160)]],
    }[digit]
    picture = Image.new(mode, size, paper)
    pen = ImageDraw.Draw(picture)
    for points in lines:
        pen.line(points, fill=ink, width=width, joint="curve")
        for x, y in points:
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=ink)
    return picture


def same(form: Tensor, other: Tensor, tolerance: float = 3) -> bool:
    """True if two forms differ by less than `tolerance` of 255 a pixel."""
    return (form.float() - other.float()).abs().mean().item() < tolerance


@pytest.mark.parametrize(
    ("disguise", "agreement"),
    [
        (lambda pixels: pixels, 1),
        (lambda pixels: 255 - pixels, 1),
        (enlarged, 0.97),
        (lambda pixels: 255 - enlarged(pixels), 0.97),
        (coloured, 0.97),
        (lambda pixels: coloured(enlarged(pixels), ink=(20, 20, 160), paper=(250, 240, 180)), 0.97),
        (photographed, 0.95),
    ],
    ids=["as it is", "inverted", "enlarged", "enlarged, inverted", "coloured", "enlarged, coloured", "photographed"],
)
def test_a_test_image_is_predicted_as_in_an_evaluation_whatever_it_looks_like(
    trained: tuple[Path, nn.Module], splits: Splits, disguise: Callable[[Array], Array], agreement: float
):
    images = splits.test.images[:NUM_TEST]
    forms = torch.stack([form_of(disguise(pixels)) for pixels in images.numpy()])
    ours, wanted = (predict(trained[1], form, DATA_SETS["mnist"]).argmax(1) for form in (forms, images))
    assert (ours == wanted).float().mean() >= agreement


@pytest.mark.parametrize("size", [(300, 200), (160, 165), (900, 170), (200, 1500)])
@pytest.mark.parametrize("width", [1, 3, 12, 24])
def test_place_size_and_pen_do_not_matter(trained: tuple[Path, nn.Module], size: tuple[int, int], width: int):
    for digit in "1247":
        form = form_of(drawn(digit, width, size))
        assert predict(trained[1], form[None], DATA_SETS["mnist"]).argmax().item() == int(digit)
        rows, columns = form.nonzero().T
        assert max(int(rows.max() - rows.min()), int(columns.max() - columns.min())) in (18, 19), "a box of 20 pixels"
        mass = form.double() / form.sum()
        for axis in (0, 1):
            assert (mass.sum(1 - axis) * torch.arange(28)).sum().item() == pytest.approx(14, abs=0.51)


def test_every_kind_of_file_gives_the_same_form():
    grey = drawn("2")
    wanted = form_of(grey)
    ink = Image.eval(grey, lambda value: 255 - value)
    black, white = (Image.new("RGB", grey.size, value) for value in ("black", "white"))
    black_on_clear, white_on_clear = black.copy(), white.copy()
    black_on_clear.putalpha(ink)
    white_on_clear.putalpha(ink)
    black_on_white = Image.merge("RGBA", (*grey.convert("RGB").split(), Image.new("L", grey.size, 255)))
    palette = grey.convert("RGB").quantize(8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    sheet = Image.new("RGBA", (400, 400))
    sheet.paste(grey.convert("RGBA"), (60, 70))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    narrow = Image.fromarray(np.asarray(grey).astype(np.uint16) * 16)
    forms = {
        "inverted": form_of(ink),
        "JPEG": form_of(grey, "JPEG", quality=30),
        "CMYK": form_of(grey.convert("CMYK"), "JPEG"),
        "1 bit": form_of(grey.convert("1")),
        "16 bit": form_of(wide),
        "12 of 16 bit": form_of(narrow),
        "palette": form_of(palette),
        "palette, transparent": form_of(palette, transparency=palette.getpixel((0, 0))),
        "grey, transparent": form_of(grey, transparency=255),
        "black on nothing": form_of(black_on_clear),
        "white on nothing": form_of(white_on_clear),
        "with a full alpha channel": form_of(black_on_white),
        "a sheet on nothing": form_of(sheet),
        "red on green as bright": form_of(coloured(np.asarray(ink), (255, 0, 0), (0, 130, 0))),
        "turned by EXIF": form_of(grey.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned),
        "GIF": form_of(grey, "GIF"),
    }
    assert [kind for kind, form in forms.items() if not same(form, wanted)] == []


def test_dust_faint_ink_and_artefacts_stay_outside_the_box():
    picture = drawn("4")
    wanted = form_of(picture)
    pen = ImageDraw.Draw(picture)
    for x, y in [(5, 5), (280, 20), (290, 190), (20, 180)]:
        pen.rectangle([x, y, x + 3, y + 3], fill=0)
    pen.line([(220, 0), (220, 199)], fill=240, width=2)
    assert same(form_of(picture, "JPEG", quality=20), wanted)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("L", (50, 40), 255),
        Image.new("RGB", (1, 1)),
        Image.new("RGBA", (50, 40)),
        Image.new("RGBA", (50, 40), (9, 99, 9, 255)),
        Image.new("I;16", (30, 30), 9000),
        Image.fromarray(np.random.default_rng(0).normal(200, 5, (90, 120)).astype(np.uint8)),
        Image.fromarray(np.random.default_rng(0).normal(200, 5, (90, 120, 3)).astype(np.uint8)),
        Image.fromarray(np.linspace(100, 250, 120 * 90).astype(np.uint8).reshape(90, 120)),
    ],
    ids=["white", "one pixel", "clear", "green", "16 bit", "noise", "coloured noise", "a shade"],
)
def test_a_picture_without_ink_is_refused(picture: Image.Image):
    with pytest.raises(UserError, match="blank"):
        form_of(picture)


def test_a_huge_picture_is_fast_and_a_bomb_is_refused():
    huge = drawn("7").resize((4500, 3000))
    assert same(form_of(huge), form_of(drawn("7")))
    content = file_of(Image.new("1", (20000, 20000)))
    assert len(content) < 100_000
    with pytest.raises(UserError, match="cannot be decoded: Image size"):
        open_picture(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_file_that_is_cut_off_is_refused(kind: str):
    picture = drawn("2", 12, (160, 165))
    content, wanted = file_of(picture, kind), form_of(picture)
    for length in range(0, int(0.9 * len(content)), max(1, len(content) // 40)):
        with pytest.raises(UserError) as reported:
            mnist_form(open_picture(content[:length]))
        assert "\n" not in str(reported.value)
    assert same(mnist_form(open_picture(content)), wanted)


def test_the_command_names_each_bad_file_once_and_goes_on(trained: tuple[Path, nn.Module], tmp_path: Path):
    run = tmp_path / "copied"
    shutil.copytree(trained[0], run)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, digit in (("b.png", "7"), ("a.JPG", "2")):
        drawn(digit).convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("not asked for")
    (folder / "text.png").write_text("hello")
    (folder / "empty.jpeg").touch()
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:300])
    Image.new("L", (9, 9)).save(folder / "blank.png")
    (tmp_path / "nothing").mkdir()
    images = ["pictures", "gone.png", "-", "nothing"]
    command = [sys.executable, "-m", "digitdist.predict", "copied", *images, "--json", "--top", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=CLEAN, input=file_of(drawn("4")), capture_output=True, timeout=100)
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [(line["file"], line["digit"]) for line in lines] == [("pictures/a.JPG", 2), ("pictures/b.png", 7), ("-", 4)]
    for line in lines:
        assert set(line) == {"file", "digit", "class", "probability", "top"}
        assert len(line["top"]) == 3
        assert line["top"][0] == {key: line[key] for key in ("digit", "class", "probability")}
        assert 1 >= line["top"][0]["probability"] >= line["top"][1]["probability"] >= line["top"][2]["probability"] >= 0
    bad = ["pictures/blank.png", "pictures/cut.png", "pictures/empty.jpeg", "pictures/text.png", "gone.png", "nothing"]
    assert [line.split(": ")[:2] for line in done.stderr.decode().splitlines()] == [["error", name] for name in bad]
    assert done.returncode == EXIT_USER_ERROR


def test_the_help_ends_with_an_example_that_works_as_typed(trained: tuple[Path, nn.Module], tmp_path: Path):
    (tmp_path / "photos").mkdir()
    shutil.copytree(trained[0], tmp_path / "runs/quick")
    drawn("7").save(tmp_path / "digit.png")
    drawn("1").save(tmp_path / "photos/one.png")
    example = python("-m", "digitdist.predict", "--help", cwd=tmp_path).out.strip().splitlines()[-1]
    done = python(*example.removeprefix("example: python ").split(), cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert [line.split()[:2] for line in done.out.splitlines()] == [["digit.png:", "7"], ["photos/one.png:", "1"]]
    assert done.out.count("%") == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine"], "IMAGE"),
        (["mine", "run.dir=RUNS"], "no IMAGE"),
        (["yours", "x.png", "run.dir=RUNS"], "mine"),
        (["mine", "run.dir=RUNS", "x.png", "--top", "11"], "--top"),
        (["mine", "run.dir=RUNS", "x.png", "--checkpoint", "worst"], "last, best or a step"),
    ],
)
def test_a_mistake_in_the_options_is_reported(
    trained: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.setattr(sys, "argv", ["predict", *(part.replace("RUNS", str(trained[0].parent)) for part in arguments)])
    with pytest.raises(UserError, match=message):
        main()


def test_the_text_names_the_file_the_digit_and_the_probability(
    trained: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    picture = drawn("7")
    picture.save(tmp_path / "é 7.png")
    probability = predict(trained[1], form_of(picture)[None], DATA_SETS["mnist"]).max()
    monkeypatch.setattr(sys, "argv", ["predict", str(trained[0]), str(tmp_path / "é 7.png")])
    main()
    assert capsys.readouterr().out == f"{tmp_path}/é 7.png: 7 {100 * probability:.2f} %\n"
