"""A codec that is one matrix, so that value, gradient and Adam's path can be written by hand.

Three tokens of two bits decode linearly to a 2x6 image. References are float64 NumPy.
"""

import jax.numpy as jnp
import numpy as np

from aps_jax import APSConfig, Params, operators
from aps_jax.codec.lfq import LFQ
from aps_jax.sampling.target import measurement_target
from aps_jax.types import Codec, Prior

BITS, CODES, LENGTH, STRIDE = 2, 4, 3, 2
GRID, IMAGE, BATCH = (1, LENGTH), (STRIDE, STRIDE * LENGTH), 2
C = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1.0]])
PIXELS = IMAGE[0] * IMAGE[1] * 3


def linear_decode(params, codes):
    flat = codes.reshape(codes.shape[0], -1) @ params
    return flat.reshape(-1, *IMAGE, 3)


def no_prior(params, tokens):
    raise AssertionError("the denoiser has no place in the inner loop")


def make_problem():
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


def make_params(problem, operator=None, perceptual=None):
    codec = Codec(
        params=f32(problem["weights"]), quantizer=LFQ(BITS), decode=linear_decode, stride=STRIDE
    )
    prior = Prior(params=None, apply=no_prior, num_codes=CODES)
    operator = operators.denoising() if operator is None else operator
    return Params(prior=prior, codec=codec, operator=operator, perceptual=perceptual)


def make_target(problem, params=None, y=None, **options):
    """The target under options of APS, with nothing known from the start."""
    params = make_params(problem) if params is None else params
    y = f32(problem["y"]) if y is None else y
    return measurement_target(params, y, config=APSConfig(image_shape=IMAGE, **options))


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax_vjp(logits, cotangent):
    """J^T c for J = diag(p) - p p^T, written out for every token."""
    p = np.exp(log_softmax(logits))
    jacobian = np.einsum("...k,kj->...kj", p, np.eye(CODES)) - p[..., :, None] * p[..., None, :]
    return np.einsum("...kj,...k->...j", jacobian, cotangent)


def decode(problem, logits, quantized=True):
    """Images of the quantized expectation, or of the mean codes."""
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
