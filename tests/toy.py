"""A posterior that can be written down: three tokens, four codes, 64 images, a perfect prior."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from aps_jax import Params, lfq, operators
from aps_jax.types import Codec, Prior, bind

BITS, CODES, LENGTH, STRIDE = 2, 4, 3, 2
FIELDS = np.array(list(itertools.product(range(CODES), repeat=LENGTH)))  # [64, 3]
HEIGHT, WIDTH = STRIDE, STRIDE * LENGTH


def table_logits(log_joint, tokens):
    """log p(x_l = k | the unmasked tokens), exact, for a grid [B, 1, 3]."""
    field = tokens[:, 0]
    agrees = (field[:, None] == CODES) | (field[:, None] == FIELDS[None])  # [B, 64, 3]
    log_weights = jnp.where(agrees.all(axis=-1), log_joint, -jnp.inf)  # [B, 64]
    is_code = jnp.asarray(FIELDS[:, :, None] == np.arange(CODES))  # [64, 3, K]
    terms = jnp.where(is_code, log_weights[:, :, None, None], -jnp.inf)
    # Impossible codes (at clean positions) get a finite logit, as any network's would be.
    return jnp.maximum(jax.nn.logsumexp(terms, axis=1), -60.0)[:, None]


def nonlinear_decode(weights, codes):
    """Every token touches every pixel."""
    x = jnp.tanh(codes.reshape(codes.shape[0], -1) @ weights)
    return x.reshape(-1, HEIGHT, WIDTH, 3)


def no_encode(params, x):
    raise AssertionError


def skewed_joint():
    """Correlated: a few images hold most of the mass, no image is impossible."""
    rng = np.random.default_rng(11)
    return 0.9 * rng.dirichlet(np.full(64, 0.3)) + 0.1 / 64


@functools.cache
def toy_codec():
    """One object, so that all tests share what is compiled for it."""
    weights = np.random.default_rng(5).normal(size=(LENGTH * BITS, HEIGHT * WIDTH * 3)) / 3
    return Codec(
        params=jnp.asarray(weights, jnp.float32),
        codebook=lfq.codebook(BITS),
        encode=no_encode,
        decode=nonlinear_decode,
        quantize=lfq.quantize,
        stride=STRIDE,
    )


def make_params(joint):
    """The toy with the prior p(x_1, x_2, x_3) = `joint` [64]."""
    prior = Prior(
        params=jnp.asarray(np.log(joint), jnp.float32), apply=bind(table_logits), num_codes=CODES
    )
    return Params(prior=prior, codec=toy_codec(), operator=operators.denoising())


@functools.cache
def decoded_images():
    """All 64 images, float64 [64, H, W, 3]."""
    codec = toy_codec()
    codes = codec.codebook[FIELDS].reshape(64, 1, LENGTH, BITS)
    return np.float64(codec.decode(codec.params, codes))


def energies(decoded, y, sigma):
    return np.sum((decoded - y) ** 2, axis=(1, 2, 3)) / (2 * sigma**2)


def exact_posterior(joint, decoded, y, sigma):
    weights = joint * np.exp(-energies(decoded, y, sigma) + energies(decoded, y, sigma).min())
    return weights / weights.sum()


def index_of(tokens):
    return np.asarray(tokens) @ np.array([16, 4, 1])


def frequencies(tokens):
    return np.bincount(index_of(tokens), minlength=64) / len(tokens)


def total_variation(p, q):
    return 0.5 * np.abs(p - q).sum()


def chi_square_p(tokens, expected):
    """p-value of the drawn tokens [n, 3] under the law `expected` [64]; rare images are pooled."""
    counts = len(tokens) * frequencies(tokens)
    is_rare = expected * len(tokens) < 10
    observed = np.append(counts[~is_rare], counts[is_rare].sum())
    wanted = np.append(expected[~is_rare], expected[is_rare].sum()) * len(tokens)
    if np.any(observed[wanted == 0] > 0):
        return 0.0
    return stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue


#: All 125 partly masked token triples, and where the clean ones are among them.
STATES = np.array(list(itertools.product(range(CODES + 1), repeat=LENGTH)))
IS_CLEAN = (STATES < CODES).all(axis=1)


def conditionals(joint, state):
    """p(x_l = k | the clean tokens of `state`) [3, 4]; one-hot at clean positions."""
    agrees = ((state == CODES) | (state == FIELDS)).all(axis=1)
    weights = np.where(agrees, joint, 0)
    weights = weights / weights.sum()
    return np.stack([np.bincount(column, weights, minlength=CODES) for column in FIELDS.T])


def product_law(rows):
    """Law over the 125 states of independent tokens with laws `rows` [3, 5], the last the mask."""
    return np.einsum("i,j,k->ijk", *rows).ravel()


def chain_law(kernel, num_steps, start=(CODES,) * LENGTH):
    """Law [64] of clean triples after a Markov chain; `kernel(i, state)` gives a law [125]."""
    law = (start == STATES).all(axis=1).astype(float)
    for i in range(num_steps):
        after = np.zeros(len(STATES))
        for mass, state in zip(law, STATES, strict=True):
            if mass > 0:
                after += mass * kernel(i, state)
        law = after
    assert abs(law[IS_CLEAN].sum() - 1) < 1e-6
    return law[IS_CLEAN]
