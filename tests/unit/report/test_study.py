from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from helpers.made_up_runs import make_run, predict_as
from matplotlib.figure import Figure

from digitdist.data import Splits
from digitdist.report import as_study, compare, obstacle, read_study, summary, summary_row, verdict, write_study_report
from digitdist.report.study_plots import common_predictions, plot_bands, plot_hard_images, plot_seeds
from digitdist.study.table import against


def study(folder: Path, counts: list[int], *options: str, held_out: list[float] | None = None) -> Path:
    for seed, count in enumerate(counts):
        share = held_out[seed] if held_out else None
        make_run(folder / f"seed-{seed}", count, held_out=share, options=options, train_seconds=1 + seed)
    return folder


def test_a_study_is_its_finished_runs_and_says_how_many_are_not(tmp_path: Path):
    found = read_study(study(tmp_path / "a", [990, 985, 992], held_out=[0.98, 0.97, 0.99]))
    assert found.name == "a"
    assert found.accuracies == [0.99, 0.985, 0.992]
    assert found.held_out == [0.98, 0.97, 0.99]
    assert found.train_seconds == [1.0, 2.0, 3.0]
    assert found.notes == []
    make_run(tmp_path / "a/seed-3", 0, finished=False)
    assert read_study(tmp_path / "a").notes == ["1 of its runs are not finished, and left out."]
    assert read_study(tmp_path / "a").accuracies == found.accuracies


def test_runs_that_differ_in_more_than_their_seeds_are_told(tmp_path: Path):
    study(tmp_path / "a", [990, 985])
    make_run(tmp_path / "a/seed-2", 980, options=["optim.lr=0.002", "run.dir=elsewhere", "train.log_every=3"])
    assert read_study(tmp_path / "a").notes == ["Its runs differ in optim.lr (0.001, 0.002)."]


def test_the_row_of_the_table_is_mean_deviation_interval_least_greatest_and_median_seconds():
    """By hand: mean 99.0, deviation 0.1, and t = 4.302653 with two degrees of freedom: 4.302653 · 0.1 / √3 = 0.248."""
    row = summary_row([0.989, 0.990, 0.991], [3.0, 1.0, 2.0])
    assert row == ("99.000 %", "0.100", "98.752 to 99.248", "98.90 %", "99.10 %", "2.00")
    assert summary_row([0.99], [1.0]) == ("99.000 %", "none", "none", "99.00 %", "99.00 %", "1.00")


def test_nothing_is_called_better_unless_welchs_test_shows_it(tmp_path: Path):
    """By hand: means 99.0 and 98.9, deviations 0.1, three runs each: t = 0.1 / (0.1 √(2/3)) = 1.2247 with 4 degrees of freedom,
    so the half interval is 2.776445 · 0.08165 = 0.2267."""
    a = read_study(study(tmp_path / "a", [989, 990, 991]))
    b = read_study(study(tmp_path / "b", [988, 989, 990], "optim.lr=0.002"))
    (found,), (p_value,) = compare(a, [b])
    assert (found.low, found.high) == pytest.approx((-0.001267, 0.003267), abs=1e-6)
    assert p_value == pytest.approx(0.2879, abs=1e-4)
    assert verdict(a, b, found, p_value, 1) == (
        "a minus b: +0.100 points (95 % interval -0.127 to 0.327, Welch): no difference is shown, p = 0.29"
        " (they differ in optim.lr (0.001, 0.002))"
    )


def test_a_difference_that_is_shown_names_the_better_one(tmp_path: Path):
    a = read_study(study(tmp_path / "a", [980, 981, 982, 983]))
    b = read_study(study(tmp_path / "b", [990, 991, 992, 993]))
    (found,), (p_value,) = compare(a, [b])
    assert "-1.000 points" in verdict(a, b, found, p_value, 1)
    assert "b is better, p < 0.0001" in verdict(a, b, found, p_value, 1)


def test_several_comparisons_are_corrected_for(tmp_path: Path):
    a = read_study(study(tmp_path / "a", [980, 981, 984, 983]))
    others = [
        read_study(study(tmp_path / name, counts)) for name, counts in (("b", [983, 984, 986, 985]), ("c", [980, 981, 985]))
    ]
    alone = [compare(a, [other])[1][0] for other in others]
    _, p_values = compare(a, others)
    assert p_values == pytest.approx([2 * alone[0], max(2 * alone[0], alone[1])])
    found, _ = compare(a, others)
    assert "Holm for 2 comparisons" in verdict(a, others[0], found[0], p_values[0], 2)


@pytest.mark.parametrize(("counts", "why"), [([990], "two runs of each are needed"), ([980, 980], "neither varies")])
def test_what_cannot_be_said_is_not_said(tmp_path: Path, counts: list[int], why: str):
    a, b = read_study(study(tmp_path / "a", [990, 990])), read_study(study(tmp_path / "b", counts))
    (found,), (p_value,) = compare(a, [b])
    assert math.isnan(p_value)
    assert why in verdict(a, b, found, p_value, 1)


def test_studies_of_other_test_images_are_not_compared(tmp_path: Path):
    a = read_study(study(tmp_path / "a", [990, 991]))
    other = as_study([make_run(tmp_path / "seed-0", 990, total=2000)], "other")
    assert obstacle(a, a) is None
    why = "a and other cannot be compared: they were tested on 1,000 images of mnist, and on 2,000 images of mnist"
    assert obstacle(a, other) == why
    assert against(a, [other]) == ([why], [{"study": "other", "verdict": why}])


def test_the_summary_is_what_json_takes(tmp_path: Path):
    found = summary(read_study(study(tmp_path / "a", [990])))
    numbers = {"count": 1, "mean": 0.99, "deviation": None, "low": None, "high": None}
    assert found["test_accuracy"] == numbers | {"least": 0.99, "greatest": 0.99, "values": [0.99]}
    assert found["validation_accuracy"] is None
    assert found["seeds"] == [0]


@pytest.fixture
def predicted(tmp_path: Path, splits: Splits) -> Path:
    """Three runs: image 0 is wrong in all, twice as a 3; image 1 in one of them; the others are right."""
    folder = study(tmp_path / "a", [998, 998, 999], held_out=[0.9, 0.9, 0.91])
    label = splits.test.labels[:20].tolist()
    for seed, (first, second) in enumerate([(3, label[1]), (3, label[1]), (9, 4)]):
        predict_as(folder / f"seed-{seed}", label, [first, second, *label[2:]])
    return folder


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_the_images_that_most_runs_get_wrong_come_first_with_what_they_said(predicted: Path, splits: Splits):
    plot = plot_hard_images(read_study(predicted))
    assert plot.figure
    first, second = splits.test.labels[:2].tolist()
    assert texts(plot.figure) == [f"{first}: 3 of 3\n3 ×2, 9 ×1", f"{second}: 1 of 3\n4 ×1"]
    assert "All 3 get 1 images wrong, at least one of them 2 of 20." in plot.caption


def test_runs_without_common_predictions_have_no_picture(predicted: Path):
    records = read_study(predicted).records
    predict_as(predicted / "seed-1", [1, 2], [1, 2])
    assert common_predictions(read_study(predicted).records) == "No picture, since the runs were tested on different images."
    (predicted / "seed-1/predictions.npz").unlink()
    assert plot_hard_images(read_study(predicted)).caption == "No picture, since 1 of 3 runs have no predictions."
    assert not isinstance(common_predictions(records), str)


def test_the_strip_shows_every_run_beside_mean_and_interval(predicted: Path):
    figure = plot_seeds(read_study(predicted)).figure
    assert figure
    (axis,) = figure.axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [sorted(line.get_xdata()) for line in dots] == [[99.8, 99.8, 99.9], [90.0, 90.0, 91.0]]
    assert len({*zip(dots[0].get_xdata(), dots[0].get_ydata(), strict=True)}) == 3, "equal ones lie beside each other"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["test", "held-out"]


def test_the_page_holds_all_of_it_and_no_script(predicted: Path):
    page = write_study_report(predicted)
    html = page.read_text()
    assert page == predicted / "report.html"
    assert html.count("<img ") == 3
    assert "<script" not in html
    text = re.sub(r"<[^>]*>", " ", html)
    assert "99.833 % (95 % interval 99.690 to 99.977 %), the mean of 3 runs that differ in their seed alone" in text
    assert {file.name for file in (predicted / "plots").iterdir()} == {"seeds.png", "curves.png", "hard.png"}


def test_a_study_without_a_finished_run_has_a_page_that_says_so(tmp_path: Path):
    make_run(tmp_path / "a/seed-0", 0, finished=False)
    assert "No run of it is finished yet." in write_study_report(tmp_path / "a").read_text()


def test_runs_with_other_steps_have_a_band_where_all_have_a_point(predicted: Path):
    file = predicted / "seed-0/metrics.jsonl"
    file.write_text('{"step": 5, "epoch": 0.5, "time": 1.0, "train/loss": 1.5}\n' + file.read_text())
    plot = plot_bands(read_study(predicted))
    assert plot.figure
    assert "from the least to the greatest" in plot.caption
