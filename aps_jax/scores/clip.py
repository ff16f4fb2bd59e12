"""CLIP (arXiv:2103.00020): images and texts as vectors whose cosine says how well they fit.

Weights are not part of this package: `aps-jax convert clip` converts published ones, and
`aps_jax.pretrained.load_clip` loads them. The cosine of a text and an image is CLIP-T, that of two
images CLIP-I, as scores or as energies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.scores.vit import (
    BlocksConfig,
    VitConfig,
    blocks_shapes,
    draw_params,
    layer_norm,
    run_blocks,
    run_vit,
    square_pixels,
    unit,
    vit_shapes,
)
from aps_jax.types import Array, Key, PyTree

#: Mean and std of the pixels that CLIP was trained on, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
#: Tokens that frame a text.
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of both towers; every field is a JSON value.

    Attributes:
      embed_dim: numbers D of an embedding.
      patch_size: pixels per patch along each axis.
      side: patches along each axis of the image.
      image_width: width of the image tower; likewise its layers, heads and MLP.
      vocab_size: ids of texts.
      context: ids of a text at most, frame included.
      end_id: id that ends a text, at which it is read off.
      text_width: width of the text tower; likewise its layers, heads and MLP.
      activation: "quick_gelu" as OpenAI published it, or "gelu".
      norm_eps: epsilon inside the square root of the norms.
    """

    embed_dim: int
    patch_size: int
    side: int
    image_width: int
    image_layers: int
    image_heads: int
    image_mlp: int
    vocab_size: int
    context: int
    end_id: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _ = self.image, self.text  # Which check themselves.

    @property
    def image(self) -> VitConfig:
        """The image tower."""
        return VitConfig(
            width=self.image_width,
            num_layers=self.image_layers,
            num_heads=self.image_heads,
            mlp_width=self.image_mlp,
            activation=self.activation,
            norm_eps=self.norm_eps,
            patch_size=self.patch_size,
            side=self.side,
            pre_norm=True,
        )

    @property
    def text(self) -> BlocksConfig:
        """The blocks of the text tower."""
        return BlocksConfig(
            width=self.text_width,
            num_layers=self.text_layers,
            num_heads=self.text_heads,
            mlp_width=self.text_mlp,
            activation=self.activation,
            norm_eps=self.norm_eps,
        )


def init_clip_params(key: Key, config: ClipConfig) -> PyTree:
    """Random weights."""
    width = config.text_width
    shapes = {
        "image": vit_shapes(config.image),
        "image_projection": {"kernel": (config.image_width, config.embed_dim)},
        "text": {
            "embedding": (config.vocab_size, width),
            "positions": (config.context, width),
            "blocks": blocks_shapes(config.text),
            "post_norm": {"scale": (width,), "bias": (width,)},
        },
        "text_projection": {"kernel": (width, config.embed_dim)},
        "logit_scale": (),
    }
    return draw_params(key, shapes)


def embed_pixels(params: PyTree, pixels: Array, *, config: ClipConfig) -> Array:
    """Vectors of length 1 [B, D] of normalised images [B, image_size, image_size, 3]."""
    with jax.default_matmul_precision("highest"):
        states = run_vit(params["image"], pixels, config=config.image)
        return unit(states[:, 0] @ params["image_projection"]["kernel"])


def embed_ids(params: PyTree, ids: Array, *, config: ClipConfig) -> Array:
    """Vectors of length 1 [B, D] of framed texts int [B, T], read off at the first `end_id`.

    What follows it is never seen. A text without one is read off at its first id, as by the
    published code.
    """
    if ids.ndim != 2 or ids.shape[1] > config.context:
        raise ValueError(
            f"ids of texts must be [B, T] with T up to {config.context}, got {ids.shape}; "
            "shorten the text"
        )
    length, text = ids.shape[1], params["text"]
    x = text["embedding"][ids] + text["positions"][None, :length]
    mask = jnp.tri(length, dtype=bool)[None]
    with jax.default_matmul_precision("highest"):
        x = run_blocks(text["blocks"], x, config=config.text, mask=mask)
        end = jnp.argmax(ids == config.end_id, axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)
        x = layer_norm(text["post_norm"], x, config.norm_eps)[:, 0]
        return unit(x @ params["text_projection"]["kernel"])


@flax.struct.dataclass
class ClipModel:
    """Both towers with their weights, a pytree.

    Attributes:
      params: weights in the shapes of `init_clip_params`.
      config: sizes.
      tokenizer: an `aps_jax.text.tokenizer.TextTokenizer`, or None where texts come as ids.
    """

    params: PyTree
    config: ClipConfig = flax.struct.field(pytree_node=False)
    tokenizer: Any = flax.struct.field(pytree_node=False, default=None)

    def embed_image(self, x: Array) -> Array:
        """Vectors of length 1, float32 [B, D], of images [B, H, W, 3] in [-1, 1] of any size.

        Differentiable in `x`, of which the middle square counts (`square_pixels`).
        """
        pixels = square_pixels(x, self.config.image.image_size, MEAN, STD)
        return embed_pixels(self.params, pixels, config=self.config)

    def embed_text(self, text: str | Sequence[str] | Array | np.ndarray) -> Array:
        """Vectors of length 1, float32 [B, D], of texts, or of their ids int [B, T]."""
        is_text = isinstance(text, Sequence) and all(isinstance(one, str) for one in text)
        ids = self.tokenize(text) if is_text else text  # pyright: ignore[reportArgumentType]
        return embed_ids(self.params, jnp.asarray(ids), config=self.config)

    def tokenize(self, text: str | Sequence[str]) -> np.ndarray:
        """Framed ids int32 [B, T] of B texts, filled up with `end_id` to the longest.

        Raises:
          ValueError: a text that is too long, or a model without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this CLIP was converted without a tokenizer.json, so texts must be given as ids; "
                "convert it again with that file beside the weights"
            )
        begin, end = (self.tokenizer.special_id(name) for name in (BEGIN, END))
        texts = [text] if isinstance(text, str) else text
        rows = [[begin, *self.tokenizer.encode(one), end] for one in texts]
        longest = max(map(len, rows))
        if longest > self.config.context:
            raise ValueError(
                f"a text has {longest - 2} tokens; CLIP reads at most {self.config.context - 2}: "
                "shorten it"
            )
        filled = [row + [self.config.end_id] * (longest - len(row)) for row in rows]
        return np.asarray(filled, np.int32)
