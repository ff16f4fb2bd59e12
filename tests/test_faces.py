"""Faces: where alignment puts them, what tells them from other pictures, and the command."""

import numpy as np
import pytest

from aps_jax import images
from aps_jax.cli import inputs, main
from aps_jax.faces import align, detect, framing

#: Eyes of the bundled portrait, as looked up by hand.
EYES = ((107.0, 101.0), (152.0, 103.0))


@pytest.fixture(scope="module")
def portrait():
    return images.sample_photo("portrait")


def ramp(height, width):
    """A picture whose red is its column and whose green its row, at pixel centres."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.stack([columns / 1000, rows / 1000, 0 * rows], axis=-1).astype(np.float32)


@pytest.mark.parametrize(
    ("first", "second"),
    [((120, 130), (160, 130)), ((150, 140), (120, 110)), ((90, 95), (98, 99))],
    ids=["level", "turned and reduced", "enlarged"],
)  # fmt: skip
def test_every_pixel_is_where_the_similarity_says(first, second):
    """The colours of this picture are coordinates, which filters keep."""
    size, eyes = 64, (first, second)
    found = align.align(ramp(260, 260), eyes, size)[..., :2] * 1000
    left, right = map(np.array, sorted(eyes))
    along = (right - left) / (0.26 * size)
    turned = np.array([-along[1], along[0]])
    at = np.arange(size) + 0.5
    # The eyes are given, everything else follows from lengths and angles being kept.
    expected = (
        left
        + (at[None, :, None] - 0.37 * size) * along
        + (at[:, None, None] - 0.45 * size) * turned
    )
    inner = slice(4, -4)  # Lanczos has nothing beyond the border to average with.
    # Pixels of the photo; Pillow's bicubic filter has ripples of a tenth of one where it enlarges.
    np.testing.assert_allclose(found[inner, inner], expected[inner, inner], atol=0.12)


def test_detail_finer_than_the_pixels_averages_out():
    checkers = np.indices((512, 512)).sum(axis=0) % 2 * 2.0 - 1
    photo = np.repeat(checkers[..., None], 3, axis=-1).astype(np.float32)
    found = align.align(photo, ((200.0, 250.0), (310.0, 262.0)))
    assert np.abs(found).max() < 0.05


def test_a_photo_repeats_its_edge_where_the_square_leaves_it():
    photo = np.full((100, 100, 3), -0.5, np.float32)
    found = align.align(photo, ((5.0, 5.0), (35.0, 5.0)))
    np.testing.assert_allclose(found, -0.5, atol=1e-5)
    outside = align.framing_of(((5.0, 5.0), (35.0, 5.0))).share_outside(100, 100)
    # The square is 115.4 wide; it begins 37.7 left of the photo and 46.9 above it.
    side = 30 / 0.26
    inside = (side - 0.37 * side + 5) * (side - 0.45 * side + 5) / side**2
    assert outside == pytest.approx(1 - inside, abs=0.03)


@pytest.mark.parametrize(
    ("eyes", "message"),
    [
        (((10.0, 10.0), (12.0, 10.0)), "2.0 pixels apart"),
        (((10.0, 10.0), (120.0, 10.0)), "the eye at 120,10 is outside"),
        (((10.0, 10.0), (float("nan"), 10.0)), "outside"),
    ],
)
def test_eyes_that_cannot_be_are_refused(eyes, message):
    with pytest.raises(ValueError, match=message):
        align.align(np.zeros((50, 60, 3), np.float32), eyes)


def test_histograms_know_the_direction_of_an_edge():
    """Brighter to the right is direction 0, downwards a quarter turn on; gain falls out."""
    across = np.tile(np.linspace(0, 250, 32, dtype=np.float32), (32, 1))
    right, down = framing.gradient_histograms(np.stack([across, across.T])).reshape(2, 64, 8)
    assert np.all(right.argmax(axis=-1) == 0) and np.all(down.argmax(axis=-1) == 2)
    np.testing.assert_allclose(right.sum(axis=0)[1:], 0, atol=1e-3)
    noise = np.random.default_rng(0).uniform(0, 100, (1, 32, 32))
    both = framing.gradient_histograms(np.concatenate([noise, 2 * noise + 20]))
    np.testing.assert_allclose(*both, rtol=0.05)


def test_an_aligned_face_scores_above_zero_and_others_below(portrait):
    face = images.sample_photo("face")
    assert framing.alignment_score(face) > 0
    assert framing.alignment_score(align.align(portrait, EYES, 200)) > 0
    assert framing.alignment_score(np.roll(face, 12, axis=1)) < 0
    assert framing.alignment_score(portrait) < 0
    assert framing.alignment_score(images.sample_photo()) < 0
    assert framing.alignment_score(np.zeros((64, 48, 3), np.float32)) == -np.inf


def test_restore_takes_the_face_and_says_when_a_picture_is_none():
    assert inputs.knows_faces_only("face64") and not inputs.knows_faces_only("photo64")
    face, cat = images.sample_photo("face")[None], images.sample_photo()[None, 64:, 64:]
    notes = inputs.framing_notes
    assert notes("face64", face) == [] == notes("photo64", cat) == notes("face64", None)
    assert "aps-jax align" in notes("face64", cat)[0]


def test_the_command_by_hand(tmp_path, portrait, capsys):
    photo, out = tmp_path / "photo.png", tmp_path / "face.png"
    images.save_image(photo, portrait)
    words = ["align", str(photo), "--out", str(out), "--eyes", "107,101", "152,103"]
    assert main(words) == 0
    # The bundled face is the same crop of the photo before it became a JPEG.
    assert np.abs(images.load_image(out) - images.sample_photo("face")).mean() < 0.03
    assert capsys.readouterr().out.count("\n") == 1
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    corner = ["--eyes", "4,6", "60,9", "--size", "32", "--overwrite"]
    assert main([*words[:4], *corner]) == 0
    assert images.load_image(out).shape == (32, 32, 3)
    printed = capsys.readouterr().out
    assert "outside the photo" in printed and "does not look like" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eyes", "1;2", "3,4"], "two points x,y"),
        (["--eyes", "1,2", "nan,4"], "in pixels"),
        (["--eyes", "1,2", "30,4", "--face", "1"], "exclude each other"),
        (["--face", "0"], "counts from 1"),
        (["--size", "4"], "--size must be from 8"),
        (["--out", "face.gif"], "must be a .png or .jpg"),
    ],
)
def test_the_command_refuses_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images.save_image("photo.png", np.zeros((64, 64, 3)))
    assert main(["align", "photo.png", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_without_opencv_the_eyes_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    images.save_image(tmp_path / "photo.png", np.zeros((64, 64, 3)))
    assert main(["align", str(tmp_path / "photo.png"), "--out", str(tmp_path / "face.png")]) == 2
    printed = capsys.readouterr().err
    assert "aps_jax[faces]" in printed and "--eyes" in printed and printed.count("\n") == 1


def test_faces_are_found_and_chosen(tmp_path, portrait, monkeypatch, capsys):
    pytest.importorskip("cv2")
    (face,) = detect.find_faces(portrait)
    assert face.saw_eyes
    np.testing.assert_allclose(face.eyes, EYES, atol=3)
    monkeypatch.chdir(tmp_path)
    two = np.concatenate([portrait, portrait], axis=1)
    images.save_image("two.png", two)
    assert main(["align", "two.png"]) == 2
    printed = capsys.readouterr().err
    assert "shows 2 faces" in printed and "--face N" in printed and printed.count("\n") == 1
    assert main(["align", "two.png", "--face", "3"]) == 2
    assert "only 2 found" in capsys.readouterr().err
    assert main(["align", "two.png", "--face", "2"]) == 0
    assert framing.alignment_score(images.load_image("face.png")) > 0
    images.save_image("none.png", np.zeros((64, 64, 3)))
    capsys.readouterr()
    assert main(["align", "none.png", "--out", "x.png"]) == 2
    assert "no face was found in none.png" in capsys.readouterr().err
