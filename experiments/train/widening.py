"""A codec of signs as the start of one with another codebook: the same pictures at first.

"vq" gets a table of the signs. "grouped" gets more bits, dealt out to tokens in turn, which say
something from the start and are not listened to yet.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec import lfq
from aps_jax.codec.magvit2 import CodecConfig
from aps_jax.types import Array, PyTree


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


def places(num_given: int, config: CodecConfig) -> np.ndarray:
    """Where the bits of a codec of signs are among those of groups: dealt out in turn, [num_given].

    Raises:
      ValueError: a group cannot take its share.
    """
    size = config.num_bits // config.code_groups
    bits = np.arange(num_given)
    if -(-num_given // config.code_groups) > size:
        raise ValueError(f"{num_given} bits do not fit {config.code_groups} groups of {size}")
    return bits % config.code_groups * size + bits // config.code_groups


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
    kept = places(source.num_bits, config)
    return jax.tree.map(lambda old, new: _widened(old, new, kept), given, random)


def _widened(old: Array, new: Array, kept: np.ndarray) -> Array:
    """New outputs have random weights; new inputs, to what was there, have none."""
    into = old.ndim > 1 and old.shape[-2] != new.shape[-2]
    if into:
        old = (
            jnp.zeros((*old.shape[:-2], *new.shape[-2:-1], old.shape[-1])).at[..., kept, :].set(old)
        )
    if old.shape[-1] == new.shape[-1]:
        return old
    return new.at[..., kept].set(old)
