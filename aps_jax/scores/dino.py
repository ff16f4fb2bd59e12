"""DINO (arXiv:2104.14294): how alike two images are, by the cosine of their class tokens.

Weights are not part of this package: `aps-jax convert dino` converts published ones, and
`aps_jax.pretrained.load_dino` loads them. DreamBooth (arXiv:2208.12242) introduced this metric for
ViT-S/16, and the paper uses it.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from aps_jax.scores.vit import VitConfig, draw_params, run_vit, square_pixels, unit, vit_shapes
from aps_jax.types import Array, Key, PyTree

#: Mean and std of ImageNet's pixels, in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def init_dino_params(key: Key, config: VitConfig) -> PyTree:
    """Random weights."""
    return draw_params(key, vit_shapes(config))


def class_features(params: PyTree, pixels: Array, *, config: VitConfig) -> Array:
    """Class tokens [B, D] of normalised images [B, image_size, image_size, 3]."""
    with jax.default_matmul_precision("highest"):
        return run_vit(params, pixels, config=config)[:, 0]


@flax.struct.dataclass
class DinoModel:
    """The network with its weights, a pytree.

    Attributes:
      params: weights in the shapes of `init_dino_params`.
      config: sizes.
    """

    params: PyTree
    config: VitConfig = flax.struct.field(pytree_node=False)

    def embed_image(self, x: Array) -> Array:
        """Class tokens, float32 [B, D], of images [B, H, W, 3] in [-1, 1] of any size.

        Differentiable in `x`, of which the middle square counts (`square_pixels`).
        """
        pixels = square_pixels(x, self.config.image_size, MEAN, STD)
        return class_features(self.params, pixels, config=self.config)

    def __call__(self, a: Array, b: Array) -> Array:
        """Cosine [B] of the class tokens of `a` and `b`; 1 for images that are alike."""
        return jnp.sum(unit(self.embed_image(a)) * unit(self.embed_image(b)), axis=-1)
