"""Random files through every reader: right by a reference, or refused in one line.

Hypothesis draws what a file says of itself; NumPy fills it with numbers of a drawn seed. The
reference values are those of `picture_files`, which does without Pillow. The longer form runs with
`pytest -m slow`.
"""

import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import picture_files as raw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aps_jax import images
from aps_jax.io.masks import load_kernel, load_mask, opaque_pixels

LENGTHS = [
    pytest.param(100, id="short"),
    pytest.param(4000, id="long", marks=pytest.mark.slow),
]
SEEDS = st.integers(0, 2**31)
#: Half a level of 16 bits and float32 rounding; and one level of 8 bits.
EXACT, LEVEL = 3e-5, 2 / 255


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


def run(check, examples, *strategies):
    """Runs `check` on so many drawn inputs: always the same ones in the short form."""
    options = settings(
        max_examples=examples, deadline=None, database=None, derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    options(given(*strategies)(check))()


def outcome(read, path):
    """What a reader makes of a file, or None if it refuses; any other way to fail is a failure."""
    try:
        return read(path)
    except ValueError as error:
        text = str(error)
        assert str(path) in text and "\n" not in text and len(text) < 500 + len(str(path)), text
        return None


@st.composite
def pngs(draw):
    """(file, expected image)."""
    colour = draw(st.sampled_from(list(raw.DEPTHS)))
    depth = draw(st.sampled_from(raw.DEPTHS[colour]))
    rng = np.random.default_rng(draw(SEEDS))
    height, width = draw(st.integers(8, 20)), draw(st.integers(8, 20))
    samples = rng.integers(0, 2**depth, (height, width, raw.CHANNELS[colour]))
    meaning, chunks = {}, []
    if draw(st.booleans()):
        meaning["gamma"] = draw(st.sampled_from([1.0, 0.3, 0.7, 0.45455]))
        chunks.append((b"gAMA", round(1e5 * meaning["gamma"]).to_bytes(4, "big")))
        if meaning["gamma"] == 0.45455 or draw(st.booleans()):
            meaning["gamma"] = None
            chunks.append((b"sRGB", b"\0"))
    if colour == raw.PALETTE:
        meaning["palette"] = rng.integers(0, 256, (2**depth, 3))
        chunks.append((b"PLTE", meaning["palette"].astype(np.uint8).tobytes()))
    if colour == raw.PALETTE and draw(st.booleans()):
        meaning["alphas"] = rng.choice([0, 9, 128, 255], draw(st.integers(1, 2**depth)))
        chunks.append((b"tRNS", bytes(meaning["alphas"].tolist())))
    if colour in (raw.GREY, raw.RGB) and draw(st.booleans()):
        meaning["transparent"] = samples[rng.integers(height), rng.integers(width)]
        samples[0, :2] = meaning["transparent"] ^ np.array([[0], [1]])
        chunks.append((b"tRNS", meaning["transparent"].astype(">u2").tobytes()))
    data = raw.png(
        samples, colour, depth, chunks=chunks,
        interlaced=draw(st.booleans()), filter_kind=draw(st.integers(0, 4)),
    )  # fmt: skip
    return data, raw.png_meaning(samples, colour, depth, **meaning)


@pytest.mark.parametrize("examples", LENGTHS)
def test_png_files(folder, examples):
    def check(drawn):
        data, expected = drawn
        (folder / "x.png").write_bytes(data)
        # All of these are in the specification and must be read.
        np.testing.assert_allclose(images.load_image(folder / "x.png"), expected, atol=EXACT)

    run(check, examples, pngs())


@st.composite
def tiffs(draw):
    """(file, expected image or None, tolerance)."""
    photometric = draw(st.sampled_from([0, 1, 2, 3, 5]))
    bits = draw(st.sampled_from([1, 2, 4, 8, 12, 16, 32] if photometric != 3 else [1, 2, 4, 8]))
    formats = [raw.UNSIGNED] * 3 + [raw.SIGNED] * (bits in (8, 16, 32)) + [raw.FLOAT] * (bits == 32)
    sample_format = draw(st.sampled_from(formats))
    extra = draw(st.sampled_from([(), (), (0,), (1,), (2,)]))
    rng = np.random.default_rng(draw(SEEDS))
    shape = (draw(st.integers(8, 20)), draw(st.integers(8, 20)))
    channels = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}[photometric] + len(extra)
    kind = {1: "u1", 2: "u1", 4: "u1", 8: "u1", 12: "u2", 16: "u2", 32: "u4"}[bits]
    samples = rng.integers(0, 2**bits, (*shape, channels)).astype(kind)
    if extra == (1,):
        samples[..., :-1] = np.minimum(samples[..., :-1], samples[..., -1:])
    if sample_format != raw.UNSIGNED:
        samples = samples.view(f"{' if'[sample_format - 1]}{samples.dtype.itemsize}")
    colours = (257 * rng.integers(0, 256, 3 * 2**bits)).tolist() if photometric == 3 else ()
    tiff = raw.Tiff(
        photometric=photometric, bits=bits, sample_format=sample_format, extra=extra,
        colour_map=tuple(colours), order=draw(st.sampled_from("<>")),
        compression=draw(st.sampled_from([1, 8])), planar=draw(st.sampled_from([1, 1, 2])),
        rows_per_strip=draw(st.integers(1, 25)), fill_order=draw(st.sampled_from([1, 1, 2])),
    )  # fmt: skip
    tolerance = LEVEL if extra == (1,) and bits == 8 else EXACT
    return tiff.file(samples), raw.tiff_meaning(samples, tiff), tolerance


@pytest.mark.parametrize("examples", LENGTHS)
def test_tiff_files(folder, examples, capfd):
    def check(drawn):
        data, expected, tolerance = drawn
        (folder / "x.tif").write_bytes(data)
        read = outcome(images.load_image, folder / "x.tif")
        if read is not None:
            assert expected is not None, "read although no white is defined"
            np.testing.assert_allclose(read, expected, atol=tolerance)

    run(check, examples, tiffs())


@st.composite
def damaged(draw):
    """(file, suffix) of a whole file with a few bytes changed, or cut."""
    if draw(st.booleans()):
        data, suffix = draw(pngs())[0], ".png"
    else:
        data, suffix = draw(tiffs())[0], ".tif"
    data = bytearray(data)
    for place, value in draw(
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        # Headers are at the beginning of PNG files and at the end of TIFF files.
        place = place**3 if suffix == ".png" else 1 - place**3
        data[min(int(place * len(data)), len(data) - 1)] = value
    return bytes(data[: draw(st.sampled_from([len(data), len(data), len(data) // 2]))]), suffix


@pytest.mark.parametrize("examples", LENGTHS)
def test_damaged_files(folder, examples, capfd):
    """Whatever comes out, nothing but one line of refusal or a picture."""

    def check(drawn):
        data, suffix = drawn
        path = folder / f"x{suffix}"
        path.write_bytes(data)
        for read in (images.load_image, load_mask, load_kernel, opaque_pixels):
            outcome(read, path)

    run(check, examples, damaged())


# Masks.


@st.composite
def two_valued(draw):
    """Numbers [H, W], and the mask that they mean or None."""
    rng = np.random.default_rng(draw(SEEDS))
    shape = (draw(st.integers(2, 12)), draw(st.integers(2, 12)))
    known = rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return known, rng


@st.composite
def mask_files(draw):
    """(file, suffix, expected mask or None): pictures of two values, right ones and others."""
    known, rng = draw(two_valued())
    expected = known if 0 < known.sum() < known.size else None
    depth = draw(st.sampled_from([1, 2, 4, 8, 16]))
    largest = 2**depth - 1
    white = draw(st.sampled_from([1, largest, 255, largest // 2 + 1, 2]))
    white = min(white, largest)
    black = draw(st.sampled_from([0, 0, 0, 0, largest // 3]))
    samples = np.where(known, white, black)
    if black or white not in (1, largest) + (255,) * (depth == 16):
        expected = None
    if expected is not None and draw(st.integers(0, 4)) == 0 and depth > 1:
        samples[rng.integers(len(known)), rng.integers(known.shape[1])] = largest // 3 * 2
        expected = None if largest // 3 * 2 not in (0, white) else expected
    suffix = draw(st.sampled_from([".png", ".tif"]))
    if suffix == ".png":
        return raw.png(samples[..., None], raw.GREY, depth), suffix, expected
    photometric = draw(st.sampled_from([0, 1]))
    if photometric == 0:
        samples = largest - samples
    tiff = raw.Tiff(photometric=photometric, bits=depth, order="<")
    return tiff.file(samples[..., None].astype(f"u{max(1, depth // 8)}")), suffix, expected


@pytest.mark.parametrize("examples", LENGTHS)
def test_mask_pictures(folder, examples):
    def check(drawn):
        data, suffix, expected = drawn
        path = folder / f"m{suffix}"
        path.write_bytes(data)
        read = outcome(load_mask, path)
        assert (read is None) == (expected is None)
        if read is not None:
            np.testing.assert_array_equal(read, expected)

    run(check, examples, mask_files())


@st.composite
def erased(draw):
    """(file, expected mask or None): pictures with transparent pixels."""
    known, rng = draw(two_valued())
    depth = draw(st.sampled_from([8, 16]))
    colour = draw(st.sampled_from([raw.GREY_ALPHA, raw.RGBA]))
    largest = 2**depth - 1
    alpha = np.where(known, largest, 0)
    # Never black, which would mean missing as well.
    shape = (*known.shape, raw.CHANNELS[colour] - 1)
    colours = rng.integers(1, largest, shape)
    is_soft = draw(st.booleans())
    if is_soft:
        alpha[0, 0] = draw(st.integers(1, largest - 1))
    is_mask = not is_soft and 0 < known.sum() < known.size
    samples = np.concatenate([colours, alpha[..., None]], axis=-1)
    return raw.png(samples, colour, depth), known if is_mask else None, known.all() and not is_soft


@pytest.mark.parametrize("examples", LENGTHS)
def test_erased_pictures(folder, examples):
    def check(drawn):
        data, expected, is_opaque = drawn
        (folder / "m.png").write_bytes(data)
        if is_opaque:
            assert opaque_pixels(folder / "m.png") is None
            return
        for reader in (load_mask, opaque_pixels):
            read = outcome(reader, folder / "m.png")
            assert (read is None) == (expected is None)
            if read is not None:
                np.testing.assert_array_equal(read, expected)

    run(check, examples, erased())


# Arrays.

DTYPES = ["?", "i1", "u1", "<i2", ">u2", "<u4", ">i8", "<f2", ">f4", "<f8", "<c8", "<U3", "<M8[s]"]


@st.composite
def arrays(draw):
    """An array of any dtype, shape, order and range, as `numpy.save` takes it."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(
        st.lists(st.sampled_from([1, 1, 3, 4, 8, 9, 12]), max_size=4)
        | st.sampled_from([[9, 8], [9, 8, 1], [8, 9, 3], [1, 8, 9, 3], [1, 9, 9, 1]])
    )
    rng = np.random.default_rng(draw(SEEDS))
    low, high = draw(st.sampled_from([(0, 1), (-1, 1), (0, 255), (0, 2), (-300, 300), (1, 1)]))
    values = rng.uniform(low, high, shape)
    if draw(st.booleans()):  # Only the two ends.
        values = np.where(rng.random(shape) < 0.5, low, high) + np.zeros(shape)
    if dtype.kind == "f" and draw(st.integers(0, 5)) == 0 and values.size:
        values.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    if draw(st.booleans()):
        values = values / max(np.nansum(values[np.isfinite(values)]), 1e-3)
    if dtype.kind in "iu":
        values = np.clip(np.nan_to_num(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
    values = values.astype(np.int64).astype(dtype) if dtype.kind == "M" else values.astype(dtype)
    return np.asfortranarray(values) if draw(st.booleans()) else values


def as_channels(array):
    """[H, W, C] of an image array, or None."""
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    array = array[..., None] if array.ndim == 2 else array
    return array if array.ndim == 3 and array.shape[-1] in (1, 3) else None


def as_matrix(array):
    """[H, W] of a mask or kernel array, or None."""
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array if array.ndim == 2 and array.dtype.kind in "?biuf" and array.size else None


def meant_measurement(array):
    if array.size == 0 or array.dtype.kind != "f":  # Integers do not say their scale.
        return None
    values = array.astype(np.float32)
    return values if np.isfinite(values).all() else None


def meant_image(array):
    is_bytes = array.dtype == np.uint8 and array.size
    values = array.astype(np.float32) / 127.5 - 1 if is_bytes else meant_measurement(array)
    shown = as_channels(array)
    if values is None or shown is None or min(shown.shape[:2]) < 8 or np.abs(values).max() > 1.001:
        return None
    values = np.clip(as_channels(values), -1, 1)
    return np.broadcast_to(values, (*values.shape[:2], 3))


def meant_mask(array):
    matrix = as_matrix(array)
    if matrix is None:
        return None
    found = set(matrix.ravel().tolist())
    whites = [1, 255] + [65535] * (matrix.dtype.kind in "iu" and matrix.dtype.itemsize > 1)
    return matrix > 0 if any(found == {0, white} for white in whites) else None


def meant_kernel(array):
    matrix = as_matrix(array)
    if matrix is None or not np.isfinite(total := matrix.astype(np.float64).sum()):
        return None
    return matrix if abs(total - 1) <= 0.02 else None


@pytest.mark.parametrize("examples", LENGTHS)
def test_arrays(folder, examples):
    def check(array):
        path = folder / "x.npy"
        np.save(path, array)
        for read, meant in (
            (images.load_image, meant_image), (load_mask, meant_mask), (load_kernel, meant_kernel),
        ):  # fmt: skip
            got, expected = outcome(read, path), meant(array)
            assert (got is None) == (expected is None), (read.__name__, array.dtype, array.shape)
            if got is not None:
                assert got.dtype == np.float32
                np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-6)
        got, expected = outcome(images.load_measurement, path), meant_measurement(array)
        assert (got is None) == (expected is None)
        if got is not None:
            np.testing.assert_allclose(got.ravel(), expected.ravel(), atol=1e-6, rtol=1e-6)

    run(check, examples, arrays())


@pytest.mark.parametrize("examples", LENGTHS)
def test_damaged_arrays(folder, examples):
    """Headers of .npy files with any bytes in them."""

    def check(array, changes):
        path = folder / "x.npy"
        np.save(path, array)
        data = bytearray(path.read_bytes())
        for place, value in changes:
            data[min(place, len(data) - 1)] = value
        path.write_bytes(bytes(data))
        for read in (images.load_image, images.load_measurement, load_mask, load_kernel):
            outcome(read, path)

    changes = st.lists(st.tuples(st.integers(0, 130), st.integers(0, 255)), min_size=1, max_size=5)
    run(check, examples, arrays(), changes)


def test_the_reference_knows_both_answers():
    """The references accept some arrays and refuse others, so that agreement means something."""
    found = {name: set() for name in ("image", "mask", "kernel")}
    made = itertools.chain([np.eye(9), np.eye(9)[:, :1]], [np.full((3, 3), 1 / 9), np.zeros(4)])
    for array in made:
        found["image"].add(meant_image(array) is None)
        found["mask"].add(meant_mask(array) is None)
        found["kernel"].add(meant_kernel(array) is None)
    assert all(answers == {True, False} for answers in found.values())
