"""The network that judges edits: never a reward, and made otherwise than the one that is.

It has another architecture than `aps_jax.load_attributes`, whose faces it never saw: it was trained
on other people's pictures (`python -m experiments.train_attributes --network judge`).
"""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from aps_jax.codec.magvit2 import space_to_depth
from aps_jax.faces.attributes import SECTION, Attributes, AttributesConfig
from aps_jax.io import checkpoint
from aps_jax.types import Array, Key, PyTree, bind

#: Where the committed judge lies.
FOLDER = Path(__file__).parent / "results" / "judges" / "attributes64"


class _Network(nn.Module):
    """Patches of 4x4 pixels, residual convolutions, then the mean and the maximum over places."""

    config: AttributesConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps faces [B, side, side, 3] to logits [B, A]."""
        narrow, wide = self.config.channels
        x = nn.Dense(narrow, name="patches")(space_to_depth(x, 4))
        for index in range(2):
            x = self._block(x, narrow, f"fine_{index}")
        x = nn.Conv(wide, (3, 3), name="widen")(nn.max_pool(x, (2, 2), (2, 2)))
        x = self._block(x, wide, "coarse")
        x = nn.LayerNorm(name="norm_out")(x)
        x = jnp.concatenate([jnp.mean(x, axis=(1, 2)), jnp.max(x, axis=(1, 2))], axis=-1)
        return nn.Dense(len(self.config.names), name="dense_out")(x)

    def _block(self, x: Array, width: int, name: str) -> Array:
        normed = nn.LayerNorm(name=f"{name}_norm")(x)
        return x + nn.relu(nn.Conv(width, (3, 3), name=name)(normed))


def _apply(params: PyTree, x: Array, *, config: AttributesConfig) -> Array:
    return _Network(config).apply({"params": params}, x)


def init_judge_params(key: Key, config: AttributesConfig) -> PyTree:
    """Random weights."""
    face = jnp.zeros((1, config.side, config.side, 3), jnp.float32)
    return _Network(config).init(key, face)["params"]


def make_judge(config: AttributesConfig, params: PyTree) -> Attributes:
    """Bundles weights with the function that uses them."""
    return Attributes(params, bind(_apply, config=config), config.names, config.side)


def load_judge(folder: Path = FOLDER) -> Attributes:
    """Loads the committed judge, or one that was trained again.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no such network.
    """
    path = folder / checkpoint.CARD_NAME
    config = checkpoint.parse_config(
        AttributesConfig, checkpoint.read_card(folder).get(SECTION), path
    )
    abstract = jax.eval_shape(lambda key: init_judge_params(key, config), jax.random.key(0))
    return make_judge(config, checkpoint.load_params(folder / f"{SECTION}.safetensors", abstract))
