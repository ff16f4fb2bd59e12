"""The study of edits: what is compared at what cost, and how its table counts."""

import json

import numpy as np
import pytest

from aps_jax import images
from aps_jax.samplers.budget import decoder_evaluations
from experiments import judge
from experiments.studies import edit_methods, edit_pictures, edit_table, smile_judge
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


def row_of(case, method, number, **values):
    return {
        "case": case, "method": method, "image": f"{number}.jpg", "reward": 1.0 - number,
        "outside": 25.0 + number, "codec_outside": 26.0, "moved": 30.0, "lpips": 0.1,
        "seconds": 2.0,
    } | values  # fmt: skip


def test_the_table_counts_those_that_were_judged():
    rows = [row_of("smiling", "prompt", n) for n in range(4)]
    rows += [row_of("unsmiling", edit_table.REFERENCE, n) for n in range(2)]
    judged = dict(zip(map(edit_table.key_of, rows), (1.0, 2.0, -1.0), strict=False))
    judged |= {edit_table.key_of(row): -3.0 for row in rows[4:]}
    lines = edit_table.table(rows, judged).splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "### all edits", "### smiling", "### unsmiling"
    ]  # fmt: skip
    by_title = {title: lines[lines.index(f"### {title}") + 4] for title in ("smiling", "unsmiling")}
    cells = [cell.strip() for cell in by_title["smiling"].strip("|").split("|")]
    assert cells[:2] == ["prompt", "4"] and cells[2].startswith("67 (") and cells[4] == "25"
    assert cells[3] == "–" and cells[5].startswith("26.50 ±") and cells[6].startswith("0.50 ±")
    # A face that does not smile fulfils the opposite wish, for the judge and for the reward.
    cells = [cell.strip() for cell in by_title["unsmiling"].strip("|").split("|")]
    assert cells[2].startswith("100 (") and cells[4] == "50"


def test_gains_are_paired_by_face():
    """Two of three faces succeed by best of n, all by APS; the fourth has no pair."""
    ours, theirs = edit_table.REFERENCE, "the same, best of n"
    rows = [row_of("smiling", ours, n) for n in range(3)]
    rows += [row_of("smiling", theirs, n) for n in range(4)]
    judged = dict(zip(map(edit_table.key_of, rows), (1, 1, 1, 1, 1, -1, -1), strict=True))
    line = next(line for line in edit_table.table(rows, judged).splitlines() if theirs in line)
    assert line.split("|")[3].strip().startswith("50 (")
    assert line.split("|")[4].strip() == "-33 ± 143"  # 4.303 * 57.7 / sqrt(3)


def test_faces_that_fulfil_the_wish_already_are_not_edited():
    case = edit_methods.CASES["smiling"]
    face = images.sample_photo("face")  # It smiles for the judge.
    faces = np.stack([face, face[::-1], face[::-1]])
    asked = judge.load_judge()
    verdicts = asked(faces)[:, asked.index("smiling")] > 0
    assert edit_pictures.needing(case, faces, np.array([-1.0, -1.0, 1.0])) == [
        place for place in (0, 1) if not verdicts[place]
    ]
    with pytest.raises(ValueError, match="no face of --data needs the edit"):
        edit_pictures.needing(case, faces, np.full(3, 1.0))


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
