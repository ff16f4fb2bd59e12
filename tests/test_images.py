import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aps_jax import images
from aps_jax.io import files


def pixels(height=12, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_uint8_round_trip_is_exact():
    levels = np.arange(256, dtype=np.uint8)
    x = images.from_uint8(levels)
    assert x.dtype == np.float32 and x[0] == -1 and x[-1] == 1
    np.testing.assert_array_equal(images.to_uint8(x), levels)
    np.testing.assert_array_equal(images.to_uint8(jnp.array([-9.0, 0.0, 9.0])), [0, 128, 255])
    with pytest.raises(ValueError, match="NaN"):
        images.to_uint8([np.nan])


@pytest.mark.parametrize("save", [images.save_image, lambda p, x: images.save_image(p, x[None])])
def test_png_round_trip_is_exact(tmp_path, save):
    x = images.from_uint8(pixels())
    save(tmp_path / "new" / "x.png", x)
    np.testing.assert_array_equal(images.load_image(tmp_path / "new" / "x.png"), x)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]


# Modes of image files.


def test_grey_is_repeated(tmp_path):
    grey = pixels(channels=1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    x = images.load_image(tmp_path / "l.png")
    np.testing.assert_array_equal(x, np.repeat(images.from_uint8(grey)[..., None], 3, axis=-1))
    Image.fromarray(grey > 127).save(tmp_path / "1.png")
    assert set(np.unique(images.load_image(tmp_path / "1.png"))) == {-1, 1}


def test_sixteen_bit_grey_keeps_its_depth(tmp_path):
    deep = np.linspace(0, 65535, 120).astype(np.uint16).reshape(12, 10)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    x = images.load_image(tmp_path / "deep.png")
    np.testing.assert_allclose(x[..., 1], deep / 32767.5 - 1, atol=1e-6)


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.zeros((8, 9, 4), np.uint8)
    rgba[:4, :, 0] = 255  # Red, opaque above and half transparent below; black and clear at right.
    rgba[:4, :, 3] = 255
    rgba[4:, :, 3] = 128
    rgba[:, 8] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    x = images.load_image(tmp_path / "rgba.png")
    np.testing.assert_array_equal(x[0, 0], [1, -1, -1])
    np.testing.assert_allclose(x[5, 0], [0, 0, 0], atol=0.01)
    np.testing.assert_array_equal(x[:, 8], 1)


def test_palette_with_transparency_cmyk_and_animation(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    x = images.load_image(tmp_path / "p.png")
    np.testing.assert_array_equal(x[0, 0], [1, 1, 1])
    np.testing.assert_array_equal(x[1, 1], [-1, 1, -1])
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "cmyk.tif")
    assert images.load_image(tmp_path / "cmyk.tif").max() == -1
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert images.load_image(tmp_path / "a.gif").max() == -1


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(pixels(8, 16))
    exif = image.getexif()
    exif[0x0112] = 6  # Rotate by 90 degrees clockwise for display.
    image.save(tmp_path / "x.png", exif=exif)
    x = images.load_image(tmp_path / "x.png")
    np.testing.assert_array_equal(x, images.from_uint8(np.rot90(pixels(8, 16), -1)))


# Bad files: always a ValueError or FileNotFoundError, of one line, that names the file.


def bad_text(folder):
    (folder / "text.png").write_text("this is not a picture\n" * 20)
    return folder / "text.png"


def bad_empty(folder):
    (folder / "empty.png").touch()
    return folder / "empty.png"


def bad_empty_npy(folder):
    (folder / "empty.npy").touch()
    return folder / "empty.npy"


def truncated(suffix):
    def make(folder):
        whole = folder / f"whole{suffix}"
        if suffix == ".npy":
            np.save(whole, np.zeros((32, 32, 3), np.float32))
        else:
            Image.fromarray(pixels(32, 32)).save(whole)
        data = whole.read_bytes()
        cut = folder / f"cut{suffix}"
        cut.write_bytes(data[: len(data) // 2])
        return cut

    return make


def bad_checksum(folder):
    Image.fromarray(pixels(32, 32)).save(folder / "flip.png")
    data = bytearray((folder / "flip.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "flip.png").write_bytes(data)
    return folder / "flip.png"


def bad_header(folder):
    Image.fromarray(pixels(32, 32)).save(folder / "head.png")
    data = bytearray((folder / "head.png").read_bytes())
    data[16:24] = bytes(8)  # Width and height.
    (folder / "head.png").write_bytes(data)
    return folder / "head.png"


def bad_tiny(folder):
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    return folder / "tiny.png"


def bad_narrow(folder):
    np.save(folder / "narrow.npy", np.zeros((64, 7)))
    return folder / "narrow.npy"


def array(name, value):
    def make(folder):
        np.save(folder / f"{name}.npy", value, allow_pickle=True)
        return folder / f"{name}.npy"

    return make


def bad_float_tiff(folder):
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "float.tif")
    return folder / "float.tif"


def bad_npz(folder):
    np.savez(folder / "x.npz", a=np.zeros(3))
    return (folder / "x.npz").rename(folder / "x.npy")


BAD = {
    "missing": (lambda folder: folder / "no.png", "does not exist"),
    "folder": (lambda folder: folder, "is a folder"),
    "text": (bad_text, "not an image Pillow can read"),
    "empty": (bad_empty, "empty"),
    "empty npy": (bad_empty_npy, "empty"),
    "cut png": (truncated(".png"), "damaged or cut short"),
    "cut jpg": (truncated(".jpg"), "damaged or cut short"),
    "cut npy": (truncated(".npy"), "not a whole .npy"),
    "flipped byte": (bad_checksum, "damaged"),
    "zero size": (bad_header, "damaged|not an image"),
    "1x1": (bad_tiny, "is 1x1 pixels; both sides must be at least 8"),
    "7 wide": (bad_narrow, "is 7x64 pixels"),
    "nan": (array("nan", np.full((9, 9), np.nan)), "NaN or infinity"),
    "overflow": (array("big", np.full((9, 9), 1e300)), "NaN or infinity"),
    "0..255 floats": (array("wide", np.full((9, 9, 3), 200.0)), r"values up to 200.*\[-1, 1\]"),
    "channels first": (array("chw", np.zeros((3, 9, 9))), "channels come last"),
    "batch": (array("batch", np.zeros((2, 9, 9, 3))), "expected"),
    "scalar": (array("scalar", np.float32(0)), "expected"),
    "no values": (array("none", np.zeros((0, 9, 3))), "no numbers"),
    "integers": (array("int", np.zeros((9, 9), np.int64)), "dtype int64"),
    "complex": (array("complex", np.zeros((9, 9), np.complex64)), "dtype complex64"),
    "pickle": (array("object", np.array([[object]])), "not a whole .npy"),
    "float tiff": (bad_float_tiff, "float32 numbers whose black and white are not defined"),
    "npz": (bad_npz, "no numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, case):
    make, message = BAD[case]
    path = make(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            images.load_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")  # Above Pillow's own limit too.
    Image.new("1", (10000, 10000)).save(tmp_path / "large.png")  # Pillow only warns.
    np.save(tmp_path / "x.npy", np.zeros((20, 20, 3), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="too many pixels|more than the limit"):
            images.load_image(tmp_path / "bomb.png")
        with pytest.raises(ValueError, match="100000000 pixels, more than the limit of 50000000"):
            images.load_image(tmp_path / "large.png")
        with pytest.raises(ValueError, match="400 pixels, more than the limit of 300"):
            images.load_image(tmp_path / "x.npy", max_pixels=300)


# Arrays and measurements.


@pytest.mark.parametrize("shape", [(9, 10), (9, 10, 1), (9, 10, 3), (1, 9, 10, 3), (1, 9, 10, 1)])
def test_arrays_become_three_channels(tmp_path, shape):
    x = np.random.default_rng(0).uniform(-1, 1, shape)
    np.save(tmp_path / "x.npy", x)
    loaded = images.load_image(tmp_path / "x.npy")
    assert loaded.shape == (9, 10, 3) and loaded.dtype == np.float32
    channels = x.reshape(9, 10, -1)
    np.testing.assert_array_equal(loaded, np.broadcast_to(channels, loaded.shape).astype("f4"))


def test_rounding_errors_outside_the_range_are_clipped(tmp_path):
    np.save(tmp_path / "x.npy", np.full((8, 8), 1.0005))
    assert images.load_image(tmp_path / "x.npy").max() == 1


def test_uint8_arrays_are_read_like_png(tmp_path):
    np.save(tmp_path / "x.npy", pixels())
    np.testing.assert_array_equal(
        images.load_image(tmp_path / "x.npy"), images.from_uint8(pixels())
    )


def test_measurements_keep_their_range_and_shape(tmp_path):
    y = np.random.default_rng(0).normal(size=(1, 4, 5, 3)).astype("f4") * 3
    images.save_array(tmp_path / "y.npy", jnp.asarray(y))
    np.testing.assert_array_equal(images.load_measurement(tmp_path / "y.npy"), y[0])
    images.save_array(tmp_path / "grey.npy", y[0, :, :, 0])
    assert images.load_measurement(tmp_path / "grey.npy").shape == (4, 5, 1)
    images.save_array(tmp_path / "vector.npy", y[0, 0, :, 0])
    assert images.load_measurement(tmp_path / "vector.npy").shape == (5,)
    images.save_array(tmp_path / "nan.npy", y * np.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        images.load_measurement(tmp_path / "nan.npy")


def test_measurements_from_image_files(tmp_path):
    images.save_image(tmp_path / "grey.png", pixels(4, 5, 1))
    images.save_image(tmp_path / "colour.png", pixels(4, 5, 3))
    assert images.load_measurement(tmp_path / "colour.png").shape == (4, 5, 3)
    assert images.load_measurement(tmp_path / "grey.png").shape == (4, 5, 3)
    y = images.load_measurement(tmp_path / "grey.png", channels=1)
    np.testing.assert_array_equal(y, images.from_uint8(pixels(4, 5, 1)))
    with pytest.raises(ValueError, match="is in colour"):
        images.load_measurement(tmp_path / "colour.png", channels=1)


# Writing.


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ((4, 4), "x.png", "expected one image"),
        ((2, 4, 4, 3), "x.png", "expected one image"),
        ((4, 4, 4), "x.png", "expected one image"),
        ((4, 4, 3), "x.webm", "unknown suffix '.webm'"),
        ((4, 4, 3), "x", "unknown suffix"),
    ],
)
def test_unsuitable_images_are_not_written(tmp_path, shape, name, message):
    with pytest.raises(ValueError, match=message):
        images.save_image(tmp_path / name, np.zeros(shape))
    assert not list(tmp_path.iterdir())


WRITERS = {
    ".png": lambda path: images.save_image(path, np.zeros((8, 8, 3))),
    ".npy": lambda path: images.save_array(path, np.zeros(3)),
    ".json": lambda path: files.write_json(path, {"a": 1}),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_unwritable_places_give_one_clear_error(tmp_path, suffix):
    """Tests may run as root, so the obstacles are a file in place of a folder and the reverse."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / f"folder{suffix}").mkdir()
    for target in (tmp_path / "file" / f"x{suffix}", tmp_path / f"folder{suffix}"):
        with pytest.raises(OSError, match="cannot write .*; free some space") as caught:
            WRITERS[suffix](target)
        assert str(target) in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    target = tmp_path / f"x{suffix}"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left on device; free some space"):
        WRITERS[suffix](target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_json_is_plain_and_strict(tmp_path):
    value = {
        "psnr": np.float32(21.5),
        "list": jnp.array([1.0, jnp.inf]),
        "nan": float("nan"),
        "path": tmp_path,
        1: (True, None, "σ"),
    }
    files.write_json(tmp_path / "a.json", value)
    expected = {"psnr": 21.5, "list": [1.0, None], "nan": None, "path": str(tmp_path)}
    assert json.loads((tmp_path / "a.json").read_text()) == {**expected, "1": [True, None, "σ"]}
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "b.json", {"f": object()})
    assert not (tmp_path / "b.json").exists()


# Geometry and display.


def test_center_crop():
    x = np.arange(6 * 9).reshape(6, 9, 1)
    np.testing.assert_array_equal(images.center_crop(x, 4), x[1:5, 2:6])
    with pytest.raises(ValueError, match="cannot crop 7x7 from an image of 9x6 pixels"):
        images.center_crop(x, 7)


def test_resize_short_side():
    x = np.linspace(-1, 1, 60 * 90 * 3).reshape(60, 90, 3)
    small = images.resize_short_side(x, 20)
    assert small.shape == (20, 30, 3) and small.dtype == np.float32
    np.testing.assert_allclose(small[5:-5, 5:-5].mean(), x[15:-15, 15:-15].mean(), atol=1e-3)
    assert images.resize_short_side(x.transpose(1, 0, 2), 64).shape == (96, 64, 3)
    edge = np.where(np.arange(16) < 8, -1.0, 1.0)[None, :, None] * np.ones((16, 1, 1))
    assert np.abs(images.resize_short_side(edge, 32)).max() <= 1
    np.testing.assert_allclose(images.resize_short_side(x, 60), x, atol=1e-6)


@pytest.mark.parametrize("value", [np.int64(30), np.bool_(False)])
def test_integers_on_another_scale_are_no_picture(tmp_path, value):
    x = np.full((8, 8, 3), value)
    for write in (
        lambda: images.save_image(tmp_path / "x.png", x),
        lambda: images.comparison([("x", x)]),
    ):
        with pytest.raises(ValueError, match="floats in"):
            write()
    for other in (x, x.astype(np.uint8)):
        with pytest.raises(ValueError, match="to resize must be floats"):
            images.resize_short_side(other, 4)


def test_comparison_enlarges_pixels_and_draws_labels():
    left, right = pixels(8, 8), pixels(32, 24, seed=1)
    panels = [("y, ×4", left), ("x", right)]
    canvas = images.comparison(panels, captions=["", "21.3 dB"])
    assert canvas.dtype == np.uint8 and canvas.shape == (28 + 256 + 28, 256 + 192 + 3 * 8, 3)
    panel = canvas[28 : 28 + 256]
    np.testing.assert_array_equal(panel[16::32, 8 + 16 : 8 + 256 : 32], left)
    np.testing.assert_array_equal(panel[4::8, 272 + 4 : 272 + 192 : 8], right)
    label = canvas[:28, :264]
    assert (label < 64).all(-1).sum() > 20 and (label == 255).all(-1).sum() > 3000
    caption = canvas[-28:]
    assert (caption[:, 272:] < 64).any() and (caption[:, :264] == 255).all()


def test_comparison_takes_grey_long_and_foreign_labels():
    panels = [
        ("a label far too long for a panel " * 5, np.zeros((64, 16, 1))),
        ("猫é", pixels(9, 9)),
    ]
    assert images.comparison(panels).shape[0] == 28 + 256 + 8
    with pytest.raises(ValueError, match="at least one"):
        images.comparison([])
    with pytest.raises(ValueError, match="1 captions for 2 panels"):
        images.comparison(panels, captions=["a"])


def test_sample_photo():
    photo = images.sample_photo()
    assert photo.shape == (128, 128, 3) and photo.dtype == np.float32
    assert photo.std() > 0.2 and np.abs(photo).max() <= 1
    assert images.sample_photo("face").shape == (64, 64, 3)
    assert images.sample_photo("portrait").shape == (256, 256, 3)
    with pytest.raises(ValueError, match="did you mean 'portrait'"):
        images.sample_photo("potrait")


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_a_measurement_of_integers_is_refused(tmp_path, dtype):
    """Nothing says on what scale they are."""
    np.save(tmp_path / "y.npy", np.ones((4, 5, 3), dtype))
    with pytest.raises(ValueError, match=f"has dtype {dtype}; save floats on the scale"):
        images.load_measurement(tmp_path / "y.npy")
