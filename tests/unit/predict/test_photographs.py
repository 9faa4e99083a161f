from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.photographs import KINDS, photograph
from torch import nn

from digitdist.data import DATA_SETS, Splits, mnist_form, open_picture
from digitdist.data.paper import close
from digitdist.errors import UserError
from digitdist.predict import predict

NUM_EACH = 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_photographed_digit_is_told_in_nine_of_ten(trained: tuple[Path, nn.Module], splits: Splits, kind: str):
    rng = np.random.default_rng(list(KINDS).index(kind))
    right = 0
    for index in rng.integers(len(splits.test), size=NUM_EACH):
        content = photograph(kind, splits.test.images[index].numpy(), 240, rng, rng.uniform(0.35, 0.65))
        try:
            form = mnist_form(open_picture(content))
        except UserError:
            continue
        right += int(predict(trained[1], form[None], DATA_SETS["mnist"]).argmax()) == splits.test.labels[index]
    assert right >= 0.9 * NUM_EACH


@pytest.mark.parametrize("kind", ["hard shadow", "ruled, shadow", "table"])
def test_in_any_light_the_form_is_that_of_even_light(splits: Splits, kind: str):
    for index in range(3):
        pixels = splits.train.images[index].numpy()
        photographs = [photograph(name, pixels, 240, np.random.default_rng(index)) for name in ("plain", kind)]
        even, uneven = (mnist_form(open_picture(content)).float() for content in photographs)
        assert (even - uneven).abs().mean() < 6, "of 255; the scenes put the digit at different places"


def test_closing_takes_strokes_away_and_leaves_a_shadow_where_it_is():
    lit = np.full((120, 160, 3), 230, dtype=np.uint8)
    y, x = np.mgrid[:120, :160]
    lit[x + y > 140] = 130  # the shadow has a slanted edge
    lit[np.hypot(x - 30, y - 60) < 25] = 130  # and is round elsewhere
    inked = lit.copy()
    inked[40:50, 70:150] = 20
    inked[20:100, 90:100] = 20
    closed = close(inked, 20)
    assert (closed != lit).any(2).mean() < 0.01, "but for where the ink crosses the edge"
    assert (close(lit, 20) != lit).any(2).mean() < 0.005
    assert (close(inked, 4) != inked).any(2).mean() < 0.001, "ink broader than the octagon is paper"
