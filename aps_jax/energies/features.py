"""Energies of a network's features: how an image is painted, and what it shows.

Source: Gatys, Ecker and Bethge, arXiv:1508.06576, with the layers of Johnson, Alahi and Fei-Fei,
arXiv:1603.08155: relu1_2, relu2_2, relu3_3 and relu4_3 of VGG16. Both distances are relative ones
here (ours), so that no layer needs a weight of its own and a weight means the same for all
references: 0 for equal statistics, about 1 for unlike ones.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from aps_jax.types import Array, Energy, Features, bind

#: Blocks of VGG16 whose Gram matrices are the style, and the one whose features are the content.
STYLE_BLOCKS, CONTENT_BLOCK = 4, 2


def style(features: Features, reference: Float[Array, "B h w 3"]) -> Energy:
    """Mean over blocks of ||G(x) - G(reference)||^2 / ||G(reference)||^2, G the Gram matrices.

    A Gram matrix [C, C] has the products of channels, averaged over the places: it forgets where
    things are. The reference may be of any size, but its strokes count as large as they are in
    its own pixels.

    Args:
      features: of images, such as `aps_jax.scores.lpips.vgg_features` gives; its first four blocks
        are read.
      reference: in [-1, 1], one per row, or a single one [1, h, w, 3] for all rows.
    """
    with jax.named_scope("features"):
        wanted = tuple(gram(block) for block in features(reference)[:STYLE_BLOCKS])
    return _compared(_style, features, wanted, "style")


def content(features: Features, reference: Float[Array, "B H W 3"]) -> Energy:
    """||F(x) - F(reference)||^2 / ||F(reference)||^2 of the third block's features F.

    Args:
      features: as for `style`.
      reference: in [-1, 1] and of the images' own size; rows as for `style`.
    """
    with jax.named_scope("features"):
        wanted = features(reference)[CONTENT_BLOCK]
    return _compared(_content, features, wanted, "content")


def gram(block: Float[Array, "B h w C"]) -> Float[Array, "B C C"]:
    """Products of channels, averaged over the places."""
    places = block.shape[1] * block.shape[2]
    with jax.default_matmul_precision("float32"):
        return jnp.einsum("bhwc,bhwd->bcd", block, block) / places


def _compared(apply: Any, features: Features, wanted: Any, name: str) -> Energy:
    is_shared = jax.tree.leaves(wanted)[0].shape[0] == 1
    params, data = ((features, wanted), None) if is_shared else ((features, None), wanted)
    return Energy(apply=bind(apply), params=params, data=data, name=name)


def _style(params: tuple[Features, Any], data: Any, x: Array) -> Float[Array, " B"]:
    features, shared = params
    wanted = data if shared is None else shared
    with jax.named_scope("features"):
        blocks = features(x)
    errors = [
        _relative(gram(mine), theirs)
        for mine, theirs in zip(blocks[:STYLE_BLOCKS], wanted, strict=True)
    ]
    return jnp.mean(jnp.stack(errors), axis=0)


def _content(params: tuple[Features, Any], data: Any, x: Array) -> Float[Array, " B"]:
    features, shared = params
    wanted = data if shared is None else shared
    with jax.named_scope("features"):
        mine = features(x)[CONTENT_BLOCK]
    return _relative(mine, wanted)


def _relative(mine: Array, theirs: Array) -> Float[Array, " B"]:
    """Squared distance per row, divided by the squared length of what is wanted."""
    axes = tuple(range(1, mine.ndim))
    size = jnp.sum(theirs**2, axis=axes) + jnp.finfo(jnp.float32).tiny
    return jnp.sum((mine - theirs) ** 2, axis=axes) / size
