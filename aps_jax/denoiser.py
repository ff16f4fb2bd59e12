"""Continuous priors on pixels: the bundles that the samplers on pixels take."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct

from aps_jax.types import Array, Operator, PyTree


@flax.struct.dataclass
class Denoiser:
    """A frozen network that removes Gaussian noise from images: a continuous prior.

    Attributes:
      params: weights.
      apply: `(params, x_t, sigma) -> x_0`, the mean of the clean image given x_t = x_0 + sigma n
        (variance exploding, no rescaling of x_t), differentiable in x_t. Images are float32
        [R, H, W, C] on the scale [-1, 1], sigma is float32 [R]. It must not mix rows.
      num_channels: C.
    """

    params: PyTree
    apply: Callable[[PyTree, Array, Array], Array] = flax.struct.field(pytree_node=False)
    num_channels: int = flax.struct.field(pytree_node=False, default=3)


@flax.struct.dataclass
class PixelParams:
    """`Params` of the samplers on pixels, which have a denoiser in place of prior and codec.

    Attributes:
      denoiser: continuous prior.
      operator: measurement operator, its random state already drawn.
    """

    denoiser: Denoiser
    operator: Operator
