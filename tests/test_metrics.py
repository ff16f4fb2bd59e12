import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from aps_jax.metrics import psnr, ssim

SHAPES = [(1, 11, 11, 3), (2, 16, 23, 3), (3, 64, 48, 1), (1, 40, 12, 4)]


def pair(shape, noise=0.1, seed=0):
    """A smooth image with some texture, and a noisy copy, both inside [-1, 1]."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 3, shape[1])[:, None, None]
    columns = np.linspace(0, 5, shape[2])[:, None]
    a = 0.6 * np.sin(rows + columns) + 0.2 * rng.uniform(-1, 1, shape)
    b = a + noise * rng.normal(size=shape)
    return np.clip(a, -1, 1).astype("float32"), np.clip(b, -1, 1).astype("float32")


def skimage_ssim(a, b):
    return structural_similarity(
        a.astype("float64"),
        b.astype("float64"),
        data_range=2,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [1e-3, 0.1, 2.0])
def test_agrees_with_scikit_image(shape, noise):
    a, b = pair(shape, noise)
    decibel = [
        peak_signal_noise_ratio(one.astype("float64"), two.astype("float64"), data_range=2)
        for one, two in zip(a, b, strict=True)
    ]
    similarity = [skimage_ssim(one, two) for one, two in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(psnr)(a, b), decibel, atol=1e-4)
    np.testing.assert_allclose(jax.jit(ssim)(a, b), similarity, atol=1e-4)


@pytest.mark.parametrize("level", [-1.0, 0.5, 1.0])
def test_ssim_of_flat_images_agrees_with_scikit_image(level):
    """Flat areas are where the variance, a difference of near-equal numbers, could go wrong."""
    a = np.full((1, 16, 16, 3), level, "float32")
    b = a * np.float32(0.95)
    np.testing.assert_allclose(
        ssim(jnp.array(a), jnp.array(b))[0], skimage_ssim(a[0], b[0]), atol=1e-4
    )


def test_equal_images_score_best():
    a, b = pair((2, 16, 16, 3))
    b[0] = a[0]
    decibel, similarity = psnr(a, b), ssim(a, b)
    assert np.isinf(decibel[0]) and decibel[0] > 0 and np.isfinite(decibel[1])
    np.testing.assert_allclose(similarity[0], 1, atol=1e-6)
    assert similarity[1] < 0.999


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_each_image_is_scored_alone_and_symmetrically(metric):
    a, b = pair((3, 20, 16, 3))
    together = metric(a, b)
    alone = jnp.concatenate([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    np.testing.assert_allclose(together, metric(b, a), rtol=1e-6)
    assert together.shape == (3,) and together.dtype == jnp.float32


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_clipping_is_the_default_and_optional(metric):
    a, b = pair((1, 16, 16, 3))
    far = 3 * b
    np.testing.assert_allclose(metric(a, far), metric(a, np.clip(far, -1, 1)), rtol=1e-6)
    assert metric(a, far, clip=False)[0] < metric(a, far)[0]
    np.testing.assert_allclose(metric(a, b, clip=False), metric(a, b), rtol=1e-6)


def test_psnr_without_clipping_is_exact_for_a_known_error():
    a = jnp.zeros((1, 4, 4, 3))
    np.testing.assert_allclose(psnr(a, a + 0.2), 20.0, atol=1e-4)


def test_wrong_shapes_are_refused():
    x = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match=r"share one shape.*\(1, 16, 16, 3\) and \(1, 16, 8, 3\)"):
        psnr(x, x[:, :, :8])
    with pytest.raises(ValueError, match="share one shape"):
        ssim(x[0], x[0])
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(x[:, :10], x[:, :10])
