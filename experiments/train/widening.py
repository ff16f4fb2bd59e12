"""A codec of signs as the start of one with another codebook: the same pictures at first.

"vq" gets a table of the signs. "grouped" gets more bits, dealt out to tokens in turn, which say
something from the start and are not listened to yet. The prior of the signs is a start, too.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec import lfq
from aps_jax.codec.config import CodecConfig, every_code
from aps_jax.prior.transformer import CodeEmbedding, TransformerConfig
from aps_jax.types import Array, PyTree, Quantizer


def sizes_of(given: CodecConfig, wanted: CodecConfig) -> CodecConfig:
    """Sizes of a codec that goes on from `given`, with the codebook of `wanted` if it can.

    Raises:
      ValueError: fewer bits than the given codec has.
    """
    given = dataclasses.replace(given, dtype="float32")
    if given.quantizer != "lfq" or wanted.quantizer not in ("vq", "grouped"):
        return given
    if wanted.quantizer == "vq":
        return dataclasses.replace(given, quantizer="vq", code_width=given.num_bits)
    if wanted.num_bits < given.num_bits:
        raise ValueError(
            f"--codec.num-bits {wanted.num_bits} is less than the {given.num_bits} bits of --init"
        )
    return dataclasses.replace(
        given, quantizer="grouped", num_bits=wanted.num_bits, code_groups=wanted.code_groups
    )


def places(num_given: int, size: int, groups: int) -> np.ndarray:
    """Where the bits of a codec of signs are among those of groups: dealt out in turn, [num_given].

    Raises:
      ValueError: a group of `size` bits cannot take its share.
    """
    bits = np.arange(num_given)
    if -(-num_given // groups) > size:
        raise ValueError(f"{num_given} bits do not fit {groups} groups of {size}")
    return bits % groups * size + bits // groups


def params_of(given: PyTree, source: CodecConfig, random: PyTree, config: CodecConfig) -> PyTree:
    """Weights of a codec of sizes `config` that does what `given` does, of sizes `source`.

    Args:
      given: weights of the codec to go on from.
      source: its sizes.
      random: random weights of the new sizes.
      config: the new sizes, as from `sizes_of`.
    """
    if source.quantizer == config.quantizer:
        return given
    if config.quantizer == "vq":
        return given | {"quantizer": {"table": lfq.codebook(config.num_bits)}}
    groups = config.code_groups
    kept = places(source.num_bits, config.num_bits // groups, groups)
    return jax.tree.map(lambda old, new: _widened(old, new, kept), given, random)


def _widened(old: Array, new: Array, kept: np.ndarray) -> Array:
    """New outputs have random weights; new inputs, to what was there, have none."""
    if old.ndim > 1 and old.shape[-2] != new.shape[-2]:
        silent = jnp.zeros((*new.shape[:-1], old.shape[-1]))
        old = silent.at[..., kept, :].set(old)
    if old.shape[-1] == new.shape[-1]:
        return old
    return new.at[..., kept].set(old)


def is_wider(num_bits: int, quantizer: Quantizer) -> bool:
    """Whether a codebook can be one that went on from codes of so many signs."""
    if isinstance(quantizer, lfq.LFQ):
        return False
    if quantizer.axes:
        return math.prod(quantizer.axes) * quantizer.num_features >= num_bits
    return quantizer.num_features == num_bits


def prior_of(given: PyTree, source: TransformerConfig, quantizer: Quantizer) -> PyTree:
    """Weights of a prior of signs, in the form for the tokens of a codec that went on from them.

    With a table, every row starts with what the prior knows of the row's signs. With groups, a
    token starts with the mean over all codes that have its bits, of which the sum over the tokens
    of a place is right as far as bits add up; what is no code counts once per token.

    Args:
      given: weights of the prior, of sizes `source` with `code_bits`.
      source: its sizes.
      quantizer: the new codebook.
    """
    assert source.code_bits is not None
    ids = jnp.arange(source.vocab_size, dtype=jnp.int32)
    rows = CodeEmbedding(source).apply({"params": given["embed"]}, ids[None])[0]
    codes, others = rows[: source.output_size], rows[source.output_size :]
    kernel = given["head"]["kernel"]
    if quantizer.axes:
        groups = quantizer.axes[0]
        codes = _group_means(codes, source.code_bits, quantizer)
        codes -= (1 - 1 / groups) * jnp.mean(rows[: source.output_size], axis=0)
        others = others / groups
        kernel = _group_means(kernel.T, source.code_bits, quantizer).T
    else:
        signs = lfq.LFQ(source.code_bits).nearest(every_code(quantizer))
        codes, kernel = codes[signs], kernel[:, signs]
    embedding = jnp.concatenate([codes, others])
    return given | {"embed": {"embedding": embedding}, "head": {"kernel": kernel}}


def _group_means(rows: Array, num_bits: int, quantizer: Quantizer) -> Array:
    """Means of rows [2**num_bits, W] over the codes that have the bits of a token, [n K, W]."""
    (groups,), size = quantizer.axes, quantizer.num_features
    kept = places(num_bits, size, groups)
    parts = []
    for group in range(groups):
        own = np.flatnonzero(kept // size == group)
        pattern = lfq.LFQ(len(own))
        at = pattern.nearest(lfq.codebook(num_bits)[:, own])
        means = jax.ops.segment_sum(rows, at, pattern.num_codes) * pattern.num_codes / len(rows)
        parts.append(means[pattern.nearest(lfq.codebook(size)[:, kept[own] % size])])
    return jnp.concatenate(parts)
