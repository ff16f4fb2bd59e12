"""A small network that says which attributes a face has, differentiable in the face."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from aps_jax.codec.convolution import conv_general_dilated
from aps_jax.codec.group_norm import GroupNorm
from aps_jax.codec.magvit2 import space_to_depth
from aps_jax.io import checkpoint
from aps_jax.io.names import suggestion
from aps_jax.types import Array, Key, PyTree, bind

#: The folder of the embedded network.
EMBEDDED = Path(__file__).parents[1] / "data" / "attributes64"
#: Name of the configuration in the card, and of the weights beside it.
SECTION = "attributes"


@dataclasses.dataclass(frozen=True)
class AttributesConfig:
    """Sizes of the network.

    Attributes:
      names: one per output.
      channels: width at 1/2, 1/4, 1/8 and so on of the side.
      side: of the faces it was trained on, in pixels.
      num_groups: of the group normalisation.
    """

    names: tuple[str, ...]
    channels: tuple[int, ...] = (32, 64, 128, 128)
    side: int = 64
    num_groups: int = 8


@flax.struct.dataclass
class Attributes:
    """A frozen network from faces to one number per attribute; a pytree of its weights.

    Attributes:
      params: weights.
      apply: `(params, x) -> logits`, x of the network's own size.
      names: one per logit.
      side: of the faces that `apply` takes.
    """

    params: PyTree
    apply: Callable[[PyTree, Array], Array] = flax.struct.field(pytree_node=False)
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    side: int = flax.struct.field(pytree_node=False, default=64)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B A"]:
        """Logits [B, A] of square faces in [-1, 1]; above 0 the face has the attribute.

        Faces of another size are resized, with antialiasing and a gradient.

        Raises:
          ValueError: if the images are not square pictures in colour.
        """
        if x.ndim != 4 or x.shape[3] != 3 or x.shape[1] != x.shape[2]:
            raise ValueError(
                f"attributes are those of square faces [B, H, H, 3]; received {x.shape}: align "
                "the picture first"
            )
        x = x.astype(jnp.float32)
        if x.shape[1] != self.side:
            x = jax.image.resize(x, (len(x), self.side, self.side, 3), "linear")
        return self.apply(self.params, x)

    def index(self, name: str) -> int:
        """Place of an attribute among the logits.

        Raises:
          ValueError: if there is no such attribute.
        """
        if name not in self.names:
            raise ValueError(
                f"unknown attribute {name!r}{suggestion(name, self.names)}; choose from "
                f"{', '.join(self.names)}"
            )
        return self.names.index(name)


class _Network(nn.Module):
    """Convolutions at ever fewer pixels, then one dense layer on what is where."""

    config: AttributesConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps faces [B, side, side, 3] to logits [B, A]."""
        x = space_to_depth(x, 2)
        for level, width in enumerate(self.config.channels):
            if level:
                x = _halved(x)
            x = self._layer(x, width, f"conv_{level}a")
            # The widest grid costs most and has the least to say.
            if 0 < level < len(self.config.channels) - 1:
                x = x + self._layer(x, width, f"conv_{level}b")
        x = x.reshape(len(x), -1)
        return nn.Dense(len(self.config.names), name="dense_out")(x)

    def _layer(self, x: Array, width: int, name: str) -> Array:
        # The input's gradient is wanted inside compiled loops, where only this convolution is fast.
        conv = nn.Conv(width, (3, 3), name=name, conv_general_dilated=conv_general_dilated)
        norm = GroupNorm(self.config.num_groups, 1e-5, "float32", name=f"{name}_norm")
        return nn.swish(norm(conv(x)))


def _halved(x: Array) -> Array:
    """Means of 2x2 pixels."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def _apply(params: PyTree, x: Array, *, config: AttributesConfig) -> Array:
    return cast(Array, _Network(config).apply({"params": params}, x))


def init_attributes_params(key: Key, config: AttributesConfig) -> PyTree:
    """Random weights."""
    face = jnp.zeros((1, config.side, config.side, 3), jnp.float32)
    return _Network(config).init(key, face)["params"]


def make_attributes(config: AttributesConfig, params: PyTree) -> Attributes:
    """Bundles weights with the function that uses them."""
    return Attributes(params, bind(_apply, config=config), config.names, config.side)


def load_attributes(folder: str | os.PathLike[str] | None = None) -> Attributes:
    """Loads the embedded network of face attributes, or that of a folder by `train_attributes`.

    It was trained on faces of 64x64 pixels in the framing of the model `face64`, also noisy,
    blurred and decoded ones, so that its gradient tells what to change in a picture. Its weights
    are for non-commercial research only, as its card says.

    Args:
      folder: with `card.json` and `attributes.safetensors`; None for the embedded one.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no such network.
    """
    folder = EMBEDDED if folder is None else Path(folder)
    path = folder / checkpoint.CARD_NAME
    config = checkpoint.parse_config(
        AttributesConfig, checkpoint.read_card(folder).get(SECTION), path
    )
    abstract = jax.eval_shape(lambda key: init_attributes_params(key, config), jax.random.key(0))
    weights = checkpoint.load_params(checkpoint.weights_path(folder, SECTION), abstract)
    return make_attributes(config, weights)
