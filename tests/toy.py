"""A posterior that can be written down: three tokens, four codes, 64 images, a perfect prior."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from aps_jax import Params, operators
from aps_jax.codec.lfq import LFQ
from aps_jax.sampling.target import measurement_target
from experiments.studies import toy_priors
from experiments.studies.toy_priors import (
    energies,
    exact_posterior,
    mixing_codec,
    mixing_decode,
    skewed_joint,
    table_prior,
    total_variation,
)

__all__ = ["energies", "exact_posterior", "mixing_decode", "skewed_joint", "total_variation"]

BITS, CODES, LENGTH, STRIDE = 2, 4, 3, 2
FIELDS = toy_priors.fields(CODES, LENGTH)  # [64, 3]
HEIGHT, WIDTH = STRIDE, STRIDE * LENGTH


@functools.cache
def toy_codec():
    """One object, so that all tests share what is compiled for it."""
    weights = np.random.default_rng(5).normal(size=(LENGTH * BITS, HEIGHT * WIDTH * 3)) / 3
    return mixing_codec(weights, LFQ(BITS), STRIDE)


def make_params(joint):
    """The toy with the prior p(x_1, x_2, x_3) = `joint` [64]."""
    return Params(
        prior=table_prior(joint, CODES, LENGTH), codec=toy_codec(), operator=operators.denoising()
    )


def batch_of(count, y=None):
    """`count` times one measurement, or as many zeros."""
    y = jnp.zeros((HEIGHT, WIDTH, 3)) if y is None else jnp.asarray(y, jnp.float32)
    return jnp.broadcast_to(y, (count, *y.shape))


def make_target(joint, config, count=1, y=None, known_tokens=None):
    """The toy's posterior under the options of a sampler, and the keys of its rows."""
    target = measurement_target(
        make_params(joint), batch_of(count, y), config=config, known_tokens=known_tokens
    )
    return target, target.keys(jax.random.key(0))


@functools.cache
def decoded_images():
    """All 64 images, float64 [64, H, W, 3]."""
    codec = toy_codec()
    codes = codec.codebook[FIELDS].reshape(64, 1, LENGTH, BITS)
    return np.float64(codec.decode(codec.params, codes))


def index_of(tokens):
    return toy_priors.index_of(tokens, CODES)


def frequencies(tokens, num_codes=CODES):
    return toy_priors.frequencies(tokens, num_codes)


def chi_square_p(tokens, expected, num_codes=CODES):
    """p-value of drawn tokens [n, L] under the law `expected` [K^L]; rare images are pooled."""
    counts = len(tokens) * frequencies(tokens, num_codes)
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
