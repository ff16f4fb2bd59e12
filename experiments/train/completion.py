"""Samples and completions of a masked prior, by ancestral sampling."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec.magvit2 import decode_tokens
from aps_jax.prior.guidance import carry_over, log_prior
from aps_jax.samplers import decoding
from aps_jax.samplers.maskgit import MaskGITConfig
from aps_jax.sampling.target import fold
from aps_jax.types import Array, Codec, Key, Prior
from experiments.figures import save_grid


def complete(
    key: Key, prior: Prior, tokens: Array, *, num_steps: int, **guidance: float | None
) -> Array:
    """Fills the masked positions of `tokens` [B, h, w] by ancestral sampling in random order.

    The number of masked tokens follows the cosine schedule; within a step tokens are drawn
    independently. `guidance` are options of `log_prior`.
    """
    config = MaskGITConfig(num_steps=num_steps, reveal="random")

    @jax.jit
    def sample(prior, tokens, keys):
        flat = tokens.reshape(tokens.shape[0], -1)

        def step(state, index):
            seen = log_prior(prior, state.tokens, tokens.shape[1:], **guidance)
            return decoding.reveal(
                config, fold(keys, index), carry_over(seen, state.tokens), state, index,
                is_unknown=flat == prior.num_codes,
            ), None  # fmt: skip

        state, _ = jax.lax.scan(step, decoding.start(flat), jnp.arange(num_steps))
        return state.tokens.reshape(tokens.shape)

    return sample(prior, tokens, jax.random.split(key, tokens.shape[0]))


def save_samples(path: Path, prior: Prior, codec: Codec, tokens: np.ndarray, key: Key) -> None:
    """Grid of pictures: two rows of samples, held-out crops, their left halves, completions."""
    count, steps = min(8, len(tokens)), 32
    grid = jnp.asarray(tokens[:count].astype(np.int32))
    nothing = jnp.full((2 * count, *grid.shape[1:]), prior.num_codes, jnp.int32)
    keys = jax.random.split(key)
    samples = complete(keys[0], prior, nothing, num_steps=steps)
    half = grid.at[:, :, grid.shape[2] // 2 :].set(prior.num_codes)
    restored = complete(keys[1], prior, half, num_steps=steps)
    decode = jax.jit(decode_tokens)
    samples, originals, restored = (np.asarray(decode(codec, x)) for x in (samples, grid, restored))
    shown = originals.copy()
    shown[:, :, shown.shape[2] // 2 :] = 0
    rows = [samples[:count], samples[count:], originals, shown, restored]
    save_grid(rows, path, zoom=2)
