from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from digitdist.data import Splits, mnist_form, open_picture
from digitdist.errors import UserError

Array = np.ndarray


def kept(pixels: Array, mode: str = "L") -> bool:
    """True if a PNG of uint8 [28, 28] comes through as it is, bit for bit."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return torch.equal(mnist_form(open_picture(buffer.getvalue())), torch.from_numpy(pixels))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_an_image_in_mnists_form_keeps_each_bit_in_any_kind_of_grey(splits: Splits, mode: str):
    assert all(kept(pixels, mode) for pixels in splits.test.images[:200].numpy())


@pytest.mark.slow
def test_all_images_of_mnist_keep_each_bit(splits: Splits):
    assert sum(kept(pixels) for pixels in splits.test.images.numpy()) == 10_000
    forms = (mnist_form(Image.fromarray(pixels).convert("RGBA")) for pixels in splits.train.images.numpy())
    assert sum(map(torch.equal, forms, splits.train.images)) == 60_000


def test_dark_on_light_in_mnists_form_is_only_inverted(splits: Splits):
    for pixels in splits.test.images[:1000].numpy():
        form = mnist_form(Image.fromarray(255 - pixels).convert("RGBA"))
        assert torch.equal(form, torch.from_numpy(pixels))


@pytest.mark.parametrize("change", ["off the centre", "coloured", "transparent", "smaller", "grey paper"])
def test_a_picture_of_28_pixels_in_another_form_is_brought_to_it(splits: Splits, change: str):
    pixels = splits.test.images[0].numpy()
    shown = np.dstack([pixels, pixels, pixels, np.full_like(pixels, 255)])
    if change == "off the centre":
        shown = np.roll(shown, (2, -2), (0, 1))
    elif change == "coloured":
        shown[..., 2] //= 2
    elif change == "transparent":
        shown[..., 3] = pixels
    elif change == "smaller":
        shown = np.pad(np.asarray(Image.fromarray(shown).resize((20, 20))), ((4, 4), (4, 4), (0, 0)))
    else:
        shown[..., :3] = np.maximum(shown[..., :3], 60)
    form = mnist_form(Image.fromarray(shown))
    assert not torch.equal(form, torch.from_numpy(shown[..., 0].copy()))
    rows, columns = form.nonzero().T
    assert max(int(rows.max() - rows.min()), int(columns.max() - columns.min())) in (18, 19), "a box of 20 pixels"
    assert (form.float() - torch.from_numpy(pixels).float()).abs().mean() < 15, "the same digit at the same place"


def drawing(*lines: list[tuple[int, int]]) -> Image.Image:
    picture = Image.new("RGBA", (300, 200), "white")
    for points in lines:
        ImageDraw.Draw(picture).line(points, fill="black", width=10, joint="curve")
    return picture


SEVEN = [(30, 45), (90, 45), (60, 160)]
ONE = [(150, 40), (150, 160)]


@pytest.mark.parametrize(
    ("lines", "count"),
    [((SEVEN, ONE), 2), ((ONE, [(170, 50), (170, 150)]), 2), ((SEVEN, ONE, [(200, 40), (260, 40), (260, 160), (200, 160)]), 3)],
    ids=["71", "11", "713"],
)
def test_digits_side_by_side_are_counted_and_refused(lines: tuple[list[tuple[int, int]], ...], count: int):
    with pytest.raises(UserError, match=f"it holds {count} digits side by side; give one digit a picture"):
        mnist_form(drawing(*lines))


@pytest.mark.parametrize(
    "lines",
    [
        ([(110, 90), (110, 60), (160, 85), (165, 120), (110, 150)], [(125, 35), (180, 30)]),
        ([(100, 40), (92, 100), (150, 100)], [(140, 60), (135, 170)]),
        ([(140, 70), (140, 170)], [(140, 35), (141, 45)]),
        (SEVEN, [(150, 150), (158, 158)]),
    ],
    ids=["a 5 with its bar apart", "a 4 of two strokes", "a 1 with a dot", "a full stop after it"],
)
def test_a_digit_of_several_strokes_is_one(lines: tuple[list[tuple[int, int]], ...]):
    assert mnist_form(drawing(*lines)).any()


def padded(pixels: Array) -> Image.Image:
    return Image.fromarray(255 - np.pad(pixels, 8)).convert("RGBA")


def error_of(picture: Image.Image) -> str | None:
    try:
        mnist_form(picture)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_hardly_a_digit_of_mnist_is_taken_for_two_and_hardly_two_for_one(splits: Splits):
    singles = [error_of(padded(pixels)) for pixels in splits.test.images[:1000].numpy()]
    pairs = [error_of(padded(np.hstack([*pair]))) for pair in splits.test.images[:200].view(100, 2, 28, 28).numpy()]
    assert sum(error is not None for error in singles) <= 1, "0.1 %"
    assert sum(error is not None and "2 digits side by side" in error for error in pairs) >= 97


@pytest.mark.parametrize("ink", [180, 200, 220, 235, 245])
@pytest.mark.parametrize("speck", [2, 4, 8], ids="{} pixels".format)
def test_a_faint_digit_with_a_dark_speck_beside_it_is_the_digit(ink: int, speck: int):
    picture = Image.new("L", (300, 200), 255)
    pen = ImageDraw.Draw(picture)
    pen.line([(85, 45), (155, 42), (120, 160)], fill=ink, width=12, joint="curve")
    wanted = mnist_form(picture.convert("RGBA"))
    pen.rectangle([250, 30, 250 + speck, 30 + speck], fill=0)
    assert torch.equal(mnist_form(picture.convert("RGBA")), wanted)


def scrawl(rng: np.random.Generator) -> Image.Image:
    """A picture of anything: flat, a gradient, noise, or strokes and specks of any strength, in any mode."""
    height, width = (int(side) for side in rng.choice([1, 2, 3, 27, 28, 29, 64, 65, 150], 2))
    picture = Image.new("L", (width, height), int(rng.integers(256)))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 7))):
        x, y, u, v = (int(place) for place in rng.integers(-5, 155, 4))
        pen.line([(x, y), (u, v)], fill=int(rng.integers(256)), width=int(rng.integers(1, 12)))
        pen.rectangle([u, v, u + int(rng.integers(0, 4)), v + int(rng.integers(0, 4))], fill=int(rng.integers(256)))
    pixels = np.asarray(picture, np.float32) + rng.choice([0, 60]) * np.mgrid[0 : 1 : height * 1j][:, None]
    pixels = pixels + rng.normal(0, rng.choice([0, 2, 20]), pixels.shape)
    grey = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    match rng.integers(5):
        case 0:
            pixels[rng.integers(height), rng.integers(width)] = rng.choice([np.nan, np.inf, -np.inf, -9, 1e38])
            return Image.fromarray(pixels.astype(np.float32) * np.float32(rng.choice([1, 1e-40, 1 / 255])))
        case 1:
            return Image.fromarray((pixels.clip(0, 255) * 257).astype(np.uint16))
    if rng.random() < 0.4:
        picture = grey.convert("RGBA")
        picture.putalpha(int(rng.choice([0, 1, 128])) if rng.random() < 0.5 else grey)
        return picture
    return grey.convert(str(rng.choice(["1", "L", "P", "RGB", "CMYK", "I"])))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("seed", range(4))
def test_a_picture_of_anything_is_a_digit_or_one_line_that_says_why_not(seed: int):
    rng, forms = np.random.default_rng(seed), list[Tensor]()
    refused = list[str]()
    for _ in range(60):
        content = io.BytesIO()
        scrawl(rng).save(content, "TIFF")
        cut = int(rng.integers(len(content.getvalue()))) if rng.random() < 0.1 else None
        try:
            forms.append(mnist_form(open_picture(content.getvalue()[:cut])))
        except UserError as error:
            refused.append(str(error))
    assert forms
    assert all(form.shape == (28, 28) and form.any() for form in forms)
    assert refused
    assert all(len(text.splitlines()) == 1 for text in refused)
