"""Sizes and switches of the masked transformer."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and switches of the transformer; every field is a JSON value.

    Attributes:
      vocab_size: number of input ids, special ids such as the mask included.
      num_outputs: columns of the head; None means `vocab_size`.
      width: residual width.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads;
        None means `num_heads`.
      head_dim: numbers per head; None means width / num_heads.
      mlp_width: hidden width of the MLP.
      block: "llama" (attention, then a gated MLP, each after an RMSNorm) or "phi" (both in parallel
        after one LayerNorm, a plain MLP, LayerNorm of queries and keys per head, and biases
        everywhere, the head included; Show-o).
      qkv_bias: biases on the query, key and value projections (Dream); a "phi" block has them.
      qk_norm: RMSNorm of queries and keys per head, before they are rotated (Qwen3); a "phi" block
        has LayerNorms there.
      norm_eps: epsilon inside the square root of the norms.
      rope_theta: base of the rotary frequencies.
      rope_stretch: Llama 3.1's stretch of slow rotations, (factor, low, high, length): those that
        turn fewer than `low` times over `length` tokens are slowed down by `factor`, those that
        turn more than `high` times stay, and between them it is interpolated. None for none.
      rope_axes: 1 for sequences; 2 for grids, where one half of the rotated pairs turns with the
        row and the other with the column.
      absolute_side: side of the square grid whose cells have a learned vector each, added to the
        embedding, so that the model knows where it is even when everything is masked; it then
        reads whole grids of this side only. None for relative positions alone.
      rope_dim: numbers per head that are rotated, the first ones; None means all.
      rope_in_float32: rotate in float32 (LLaDA) instead of the activation dtype (Dream).
      tie_embeddings: reuse the embedding matrix as the head.
      shift_logits: the backbone's output at position t predicts position t + 1 (Dream); outputs
        are shifted so that position t always predicts token t.
      code_bits: if set, ids below 2**code_bits are LFQ codes and are embedded by a linear map of
        their bits, plus the low-rank table if `code_rank` > 0; ids above have rows of their own.
      code_rank: rank of the free part of the code embedding.
      token_groups: tokens per place of a grid, from equal shares of the codes: ids of group g are
        moved on by the codes of the groups before, their embeddings are summed, and the head has
        the logits of one group after the other.
      attention: "einsum" (plain, fastest on CPU), or an implementation of
        `jax.nn.dot_product_attention`: "xla", or "cudnn" (flash attention on NVIDIA GPUs in bf16).
      remat: recompute each block in the backward pass.
      unroll: blocks per iteration of the scan over layers; `num_layers` leaves no loop.
      dtype: activation dtype. Norm statistics, softmax and logits are float32 regardless.
      param_dtype: dtype of freshly initialised weights.
    """

    vocab_size: int
    num_outputs: int | None = None
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int
    block: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_stretch: tuple[float, float, float, int] | None = None
    rope_axes: int = 1
    absolute_side: int | None = None
    rope_dim: int | None = None
    rope_in_float32: bool = True
    tie_embeddings: bool = False
    shift_logits: bool = False
    code_bits: int | None = None
    code_rank: int = 0
    token_groups: int = 1
    attention: Literal["einsum", "xla", "cudnn"] = "einsum"
    remat: bool = False
    unroll: int = 1
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} does not divide {self.num_heads} heads")
        if self.rope_axes not in (1, 2):
            raise ValueError(f"rope_axes must be 1 or 2, got {self.rope_axes}")
        if self.absolute_side is not None and (self.rope_axes != 2 or self.absolute_side < 1):
            raise ValueError(
                f"absolute_side={self.absolute_side} is the side of a grid, so it must be positive "
                f"and needs rope_axes=2, got {self.rope_axes}"
            )
        if self.head_size % (2 * self.rope_axes):
            raise ValueError(
                f"head dimension {self.head_size} is not a multiple of {2 * self.rope_axes}"
            )
        if self.rope_size % (2 * self.rope_axes) or not 0 < self.rope_size <= self.head_size:
            raise ValueError(
                f"rope_dim={self.rope_dim} is not a multiple of {2 * self.rope_axes} up to the "
                f"head dimension {self.head_size}"
            )
        self._check_stretch()
        if self.block not in ("llama", "phi"):
            raise ValueError(f"block must be llama or phi, got {self.block!r}")
        if self.attention not in ("einsum", "xla", "cudnn"):
            raise ValueError(f"attention must be einsum, xla or cudnn, got {self.attention!r}")
        if self.token_groups > 1 and (self.code_bits or self.output_size % self.token_groups):
            raise ValueError(
                f"token_groups={self.token_groups} needs code_bits=None and a head of that many "
                f"equal parts, got {self.output_size} columns"
            )
        if self.code_bits is not None and 2**self.code_bits > self.vocab_size:
            raise ValueError(f"2**{self.code_bits} codes exceed vocab_size={self.vocab_size}")
        if self.tie_embeddings and (self.code_bits is not None or self.num_outputs is not None):
            raise ValueError("tie_embeddings needs code_bits=None and num_outputs=None")

    def _check_stretch(self) -> None:
        if self.rope_stretch is None:
            return
        factor, low, high, length = self.rope_stretch
        if not (factor >= 1 and 0 < low < high and length > 0):
            raise ValueError(
                "rope_stretch must be (factor >= 1, 0 < low < high, length > 0), got "
                f"{self.rope_stretch}"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads, default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Numbers per head, default resolved."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rope_size(self) -> int:
        """Rotated numbers per head, default resolved."""
        return self.head_size if self.rope_dim is None else self.rope_dim

    @property
    def output_size(self) -> int:
        """Head columns, default resolved."""
        return self.vocab_size if self.num_outputs is None else self.num_outputs
