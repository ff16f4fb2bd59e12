"""Masks and kernels in every form that editors and arrays give them."""

import dataclasses

import jax
import numpy as np
import picture_files as raw
import pytest
from PIL import Image

from aps_jax import images
from aps_jax.cli import inputs
from aps_jax.cli import options as cli_options
from aps_jax.io.masks import load_kernel, load_mask, opaque_pixels

KNOWN = np.random.default_rng(3).random((12, 10)) < 0.7


def save_png(path, samples, colour=raw.GREY, depth=8, chunks=()):
    samples = np.asarray(samples)
    samples = samples[..., None] if samples.ndim == 2 else samples
    path.write_bytes(raw.png(samples, colour, depth, chunks=chunks))


def png(samples, **options):
    return lambda folder: save_png(folder / "m.png", samples, **options) or folder / "m.png"


def tiff(samples, **options):
    def make(folder):
        (folder / "m.tif").write_bytes(raw.Tiff(**options).file(samples[..., None]))
        return folder / "m.tif"

    return make


def pillow(values, suffix=".png", palette=None, **options):
    def make(folder):
        image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values))
        if palette is not None:
            image.putpalette(palette)
        image.save(folder / f"m{suffix}", **options)
        return folder / f"m{suffix}"

    return make


def npy(values):
    return lambda folder: np.save(folder / "m.npy", values) or folder / "m.npy"


def times(white, dtype):
    return (white * KNOWN).astype(dtype)


def coloured(known, missing, alpha=None):
    """[H, W, 3 or 4]: one colour where known, another where missing."""
    values = np.where(KNOWN[..., None], np.uint8(known), np.uint8(missing)) * np.ones(3, np.uint8)
    if alpha is None:
        return values
    opacity = np.where(KNOWN, *map(np.uint8, alpha))[..., None]
    return np.concatenate([values, opacity], axis=-1)


PHOTO = np.random.default_rng(4).integers(0, 256, (*KNOWN.shape, 3)).astype(np.uint8)
VOC = [0, 0, 0, 128, 0, 0]  # The first two colours of a common palette of label maps.
LARGE = np.kron(KNOWN, np.full((16, 16), 255)).astype(np.uint8)
HIDDEN = (b"tRNS", b"\0\0")  # Black is transparent, or entry 0 wholly and entry 1.

GOOD = {
    "1 bit": png(KNOWN, depth=1),
    "2 bits": png(times(3, int), depth=2),
    "2 bits of 0 and 1": png(times(1, int), depth=2),
    "4 bits": png(times(15, int), depth=4),
    "4 bits of 0 and 1": png(times(1, int), depth=4),
    "8 bits of 0 and 1": png(times(1, int)),
    "8 bits of 0 and 255": png(times(255, int)),
    "16 bits of 0 and 1": png(times(1, int), depth=16),
    "16 bits of 0 and 255": png(times(255, int), depth=16),
    "16 bits of 0 and 65535": png(times(65535, int), depth=16),
    "RGB of 0 and 1": pillow(coloured(1, 0)),
    "RGB": pillow(coloured(255, 0)),
    "RGB, 16 bits": png(257 * coloured(255, 0).astype(int), colour=raw.RGB, depth=16),
    "opaque RGBA": pillow(coloured(255, 0, alpha=(255, 255))),
    "erased white": pillow(coloured(255, 255, alpha=(255, 0))),
    "erased white on black": pillow(coloured(255, 0, alpha=(255, 0))),
    "erased photo": pillow(np.dstack([PHOTO, times(255, np.uint8)])),
    "erased grey": pillow(coloured(90, 90, alpha=(255, 0))[..., 2:]),
    "erased, 16 bits": png(
        np.dstack([np.full(KNOWN.shape, 9), times(65535, int)]), colour=raw.GREY_ALPHA, depth=16
    ),
    "tRNS, 1 bit": png(KNOWN, depth=1, chunks=[HIDDEN]),
    "tRNS, 2 bits": png(times(3, int), depth=2, chunks=[HIDDEN]),
    "tRNS, 16 bits": png(times(65535, int), depth=16, chunks=[HIDDEN]),
    "palette of white and black": pillow(~KNOWN * np.uint8(1), palette=[255] * 3 + [0] * 3),
    "palette of labels": pillow(times(1, np.uint8), palette=VOC),
    "palette of labels, 0 and 255": pillow(times(255, np.uint8), palette=VOC + [99] * 762),
    "palette of dark greys": pillow(times(1, np.uint8), palette=[0, 0, 0, 1, 1, 1]),
    "palette with tRNS": png(
        KNOWN, colour=raw.PALETTE, depth=1, chunks=[(b"PLTE", b"\x09" * 6), (b"tRNS", b"\0")]
    ),
    "GIF": pillow(times(255, np.uint8), ".gif"),
    "BMP": pillow(times(255, np.uint8), ".bmp"),
    "PGM": pillow(times(1, np.uint8), ".pgm"),
    "TIFF, int32 of 0 and 1": pillow(times(1, np.int32), ".tif"),
    "TIFF, int32 of 0 and 255": pillow(times(255, np.int32), ".tif"),
    "TIFF, uint16 of 0 and 1": pillow(times(1, np.uint16), ".tif"),
    "TIFF, big-endian": tiff(times(65535, np.uint16), bits=16, order=">"),
    "TIFF, WhiteIsZero": tiff((1 - KNOWN).astype(np.uint8), bits=1, photometric=0),
    "TIFF, WhiteIsZero, 16 bits": tiff(
        np.where(KNOWN, 0, 65535).astype(np.uint16), bits=16, photometric=0
    ),
    "TIFF, float": pillow(times(1, np.float32), ".tif"),
    "TIFF, float of 0 and 255": pillow(times(255, np.float32), ".tif"),
    "JPEG of large areas": pillow(LARGE, ".jpg", quality=95),
    "lossy WebP of large areas": pillow(LARGE, ".webp", quality=100),
    "bool": npy(KNOWN),
    "uint8": npy(times(1, np.uint8)),
    "uint8 of 0 and 255": npy(times(255, np.uint8)),
    "int64": npy(times(1, np.int64)),
    "big-endian int16 of 0 and 255": npy(times(255, ">i2")),
    "uint16 of 0 and 65535": npy(times(65535, np.uint16)),
    "float16": npy(times(1, np.float16)),
    "float64 of 0 and 255": npy(times(255, np.float64)),
    "[H, W, 1]": npy(KNOWN[..., None]),
    "[1, H, W, 1]": npy(KNOWN[None, ..., None]),
    "columns first in memory": npy(np.asfortranarray(KNOWN)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_masks_are_read_by_what_they_mean(tmp_path, name):
    mask = load_mask(GOOD[name](tmp_path))
    scale = len(mask) // len(KNOWN)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, np.kron(KNOWN, np.ones((scale, scale))))


GREYS = times(255, np.uint8)
GREYS[0, :2] = 128, 30
SPECKS = times(255, np.uint8).astype(float)
SPECKS[0, 0] = np.nan
LABELS = times(1, np.uint8)
LABELS[0, 0] = 255
STRIPES = np.tile(np.uint8([0, 255]), (12, 5))
THREE = np.indices(KNOWN.shape).sum(0).astype(np.uint8) % 3
SOFT = coloured(255, 255, alpha=(255, 0))
SOFT[0, 0, 3] = 100
SIDES = "white, 1 or opaque means known; black, 0 or transparent means missing"
DOTS = (255 * (np.indices((48, 40)).sum(0) % 2)).astype(np.uint8)

BAD = {
    "antialiased": (pillow(GREYS), "values 0, 30, 128, 255; a mask has two values"),
    "two greys": (pillow(times(128, np.uint8)), "values 0, 128; .*only 0 and 1, or 0 and 255"),
    "1 and 2": (pillow(1 + times(1, np.uint8)), "values 1, 2;"),
    "0, 1 and 255": (pillow(LABELS), "values 0, 1, 255;"),
    "many greys": (pillow(PHOTO[..., 0]), r"values 0, \d+, ... 25\d, \d+ in all;"),
    "a photo": (pillow(PHOTO), "has 120 colours; a mask has two values"),
    "red on black": (pillow(coloured((255, 0, 0), 0)), "has 2 colours"),
    "half erased": (pillow(SOFT), "half-transparent pixels .opacities 0, 0.392, 1"),
    "opacity 0 and 1 of 255": (pillow(coloured(255, 255, alpha=(1, 0))), "opacities 0, 0.00392"),
    "black strokes on nothing": (pillow(coloured(0, 0, alpha=(255, 0))), "both mean missing"),
    "black, white and erased": (
        pillow(np.dstack([coloured(255, 0), STRIPES])),
        "both mean missing",
    ),
    "palette that shows the reverse": (
        pillow(times(1, np.uint8), palette=[128, 0, 0, 0, 0, 0]),
        "2 colours",
    ),
    "palette of three": (pillow(THREE, palette=VOC + [0, 128, 0]), "3 colours"),
    "minus one": (pillow(times(-1, np.int32), ".tif"), "values -1, 0;"),
    "JPEG of dots": (pillow(DOTS, ".jpg", quality=30), "between black and white .* as PNG"),
    "CMYK": (pillow(Image.new("CMYK", (10, 12)), ".tif"), "CMYK"),
    "float": (npy(times(0.5, np.float32)), "values 0, 0.5;"),
    "float of -1 and 1": (npy(2 * times(1, np.float32) - 1), "values -1, 1;"),
    "NaN": (npy(SPECKS), "values 0, 255, nan;"),
    "int8 of -1": (npy(times(-1, np.int8)), "values -1, 0;"),
    "complex": (npy(times(1, np.complex64)), "dtype complex64"),
    "text": (npy(times(1, np.uint8).astype(str)), "dtype <U"),
    "RGB array": (npy(coloured(255, 0)), r"need numbers \[H, W\]"),
    "vector": (npy(KNOWN.ravel()), r"shape \(120,\)"),
    "all missing": (npy(0 * KNOWN), f"misses every pixel: {SIDES}"),
    "none missing": (npy(KNOWN | True), f"misses no pixel: {SIDES}"),
    "a black picture": (pillow(times(0, np.uint8)), "misses every pixel"),
    "a white picture": (pillow(times(0, np.uint8) + np.uint8(255)), "misses no pixel"),
    "a picture of ones": (pillow(times(0, np.uint8) + np.uint8(1)), "misses no pixel"),
    "wholly transparent": (pillow(coloured(255, 255, alpha=(0, 0))), "misses every pixel"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_values_are_refused(tmp_path, name):
    make, message = BAD[name]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_mask(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in GOOD if "erased" in name or "tRNS" in name])
def test_a_measurement_and_a_mask_agree_on_what_is_transparent(tmp_path, name):
    path = GOOD[name](tmp_path)
    np.testing.assert_array_equal(opaque_pixels(path), load_mask(path))
    np.testing.assert_array_equal(opaque_pixels(path), KNOWN)


@pytest.mark.parametrize("name", ["half erased", "wholly transparent"])
def test_a_measurement_and_a_mask_refuse_the_same_transparency(tmp_path, name):
    path = BAD[name][0](tmp_path)
    messages = []
    for read in (opaque_pixels, load_mask):
        with pytest.raises(ValueError, match=BAD[name][1]) as caught:
            read(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_picture_without_transparency_hides_nothing(tmp_path):
    assert opaque_pixels(GOOD["RGB"](tmp_path)) is None


def test_masks_turn_with_their_exif_data(tmp_path):
    image = Image.fromarray(times(255, np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "m.png", exif=exif)
    np.testing.assert_array_equal(load_mask(tmp_path / "m.png"), np.rot90(KNOWN, -1))


# On the command line.


def measured(path, **options):
    return cli_options.Restore(image=path, task="inpainting_mask", measured=True, **options)


def test_the_mask_of_the_command_line_reaches_the_operator(tmp_path):
    images.save_image(tmp_path / "photo.png", PHOTO)
    mask = GOOD["8 bits of 0 and 1"](tmp_path)
    options = cli_options.Restore(image=tmp_path / "photo.png", task="inpainting_mask", mask=mask)
    for problem in (
        inputs.degrade_photo(options, jax.random.key(0), jax.random.key(1)),
        inputs.load_measured(dataclasses.replace(options, measured=True)),
    ):
        np.testing.assert_array_equal(problem.operator.params[..., 0], KNOWN)
        assert not np.asarray(problem.y)[0][~KNOWN].any()


def test_the_transparency_of_a_measurement_reaches_the_operator(tmp_path):
    problem = inputs.load_measured(measured(GOOD["erased photo"](tmp_path)))
    np.testing.assert_array_equal(problem.operator.params[..., 0], KNOWN)
    expected = images.from_uint8(PHOTO) * KNOWN[..., None]
    np.testing.assert_allclose(problem.y[0], expected, atol=1e-6)


def test_a_mask_must_not_know_what_is_transparent(tmp_path):
    path = GOOD["erased photo"](tmp_path)
    np.save(tmp_path / "same.npy", KNOWN)
    np.save(tmp_path / "other.npy", ~KNOWN)
    problem = inputs.load_measured(measured(path, mask=tmp_path / "same.npy"))
    np.testing.assert_array_equal(problem.operator.params[..., 0], KNOWN)
    with pytest.raises(ValueError, match="transparent pixels that --mask calls known"):
        inputs.load_measured(measured(path, mask=tmp_path / "other.npy"))


# Kernels.

WEIGHTS = np.random.default_rng(5).integers(0, 200, (5, 7)).astype(np.uint8)
SHARE = WEIGHTS / WEIGHTS.sum()


def see_through(colour):
    colours = np.full((*WEIGHTS.shape, 3), colour, np.uint8)
    return np.dstack([colours, WEIGHTS])


KERNELS = {
    "grey": pillow(WEIGHTS),
    "RGB": pillow(np.dstack([WEIGHTS] * 3)),
    "16 bits": pillow(WEIGHTS.astype(np.uint16) * 3),
    "linear grey with gamma": png(WEIGHTS, chunks=[(b"gAMA", (100000).to_bytes(4, "big"))]),
    "TIFF, int32": pillow(WEIGHTS.astype(np.int32), ".tif"),
    "TIFF, float": pillow(WEIGHTS.astype(np.float32), ".tif"),
    "white, weights in alpha": pillow(see_through(255)),
    "black, weights in alpha": pillow(see_through(0)),
    "grey and alpha": pillow(see_through(7)[..., 2:]),
    "array": npy(SHARE),
    "array [kh, kw, 1]": npy(SHARE[..., None].astype(np.float32)),
    "rounded array": npy(1.019 * SHARE),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_weights_that_sum_to_one(tmp_path, name):
    kernel = load_kernel(KERNELS[name](tmp_path))
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, SHARE, rtol=0.02 if name == "rounded array" else 1e-5)


def test_negative_weights_are_fine_in_an_array(tmp_path):
    sharpen = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]])
    np.testing.assert_array_equal(load_kernel(npy(sharpen)(tmp_path)), sharpen)


BAD_KERNELS = {
    "black": (pillow(0 * WEIGHTS), "is black"),
    "transparent": (pillow(0 * see_through(255)), "is transparent"),
    "colour": (pillow(PHOTO), "is in colour"),
    "grey levels and alpha": (pillow(np.dstack([WEIGHTS, WEIGHTS])), "either could be the weights"),
    "negative": (pillow(WEIGHTS.astype(np.float32) - 9, ".tif"), "negative"),
    "NaN": (pillow(WEIGHTS * np.float32("nan"), ".tif"), "negative or infinite"),
    "zeros": (npy(np.zeros((9, 9))), "only zeros"),
    "sum 2295": (npy((255 * np.eye(9)).astype(np.uint8)), "sum to 2295, .* divide it by its sum"),
    "sum 0": (npy(np.array([[1.0, -1.0]])), "sum to 0, .* correct its weights"),
    "sum -1": (npy(-SHARE), "sum to -1, "),
    "sum 0.5": (npy(0.5 * SHARE), "sum to 0.5, "),
    "NaN array": (npy(SHARE * np.nan), "NaN or infinity"),
    "infinite array": (npy(np.where(SHARE > 0.03, np.inf, SHARE)), "NaN or infinity"),
    "colour array": (npy(np.zeros((5, 5, 3))), r"need numbers \[H, W\]"),
    "complex": (npy(SHARE * 1j), "dtype complex128"),
}


@pytest.mark.parametrize("name", BAD_KERNELS)
def test_other_kernels_are_refused(tmp_path, name):
    make, message = BAD_KERNELS[name]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_kernel(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
