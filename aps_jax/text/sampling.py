"""Text from a masked language model (LLaDA, Dream), by the decoding that images use.

for each block, left to right:
  for i = 1..T: draw every masked token of the block, keep the most confident, mask the rest again

Sources: LLaDA (arXiv:2502.09992, section 2.4 and appendix A.3), Dream (arXiv:2508.15487).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from aps_jax.config import check_options
from aps_jax.prior.guidance import carry_over, log_prior
from aps_jax.samplers.config import DecodingConfig
from aps_jax.samplers.decoding import Decoding, reveal, start
from aps_jax.sampling.draws import top_p
from aps_jax.sampling.leaves import as_pytree, or_none
from aps_jax.sampling.target import fold, row_keys, start_tokens
from aps_jax.types import Array, Key, Prior


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(DecodingConfig):
    """Options of `sample_text`; sigma, decode_scale and image_shape are not used.

    Attributes:
      num_steps: timesteps T per block.
      schedule: LLaDA reveals equally many tokens at each step, "linear".
      block_length: tokens per block, written one block after the other (LLaDA's semi-autoregressive
        remasking, which its Instruct model needs for long answers); None writes all at once.
      top_p: draw from the likeliest tokens that hold this mass; 0 takes the likeliest.
    """

    STATIC_FLOATS: ClassVar = ("top_p",)

    num_steps: int = 128
    schedule: str = "linear"
    gumbel_temperature: float = 0.0
    block_length: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, shares=("top_p",))
        if self.block_length is not None:
            check_options(self, integers={"block_length": 1})


def sample_text(
    prior: Prior,
    key: Key,
    *,
    length: int,
    batch: int = 1,
    config: TextConfig = TextConfig(),
    known_tokens: Array | None = None,
) -> Array:
    """Samples the text that follows a prompt, or fills the gaps of a text.

    With `reveal="random"`, one token per step and one block it is an exact sampler of a perfect
    prior.

    Args:
      prior: text prior, as by `load_prior` of a converted LLaDA or Dream; the prompt is in it.
      key: one typed key, or one per text [B].
      length: number L of tokens to write.
      batch: number B of texts; as many as the prior has prompts, unless that is one.
      config: options.
      known_tokens: int [B, L], ids that are given, K where one is to be written; None for none.

    Returns:
      Ids int32 [S * B, L] of S samples, sample-major; none is masked and known ones are kept.

    Raises:
      ValueError: `block_length` does not divide `length`, or shapes do not fit.
    """
    size = config.block_length or length
    if length < 1 or length % size:
        raise ValueError(f"length must be a positive multiple of block_length {size}, got {length}")
    start_with = start_tokens(known_tokens, (batch, length), prior.num_codes)
    tokens = jnp.tile(start_with, (config.num_samples, 1))
    keys = row_keys(key, tokens.shape[0], config.num_samples)
    write_block = _block_writer(prior, keys, size, config)
    tokens, _ = jax.lax.scan(write_block, tokens, jnp.arange(length // size, dtype=jnp.int32))
    return tokens


def _block_writer(
    prior: Prior, keys: Key, size: int, config: TextConfig
) -> Callable[[Array, Array], tuple[Array, None]]:
    """`(tokens [R, L], index of a block) -> tokens`, for a scan over blocks of `size` tokens."""
    options = {
        "guidance_scale": or_none(config.guidance_scale, 0.0),
        "prior_temperature": or_none(config.prior_temperature, 1.0),
    }

    def write_block(tokens: Array, index: Array) -> tuple[Array, None]:
        def cut(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)

        def paste(part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(tokens, part, index * size, axis=1)

        block = cut(tokens)

        def step(state: Decoding, i: Array) -> tuple[Decoding, None]:
            seen = paste(state.tokens)
            log_probs = log_prior(prior, seen, (1, seen.shape[1]), **options)
            log_probs = _without_tail(cut(carry_over(log_probs, seen)), config.top_p)
            step_keys = fold(keys, index * config.num_steps + i)
            is_unknown = block == prior.num_codes
            return reveal(config, step_keys, log_probs, state, i, is_unknown=is_unknown), None

        state, _ = jax.lax.scan(step, start(block), jnp.arange(config.num_steps, dtype=jnp.int32))
        return paste(state.tokens), None

    return write_block


def _without_tail(log_probs: Array, mass: float) -> Array:
    """Log-probabilities [R, L, K] of the tokens that hold `mass`, or at 0 of the likeliest."""
    if mass > 0:
        return top_p(log_probs, mass)
    peak = jnp.max(log_probs, axis=-1, keepdims=True)
    return jnp.where(log_probs == peak, log_probs, -jnp.inf)
