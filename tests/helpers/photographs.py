"""Photographs of handwritten digits: MNIST's images drawn on paper, as a phone would take them."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

Array = np.ndarray
WHITE, BLACK, BLUE, GRAPHITE = (236, 233, 226), (45, 44, 48), (45, 62, 150), (140, 140, 142)
BOARD, CHALK = (58, 78, 68), (214, 216, 208)


def photograph(kind: str, pixels: Array, size: int, rng: np.random.Generator, fill: float = 0.5) -> bytes:
    """A JPEG file of `size` × `size` pixels that shows the digit of `pixels`, uint8 [28, 28], `fill` of the picture high."""
    light, lines, ink, paper = KINDS[kind](size, rng)
    pen = stroke(pixels, size, rng, fill, marker=kind == "marker")[..., None]
    surface = np.array(paper) * lines[..., None]
    seen = light[..., None] * (surface * (1 - pen) + np.array(ink) * pen)
    if kind in ("table", "finger"):
        seen = (table if kind == "table" else finger)(seen, rng)
    if kind == "low light":
        seen = 0.35 * seen
    noise = {"low light": 9, "jpeg": 6, "grain": 5}.get(kind, 3)
    seen = seen + rng.normal(0, noise, seen.shape)
    image = Image.fromarray(seen.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=18 if kind == "jpeg" else 85)
    return buffer.getvalue()


def stroke(pixels: Array, size: int, rng: np.random.Generator, fill: float = 0.5, marker: bool = False) -> Array:
    """Share of ink, float [size, size] in 0..1, of a digit off the centre, with the edges of a pen."""
    side = min(int(28 * size * fill / 20), size)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    if marker:
        image = image.filter(ImageFilter.MaxFilter(side // 28 // 2 * 2 + 1))
    pen = ((np.asarray(image, dtype=np.float64) / 255 - 0.3) / 0.4).clip(0, 1)
    y, x = (int(rng.uniform(0.2, 0.8) * (size - side)) for _ in "yx")
    return np.pad(pen, ((y, size - side - y), (x, size - side - x)))


def grid(size: int) -> tuple[Array, Array]:
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    return y, x


def beyond_a_line(size: int, rng: np.random.Generator, softness: float, reach: float = 0.15) -> Array:
    """0 on one side of a line through the picture and 1 on the other, with an edge of `softness` times the picture's side."""
    y, x = grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    distance = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) - rng.uniform(-reach, reach)
    return 1 / (1 + np.exp(-(distance / softness).clip(-50, 50)))


def shade(lit: Array, rng: np.random.Generator) -> Array:
    """Light of 1 where `lit` is 1, and of 55 to 60 % where it is 0."""
    dark = rng.uniform(0.55, 0.6)
    return dark + (1 - dark) * lit


def even(size: int) -> Array:
    return np.ones((size, size))


def hand(size: int, rng: np.random.Generator, softness: float = 0.03) -> Array:
    y, x = grid(size)
    distance = np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8)) - rng.uniform(0.25, 0.4)
    return 1 / (1 + np.exp(-(distance / softness).clip(-50, 50)))


def slope(size: int, rng: np.random.Generator) -> Array:
    y, x = grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    return 0.75 + 0.35 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))


def corners(size: int) -> Array:
    y, x = grid(size)
    return 1 - 0.9 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)


def ruled(size: int, rng: np.random.Generator, squared: bool = False) -> Array:
    """The paper's brightness: 1, and 0.78 on lines printed across it."""
    lines, step = even(size), size // int(rng.integers(*((10, 16) if squared else (6, 9))))
    for start in range(int(rng.integers(step)), size, step):
        lines[start : start + max(1, size // 220)] = 0.78
        if squared:
            lines[:, start : start + max(1, size // 220)] = 0.78
    return lines


def grain(size: int, rng: np.random.Generator) -> Array:
    coarse = Image.fromarray(rng.normal(0, 1, (size // 2, size // 2)).astype(np.float32))
    return 0.92 + 0.05 * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def table(seen: Array, rng: np.random.Generator) -> Array:
    """The sheet ends before the picture does, slightly turned, on brown wood."""
    size = len(seen)
    y, x = grid(size)
    turn, start = rng.uniform(-0.1, 0.1), rng.uniform(0.06, 0.12)
    wood = np.array((110, 80, 55)) * (0.9 + 0.1 * np.sin(60 * x + 4 * y))[..., None]
    beyond = np.rot90((y + turn * (x - 0.5)) < start, int(rng.integers(4)))[..., None]
    return np.where(beyond, wood, seen)


def finger(seen: Array, rng: np.random.Generator) -> Array:
    """The tip of a finger that holds the sheet reaches in from one side."""
    y, x = grid(len(seen))
    tip, at, width = rng.uniform(0.1, 0.15), rng.uniform(0.2, 0.8), rng.uniform(0.06, 0.09)
    inside = np.hypot(np.maximum(y - tip + width, 0), x - at) < width
    inside = np.rot90(inside, int(rng.integers(4)))[..., None]
    return np.where(inside, np.array((196, 146, 122)), seen)


Scene = Callable[[int, np.random.Generator], tuple[Array, Array, tuple[int, int, int], tuple[int, int, int]]]
KINDS: dict[str, Scene] = {  # light, brightness of the paper, colours of ink and paper
    "plain": lambda size, rng: (even(size), even(size), BLACK, WHITE),
    "gradient": lambda size, rng: (slope(size, rng), even(size), BLACK, WHITE),
    "vignette": lambda size, rng: (corners(size), even(size), BLACK, WHITE),
    "soft shadow": lambda size, rng: (shade(beyond_a_line(size, rng, 0.08), rng), even(size), BLACK, WHITE),
    "hard shadow": lambda size, rng: (shade(beyond_a_line(size, rng, 0.004), rng), even(size), BLACK, WHITE),
    "hand's shadow": lambda size, rng: (shade(hand(size, rng), rng), even(size), BLACK, WHITE),
    "ruled": lambda size, rng: (even(size), ruled(size, rng), BLACK, WHITE),
    "squared": lambda size, rng: (even(size), ruled(size, rng, True), BLACK, WHITE),
    "ruled, shadow": lambda size, rng: (shade(beyond_a_line(size, rng, 0.03), rng), ruled(size, rng), BLACK, WHITE),
    "squared, blue ink, shadow": lambda size, rng: (
        shade(beyond_a_line(size, rng, 0.03), rng),
        ruled(size, rng, True),
        BLUE,
        WHITE,
    ),
    "grain": lambda size, rng: (even(size), grain(size, rng), BLACK, WHITE),
    "jpeg": lambda size, rng: (even(size), even(size), BLACK, WHITE),
    "low light": lambda size, rng: (slope(size, rng), even(size), BLACK, WHITE),
    "blue ink": lambda size, rng: (slope(size, rng), even(size), BLUE, WHITE),
    "pencil": lambda size, rng: (slope(size, rng), even(size), GRAPHITE, WHITE),
    "pencil, shadow": lambda size, rng: (shade(beyond_a_line(size, rng, 0.03), rng), even(size), GRAPHITE, WHITE),
    "marker": lambda size, rng: (shade(beyond_a_line(size, rng, 0.08), rng), even(size), BLACK, WHITE),
    "chalk": lambda size, rng: (slope(size, rng) * corners(size), even(size), CHALK, BOARD),
    "chalk, shadow": lambda size, rng: (shade(beyond_a_line(size, rng, 0.05), rng), even(size), CHALK, BOARD),
    "table": lambda size, rng: (slope(size, rng), even(size), BLACK, WHITE),
    "finger": lambda size, rng: (even(size), even(size), BLACK, WHITE),
}
