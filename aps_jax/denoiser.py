"""Continuous priors, of pixels or of a codec's latents: the bundles that their samplers take."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct

from aps_jax.types import Array, Codec, Operator, PyTree


@flax.struct.dataclass
class Denoiser:
    """A frozen network that removes Gaussian noise from images: a continuous prior.

    Attributes:
      params: weights.
      apply: `(params, x_t, sigma) -> x_0`, the mean of the clean image given x_t = x_0 + sigma n
        (variance exploding, no rescaling of x_t), differentiable in x_t. Images are float32
        [R, H, W, C] on the scale [-1, 1], sigma is float32 [R]. It must not mix rows.
      num_channels: C.
      codec: None for a denoiser of images. Else x_0 are the latents of its codec, its features
        clipped to [-1, 1], where the codes of look-up-free quantisation lie
        (`codec.latents.encode`), and "images" above are grids [R, h, w, d] of them.
    """

    params: PyTree
    apply: Callable[[PyTree, Array, Array], Array] = flax.struct.field(pytree_node=False)
    num_channels: int = flax.struct.field(pytree_node=False, default=3)
    codec: Codec | None = None

    @property
    def kind(self) -> str:
        """What samplers ask for by `NEEDS`."""
        return "denoiser" if self.codec is None else "latent denoiser"


@flax.struct.dataclass
class PixelParams:
    """`Params` of the samplers that have a denoiser in place of a prior over tokens.

    Attributes:
      denoiser: continuous prior, of pixels or of latents.
      operator: measurement operator, its random state already drawn.
    """

    denoiser: Denoiser
    operator: Operator
