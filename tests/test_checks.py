"""Images and measurements of another dtype or scale are refused, never clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import APSConfig, metrics, operators
from aps_jax.samplers import DAPSConfig, G2D2Config, MaskGITConfig, SGDDConfig
from aps_jax.sampling.checks import check_measured_values, check_measurement
from aps_jax.sampling.target import start_tokens
from aps_jax.scores import report
from aps_jax.types import image_keys

RNG = np.random.default_rng(0)
PICTURE = np.float32(RNG.uniform(-1, 1, (2, 16, 16, 3)))


@pytest.mark.parametrize("score", [metrics.psnr, metrics.ssim])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 16, 16, 3), np.uint8), "floating-point.*uint8"),
        (np.zeros((2, 16, 16, 3), np.int32), "floating-point.*int32"),
        (np.zeros((2, 16, 16, 3), bool), "floating-point.*bool"),
        ((PICTURE + 1) * 127.5, "not on the scale"),
        (np.float32(PICTURE.transpose(0, 3, 1, 2)), "channels come last"),
    ],
)
def test_scores_refuse_other_numbers(score, x, message):
    with pytest.raises(ValueError, match=message):
        score(x, x)


def test_scores_take_what_noise_pushes_out_of_the_range():
    noisy = PICTURE + np.float32(RNG.normal(0, 0.5, PICTURE.shape))
    assert np.isfinite(metrics.psnr(noisy, PICTURE)).all()
    assert jax.jit(metrics.psnr)(noisy, PICTURE).shape == (2,)


def test_measurements_are_refused_by_dtype_and_layout_while_tracing():
    operator = operators.denoising()
    for dtype in ("uint8", "int32", "bool", "complex64"):
        with pytest.raises(ValueError, match=f"floating-point.*{dtype}"):
            jax.eval_shape(
                lambda y: check_measurement(operator, y),
                jax.ShapeDtypeStruct((1, 8, 8, 3), dtype),
            )
    with pytest.raises(ValueError, match="channels come last"):
        check_measurement(operator, jnp.zeros((1, 3, 8, 8), jnp.float32))


def test_values_of_measurements():
    operator = operators.denoising()
    check_measured_values(operator, np.float32(PICTURE + RNG.normal(0, 1, PICTURE.shape)), 0.05)
    with pytest.raises(ValueError, match="not on the scale"):
        check_measured_values(operator, (PICTURE + 1) * 127.5, 0.05)
    with pytest.raises(ValueError, match="NaN"):
        check_measured_values(operator, PICTURE * np.float32(np.nan), 0.05)
    # Amplitudes have no scale of their own.
    check_measured_values(operators.phase_retrieval(), 100 * np.abs(PICTURE), 0.05)


def test_the_limit_of_a_residual_is_that_of_chi_square():
    from scipy.stats import chi2, norm

    for count in (30, 100, 10_000):  # At ten entries Wilson and Hilferty are 1 % too careful.
        quantile = chi2.ppf(norm.cdf(4.75), count) / count
        want = np.sqrt(0.3**2 * quantile + report.MODEL_ERROR**2)
        assert report.largest_residual(0.3, count) == pytest.approx(want, rel=6e-3)


def test_a_residual_that_noise_explains_is_not_far_and_one_of_another_operator_is():
    x = jnp.asarray(PICTURE[0])
    noise = np.float32(RNG.normal(0, 0.5, (1, 16, 16, 3)))
    fitting = report.data_residual(operators.denoising(), x, x[None] + noise, sigma=0.5)
    assert not fitting["is_far"] and report.residual_notes(fitting, 0.5) == []
    wrong = report.data_residual(operators.denoising(), x, -x[None] + noise, sigma=0.5)
    assert wrong["is_far"] and "does not explain" in report.residual_notes(wrong, 0.5)[0]
    # What is explained by data consistency alone is as far as the decoder's picture.
    mended = report.data_residual(
        operators.denoising(), x, x[None] + noise, sigma=0.5, decoded=-x
    )  # fmt: skip
    assert mended["root_mean_square"] == fitting["root_mean_square"]
    assert mended["is_far"] and "does not explain" in report.residual_notes(mended, 0.5)[0]


def test_old_keys_are_refused_with_the_way_to_make_a_new_one():
    old = jax.random.PRNGKey(0)
    with pytest.raises(ValueError, match="wrap_key_data"):
        image_keys(old, 2)
    assert image_keys(jax.random.wrap_key_data(old), 2).shape == (2,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, -1]], "from -1 to 0; they must be from 0 to 7, and 8 where"),
        ([[0, 9]], "from 0 to 9"),
        ([[0.0, 1.0]], "must be integers"),
        ([[0, 1, 2]], r"shape \(1, 3\)"),
    ],
)
def test_known_tokens_are_codes_or_the_mask(tokens, message):
    with pytest.raises(ValueError, match=message):
        start_tokens(jnp.asarray(tokens), (1, 2), 8)
    given = jnp.asarray([[8, 3]])
    np.testing.assert_array_equal(start_tokens(given, (1, 2), 8), given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DAPSConfig(first_sigma=0.05), "last_sigma must not be above first_sigma"),
        (lambda: DAPSConfig(ode_sigma=5.0), "ode_sigma must not be above last_sigma"),
        (lambda: SGDDConfig(first_noise=0.01, last_noise=1.0), "last_noise must not be above"),
        (lambda: MaskGITConfig(guidance_scale=-5.0), "guidance_scale must not be negative"),
        (lambda: G2D2Config(guidance_scale=float("nan")), "guidance_scale must not be negative"),
        (lambda: APSConfig(image_shape=64), r"image_shape must be \(height, width\).*64"),
        (lambda: APSConfig(image_shape=(64,)), "image_shape must be"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_and_jax_are_options():
    """They become Python's, so that a configuration with them is equal to one without."""
    plain = APSConfig(num_steps=5, sigma=0.25, prior_weight=0.5)
    assert plain == APSConfig(
        num_steps=np.int64(5), sigma=jnp.float32(0.25), prior_weight=np.float64(0.5)
    )
    assert hash(plain) == hash(APSConfig(num_steps=jnp.int32(5), sigma=0.25, prior_weight=0.5))
    for options in ({"num_steps": np.float32(5.5)}, {"sigma": np.array([0.1, 0.2])}):
        with pytest.raises(ValueError, match=next(iter(options))):
            APSConfig(**options)
