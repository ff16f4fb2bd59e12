"""The study of posterior samples' spread, against distributions whose spread is known."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import rows, spread

MASK = 9


def test_samples_and_photo_of_one_distribution_are_calibrated():
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.02, 0.3, (64, 64, 3))
    samples = scale * rng.normal(size=(6, 64, 64, 3))
    predicted, error = spread.spread_and_error(samples, scale * rng.normal(size=scale.shape))
    assert np.sqrt(np.mean(predicted**2)) == pytest.approx(np.sqrt(np.mean(error**2)), rel=0.03)


def test_too_narrow_samples_predict_too_small_an_error():
    rng = np.random.default_rng(0)
    samples = 0.5 * rng.normal(size=(2, 64, 64, 3))
    predicted, error = spread.spread_and_error(samples, rng.normal(size=(64, 64, 3)))
    # The variance of (half of x1 + half of x2) / 2 - x is 1/8 + 1; predicted are 1/4 * 3/2.
    assert np.mean(predicted**2) == pytest.approx(0.375, rel=0.05)
    assert np.mean(error**2) == pytest.approx(1.125, rel=0.05)


def test_overlap_of_anchors_by_hand():
    tokens = np.full((3, 2, 8), MASK)
    tokens[1, 0, :3] = 1  # The first sample passes a quarter with positions 0 to 2,
    tokens[0, 1, 1:3] = 2  # the second one step earlier with 1 and 2.
    tokens[1, 1, 1:5] = 2
    tokens[2] = 1
    assert spread.anchor_overlap(tokens, MASK) == pytest.approx(2 / 3)


def test_overlap_of_random_anchors_is_the_chance_level():
    rng = np.random.default_rng(0)
    tokens = np.full((1, 40, 400), MASK)
    for sample in tokens[0]:
        sample[rng.permutation(400)[:100]] = 0
    assert spread.anchor_overlap(tokens, MASK) == pytest.approx(1 / 7, abs=0.01)


def test_row_pools_every_pixel_once():
    rng = np.random.default_rng(1)
    x = np.float32(rng.uniform(-1, 1, (8, 8, 3)))
    samples = np.float32(x + rng.normal(scale=0.1, size=(4, 8, 8, 3)))
    tokens = np.zeros((1, 4, 5), int)
    row = spread.row_of(samples, tokens, MASK, x)
    assert sum(row["pixels"]) == 8 * 8 * 3
    assert sum(row["squared_error"]) == pytest.approx(row["error"] ** 2 * 192)
    assert row["psnr_mean_4"] > row["psnr_mean_1"]
    assert row["overlap"] == 1


def test_equal_samples_have_no_correlation():
    x = np.zeros((4, 4, 3), np.float32)
    row = spread.row_of(np.full((2, 4, 4, 3), 0.5, np.float32), np.zeros((1, 2, 5), int), MASK, x)
    assert row["correlation"] == 0 and row["predicted"] == 0


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
    assert len(lines) == 2 * len(spread.TASKS) * len(spread.METHODS)
    log.write_text("\n".join(lines[:-1]) + "\n")
    assert spread.main(arguments) == 0
    assert rows.read(log)[-1] == json.loads(lines[-1])
    assert (tmp_path / "out/calibration.png").stat().st_size > 5000
    other = spread.Arguments(out=tmp_path / "out", data=photo_folder, smoke=True, seed=1)
    assert spread.main(other) == 2
    assert "seed" in capsys.readouterr().err
