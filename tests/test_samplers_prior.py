"""MaskGIT decoding, best of n and the codec on its own, against laws that can be written down."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conftest import patch_codec
from toy import CODES, FIELDS, LENGTH

from aps_jax import Params, operators, samplers
from aps_jax import schedules as schedule
from aps_jax.codec.vq import VQ
from aps_jax.samplers import decoding
from aps_jax.samplers.best_of_n import BestOfNConfig
from aps_jax.samplers.maskgit import MaskGITConfig
from aps_jax.samplers.straight_through import StraightThroughConfig

COUNT = 4000
JOINT = toy.skewed_joint()


sample = jax.jit(samplers.sample, static_argnames="config")


def draw(config, y=None, count=COUNT):
    """`count` samples of one measurement on the toy."""
    return sample(toy.make_params(JOINT), toy.batch_of(count, y), jax.random.key(0), config=config)


# MaskGIT.


def test_one_token_at_a_time_draws_from_the_joint():
    config = MaskGITConfig(num_steps=LENGTH, reveal="random", schedule="linear")
    assert toy.chi_square_p(draw(config).tokens, JOINT) > 1e-3


def test_confidence_keeps_the_likeliest_of_the_proposal():
    """Two steps: the two likeliest of three proposals, then the third given those."""
    config = MaskGITConfig(num_steps=2, schedule="linear", gumbel_temperature=0.0)
    first = toy.conditionals(JOINT, np.full(3, CODES))
    law = np.zeros(64)
    for proposal in FIELDS:
        probs = first[np.arange(3), proposal]
        redrawn = np.argmin(probs)
        state = proposal.copy()
        state[redrawn] = CODES
        second = toy.conditionals(JOINT, state)[redrawn]
        for k in range(CODES):
            state[redrawn] = k
            law[toy.index_of(state)] += np.prod(probs) * second[k]
    assert toy.chi_square_p(draw(config).tokens, law) > 1e-3


@pytest.mark.parametrize(
    ("reveal", "strength"), [("ancestral", 0.0), ("remdm-cap", 0.9), ("remdm-rescale", 0.9)]
)
def test_independent_reveals_follow_their_kernel(reveal, strength):
    steps = 4
    config = MaskGITConfig(num_steps=steps, reveal=reveal, remask_strength=strength)
    alphas = 1 - schedule.masked_share("cosine", steps)

    def kernel(i, state):
        at, at_next = alphas[i], alphas[i + 1]
        most = min(1.0, (1 - at_next) / at) if at > 0 else 1.0
        s = {"ancestral": 0, "remdm-cap": min(strength, most), "remdm-rescale": strength * most}
        s = s[reveal]
        probs = toy.conditionals(JOINT, state)
        rows = np.zeros((3, CODES + 1))
        for row, token, prob in zip(rows, state, probs, strict=True):
            if token < CODES:
                row[token], row[CODES] = 1 - s, s
            else:
                row[CODES] = (1 - at_next - s * at) / (1 - at)
                row[:CODES] = (at_next - (1 - s) * at) / (1 - at) * prob
        return toy.product_law(rows)

    law = toy.chain_law(kernel, steps)
    assert toy.chi_square_p(draw(config).tokens, law) > 1e-3
    if reveal != "ancestral":  # the kernel matters at this size of sample
        plain = dataclasses.replace(config, reveal="ancestral")
        assert toy.chi_square_p(draw(plain).tokens, law) < 1e-3


def test_doubtful_tokens_are_masked_again_more_often():
    """remdm-conf: softmax(-p) over the clean tokens that were not given."""
    config = MaskGITConfig(num_steps=4, reveal="remdm-conf", remask_strength=1.0)
    known = jnp.tile(jnp.array([[1, CODES, CODES]]), (COUNT, 1))
    target, keys = toy.make_target(JOINT, config, COUNT, known_tokens=known)
    tokens = jnp.tile(jnp.array([[1, 2, 3]]), (COUNT, 1))
    confidence = jnp.log(jnp.array([[0.5, 0.9, 0.1]])) + jnp.zeros((COUNT, 1))
    after, _ = config.step(target, decoding.Decoding(tokens, confidence, jnp.asarray(2)), keys)
    gammas = schedule.masked_share("cosine", 4)
    doubt = np.exp([-0.9, -0.1]) / np.exp([-0.9, -0.1]).sum()
    expected = min(1.0, gammas[3] / (1 - gammas[2])) * doubt
    shares = np.mean(np.asarray(after.tokens) == CODES, axis=0)
    assert shares[0] == 0
    error = np.sqrt(expected * (1 - expected) / COUNT)
    np.testing.assert_array_less(np.abs(shares[1:] - expected), 4 * error)


# Best of n.


def test_best_of_n_follows_the_law_of_the_minimum():
    num, y = 4, toy.decoded_images()[7] + 0.3
    energy = toy.energies(toy.decoded_images(), y, 1.0)
    # P(minimum is x) = P(all at least E(x)) - P(all above it), for exact draws of the joint.
    above = np.array([JOINT[energy > e].sum() for e in energy])
    law = (above + JOINT) ** num - above**num
    np.testing.assert_allclose(law.sum(), 1)
    config = BestOfNConfig(
        num_steps=LENGTH, reveal="random", schedule="linear", num_candidates=num, sigma=1.0
    )
    result = draw(config, y)
    assert toy.chi_square_p(result.tokens, law) > 1e-3
    loss = np.asarray(result.info.loss)[LENGTH - 1 :: LENGTH, :, 0]  # after each candidate
    assert loss.shape == (num, COUNT) and np.all(np.diff(loss, axis=0) <= 0)
    np.testing.assert_allclose(loss[-1], energy[toy.index_of(result.tokens)], rtol=1e-4)


# Straight through.


@pytest.mark.parametrize(("variables", "rate"), [("bits", 0.05), ("tokens", 0.1)])
def test_straight_through_finds_the_codes_behind_a_sharp_measurement(variables, rate):
    params = Params(
        prior=toy.make_params(JOINT).prior.replace(num_codes=16),
        codec=patch_codec(),
        operator=operators.denoising(),
    )
    truth = np.random.default_rng(0).integers(0, 16, size=(4, 16))
    codes = params.codec.codebook[truth].reshape(4, 4, 4, -1)
    y = params.codec.decode(params.codec.params, codes)
    config = StraightThroughConfig(num_inner_steps=300, variables=variables, learning_rate=rate)
    result = sample(params, y, jax.random.key(0), config=config)
    assert np.mean(result.tokens == truth) > 0.9
    # The reported loss is the energy of the returned tokens.
    residual = np.sum((np.asarray(result.images) - y) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(result.info.loss[-1, :, 0], residual / (2 * 0.05**2), rtol=1e-3)


def test_straight_through_returns_the_best_of_its_iterates():
    """Steps so long that the last iterate is rarely the best."""
    config = StraightThroughConfig(num_inner_steps=6, learning_rate=2.0, sigma=1.0)
    y = toy.decoded_images()[7] + 0.3
    result = draw(config, y, count=200)
    energy = toy.energies(toy.decoded_images(), y, 1.0)[toy.index_of(result.tokens)]
    np.testing.assert_allclose(result.info.loss[-1, :, 0], energy, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed"])
def test_gradients_of_the_bits(estimator):
    """d/ds of a function of the code: its slope there times 1 - tanh(s)^2."""
    config = StraightThroughConfig(estimator=estimator)
    target, _ = toy.make_target(JOINT, config, known_tokens=jnp.array([[CODES, 1, CODES]]))
    bits = jnp.asarray(np.random.default_rng(1).normal(size=(1, LENGTH, 2)), jnp.float32)

    def total(bits):
        codes, _ = config._codes(target, bits)
        return jnp.sum(codes**3 / 3)

    gradient = np.asarray(jax.grad(total)(bits))
    soft = np.tanh(bits)
    at = np.sign(bits) if estimator == "straight_through" else soft
    expected = at**2 * (1 - soft**2)
    expected[:, 1] = 0  # that token is known
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("width", [2, 3])
def test_bits_need_a_codebook_of_bits(width):
    """Also where a table has as many rows as there would be signs of its numbers."""
    params = toy.make_params(JOINT)
    wide = params.codec.replace(quantizer=VQ(jnp.zeros((CODES, width))))
    with pytest.raises(ValueError, match=f"4 codes of {width} numbers; use variables='tokens'"):
        samplers.sample(
            params.replace(codec=wide), toy.batch_of(1), jax.random.key(0),
            config=StraightThroughConfig(variables="bits"),
        )  # fmt: skip


@pytest.mark.parametrize(("has_signs", "variables"), [(True, "bits"), (False, "tokens")])
def test_variables_follow_the_codebook(has_signs, variables):
    """`auto` is bits where the codes are signs, and logits of tokens elsewhere."""
    params = toy.make_params(JOINT)
    if not has_signs:
        table = jax.random.normal(jax.random.key(1), (CODES, 2))
        params = params.replace(codec=params.codec.replace(quantizer=VQ(table)))

    def losses(chosen):
        config = StraightThroughConfig(num_inner_steps=5, variables=chosen)
        found = samplers.sample(params, toy.batch_of(1), jax.random.key(0), config=config)
        return np.asarray(found.info.loss)

    np.testing.assert_array_equal(losses("auto"), losses(variables))
    if has_signs:  # A table has no bits to compare with.
        assert not np.array_equal(losses("auto"), losses("tokens"))
