"""MMaDA's decoding against a second implementation in NumPy, on the same noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conftest import NUM_CODES, mixing_prior, patch_codec

from aps_jax import Params, operators
from aps_jax.samplers import mmada, sample
from aps_jax.samplers.mmada import MMaDAConfig
from aps_jax.sampling.target import row_keys

LENGTH, ROWS = 16, 3
FLOAT_MAX = np.finfo(np.float32).max


def reference(logits_of, tokens, noise_of, num_steps, tau):
    """MMaDA's loop for one image [L], with Python's numbers where its code has Python's numbers."""
    tokens, num_tokens = tokens.copy(), len(tokens)
    history = []
    for step in range(num_steps):
        logits = logits_of(tokens).astype(np.float32)
        exponential, uniform = noise_of(step)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probs = weights / weights.sum(axis=-1, keepdims=True)
        sampled = np.argmax(probs / exponential, axis=-1)
        unknown = tokens == NUM_CODES
        sampled[~unknown] = tokens[~unknown]
        ratio = 1.0 * (step + 1) / num_steps
        share = np.cos(np.float32(ratio) * np.float32(np.pi) * np.float32(0.5), dtype=np.float32)
        chosen = np.array([row[token] for row, token in zip(probs, sampled, strict=True)])
        chosen[~unknown] = FLOAT_MAX
        length = max(1, min(int(unknown.sum()) - 1, int(np.floor(np.float32(num_tokens) * share))))
        tau = tau * (1.0 - ratio)
        log = lambda x: np.log(np.maximum(x, np.float32(1e-20)))  # noqa: E731
        confidence = log(chosen) + np.float32(tau) * -log(-log(uniform))
        masked = confidence < np.sort(confidence)[length]
        tokens = np.where(masked, NUM_CODES, sampled)
        history.append(tokens)
    return sampled, history


def placed_logits(params, tokens):
    return mixing_prior().apply(params["mixing"], tokens) + params["places"]


def placed_unconditional(params, tokens):
    return mixing_prior().apply_unconditional(params["mixing"], tokens) - params["places"]


def placed_prior():
    """Every place has its own logits, so that no two tokens are equally sure."""
    places = np.random.default_rng(3).normal(size=(4, 4, NUM_CODES))
    return mixing_prior().replace(
        params={"mixing": mixing_prior().params, "places": jnp.asarray(places, jnp.float32)},
        apply=placed_logits,
        apply_unconditional=placed_unconditional,
    )


def make_params():
    return Params(prior=placed_prior(), codec=patch_codec(), operator=operators.denoising())


@functools.cache
def jitted():
    return jax.jit(sample, static_argnames="config")


def known_tokens():
    """Nothing, a little, and more than half is given."""
    known = np.full((ROWS, LENGTH), NUM_CODES)
    known[1, [2, 9]] = [4, 11]
    known[2, :11] = np.arange(11)
    return known


@pytest.mark.parametrize(
    ("num_steps", "tau", "guidance"), [(1, 1.0, 0.0), (6, 0.0, 0.0), (9, 1.0, 1.5), (18, 3.0, 0.0)]
)
def test_the_tokens_are_those_of_a_second_implementation(num_steps, tau, guidance):
    params = make_params()
    prior = params.prior
    config = MMaDAConfig(num_steps=num_steps, gumbel_temperature=tau, guidance_scale=guidance)
    key, y = jax.random.key(8), jnp.zeros((ROWS, 16, 16, 3))
    result = jitted()(params, y, key, config=config, known_tokens=jnp.asarray(known_tokens()))
    keys = row_keys(key, ROWS, 1)
    noises = [mmada.draw_noise(keys, step, (LENGTH, NUM_CODES)) for step in range(num_steps)]

    def logits_of(tokens):
        grid = jnp.asarray(tokens).reshape(1, 4, 4)
        cond = np.asarray(prior.apply(prior.params, grid)).reshape(LENGTH, -1)
        uncond = np.asarray(prior.apply_unconditional(prior.params, grid)).reshape(LENGTH, -1)
        return (1 + guidance) * cond - guidance * uncond

    for row, start in enumerate(known_tokens()):
        tokens, history = reference(
            logits_of, start, lambda i, row=row: [np.asarray(n[row]) for n in noises[i]],
            num_steps, tau,
        )  # fmt: skip
        np.testing.assert_array_equal(result.tokens[row], tokens)
        left = [int(np.sum(state == NUM_CODES)) for state in history]
        assert np.asarray(result.info.num_masked)[:-1, row, 0].tolist() == left[:-1]
        # The original masks one token even at the end; what it gives is the image without a mask.
        assert left[-1] == 1 and result.info.num_masked[-1, 0, row] == 0


def test_noise_temperatures_multiply():
    expected = [0.8, 0.48, 0.192, 0.0384, 0]
    np.testing.assert_allclose(mmada.temperatures(5, 1.0), expected, rtol=1e-6)
    expected = [0.917, 0.764, 0.573, 0.382, 0.223, 0.111]
    np.testing.assert_allclose(mmada.temperatures(12, 1.0)[:6], expected, atol=5e-4)


def test_counts_are_rounded_down_in_float32():
    """cos(pi/3) is one half and no less; exact numbers would leave 512 of 1024 and 0 at the end."""
    for num_steps in (3, 12, 15, 18):
        counts = mmada.scheduled_counts(num_steps, 1024)
        assert counts[2 * num_steps // 3 - 1] == 511 and counts[-1] == -1
    counts = mmada.scheduled_counts(4, 256)
    assert counts.tolist() == [236, 181, 97, -1]


def test_counts_are_those_of_torch():
    torch = pytest.importorskip("torch")
    for num_tokens in (256, 1024, 4096):
        for num_steps in range(1, 65):
            ratios = [1.0 * (step + 1) / num_steps for step in range(num_steps)]
            shares = [torch.cos(torch.tensor(ratio) * np.pi * 0.5) for ratio in ratios]
            expected = [int((num_tokens * share).floor()) for share in shares]
            assert mmada.scheduled_counts(num_steps, num_tokens).tolist() == expected


def test_given_tokens_count_as_part_of_the_image():
    """With 11 of 16 known the schedule stays above the unknown: one token is revealed per step."""
    result = jitted()(
        make_params(),
        jnp.zeros((ROWS, 16, 16, 3)),
        jax.random.key(0),
        config=MMaDAConfig(num_steps=6),
        known_tokens=jnp.asarray(known_tokens()),
    )
    assert np.asarray(result.info.num_masked)[:, 2, 0].tolist() == [4, 3, 2, 1, 1, 0]


def test_an_image_that_is_all_given_stays():
    tokens = jnp.arange(LENGTH)[None] % NUM_CODES
    probs = jnp.full((1, LENGTH, NUM_CODES), 1 / NUM_CODES)
    noise = mmada.draw_noise(jax.random.split(jax.random.key(0), 1), 0, (LENGTH, NUM_CODES))
    for result in mmada.transition(tokens, probs, noise, jnp.asarray(5), jnp.asarray(1.0)):
        np.testing.assert_array_equal(result, tokens)


def test_equally_sure_tokens_share_their_fate():
    """What stays masked is less sure than the next one; of equals at that border none stays."""
    tokens = jnp.full((1, 4), 2)
    probs = jnp.asarray([[[0.75, 0.25]] * 3 + [[0.125, 0.875]]])
    noise = mmada.Noise(jnp.asarray([[[0.1, 5.0]] * 3 + [[0.1, 5.0]]]), jnp.full((1, 4), 0.5))
    for count, expected in ((1, [0, 0, 0, 2]), (2, [0, 0, 0, 2]), (3, [0, 0, 0, 2])):
        after, proposal = mmada.transition(tokens, probs, noise, jnp.asarray(count), 0.0)
        assert proposal[0].tolist() == [0, 0, 0, 0] and after[0].tolist() == expected


def test_one_step_draws_every_token_by_itself():
    """The law of the draw itself: with one step, the product of the marginals."""
    joint, count = toy.skewed_joint(), 4000
    y = jnp.zeros((count, toy.HEIGHT, toy.WIDTH, 3))
    result = jitted()(toy.make_params(joint), y, jax.random.key(2), config=MMaDAConfig(num_steps=1))
    marginals = toy.conditionals(joint, np.full(toy.LENGTH, toy.CODES))
    law = np.prod([marginals[i, toy.FIELDS[:, i]] for i in range(toy.LENGTH)], axis=0)
    assert toy.chi_square_p(result.tokens, law) > 1e-3
    assert toy.chi_square_p(result.tokens, joint) < 1e-3  # which sees the difference
