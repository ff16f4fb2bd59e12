"""Sizes of a tokenizer, and its codebook."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from aps_jax.codec import lfq
from aps_jax.codec.fsq import FSQ
from aps_jax.codec.residual import Residual
from aps_jax.codec.vq import VQ
from aps_jax.types import Array, PyTree, Quantizer

#: Codebooks that `CodecConfig.quantizer` names.
QUANTIZERS = ("lfq", "vq", "fsq", "grouped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Sizes of the tokenizer; the defaults are the public MagVIT-v2 checkpoint.

    The channel and block lists run from full resolution (level 0) to the token grid, and the two
    halves are independent of each other.

    Attributes:
      num_bits: code bits d; the codebook has 2**d codes.
      encoder_channels: channels per encoder level.
      encoder_blocks: residual blocks per encoder level.
      decoder_channels: channels per decoder level.
      decoder_blocks: residual blocks per decoder level.
      num_groups: groups of every group normalisation; must divide all channel counts.
      patch_width: width of the patch path, a small network that sees one token's patch alone and is
        added to the convolutions in both halves; 0 for none, as in the public model.
      patch_blocks: residual blocks of the patch path in either half.
      dtype: activation dtype, "float32" or "bfloat16"; outputs are float32 either way.
      quantizer: "lfq" (signs), "vq" (a learned table), "fsq" (numbers of a few levels each), or
        "grouped": the bits of "lfq" in `code_groups` equal parts, each a token of its own.
      code_width: numbers per row of the table of "vq".
      levels: values of each number of "fsq", of product 2**num_bits.
      code_groups: tokens per place of "grouped"; the token grid has an axis for them.
    """

    num_bits: int = 13
    encoder_channels: tuple[int, ...] = (128, 256, 256, 512, 512)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    num_groups: int = 32
    patch_width: int = 0
    patch_blocks: int = 2
    dtype: str = "float32"
    quantizer: str = "lfq"
    code_width: int = 12
    levels: tuple[int, ...] = ()
    code_groups: int = 2

    def __post_init__(self) -> None:
        lists = ("encoder_channels", "encoder_blocks", "decoder_channels", "decoder_blocks")
        for name in (*lists, "levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        levels = len(self.encoder_channels)
        lists = (self.encoder_blocks, self.decoder_channels, self.decoder_blocks)
        if any(len(values) != levels for values in lists):
            raise ValueError(f"all channel and block lists need {levels} levels, got {lists}")
        for channels in (*self.encoder_channels, *self.decoder_channels):
            if channels % self.num_groups:
                raise ValueError(
                    f"num_groups={self.num_groups} does not divide {channels} channels"
                )
        self._check_quantizer()

    def _check_quantizer(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {QUANTIZERS}, got {self.quantizer!r}")
        if self.quantizer == "fsq" and math.prod(self.levels) != 2**self.num_bits:
            raise ValueError(
                f"levels={self.levels} make {math.prod(self.levels)} codes; num_bits="
                f"{self.num_bits} says 2**{self.num_bits}"
            )
        if self.quantizer == "grouped" and self.num_bits % self.code_groups:
            raise ValueError(
                f"code_groups={self.code_groups} does not divide num_bits={self.num_bits}"
            )

    @property
    def stride(self) -> int:
        """Pixels per token along each axis."""
        return 2 ** (len(self.encoder_channels) - 1)

    @property
    def num_features(self) -> int:
        """Numbers that the encoder gives and the decoder takes per place."""
        return {"vq": self.code_width, "fsq": len(self.levels)}.get(self.quantizer, self.num_bits)

    def features(self, x: Array) -> Array:
        """What the codebook is asked about, of the encoder's numbers [..., num_features].

        FSQ's lie within its levels (arXiv:2309.15505, Eq. 1, the same for even numbers of levels);
        those of groups have an axis for the group.
        """
        if self.quantizer == "fsq":
            return jnp.tanh(x)
        if self.quantizer == "grouped":
            return x.reshape(*x.shape[:-1], self.code_groups, -1)
        return x

    def numbers(self, codes: Array) -> Array:
        """What the decoder reads [..., num_features] of codes."""
        if self.quantizer != "grouped":
            return codes
        return codes.reshape(*codes.shape[:-2], -1)


def every_code(quantizer: Quantizer) -> Array:
    """All codes [K, d], or [K, n, d] with n tokens per place, of each of them."""
    ids = jnp.arange(quantizer.num_codes, dtype=jnp.int32)
    for size in quantizer.axes:
        ids = jnp.repeat(ids[..., None], size, axis=-1)
    return quantizer.lookup(ids)


def make_quantizer(config: CodecConfig, params: PyTree) -> Quantizer:
    """The codebook of a codec, whose weights may hold its table (`{"quantizer": {"table"}}`)."""
    if config.quantizer == "vq":
        return VQ(params["quantizer"]["table"])
    if config.quantizer == "fsq":
        return FSQ(config.levels)
    if config.quantizer == "grouped":
        table = lfq.codebook(config.num_bits // config.code_groups)
        return Residual(jnp.stack([table] * config.code_groups))
    return lfq.LFQ(config.num_bits)
