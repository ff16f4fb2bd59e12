"""PSLD (arXiv:2307.00619): DPS on latents, glued to what the encoder makes of the measured image.

z <- noise
for t = T..1:
  z_0 <- denoiser(z)
  x <- decode(z_0), moved to the measurement by A^T (y - A x)
  z <- DDPM's step from z to z_0 - gradient in z of
       step_size ||y - A(decode(z_0))|| + gluing ||encode(x) - z_0||
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from aps_jax.config import Evaluations, Knob, check_options
from aps_jax.samplers.continuous import Pixels
from aps_jax.samplers.dps import DPSConfig
from aps_jax.sampling.leaves import as_pytree, is_absent
from aps_jax.sampling.pixels import PixelTarget
from aps_jax.types import Array, Key, Operator, PyTree


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class PSLDConfig(DPSConfig):
    """Its Algorithm 2, whose step is that of DPS; biased likewise.

    The defaults are those of the released code for faces, which steps by DDIM without fresh noise
    where the paper and this file step by DDPM. The paper's A has orthonormal rows, so that
    x + A^T (y - A x) is the nearest image that fits the measurement. Here the way along A^T has the
    length that fits best, which is the paper's for such rows, and for those of one other size what
    the code's upsampling is for super-resolution. Of a nonlinear operator, which the paper has not,
    A^T is that of the derivative at x. `evaluations()` does not count the encoder, which
    runs forth and back once per step; with `gluing` 0 it does not run, and this is DPS on latents.

    Attributes:
      step_size: omega of the code.
      gluing: gamma of the code.
    """

    NAME: ClassVar = "psld"
    SUMMARY: ClassVar = "PSLD: DPS on latents, which are to be those of a measured image"
    PAPER: ClassVar = "arXiv:2307.00619"
    KNOB: ClassVar = Knob("num_steps")
    NEEDS: ClassVar = "latent denoiser"
    SOURCES: ClassVar = {
        "its code, faces": (
            "num_steps", "step_size", "gluing", "measurement_term", "clip_denoised",
        ),
    }  # fmt: skip

    step_size: float = 0.1
    gluing: float = 0.1
    clip_denoised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, not_negative=("gluing",))

    def init(self, target: PixelTarget, keys: Key) -> Pixels:
        """Noise, in DDPM's scaling; ValueError where there is nothing to glue to."""
        codec = target.denoiser.codec
        lacks = "a codec with an encoder" if codec is not None and codec.encode is None else ""
        lacks = "a measurement" if target.measurement is None else lacks
        if lacks and not is_absent(self.gluing):
            raise ValueError(f"sampler 'psld' needs {lacks} for its gluing; set gluing to 0")
        return super().init(target, keys)

    def pull(self, target: PixelTarget, clean: Array) -> tuple[Array, Array]:
        """What a step descends by its plain gradient, and the objective, of denoised rows [R]."""
        images = target.decode(clean)
        losses = target.by_sample(target.objective, images)
        pulls = self.step_size * losses
        if is_absent(self.gluing):
            return pulls, losses
        assert target.measurement is not None
        operator, y = target.measurement.operator, target.measurement.y
        measured = target.by_sample(lambda x: towards(operator, y, x), images)
        square = jnp.sum(jnp.square(target.encode(measured) - clean), axis=(1, 2, 3))
        # The least normal number keeps the gradient finite where both agree.
        gap = jnp.sqrt(square + jnp.finfo(jnp.float32).tiny)
        return pulls + self.gluing * gap, losses

    def evaluations(self) -> Evaluations:
        """Calls per sample; one gradient goes through operator, codec and denoiser."""
        return super().evaluations()._replace(decoder=1)


def towards(operator: Operator, y: PyTree, x: Array) -> Array:
    """Images moved along A^T (y - A x), as far as fits the measurement best.

    Args:
      operator: A, its random state drawn.
      y: measurement of B images.
      x: images [B, H, W, C], in which the result is differentiable, but for A^T and the length.
    """
    still = jax.lax.stop_gradient(x)
    with jax.default_matmul_precision("float32"):
        there, transpose = jax.vjp(operator, still)
        left = jax.tree.map(jnp.subtract, y, operator(x))
        way = transpose(left)[0]
        # A as the transpose of A^T: networks with rules of their own for the way back have none for
        # the way forward.
        forward = jax.vjp(transpose, jax.tree.map(jnp.zeros_like, there))[1]
        seen = forward((way,))[0]
    square = sum(_square(leaf) for leaf in jax.tree.leaves(seen))
    length = jnp.where(square > 0, _square(way) / jnp.where(square > 0, square, 1.0), 0.0)
    return x + jax.lax.stop_gradient(length)[:, None, None, None] * way


def _square(x: Array) -> Array:
    return jnp.sum(jnp.square(x).reshape(x.shape[0], -1), axis=1)
