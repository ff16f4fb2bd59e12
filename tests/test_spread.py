"""The study of posterior samples' spread, against distributions whose spread is known."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from aps_jax.io import rows
from experiments.studies import spread, spread_measures, spread_report

MASK = 9
STUDY = spread.STUDIES["photos"]
TASK, METHOD = next(iter(STUDY.tasks)), next(iter(STUDY.methods))


def test_samples_and_photo_of_one_distribution_are_calibrated():
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.02, 0.3, (64, 64, 3))
    samples = scale * rng.normal(size=(6, 64, 64, 3))
    predicted, error = spread_measures.spread_and_error(
        samples, scale * rng.normal(size=scale.shape)
    )
    assert np.sqrt(np.mean(predicted**2)) == pytest.approx(np.sqrt(np.mean(error**2)), rel=0.03)


def test_too_narrow_samples_predict_too_small_an_error():
    rng = np.random.default_rng(0)
    samples = 0.5 * rng.normal(size=(2, 64, 64, 3))
    predicted, error = spread_measures.spread_and_error(samples, rng.normal(size=(64, 64, 3)))
    # The variance of (half of x1 + half of x2) / 2 - x is 1/8 + 1; predicted are 1/4 * 3/2.
    assert np.mean(predicted**2) == pytest.approx(0.375, rel=0.05)
    assert np.mean(error**2) == pytest.approx(1.125, rel=0.05)


def test_overlap_of_anchors_by_hand():
    tokens = np.full((3, 2, 8), MASK)
    tokens[1, 0, :3] = 1  # The first sample passes a quarter with positions 0 to 2,
    tokens[0, 1, 1:3] = 2  # the second one step earlier with 1 and 2.
    tokens[1, 1, 1:5] = 2
    tokens[2] = 1
    np.testing.assert_allclose(spread_measures.anchor_overlaps(tokens, MASK), [2 / 3, 2 / 3])
    # A third with nothing in common with the first, half of it in common with the second.
    third = np.full((3, 1, 8), MASK)
    third[0, 0, [2, 7]] = 0
    third[1:] = 0
    tokens[1, 0, :3] = MASK
    tokens[1, 0, [0, 1, 6]] = 1
    overlaps = spread_measures.anchor_overlaps(np.concatenate([tokens, third], axis=1), MASK)
    one, two, three = 1 / 4, 0, 1 / 3  # of first and second, first and third, second and third
    np.testing.assert_allclose(overlaps, [(one + two) / 2, (one + three) / 2, (two + three) / 2])


def test_overlap_of_random_anchors_is_the_chance_level():
    rng = np.random.default_rng(0)
    tokens = np.full((1, 40, 400), MASK)
    for sample in tokens[0]:
        sample[rng.permutation(400)[:100]] = 0
    assert np.mean(spread_measures.anchor_overlaps(tokens, MASK)) == pytest.approx(1 / 7, abs=0.01)


def test_row_pools_every_pixel_once():
    rng = np.random.default_rng(1)
    x = np.float32(rng.uniform(-1, 1, (8, 8, 3)))
    samples = np.float32(x + rng.normal(scale=0.1, size=(4, 8, 8, 3)))
    tokens = np.zeros((1, 4, 5), int)
    row = spread_measures.row_of(samples, tokens, MASK, x)
    assert sum(row["pixels"]) == 8 * 8 * 3
    assert sum(row["squared_error"]) == pytest.approx(row["error"] ** 2 * 192)
    assert row["psnr_of_means"]["4"] > row["psnr_of_means"]["1"]
    assert row["overlap"] == 1 and row["sample_overlap"] == [1] * 4
    errors = np.mean((np.clip(samples, -1, 1) - x) ** 2, axis=(1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(row["sample_psnr"], 10 * np.log10(4 / errors), atol=1e-3)
    assert set(spread.NEEDED) == {*row, "task", "method", "image"}


def test_equal_samples_have_no_correlation():
    x = np.zeros((4, 4, 3), np.float32)
    row = spread_measures.row_of(
        np.full((2, 4, 4, 3), 0.5, np.float32), np.zeros((1, 2, 5), int), MASK, x
    )
    assert row["correlation"] == 0 and row["predicted"] == 0


def test_means_are_of_groups_without_overlap():
    """Flat samples, each off by its own number."""
    x = np.zeros((2, 2, 3), np.float32)
    errors = np.array([0.1, -0.1, 0.2, 0.0, 0.3], np.float32)
    samples = np.broadcast_to(errors[:, None, None, None], (5, 2, 2, 3))
    found = spread_measures.psnr_of_means(samples, x)
    assert list(found) == ["1", "2", "4", "5"]
    assert found["5"] == pytest.approx(20 * np.log10(2 / 0.1), abs=1e-3)
    assert found["4"] == pytest.approx(20 * np.log10(2 / 0.05), abs=1e-3)
    samples = samples + np.float32(0.1)  # Pairs are off by 0.1 and 0.2, the fifth is in none.
    pairs = np.mean(20 * np.log10(2 / np.array([0.1, 0.2])))
    assert spread_measures.psnr_of_means(samples, x)["2"] == pytest.approx(pairs, abs=1e-3)


def scored_rows(psnr, overlap, method=None):
    """Rows of one task whose samples have these PSNR and overlaps [photos, S]."""
    filler = {name: [200.0] for name in ("pixels", "squared_predicted", "squared_error")}
    filler |= dict.fromkeys(("predicted", "error", "correlation", "overlap"), 0.5)
    return [
        {"task": TASK, "method": method or METHOD, "image": f"{i}"}
        | filler | {"sample_psnr": list(own), "sample_overlap": list(agreed),
                    "psnr_of_means": {"1": 10.0 * i, "2": 10.0 * i + gain}}
        for i, (own, agreed, gain) in enumerate(zip(psnr, overlap, (1.0, 2.0, 3.0), strict=True))
    ]  # fmt: skip


def test_agreement_is_compared_with_quality_within_a_photo():
    """The better photo has less overlap, yet in each photo the better samples have more."""
    psnr = [[20, 21, 22, 23], [30, 31, 32, 33], [25, 26, 27, 28]]
    overlap = [[0.8, 0.81, 0.82, 0.83], [0.1, 0.2, 0.4, 0.3], [0.5, 0.5, 0.5, 0.5]]
    found = scored_rows(psnr, overlap)
    values, mean = spread_report.agreement(found)
    assert values == pytest.approx([1, 0.8]) and mean.mean == pytest.approx(0.9)
    assert mean.half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)
    text = spread_report.table(found)
    assert "| 3 | 10.00 ± 8.16 | 12.00 ± " in text and "| +0.90 ± 1.27 (2) |" in text


def test_gains_of_means_have_paired_intervals():
    found = scored_rows([[1, 2]] * 3, [[0, 1]] * 3)
    # Photos are 10 dB apart, gains 1 dB: only the latter widens the interval.
    assert spread_report.gains_of_means(found) == [
        (1, pytest.approx(10), 0),
        (2, pytest.approx(12), pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)),
    ]


def test_plots_show_every_method_and_number(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(spread_report, "save_figure", lambda figure, path: figures.append(figure))
    methods = list(STUDY.methods)[:2]
    found = [row for name in methods for row in scored_rows([[1, 2]] * 3, [[0, 1]] * 3, name)]
    spread_report.plot_samples(found, tmp_path / "samples.png")
    axis = figures[0].axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == methods
    for container in axis.containers:
        line, _, (bars,) = container
        np.testing.assert_allclose(np.float64(line.get_xydata()), [[1, 10], [2, 12]])
        low, high = bars.get_segments()[1][:, 1]
        assert (low + high) / 2 == pytest.approx(12) and high - 12 == pytest.approx(2.48413, 1e-4)


def test_everything_that_decides_the_rows_is_in_the_identity(monkeypatch):
    monkeypatch.setattr(spread, "model_facts", lambda folder: {})
    plain = spread.Arguments(out=None)
    others = [{"sigma": 0.1}, {"num_samples": 4}, {"seed": 1}, {"count": 3}, {"size": 32}]
    found = [spread.identity(dataclasses.replace(plain, **other)) for other in ({}, *others)]
    name = METHOD
    changed = STUDY.methods | {name: STUDY.methods[name] | {"learning_rate": 0.123}}
    changed = dataclasses.replace(STUDY, methods=changed)
    monkeypatch.setitem(spread.STUDIES, "photos", changed)
    found.append(spread.identity(plain))
    assert len({json.dumps(one) for one in found}) == 7
    assert found[1]["methods"][name]["sigma"] == 0.1
    # Without noise, the likelihood keeps the sampler's own.
    assert spread.config_of(name, dataclasses.replace(plain, sigma=0.0)).sigma == 0.05


def test_missing_data_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert spread.main(spread.Arguments(out=tmp_path)) == 2
    assert "--data" in capsys.readouterr().err


@pytest.fixture
def photo_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        pixels = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{index}.png")
    return folder


@pytest.mark.slow
def test_a_run_goes_on_and_refuses_other_settings(tmp_path, photo_folder, capsys):
    arguments = spread.Arguments(out=tmp_path / "out", data=photo_folder, smoke=True)
    assert spread.main(arguments) == 0
    log = tmp_path / "out/rows.jsonl"
    lines = log.read_text().splitlines()
    assert len(lines) == 2 * len(STUDY.tasks) * len(STUDY.methods)
    log.write_text("\n".join(lines[:-1]) + "\n")
    assert spread.main(arguments) == 0
    assert rows.read(log)[-1] == json.loads(lines[-1])
    for name in ("calibration.png", "samples.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    other = spread.Arguments(out=tmp_path / "out", data=photo_folder, smoke=True, seed=1)
    assert spread.main(other) == 2
    assert "seed" in capsys.readouterr().err


@pytest.fixture
def instantly(monkeypatch):
    """Samples of noise in place of the model's, for what is around them."""

    def sample(params, y, keys, *, config):
        return len(keys), config.num_samples

    def by_photo(result):
        batch, count = result
        rng = np.random.default_rng(0)
        tokens = np.zeros((batch, 1, count, 4), int)
        return np.float32(rng.uniform(-1, 1, (batch, count, 32, 32, 3))), tokens

    monkeypatch.setattr(spread, "_sample", sample)
    monkeypatch.setattr(spread, "_by_photo", by_photo)


def test_photos_left_out_are_recorded(tmp_path, photo_folder, capsys, instantly):
    arguments = spread.Arguments(out=tmp_path / "out", data=photo_folder, smoke=True)
    Image.new("RGB", (40, 80)).save(photo_folder / "0.png")
    assert spread.main(arguments) == 0
    record = json.loads((tmp_path / "out/unreadable.json").read_text())
    assert record == {"0.png": "smaller than 64 pixels: 40x80"}
    assert "skipped 0.png: smaller than 64 pixels" in capsys.readouterr().err
    (photo_folder / "0.png").write_bytes(b"")
    assert spread.main(arguments) == 1
    assert "skipped 0.png" in capsys.readouterr().err
    assert {row["image"] for row in rows.read(tmp_path / "out/rows.jsonl")} == {"1.png"}


def test_rows_of_other_photos_or_writers_are_refused(tmp_path, photo_folder, capsys, instantly):
    arguments = spread.Arguments(out=tmp_path / "out", data=photo_folder, smoke=True)
    with rows.alone(tmp_path / "out/rows.jsonl"):
        assert spread.main(arguments) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert spread.main(arguments) == 0
    other = tmp_path / "other"
    shutil.copytree(photo_folder, other)
    (other / "1.png").rename(other / "2.png")
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    assert spread.main(dataclasses.replace(arguments, data=other)) == 2
    assert f"not among those chosen from {other} (1.png)" in capsys.readouterr().err
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before


def test_a_table_of_foreign_rows_is_one_line(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"task": "hdr"}\n')
    assert spread.main(spread.Arguments(out=tmp_path, table=True)) == 2
    assert "line 1 is not a row" in capsys.readouterr().err
