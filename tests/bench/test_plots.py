"""Plots of the benchmark."""

import numpy as np
import pytest
from matplotlib.text import Text

from bench.conftest import STUDY, plot
from experiments import figures as figures_of
from experiments.bench import plan, plots, study
from experiments.bench.calibration import Calibration


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files, by name of the file."""
    found = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: found.setdefault(path, figure))
    return found


def toy_rows(score_of, *, tasks, methods, budget=None, photos=4, **more):
    """Rows of one seed, with a PSNR of `score_of(task, method, photo)` and an LPIPS of a tenth."""
    return [
        {"task": task, "method": method, "budget": budget, "seed": 0, "image": f"{photo}",
         "psnr": score_of(task, method, photo), "lpips": score_of(task, method, photo) / 10} | more
        for task in tasks for method in methods for photo in range(photos)
    ]  # fmt: skip


SIGMAS = {
    "sr, 0.1": {"task": "super_resolution", "sigma": 0.1, "x": 0.1, "series": "upscaling"},
    "sr, 0.01": {"task": "super_resolution", "sigma": 0.01, "x": 0.01, "series": "upscaling"},
    "hdr": {"x": 0.05},
    "denoising": {},
}


def test_tasks_are_plotted_by_family(figures, tmp_path):
    raw = {"tasks": SIGMAS, "compare_to": "b", "budgets": {}, "task_x_label": "noise"}
    parsed = study.parse(
        STUDY | raw | {"methods": {"a": {}, "b": {}, "c": {"kind": "codec"}, "d": {}}}
    )
    gains = {"a": [1, 2, 3, 4], "b": [0] * 4, "c": [-1] * 4, "d": [5] * 4}
    level = {"sr, 0.1": 20, "sr, 0.01": 30, "hdr": 40, "denoising": 50}
    rows = toy_rows(
        lambda task, method, photo: level[task] + photo + gains[method][photo],
        tasks=SIGMAS, methods=gains,
    )  # fmt: skip
    # The last has fewer photos, and is missing in one place.
    rows = [
        row for row in rows
        if row["method"] != "d" or (row["image"] < "2" and row["task"] != "sr, 0.01")
    ]  # fmt: skip
    (path,) = plot(parsed, rows, tmp_path)[1:]
    picture = figures[tmp_path / "tasks.png"]
    titles = [axis.get_title() for axis in picture.axes]
    assert titles == [
        "upscaling: PSNR, dB", "upscaling: LPIPS", "hdr: PSNR, dB", "hdr: LPIPS"
    ]  # fmt: skip
    axis = picture.axes[0]
    assert axis.get_xlabel() == "noise" and len(axis.containers) == 4
    curves = {line.get_label(): line for line in axis.containers}
    for label, gain in (("a", 2.5), ("b", 0), ("c", -1)):
        line, _, (bars,) = curves[label]
        expected = [[0.01, 31.5 + gain], [0.1, 21.5 + gain]]
        np.testing.assert_allclose(np.float64(line.get_xydata()), expected)
        low, high = bars.get_segments()[0][:, 1]
        width = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2 if label == "a" else 0
        assert (high - low) / 2 == pytest.approx(width, abs=1e-6)
    assert curves["c"][0].get_linestyle() == "--" and curves["a"][0].get_linestyle() == "-"
    (hollow,) = [line for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
    np.testing.assert_allclose(np.float64(hollow.get_xydata()), [[0.1, 26.5]])
    (legend,) = picture.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["a", "b", "c", "d", "d, fewer photos"]
    figures.clear()
    assert plot(parsed, [], tmp_path) == plot(parsed, rows[:1], tmp_path) == [] and not figures
    assert path is picture


def test_places_of_tasks_do_not_change_fingerprints(model):
    raw = STUDY | {"model": str(model), "methods": {"no prior": {}}, "budgets": {}}
    plain = {
        label: {name: value for name, value in task.items() if name not in ("x", "series")}
        for label, task in SIGMAS.items()
    }
    found = [
        plan.Plan(study.parse(raw | more), None, Calibration(model / "none.json"), None)
        for more in ({"tasks": SIGMAS, "task_x_label": "noise"}, {"tasks": plain})
    ]
    assert found[0].expected() == found[1].expected()


def test_points_of_fewer_photos_are_hollow(figures, tmp_path):
    methods = {f"m{x}": {"series": "s", "x": x} for x in (1, 2, 3)}
    raw = {"tasks": {"hdr": {}}, "methods": methods, "compare_to": "m1", "budgets": {}}
    rows = [
        {"task": "hdr", "method": f"m{x}", "budget": None, "seed": 0, "image": f"{photo}",
         "psnr": 10.0 * x + photo, "lpips": 0.1 * photo}
        for x in (1, 2, 3) for photo in range(2 if x == 3 else 4)
    ]  # fmt: skip
    plot(study.parse(STUDY | raw), rows, tmp_path)
    heights = ((11.5, 21.5, 31.5), (0.15, 0.15, 0.15))  # Those of 4 photos, and paired gains.
    for axis, expected in zip(figures[tmp_path / "sweep.png"].axes, heights, strict=True):
        hollow = [line for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
        assert [tuple(line.get_xdata()) for line in hollow] == [(3,)]
        assert hollow[0].get_ydata()[0] == pytest.approx(expected[2])
        whole = next(line for line in axis.get_lines() if len(line.get_xdata()) == 3)
        np.testing.assert_allclose(np.asarray(whole.get_ydata(), float), expected)
        assert hollow[0].get_color() == whole.get_color()


def test_quality_is_plotted_against_what_a_budget_does_not_fix(figures, tmp_path):
    raw = {"tasks": {"hdr": {}}, "compare_to": "a"}
    methods = {name: {"sampler": "straight_through"} for name in ("a", "b", "c")}
    methods |= {"d": {"kind": "codec"}, "prior": {"sampler": "maskgit"}}
    budgets = {"even": {"evaluations": 9}, "time": {"evaluations": 9, "seconds_of": "a"}}
    parsed = study.parse(STUDY | raw | {"methods": methods, "budgets": budgets})
    costs = {"a": (9, 1.0), "b": (9, 2.0), "c": (8, 40.0), "prior": (0, 0.5), "d": (None, 0.1)}
    rows = []
    for method, (evaluations, seconds) in costs.items():
        count = {} if evaluations is None else {"decoder_evaluations": evaluations}
        for budget in ("even", "time"):
            if budget == "time" and count:
                count, seconds = {"decoder_evaluations": 10 * evaluations * (method == "b")
                                  or evaluations}, 1.0  # fmt: skip
            rows += toy_rows(
                lambda task, method, photo: 20 + 5 * "abc".find(method) + photo,
                tasks=["hdr"], methods=[method], budget=budget, seconds=seconds, **count,
            )  # fmt: skip
    plot(parsed, rows, tmp_path)
    expected = {
        "even": ("seconds", {"a": (1, 21.5), "b": (2, 26.5), "c": (40, 31.5),
                             "prior": (0.5, 16.5)}),
        "time": ("decoder evaluations", {"a": (9, 21.5), "b": (90, 26.5), "c": (8, 31.5),
                                         "prior": (0, 16.5)}),
    }  # fmt: skip
    for budget, (label, points) in expected.items():
        picture = figures[tmp_path / f"quality-{budget}.png"]
        axis = picture.axes[0]
        assert axis.get_xlabel() == label
        assert {text.get_text(): text.xy for text in axis.texts} == {
            name: pytest.approx(place) for name, place in points.items()
        }
        for text in axis.texts:  # Names are readable.
            box = text.get_window_extent()
            assert axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
            others = [other for other in axis.texts if other is not text]
            assert not any(box.overlaps(other.get_window_extent()) for other in others)
    # Without a budget in seconds nobody promised that the machine was idle.
    figures.clear()
    del budgets["time"]
    untimed = study.parse(STUDY | raw | {"methods": methods, "budgets": budgets})
    plot(untimed, [row for row in rows if row["budget"] == "even"], tmp_path)
    assert list(figures) == [tmp_path / "gains-even.png"]
    # One cost for all says nothing.
    rows = [row for row in rows if row["budget"] == "even" and row["method"] in ("prior", "a")]
    figures.clear()
    plot(parsed, rows, tmp_path)
    assert list(figures) == [tmp_path / "gains-even.png"]


def test_names_of_crowded_points_do_not_cover_each_other(tmp_path):
    picture, axes = figures_of.figure(1, 1, (5.5, 4.2))
    axis = axes[0][0]
    places = [(5 + 0.01 * i, 7 + 0.02 * i) for i in range(6)]
    axis.plot([0, 10, *(x for x, _ in places)], [0, 10, *(y for _, y in places)], "o")
    plots._name_points(picture, [(axis, f"a method {i}", xy) for i, xy in enumerate(places)])
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
    assert figures_of.save_figure(picture, tmp_path / "a.png").stat().st_size > 1000
