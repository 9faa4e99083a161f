"""Digits as people draw them, as strokes: points [x, y] in a square whose sides are 1, y downwards."""

from __future__ import annotations

import itertools
import math

Point = tuple[float, float]
Stroke = list[Point]


def arc(centre: Point, radii: Point, first: float, last: float) -> Stroke:
    """A part of an ellipse, between angles in degrees: 0 is right, 90 down."""
    angles = [math.radians(first + (last - first) * part / 24) for part in range(25)]
    return [(centre[0] + radii[0] * math.cos(a), centre[1] + radii[1] * math.sin(a)) for a in angles]


def in_steps(stroke: Stroke, step: float = 0.03) -> Stroke:
    """The same stroke with points at most `step` apart, as a pointer reports them."""
    points = stroke[:1]
    for (x, y), (u, v) in itertools.pairwise(stroke):
        count = max(1, math.ceil(math.hypot(u - x, v - y) / step))
        points += [(x + (u - x) * part / count, y + (v - y) * part / count) for part in range(1, count + 1)]
    return points


DIGITS: dict[str, list[Stroke]] = {
    "0": [arc((0.5, 0.5), (0.19, 0.31), -100, 262)],
    "1": [[(0.53, 0.18), (0.48, 0.82)]],
    "2": [[*arc((0.5, 0.37), (0.18, 0.18), -170, 30), (0.31, 0.8), (0.72, 0.79)]],
    "3": [[*arc((0.47, 0.34), (0.18, 0.15), -150, 85), *arc((0.47, 0.64), (0.2, 0.17), -85, 150)]],
    "4": [[(0.38, 0.2), (0.29, 0.53), (0.72, 0.52)], [(0.62, 0.3), (0.58, 0.84)]],
    "5": [[(0.4, 0.2), (0.36, 0.46), *arc((0.45, 0.62), (0.2, 0.18), -100, 140)], [(0.4, 0.2), (0.68, 0.19)]],
    "6": [[(0.62, 0.17), (0.46, 0.3), (0.36, 0.5), *arc((0.51, 0.65), (0.17, 0.17), 180, -180)]],
    "7": [[(0.29, 0.22), (0.7, 0.21), (0.56, 0.5), (0.46, 0.83)]],
    "8": [[(0.5 + 0.18 * math.sin(2 * t), 0.5 - 0.31 * math.cos(t)) for t in (math.tau * part / 48 for part in range(49))]],
    "9": [[*arc((0.5, 0.36), (0.17, 0.16), 0, -350), (0.66, 0.4), (0.62, 0.6), (0.56, 0.83)]],
}
