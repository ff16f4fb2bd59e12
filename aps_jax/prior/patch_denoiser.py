"""A denoiser of images or latents: the masked transformer's blocks on patches, as a `Denoiser`.

Inputs, outputs and the residual are scaled by the level of noise as EDM does it (Karras et al.,
arXiv:2206.00364, table 1), so that the network sees and gives numbers of unit size at any level.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from aps_jax.codec.magvit2 import depth_to_space, space_to_depth
from aps_jax.denoiser import Denoiser
from aps_jax.prior.attention import grid_positions
from aps_jax.prior.transformer import Transformer, TransformerConfig
from aps_jax.types import Array, Codec, Key, PyTree, bind

#: Frequencies, in turns per nat of a quarter of log sigma, at which the network reads the level.
_NUM_FREQUENCIES, _LARGEST_FREQUENCY = 32, 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchDenoiserConfig:
    """Sizes; every field is a JSON value. Of latents, images and pixels are those of their grid.

    Attributes:
      side: of the images in pixels; the network knows whole images of this size only.
      patch: side of the square patches, of which each is one position of the transformer.
      num_channels: of the images.
      sigma_data: standard deviation of the clean images on the scale [-1, 1].
      width: residual width.
      num_layers: number of blocks.
      num_heads: attention heads.
      mlp_width: hidden width of the MLP.
      rope_theta: base of the rotary frequencies.
      dtype: of activations.
    """

    side: int = 64
    patch: int = 4
    num_channels: int = 3
    sigma_data: float = 0.5
    width: int = 192
    num_layers: int = 6
    num_heads: int = 3
    mlp_width: int = 512
    rope_theta: float = 100.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.side < 1 or self.patch < 1 or self.side % self.patch:
            raise ValueError(f"patches of side {self.patch} do not tile images of {self.side}")
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    @property
    def transformer(self) -> TransformerConfig:
        """Sizes of the blocks, which read no ids here."""
        return TransformerConfig(
            vocab_size=1, width=self.width, num_layers=self.num_layers, num_heads=self.num_heads,
            mlp_width=self.mlp_width, rope_theta=self.rope_theta, rope_axes=2,
            absolute_side=self.side // self.patch, dtype=self.dtype,
        )  # fmt: skip


class PatchTransformer(nn.Module):
    """The network inside the scaling."""

    config: PatchDenoiserConfig

    @nn.compact
    def __call__(self, x: Array, level: Array) -> Array:
        """Maps images [R, H, W, C] of unit size and levels [R] to images, zero at first."""
        config = self.config
        patches = space_to_depth(x, config.patch).astype(config.dtype)
        rows, height, width, depth = patches.shape
        h = nn.Dense(config.width, dtype=config.dtype, name="patches")(
            patches.reshape(rows, height * width, depth)
        )
        turns = jnp.geomspace(1.0, _LARGEST_FREQUENCY, _NUM_FREQUENCIES) / 2
        angles = 2 * jnp.pi * level[:, None] * turns
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(config.dtype)
        waves = nn.silu(nn.Dense(config.width, dtype=config.dtype, name="level_in")(waves))
        h = h + nn.Dense(config.width, dtype=config.dtype, name="level_out")(waves)[:, None]
        backbone = Transformer(config.transformer, name="backbone")
        h = backbone.hidden_of(h, grid_positions(height, width))
        out = nn.Dense(depth, kernel_init=nn.initializers.zeros, name="pixels")(
            h.astype(jnp.float32)
        )
        return depth_to_space(out.reshape(rows, height, width, depth), config.patch)


def denoise(
    params: PyTree,
    x: Float[Array, "R H W C"],
    sigma: Float[Array, " R"],
    *,
    config: PatchDenoiserConfig,
    stride: int = 1,
) -> Float[Array, "R H W C"]:
    """The mean of the clean images, given them with noise of std `sigma` (EDM, equation 7).

    Args:
      params: as from `init_patch_denoiser_params`.
      x: clean images plus sigma times normal noise, without rescaling.
      sigma: positive.
      config: sizes.
      stride: pixels of an image per place of `x` along each axis, for the message.

    Raises:
      ValueError: images of another size.
    """
    shape = (config.side, config.side, config.num_channels)
    if x.shape[1:] != shape:
        side, what = config.side * stride, "channels" if stride == 1 else "features per latent"
        raise ValueError(
            f"this denoiser knows images of {side}x{side} pixels with {shape[2]} {what} only; "
            f"received {x.shape[1:]}: resize the images, or choose another model"
        )
    levels = sigma.astype(jnp.float32)[:, None, None, None]
    total = levels**2 + config.sigma_data**2
    found = PatchTransformer(config).apply(
        {"params": params}, x / jnp.sqrt(total), jnp.log(sigma) / 4
    )
    kept = config.sigma_data**2 / total
    return kept * x + levels * config.sigma_data / jnp.sqrt(total) * jnp.asarray(found)


def init_patch_denoiser_params(key: Key, config: PatchDenoiserConfig) -> PyTree:
    """Random weights, with which the denoiser is that of white noise of variance sigma_data^2."""
    x = jnp.zeros((1, config.side, config.side, config.num_channels))
    return PatchTransformer(config).init(key, x, jnp.zeros(1))["params"]


def make_patch_denoiser(
    config: PatchDenoiserConfig, params: PyTree, codec: Codec | None = None
) -> Denoiser:
    """Bundles weights as a `Denoiser` of images of one size, or of the latents of a codec."""
    return Denoiser(
        params=params,
        apply=bind(denoise, config=config, stride=1 if codec is None else codec.stride),
        num_channels=config.num_channels,
        codec=codec,
    )


def denoising_loss(
    params: PyTree,
    x: Float[Array, "B H W C"],
    key: Key,
    *,
    config: PatchDenoiserConfig,
    log_sigma_mean: float = -1.2,
) -> tuple[Array, dict[str, Array]]:
    """EDM's loss (its equation 8), with its levels: log sigma is normal, of mean -1.2 and std 1.2.

    Args:
      params: weights.
      x: clean images in [-1, 1].
      key: of levels and noise.
      config: sizes.
      log_sigma_mean: another mean of log sigma.

    Returns:
      The mean over images and pixels of the weighted squared error, and what a log has of it.
    """
    key_level, key_noise = jax.random.split(key)
    # Stratified: the same law per image, less spread over the batch.
    quantiles = (jnp.arange(len(x)) + jax.random.uniform(key_level, (len(x),))) / len(x)
    normal = jax.scipy.stats.norm.ppf(jnp.clip(quantiles, 1e-6, 1 - 1e-6))
    sigma = jnp.exp(1.2 * normal + log_sigma_mean)
    noise = jax.random.normal(key_noise, x.shape)
    found = denoise(params, x + sigma[:, None, None, None] * noise, sigma, config=config)
    errors = jnp.mean(jnp.square(found - x), axis=(1, 2, 3))
    weights = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
    loss = jnp.mean(weights * errors)
    return loss, {"loss": loss}
