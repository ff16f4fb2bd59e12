"""The study of edits: what is compared at what cost, and how its table counts."""

import json

import numpy as np
import pytest

from aps_jax import images
from aps_jax.samplers.budget import decoder_evaluations
from experiments import judge
from experiments.studies import edit_methods, edit_table, smile_judge
from experiments.train import judge as train_judge


def test_rewarded_methods_cost_the_same():
    for method in edit_methods.METHODS.values():
        cost = decoder_evaluations(edit_methods.config_of(method))
        assert cost == (edit_methods.BUDGET if method.is_rewarded else 0), method


def test_boxes_are_whole_tokens_and_hold_what_they_are_for():
    for case in edit_methods.CASES.values():
        mask = edit_methods.kept(case)
        cells = mask.reshape(16, 4, 16, 4)
        assert np.all(cells.min(axis=(1, 3)) == cells.max(axis=(1, 3)))
        eye_row = round(0.45 * 64)
        assert (mask[eye_row, [24, 40]] == 0).all() == (case.attribute == "eyeglasses")


def test_wilsons_interval_against_its_equation():
    """The ends are where the share that was seen is 1.96 standard errors of the end away."""
    for hits, count in ((0, 16), (8, 10), (16, 16), (3, 40)):
        for end in edit_table.wilson(hits, count):
            distance = (hits / count - end) ** 2
            assert distance == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-7)


def test_the_table_counts_those_that_were_judged():
    rows = [
        {
            "case": "smiling", "method": "prompt", "image": f"{n}.jpg", "reward": 1.0 - n,
            "outside": 25.0 + n, "codec_outside": 26.0, "lpips": 0.1, "seconds": 2.0,
        }
        for n in range(4)
    ]  # fmt: skip
    judged = {
        edit_table.key_of(row): sign for row, sign in zip(rows[:3], (1.0, 2.0, -1.0), strict=True)
    }
    lines = edit_table.table(rows, judged).splitlines()
    assert lines[0] == "### smiling" and len(lines) == 5
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[:2] == ["prompt", "4"] and cells[2].startswith("67 (") and cells[3] == "25"
    assert cells[4].startswith("26.50 ±") and cells[5] == "26.00"


def test_the_judge_sees_the_smile_of_the_bundled_face():
    asked = judge.load_judge()
    (scores,) = asked(images.sample_photo("face")[None])
    assert scores[asked.index("smiling")] > 0 > scores[asked.index("eyeglasses")]
    with pytest.raises(ValueError, match="unknown attribute 'smile', did you mean 'smiling'"):
        asked.index("smile")
    with pytest.raises(ValueError, match="takes faces"):
        asked(np.zeros((1, 32, 32, 3)))


def test_the_fit_of_the_judge_separates_what_a_feature_tells():
    """A threshold at 3 of the second feature, however the features are scaled and shifted."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)) * np.array([1, 50, 0.1]) + np.array([0, 3, 7])
    labels = x[:, [1]] > 3
    weights, bias = train_judge.fit(x, labels, ridge=1.0)
    assert np.mean((x @ weights + bias > 0) == labels) > 0.97
    assert abs(weights[1, 0] * 50) > 20 * np.abs(weights[[0, 2], 0] * [1, 0.1]).max()


def test_foreign_weights_are_read_with_their_scale_or_refused(tmp_path):
    entry = {"name": "a", "shape": [2, 2], "dtype": "float32"}
    stored = entry | {"quantization": {"dtype": "uint8", "scale": 0.5, "min": -1.0}}
    manifest = [{"paths": ["w.bin"], "weights": [stored, entry | {"name": "b", "shape": [1]}]}]
    (tmp_path / smile_judge.MANIFEST).write_text(json.dumps(manifest))
    data = bytes([0, 2, 4, 255]) + np.float32(7).tobytes()
    (tmp_path / "w.bin").write_bytes(data)
    found = smile_judge.read_weights(tmp_path)
    np.testing.assert_array_equal(found["a"], [[-1, 0], [1, 126.5]])
    assert found["b"] == [7]
    (tmp_path / "w.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="truncated at b"):
        smile_judge.read_weights(tmp_path)
    (tmp_path / "w.bin").write_bytes(data + b"x")
    with pytest.raises(ValueError, match="1 bytes more"):
        smile_judge.read_weights(tmp_path)
