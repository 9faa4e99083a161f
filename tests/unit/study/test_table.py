from __future__ import annotations

from pathlib import Path

import pytest
from helpers.made_up_runs import make_run

from digitdist.errors import UserError
from digitdist.report import Study, read_study
from digitdist.study import study_table
from digitdist.study.table import grid_summary


def study(folder: Path, counts: list[int], held_out: list[float]) -> Study:
    for seed, (count, share) in enumerate(zip(counts, held_out, strict=True)):
        make_run(folder / f"seed-{seed}", count, held_out=share)
    return read_study(folder)


@pytest.fixture
def grid(tmp_path: Path) -> list[Study]:
    """``b`` is best on held-out images, ``a`` on test images."""
    worst = study(tmp_path / "c", [900, 901, 902], [0.90, 0.901, 0.902])
    return [
        worst,
        study(tmp_path / "a", [999, 998, 999], [0.97, 0.971, 0.972]),
        study(tmp_path / "b", [990, 991, 992], [0.98, 0.981, 0.982]),
    ]


def test_a_grid_is_ranked_by_held_out_images_and_the_chosen_one_alone_told_on_test_images(grid: list[Study]):
    lines, values = grid_summary("g", grid)
    assert values["chosen"] == "b"
    assert [one["study"] for one in values["combinations"]] == ["b", "a", "c"]
    assert ["test_accuracy" in one for one in values["combinations"]] == [True, False, False]
    text = "\n".join(lines)
    assert "99.8" not in text, "nothing of a's test images"
    assert [line.split()[0] for line in lines[0].splitlines()] == ["held-out", "b", "a", "c"]
    assert "b minus a: +1.000 points" in text
    assert "Holm for 2 comparisons" in text
    assert "chosen by held-out images: b" in text
    assert "99.100 %" in text.split("chosen by")[1]


def test_a_grid_without_held_out_accuracies_chooses_nothing(grid: list[Study], tmp_path: Path):
    make_run(tmp_path / "d/seed-0", 900)
    with pytest.raises(UserError, match="d: none of its runs is finished with a held-out accuracy"):
        grid_summary("g", [*grid, read_study(tmp_path / "d")])


def test_the_table_has_a_row_a_study_with_columns_below_their_heads(grid: list[Study]):
    head, *rows = study_table(grid).splitlines()
    assert len({len(line) for line in (head, *rows)}) == 1
    assert rows[1].split()[:4] == ["a", "3", "99.867", "%"]
