"""The measurement objective against float64 NumPy, on a codec that is one matrix.

Three tokens of two bits decode linearly to a 2x6 image, so value, gradient and Adam's path can be
written by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import APSConfig, Params, operators
from aps_jax.codec import lfq
from aps_jax.sampling import likelihood
from aps_jax.types import Codec, Perceptual, Prior

BITS, CODES, LENGTH, STRIDE = 2, 4, 3, 2
GRID, IMAGE, BATCH = (1, LENGTH), (STRIDE, STRIDE * LENGTH), 2
C = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1.0]])
PIXELS = IMAGE[0] * IMAGE[1] * 3


def linear_decode(params, codes):
    flat = codes.reshape(codes.shape[0], -1) @ params
    return flat.reshape(-1, *IMAGE, 3)


def no_encode(params, x):
    raise AssertionError


def no_prior(params, tokens):
    raise AssertionError("the denoiser has no place in the inner loop")


def keep_mean(codebook, features):
    """An identity in place of the quantiser: the relaxation whose gradient is exact."""
    return features, lfq.codes_to_tokens(features)


@pytest.fixture(scope="module")
def problem():
    """Everything in float64: one known token in image 0, none in image 1."""
    rng = np.random.default_rng(3)
    return {
        "weights": rng.normal(size=(LENGTH * BITS, PIXELS)) / 3,
        "logits": rng.normal(size=(BATCH, LENGTH, CODES)),
        "prior": log_softmax(rng.normal(size=(BATCH, LENGTH, CODES))),
        "tokens": np.array([[CODES, 2, CODES], [CODES, CODES, CODES]]),
        "y": rng.normal(size=(BATCH, *IMAGE, 3)),
        "mask": (rng.uniform(size=(BATCH, *IMAGE, 1)) > 0.4).astype(float),
    }


def f32(values):
    return jnp.asarray(values, jnp.float32)


def make_params(problem, operator, quantize=lfq.quantize, perceptual=None):
    codec = Codec(
        params=f32(problem["weights"]),
        codebook=f32(C),
        encode=no_encode,
        decode=linear_decode,
        quantize=quantize,
        stride=STRIDE,
    )
    prior = Prior(params=None, apply=no_prior, num_codes=CODES)
    return Params(prior=prior, codec=codec, operator=operator, perceptual=perceptual)


def arguments(problem, y=None):
    return (
        f32(problem["y"]) if y is None else y,
        f32(problem["logits"]),
        f32(problem["prior"]),
        jnp.asarray(problem["tokens"]),
        jnp.float32(0.25),
    )


def losses_of(problem, params, y=None, **options):
    config = APSConfig(**options)
    y, logits, prior, tokens, weight = arguments(problem, y)
    return likelihood.objective(
        params, y, logits, prior, tokens, weight, grid=GRID, image_shape=IMAGE, config=config
    )


# Float64 reference.


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax_vjp(logits, cotangent):
    """J^T c for J = diag(p) - p p^T, written out for every token."""
    p = np.exp(log_softmax(logits))
    jacobian = np.einsum("...k,kj->...kj", p, np.eye(CODES)) - p[..., :, None] * p[..., None, :]
    return np.einsum("...kj,...k->...j", jacobian, cotangent)


def decode(problem, logits, quantized=True):
    mean = np.exp(log_softmax(logits)) @ C
    codes = np.where(mean > 0, 1.0, -1.0) if quantized else mean
    tokens = problem["tokens"]
    codes = np.where((tokens == CODES)[..., None], codes, C[np.minimum(tokens, CODES - 1)])
    return (codes.reshape(BATCH, -1) @ problem["weights"]).reshape(BATCH, *IMAGE, 3)


def prior_term(problem, logits):
    inner = np.log(np.sum(np.exp(log_softmax(logits) + problem["prior"]), -1))
    return -np.sum(np.where(problem["tokens"] == CODES, inner, 0), -1)


def gaussian_loss(problem, logits, *, sigma, prior_weight, quantized=True, mask=1.0):
    residual = (decode(problem, logits, quantized) - problem["y"]) * mask
    energy = np.sum(residual**2, axis=(1, 2, 3)) / (2 * sigma**2)
    return energy + prior_weight * prior_term(problem, logits)


def gaussian_gradient(problem, logits, *, sigma, prior_weight, quantized=True):
    """The straight-through gradient: measured at the codes, passed on to the mean code."""
    residual = (decode(problem, logits, quantized) - problem["y"]).reshape(BATCH, -1)
    cotangent = (residual @ problem["weights"].T / sigma**2).reshape(BATCH, LENGTH, BITS)
    grad = softmax_vjp(logits, cotangent @ C.T)
    p, x = np.exp(log_softmax(logits)), np.exp(problem["prior"])
    inner = np.sum(p * x, -1, keepdims=True)
    grad = grad - prior_weight * (p * x / inner - p)
    return np.where((problem["tokens"] == CODES)[..., None], grad, 0)


# The quantized expectation.


def test_quantized_expectation_is_a_code_with_the_gradient_of_the_mean(rng):
    params = make_params({"weights": np.zeros((6, PIXELS))}, operators.denoising())
    logits = rng.normal(scale=2, size=(BATCH, LENGTH, CODES))
    cotangent = rng.normal(size=(BATCH, LENGTH, BITS))

    def value(logits):
        codes, tokens = likelihood.quantized_expectation(params.codec, logits)
        return jnp.sum(codes * f32(cotangent)), (codes, tokens)

    grad, (codes, tokens) = jax.grad(value, has_aux=True)(f32(logits))
    mean = np.exp(log_softmax(logits)) @ C
    np.testing.assert_array_equal(codes, np.sign(mean))  # exactly: no rounding is left over
    np.testing.assert_array_equal(C[np.asarray(tokens)], codes)
    np.testing.assert_allclose(grad, softmax_vjp(logits, cotangent @ C.T), atol=2e-6)
    np.testing.assert_allclose(likelihood.expected_code(params.codec, f32(logits)), mean, atol=1e-6)


def test_a_cheaper_mean_code_takes_the_place_of_the_product(rng):
    plain = make_params({"weights": np.zeros((6, PIXELS))}, operators.denoising()).codec
    logits = f32(rng.normal(scale=2, size=(BATCH, LENGTH, CODES)))
    expected = likelihood.expected_code(plain, logits)
    got = likelihood.expected_code(plain.replace(mean_code=lfq.mean_code), logits)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    doubled = plain.replace(mean_code=lambda logits: 2 * lfq.mean_code(logits))
    np.testing.assert_allclose(likelihood.expected_code(doubled, logits), 2 * expected, atol=1e-6)


def test_any_codebook_can_be_the_tokenizer(rng):
    codebook = rng.normal(size=(CODES, BITS))
    params = make_params({"weights": np.zeros((6, PIXELS))}, operators.denoising())
    codec = params.codec.replace(codebook=f32(codebook), quantize=lfq.quantize_nearest)
    logits = 3 * rng.normal(size=(20, LENGTH, CODES))
    codes, tokens = likelihood.quantized_expectation(codec, f32(logits))
    mean = np.exp(log_softmax(logits)) @ codebook
    expected = np.argmin(((mean[..., None, :] - codebook) ** 2).sum(-1), axis=-1)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(codes, codebook[expected], atol=1e-6)


# The terms of the loss.


def test_gaussian_and_prior_terms(problem):
    params = make_params(problem, operators.denoising())
    for weight in (0.0, 0.7):
        got = losses_of(
            problem, params, measurement_term="gaussian", sigma=0.3, prior_weight=weight
        )
        expected = gaussian_loss(problem, problem["logits"], sigma=0.3, prior_weight=weight)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    # The bound of Theorem 3.3 scales the prior term by w_t, here 0.25.
    got = losses_of(
        problem,
        params,
        measurement_term="gaussian",
        sigma=0.3,
        prior_weight=0.7,
        prior_weighting="elbo",
    )
    expected = gaussian_loss(problem, problem["logits"], sigma=0.3, prior_weight=0.7 / 4)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_kl_term(problem):
    params = make_params(problem, operators.denoising())
    options = {"measurement_term": "gaussian", "sigma": 0.3, "prior_weight": 0.7}
    got = losses_of(problem, params, prior_term="kl", **options)
    log_probs, log_prior = log_softmax(problem["logits"]), problem["prior"]
    divergence = (np.exp(log_probs) * (log_probs - log_prior)).sum(-1)
    divergence = (divergence * (problem["tokens"] == CODES)).sum(-1)
    energy = gaussian_loss(problem, problem["logits"], sigma=0.3, prior_weight=0.0)
    np.testing.assert_allclose(got, energy + 0.7 * divergence, rtol=1e-5)


def test_the_kl_term_is_least_at_the_prior_and_the_overlap_at_its_mode(rng):
    log_prior = f32(log_softmax(rng.normal(size=(1, 2, CODES))))
    sure = f32(100 * np.eye(CODES))[jnp.argmax(log_prior, axis=-1)]
    is_masked = jnp.ones((1, 2), bool)

    def energy(logits, term):
        return float(likelihood.prior_energy(logits, log_prior, is_masked, term=term)[0])

    assert energy(log_prior, "kl") == pytest.approx(0, abs=1e-6) and energy(sure, "kl") > 0.1
    assert energy(sure, "overlap") < energy(log_prior, "overlap")
    slope = jax.grad(lambda x: likelihood.prior_energy(x, log_prior, is_masked, term="kl")[0])
    np.testing.assert_allclose(slope(log_prior), 0, atol=1e-6)


def test_absolute_error_counts_measured_pixels_only(problem):
    mask = problem["mask"]
    operator = operators.inpainting_mask(mask)
    params = make_params(problem, operator)
    y = f32(problem["y"] * mask)
    got = losses_of(problem, params, y, prior_weight=0.7)
    residual = np.abs(decode(problem, problem["logits"]) - problem["y"]) * mask
    mean = residual.sum(axis=(1, 2, 3)) / (3 * mask.sum(axis=(1, 2, 3)))
    expected = LENGTH * mean + 0.7 * prior_term(problem, problem["logits"])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # What stands in y at missing pixels is of no account.
    other = f32(problem["y"] * mask + 9 * (1 - mask))
    np.testing.assert_allclose(losses_of(problem, params, other, prior_weight=0.7), got, rtol=1e-6)
    got = losses_of(problem, params, other, measurement_term="gaussian", sigma=0.3)
    expected = gaussian_loss(problem, problem["logits"], sigma=0.3, prior_weight=0, mask=mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_stacked_measurements_add_up(problem):
    mask = problem["mask"][0]
    operator = operators.stack([operators.denoising(), operators.inpainting_mask(mask)])
    y = (f32(problem["y"]), f32(problem["y"] * mask))
    got = losses_of(problem, make_params(problem, operator), y)
    residual = np.abs(decode(problem, problem["logits"]) - problem["y"])
    expected = residual.mean(axis=(1, 2, 3))
    expected = expected + (residual * mask).sum(axis=(1, 2, 3)) / (3 * mask.sum())
    np.testing.assert_allclose(got, LENGTH * expected, rtol=1e-5)


def test_perceptual_features_of_y_are_computed_once(problem):
    """A distance in two halves gives the same loss, and its half of y is outside the inner loop."""
    seen = []

    def describe(params, b):
        seen.append("y")
        return 2 * b

    def compare(params, a, features):
        seen.append("x")
        return jnp.mean((2 * a - features) ** 2, axis=(1, 2, 3))

    def whole(params, a, b):
        return compare(params, a, 2 * b)

    y = f32(problem["y"])
    identity = operators.denoising()
    plain = make_params(problem, identity, perceptual=Perceptual(params=None, apply=whole))
    halves = make_params(
        problem, identity,
        perceptual=Perceptual(params=None, apply=whole, describe=describe, compare=compare),
    )  # fmt: skip
    expected = losses_of(problem, plain, y, perceptual_weight=0.5)
    seen.clear()
    np.testing.assert_allclose(
        losses_of(problem, halves, y, perceptual_weight=0.5), expected, rtol=1e-6
    )
    assert set(seen) == {"x", "y"}
    config = APSConfig(num_inner_steps=3, perceptual_weight=0.5)
    logits = f32(problem["logits"])
    targets = likelihood.perceptual_targets(halves, y, config)
    seen.clear()
    likelihood.objective(
        halves, y, logits, f32(problem["prior"]), jnp.asarray(problem["tokens"]), jnp.ones(()),
        grid=GRID, image_shape=IMAGE, config=config, targets=targets,
    )  # fmt: skip
    assert seen == ["x"]


def test_perceptual_term_is_for_images_only(problem):
    def squares(params, a, b):
        return jnp.mean((a - b) ** 2, axis=(1, 2, 3))

    perceptual = Perceptual(params=None, apply=squares)
    grey = operators.colorization()
    y = f32(problem["y"][..., :1])
    params = make_params(problem, grey, perceptual=perceptual)
    plain = losses_of(problem, params, y)
    extra = (losses_of(problem, params, y, perceptual_weight=0.5) - plain) / LENGTH
    x = np.asarray(grey(f32(decode(problem, problem["logits"]))))
    np.testing.assert_allclose(extra, 0.5 * ((x - y) ** 2).mean(axis=(1, 2, 3)), rtol=1e-4)
    blind = params.replace(operator=grey.replace(is_image=False))
    np.testing.assert_array_equal(losses_of(problem, blind, y, perceptual_weight=0.5), plain)


def test_decoding_at_twice_the_size_averages_areas(rng):
    def tile(params, codes):
        return params[:, : 4 * codes.shape[1], : 4 * codes.shape[2]]

    field = rng.normal(size=(1, 12, 16, 3))
    codec = make_params({"weights": np.zeros((6, PIXELS))}, operators.denoising()).codec
    codec = codec.replace(params=f32(field), decode=tile)
    codes = jnp.zeros((1, 3, 4, BITS))
    got = likelihood.decode_image(codec, codes, (5, 7), 2)
    expected = [[field[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for j in range(7)]
                for i in range(5)]  # fmt: skip
    np.testing.assert_allclose(got[0], expected, atol=1e-6)
    np.testing.assert_array_equal(
        likelihood.decode_image(codec, codes, (11, 13), 1), f32(field)[:, :11, :13]
    )


# Gradients.


def gradients(problem, params, y=None, **options):
    return jax.grad(
        lambda logits: jnp.sum(losses_of({**problem, "logits": logits}, params, y, **options))
    )(f32(problem["logits"]))


def test_gradient_of_the_smooth_relaxation_equals_finite_differences(problem, rng):
    params = make_params(problem, operators.denoising(), quantize=keep_mean)
    options = {"sigma": 0.5, "prior_weight": 0.7}
    grad = np.float64(gradients(problem, params, measurement_term="gaussian", **options))
    step = 1e-6
    for _ in range(4):
        direction = rng.normal(size=grad.shape)
        ends = [
            gaussian_loss(
                problem, problem["logits"] + sign * step * direction, quantized=False, **options
            ).sum()
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(
            np.sum(grad * direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-3
        )


def test_straight_through_gradient_equals_its_definition(problem):
    params = make_params(problem, operators.denoising())
    options = {"sigma": 0.5, "prior_weight": 0.7}
    grad = gradients(problem, params, measurement_term="gaussian", **options)
    expected = gaussian_gradient(problem, problem["logits"], **options)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(grad[0, 1], 0)  # the known token
    assert np.all(np.abs(np.delete(np.asarray(grad), 1, axis=1)).max(axis=-1) > 1e-3)


def test_images_of_a_batch_do_not_meet(problem):
    params = make_params(problem, operators.denoising())
    changed = {name: values for name, values in problem.items()}
    for name in ("y", "logits", "prior"):
        changed[name] = problem[name].copy()
        changed[name][1] = np.roll(problem[name][1], 1, axis=-1)
    options = {"prior_weight": 0.5}
    a, b = (losses_of(p, params, **options) for p in (problem, changed))
    assert a[0] == b[0] and abs(a[1] - b[1]) > 1e-3
    a, b = (np.asarray(gradients(p, params, **options)) for p in (problem, changed))
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-3


# The inner loop.


def run(problem, params, y=None, evidence=None, rates=None, **options):
    config = APSConfig(measurement_term="gaussian", sigma=0.5, prior_weight=0.7, **options)
    y, logits, prior, tokens, weight = arguments(problem, y)
    moments = likelihood.make_optimizer(config).init(logits)
    return jax.jit(likelihood.refine, static_argnames=("grid", "image_shape", "config"))(
        params, y, logits, moments, prior, tokens, weight,
        grid=GRID, image_shape=IMAGE, config=config, evidence=evidence, rates=rates,
    )  # fmt: skip


def numpy_adam(problem, num_steps, learning_rate, eps, share=1.0, rates=None):
    phi = problem["logits"]
    first, second, losses = 0.0, 0.0, []
    for step in range(1, num_steps + 1):
        losses.append(gaussian_loss(problem, phi, sigma=0.5, prior_weight=0.7))
        grad = gaussian_gradient(problem, phi, sigma=0.5, prior_weight=0.7)
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        rate = learning_rate * (1 if rates is None else rates[step - 1])
        phi = phi - share * rate * mean / (np.sqrt(square) + eps)
    return phi, np.array(losses)


@pytest.mark.parametrize("eps", [1e-8, 10.0])
def test_inner_loop_is_adam(problem, eps):
    result = run(
        problem,
        make_params(problem, operators.denoising()),
        num_inner_steps=6,
        learning_rate=0.3,
        adam_eps=eps,
        trace=True,
    )
    phi, losses = numpy_adam(problem, 6, 0.3, eps)
    np.testing.assert_allclose(result.logits, phi, atol=2e-4)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(result.loss, losses[-1], rtol=1e-4)
    np.testing.assert_array_equal(result.num_steps, 6)
    assert np.abs(phi - problem["logits"]).max() > 0.05


def test_evidence_scales_the_updates(problem):
    evidence = np.array([[0.2, 1.0, 0.7], [0.0, 0.5, 1.0]])
    result = run(
        problem,
        make_params(problem, operators.denoising()),
        num_inner_steps=4,
        learning_rate=0.3,
        trace=True,
        evidence=f32(evidence),
    )
    phi, losses = numpy_adam(problem, 4, 0.3, 1e-8, share=evidence[..., None])
    np.testing.assert_allclose(result.logits, phi, atol=2e-4)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    np.testing.assert_array_equal(result.logits[1, 0], f32(problem["logits"][1, 0]))


def test_rates_scale_the_updates_of_each_step(problem):
    rates = np.array([1.0, 0.7, 0.2, 0.0])
    options = {"num_inner_steps": 4, "learning_rate": 0.3}
    result = run(problem, make_params(problem, operators.denoising()), rates=f32(rates), **options)
    phi, losses = numpy_adam(problem, 4, 0.3, 1e-8, rates=rates)
    np.testing.assert_allclose(result.logits, phi, atol=2e-4)
    np.testing.assert_allclose(result.loss, losses[-1], rtol=1e-4)


@pytest.mark.parametrize("early_stop", [0.0, 1e-30])
def test_the_best_phi_is_kept(problem, early_stop):
    params = make_params(problem, operators.denoising())
    # Steps so long that the loss goes up and down.
    options = {"learning_rate": 3.0, "keep_best": True, "early_stop": early_stop}
    result = run(problem, params, num_inner_steps=7, trace=True, **options)
    path = [numpy_adam(problem, n, 3.0, 1e-8) for n in range(8)]
    losses = path[-1][1]
    np.testing.assert_allclose(result.losses, losses, rtol=1e-3)
    best = 3 + np.argmin(losses[3:], axis=0)  # in the second half
    assert np.any(best != np.argmin(losses, axis=0)) and best[0] != best[1]
    expected = np.stack([path[step][0][image] for image, step in enumerate(best)])
    np.testing.assert_allclose(result.logits, expected, atol=2e-3)
    if early_stop == 0:
        np.testing.assert_allclose(result.loss, losses[3:].min(axis=0), rtol=1e-3)
    # A single step has evaluated nothing but the start, and moves on from it.
    single = run(problem, params, num_inner_steps=1, **options)
    np.testing.assert_allclose(single.logits, path[1][0], atol=2e-3)


def test_images_that_stop_early_keep_the_phi_they_stopped_at(problem):
    params = make_params(problem, operators.denoising())
    options = {"learning_rate": 0.3, "early_stop": 1e3, "keep_best": True}
    least = 1 + likelihood.QUIET_STEPS
    result = run(problem, params, num_inner_steps=2 * least + 2, **options)
    np.testing.assert_array_equal(result.num_steps, least)
    np.testing.assert_allclose(result.logits, numpy_adam(problem, least, 0.3, 1e-8)[0], atol=2e-4)


def test_a_failed_step_is_told_although_a_better_one_was_kept(problem):
    params = make_params(problem, operators.denoising())
    result = run(problem, params, num_inner_steps=4, learning_rate=3e38, keep_best=True, trace=True)
    assert np.all(np.isfinite(result.losses[0])) and not np.all(np.isfinite(result.losses))
    assert np.all(np.isnan(result.loss)) and np.all(np.isfinite(result.logits))


def test_no_inner_steps_leave_the_logits(problem):
    result = run(problem, make_params(problem, operators.denoising()), num_inner_steps=0)
    np.testing.assert_array_equal(result.logits, f32(problem["logits"]))
    np.testing.assert_array_equal(result.num_steps, 0)
    assert np.all(np.isnan(result.loss)) and result.losses is None


def test_early_stop_freezes_each_image_on_its_own(problem):
    params = make_params(problem, operators.denoising())
    # All of image 0 is known: its loss never changes, so it stops as soon as it may.
    settled = {**problem, "tokens": np.array([[0, 2, 1], [CODES] * 3])}
    least = 1 + likelihood.QUIET_STEPS  # the first step has nothing to compare with
    options = {"num_inner_steps": 8, "learning_rate": 0.3, "early_stop": 1e-5}
    both = run(settled, params, **options)
    np.testing.assert_array_equal(both.num_steps, [least, 8])
    np.testing.assert_array_equal(both.logits[0], f32(problem["logits"][0]))
    # A tolerance that every image meets at once: the same as a loop of so many steps.
    loose = run(problem, params, num_inner_steps=8, learning_rate=0.3, early_stop=1e3)
    short = run(problem, params, num_inner_steps=least, learning_rate=0.3)
    np.testing.assert_array_equal(loose.num_steps, least)
    np.testing.assert_allclose(loose.logits, short.logits, atol=1e-6)
    # A tolerance that nobody meets: the plain loop.
    strict = run(problem, params, num_inner_steps=6, learning_rate=0.3, early_stop=1e-30)
    np.testing.assert_allclose(strict.logits, numpy_adam(problem, 6, 0.3, 1e-8)[0], atol=2e-4)


def test_early_stop_does_not_depend_on_the_batch(problem):
    """One image stops early; what is reported of it is what it reports alone."""
    near = {**problem, "y": problem["y"].copy()}
    near["y"][0] = decode(problem, problem["logits"])[0] + 3.0  # little to be gained
    params = make_params(problem, operators.denoising())
    options = {"num_inner_steps": 30, "learning_rate": 0.3, "early_stop": 0.02}
    both = run(near, params, **options)
    assert both.num_steps[0] < both.num_steps[1] < 30
    names = ("y", "logits", "prior", "tokens")
    alone = run({**near, **{name: near[name][:1] for name in names}}, params, **options)
    assert int(alone.num_steps[0]) == int(both.num_steps[0])
    np.testing.assert_allclose(alone.logits[0], both.logits[0], atol=1e-6)
    np.testing.assert_allclose(alone.loss[0], both.loss[0], rtol=1e-5)
