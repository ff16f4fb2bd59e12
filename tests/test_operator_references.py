"""Operators against independent float64 references in NumPy, SciPy and Pillow."""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.signal
from PIL import Image

from aps_jax import operators
from aps_jax.operators.jpeg import quantization_tables
from aps_jax.operators.motion import motion_kernel
from aps_jax.operators.resample import bicubic_taps


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


@jax.jit
def forward(operator, x):
    return operator(x)


def apply(operator, x):
    return np.asarray(forward(operator, jnp.asarray(x, "float32")), np.float64)


# Super-resolution


def cubic(u):
    u = abs(u)
    if u <= 1:
        return 1.5 * u**3 - 2.5 * u**2 + 1
    return -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2 if u <= 2 else 0.0


def bicubic_matrix(size, scale):
    """The published resizer, pixel by pixel: 1-based positions, wide support, mirrored indices."""
    s = 1 / scale
    num_out = int(np.ceil(size * s))
    matrix = np.zeros((num_out, size))
    mirror = np.concatenate([np.arange(size), np.arange(size)[::-1]])
    for j in range(1, num_out + 1):
        centre = (j - (num_out - size * s) / 2) / s + 0.5 * (1 - 1 / s)
        first = int(np.floor(centre - 2 / s))
        positions = range(first - 1, first + int(np.ceil(4 / s)) + 3)
        weights = np.array([s * cubic(s * (centre - p)) for p in positions])
        for p, weight in zip(positions, weights / weights.sum(), strict=True):
            matrix[j - 1, mirror[(p - 1) % (2 * size)]] += weight
    return matrix


def test_bicubic_taps_of_factor_4():
    first, taps = bicubic_taps(4, 256)
    half = [-14, -90, -150, -98, 186, 798, 1490, 1974]
    assert first == -6
    np.testing.assert_allclose(8192 * taps, half + half[::-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "height, width, scale", [(64, 24, 4), (17, 18, 4), (3, 1, 4), (15, 16, 3), (9, 7, 2), (5, 6, 9)]
)
def test_super_resolution_matches_the_mirrored_resizer(height, width, scale):
    x = images(1, height, width, 2)
    expected = np.einsum(
        "oh,bhwc,pw->bopc", bicubic_matrix(height, scale), x, bicubic_matrix(width, scale)
    )
    got = apply(operators.super_resolution(scale=scale), x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_super_resolution_by_1_is_the_identity():
    x = images(1, 5, 6, 3)
    np.testing.assert_allclose(apply(operators.super_resolution(scale=1), x), x, atol=1e-7)


# Blurs


@pytest.mark.parametrize("std, shape", [(3.0, (40, 70)), (1.5, (33, 8)), (3.0, (5, 2))])
def test_gaussian_blur_matches_scipy(std, shape):
    x = images(1, *shape, 2)
    expected = scipy.ndimage.gaussian_filter(x, std, mode="mirror", axes=(1, 2))
    np.testing.assert_allclose(apply(operators.gaussian_blur(std=std), x), expected, atol=1e-6)


def test_gaussian_kernel_support():
    x = np.zeros((1, 61, 61, 1))
    x[0, 30, 30] = 1
    kernel = apply(operators.gaussian_blur(kernel_size=61, std=3.0), x)[0, :, :, 0]
    rows, columns = np.nonzero(kernel)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (18, 42, 18, 42)
    assert kernel.max() == pytest.approx(0.0176849, abs=1e-6)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    cut = apply(operators.gaussian_blur(kernel_size=5, std=3.0), x)[0, :, :, 0]
    assert (cut != 0).sum() == 25 and cut.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "kernel_shape, shape", [((5, 5), (16, 24)), ((4, 7), (9, 8)), ((9, 3), (4, 6))]
)
def test_kernel_blur_matches_direct_correlation(kernel_shape, shape):
    x, kernel = images(2, *shape, 3), images(*kernel_shape, seed=1)
    rows, columns = kernel_shape
    widths = ((rows // 2, (rows - 1) // 2), (columns // 2, (columns - 1) // 2))
    got = apply(operators.blur(kernel), x)
    for image, channel in itertools.product(range(2), range(3)):
        padded = np.pad(x[image, :, :, channel], widths, mode="reflect")
        expected = scipy.signal.correlate2d(padded, kernel, mode="valid")
        np.testing.assert_allclose(got[image, :, :, channel], expected, atol=1e-5)


def test_motion_blur_is_correlation_with_its_kernel():
    x = images(1, 20, 24, 1)
    operator = operators.motion_blur(kernel_size=31).init(jax.random.key(0), (20, 24))
    padded = np.pad(x[0, :, :, 0], 15, mode="reflect")
    expected = scipy.signal.correlate2d(padded, np.asarray(operator.params), mode="valid")
    np.testing.assert_allclose(apply(operator, x)[0, :, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize("size, intensity", [(61, 0.5), (15, 0.0), (5, 1.0)])
def test_motion_kernels(size, intensity):
    for seed in range(10):
        kernel = motion_kernel(np.random.default_rng(seed), size=size, intensity=intensity)
        again = motion_kernel(np.random.default_rng(seed), size=size, intensity=intensity)
        np.testing.assert_array_equal(kernel, again)
        assert kernel.shape == (size, size)
        assert (kernel >= 0).all()
        assert kernel.sum() == pytest.approx(1)


def test_motion_kernels_have_the_published_extent():
    """Facts about the reference generator at 61 pixels, intensity 0.5, over 300 seeds."""
    kernels = [
        motion_kernel(np.random.default_rng(seed), size=61, intensity=0.5) for seed in range(60)
    ]
    counts = np.array([(kernel > 0).sum() for kernel in kernels])
    assert 10 <= counts.min() and counts.max() <= 300
    assert 110 <= np.median(counts) <= 175  # 142 in the reference
    offsets = [np.hypot(*(np.array(scipy.ndimage.center_of_mass(k)) - 30)) for k in kernels]
    assert np.median(offsets) < 2 and max(offsets) < 10  # 1.1 and 7.3 in the reference


@pytest.mark.parametrize(
    "operator",
    [
        operators.super_resolution(scale=3),
        operators.gaussian_blur(kernel_size=61, std=3.0),
        operators.motion_blur(kernel_size=31),
        operators.denoising(),
    ],
    ids=lambda operator: operator.name,
)
def test_constant_images_are_fixed_points(operator):
    operator = operator.init(jax.random.key(0), (12, 18))
    y = apply(operator, np.full((1, 12, 18, 3), 0.4))
    np.testing.assert_allclose(y, 0.4, atol=1e-6)


# Masks


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 0.92])
def test_random_masks_miss_the_exact_number_of_pixels(fraction):
    operator = operators.inpainting_random(fraction=fraction).init(jax.random.key(1), (31, 17))
    assert operator.params.shape == (31, 17, 1)
    assert int((operator.params == 0).sum()) == int(31 * 17 * fraction)


def test_boxes_keep_their_margin():
    low, high = np.full(2, 99), np.zeros(2, int)
    for seed in range(40):
        operator = operators.inpainting_box().init(jax.random.key(seed), (32, 32))
        rows, columns = np.nonzero(np.asarray(operator.params[:, :, 0]) == 0)
        assert len(rows) == 16 * 16
        assert np.ptp(rows) == np.ptp(columns) == 15
        low = np.minimum(low, [rows.min(), columns.min()])
        high = np.maximum(high, [rows.min(), columns.min()])
    # Margin 4; the last place, 12, is excluded as in DAPS. All eight others come up.
    np.testing.assert_array_equal(low, 4)
    np.testing.assert_array_equal(high, 11)


def test_box_with_its_own_size():
    operator = operators.inpainting_box(box_size=(3, 10), margin=0).init(
        jax.random.key(0), (16, 10)
    )
    missing = np.asarray(operator.params[:, :, 0]) == 0
    assert missing.any(axis=1).sum() == 3 and missing.any(axis=0).sum() == 10


# Pointwise, colour and Fourier operators


def test_hdr_and_quantization_by_hand():
    x = np.array([-1.0, -0.6, -0.2, 0.0, 0.3, 0.8, 1.0]).reshape(1, 1, 7, 1)
    hdr = apply(operators.hdr(gain=2.0), x).ravel()
    np.testing.assert_allclose(hdr, [-1, -1, -0.4, 0, 0.6, 1, 1], atol=1e-6)
    levels = apply(operators.quantization(bits=1), x).ravel()
    np.testing.assert_allclose(levels[[0, 1, 2, 4, 5, 6]], [-1, -1, -1, 1, 1, 1], atol=1e-6)
    levels = apply(operators.quantization(bits=2), images(1, 20, 20, 3))
    steps = (levels + 1) * 1.5
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
    assert len(np.unique(np.round(steps))) == 4


def test_luma_by_hand():
    x = np.stack([np.full((2, 2), v) for v in (1.0, -0.5, 0.25)], axis=-1)[None]
    y = apply(operators.colorization(), x)
    np.testing.assert_allclose(y, np.full((1, 2, 2, 1), 0.299 - 0.2935 + 0.0285), atol=1e-6)


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "grbg", "gbrg"])
@pytest.mark.parametrize("height, width", [(4, 6), (5, 3)])
def test_mosaic_by_hand(pattern, height, width):
    x = images(2, height, width, 3)
    y = apply(operators.demosaicing(pattern=pattern), x)
    for row, column in itertools.product(range(height), range(width)):
        colour = "rgb".index(pattern[2 * (row % 2) + column % 2])
        np.testing.assert_allclose(y[:, row, column, 0], x[:, row, column, colour], atol=1e-7)


@pytest.mark.parametrize("height, width, oversample", [(16, 24, 2.0), (9, 15, 3.0), (8, 8, 0.0)])
def test_phase_retrieval_matches_numpy(height, width, oversample):
    x = images(1, height, width, 3)
    rows, columns = int(oversample / 8 * height), int(oversample / 8 * width)
    u = np.pad((x + 1) / 2, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    shifted = np.fft.ifftshift(u, axes=(1, 2))
    expected = np.abs(np.fft.fftshift(np.fft.fft2(shifted, axes=(1, 2), norm="ortho"), axes=(1, 2)))
    operator = operators.phase_retrieval(oversample=oversample)
    y = apply(operator, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert np.sum(y**2) == pytest.approx(np.sum(u**2), rel=1e-5)
    np.testing.assert_allclose(apply(operator, x[:, ::-1, ::-1]), y, atol=1e-5)
    assert operator.image_shape(y.shape) == (height, width)


def test_phase_retrieval_inverts_every_padding():
    for oversample, side in itertools.product((0.0, 1.3, 2.0, 4.0), range(1, 130)):
        operator = operators.phase_retrieval(oversample=oversample)
        padded = side + 2 * int(oversample / 8 * side)
        assert operator.image_shape((1, padded, padded, 3)) == (side, side)


def test_sensing_matrices():
    for ensemble in ("signs", "gaussian"):
        operator = operators.compressed_sensing(num_measurements=40, ensemble=ensemble)
        operator = operator.init(jax.random.key(0), (8, 9))
        matrix = np.asarray(operator.params, np.float64)
        assert matrix.shape == (40, 72)
        assert matrix.var() == pytest.approx(1 / 40, rel=0.1)
        if ensemble == "signs":
            np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(40), rtol=1e-6)
        x = images(2, 8, 9, 3)
        expected = np.einsum("mn,bnc->bmc", matrix, x.reshape(2, 72, 3))
        np.testing.assert_allclose(apply(operator, x), expected, atol=1e-5)


# JPEG


def jpeg_reference(x, quality):
    """Block by block with SciPy's DCT; chroma tables for the last two channels."""
    height, width = x.shape[:2]
    rgb = np.pad((x + 1) * 127.5, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    red, green, blue = np.moveaxis(rgb, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = [luma - 128, (blue - luma) / 1.772, (red - luma) / 1.402]
    tables = quantization_tables(quality)
    for channel, table in zip(channels, (tables[0], tables[1], tables[1]), strict=True):
        for i, j in itertools.product(*(range(0, side, 8) for side in channel.shape)):
            block = scipy.fft.dctn(channel[i : i + 8, j : j + 8], norm="ortho")
            block = np.round(block / table) * table
            channel[i : i + 8, j : j + 8] = scipy.fft.idctn(block, norm="ortho")
    luma, cb, cr = channels[0] + 128, channels[1], channels[2]
    red, blue = luma + 1.402 * cr, luma + 1.772 * cb
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    out = np.stack([red, green, blue], axis=-1)[:height, :width] / 127.5 - 1
    return np.clip(out, -1, 1)


@pytest.mark.parametrize("quality, shape", [(5, (16, 24)), (50, (19, 9)), (95, (3, 8))])
def test_jpeg_matches_block_dct(quality, shape):
    x = images(1, *shape, 3)
    got = apply(operators.jpeg(quality=quality), x)[0]
    expected = jpeg_reference(x[0], quality)
    # A coefficient within rounding of a half may fall either way and changes its whole block.
    assert np.mean(np.abs(got - expected) > 1e-4) < 0.01


def test_jpeg_is_close_to_a_real_codec():
    rows, columns = np.mgrid[:64, :48] / 16
    pixels = np.stack([np.sin(rows * columns), np.cos(rows + columns), np.sin(rows)], axis=-1)
    pixels = np.round(127.5 + 100 * pixels).astype(np.uint8)
    for quality in (10, 40, 90):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
        file.seek(0)
        theirs = np.asarray(Image.open(file), np.float64)
        ours = (apply(operators.jpeg(quality=quality), pixels[None] / 127.5 - 1)[0] + 1) * 127.5
        damage = np.sqrt(np.mean((theirs - pixels) ** 2))
        assert np.sqrt(np.mean((theirs - ours) ** 2)) < max(1.5, 0.3 * damage)  # Their 8-bit steps.


def test_jpeg_tables():
    tables = quantization_tables(50)
    assert (tables[0, 0, 0], tables[0, 7, 7], tables[1, 0, 0], tables[1, 7, 7]) == (16, 99, 17, 99)
    assert (quantization_tables(100) == 1).all()
    assert quantization_tables(1).max() == 255
