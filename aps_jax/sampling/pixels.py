"""What samplers with a denoiser draw from: its prior times exp(-energy) of the image.

Rows are images, or, where the denoiser is one of latents, grids of latents that decode to images.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from aps_jax import energies
from aps_jax.codec import latents
from aps_jax.config import SharedConfig
from aps_jax.denoiser import Denoiser, PixelParams
from aps_jax.sampling.base import BaseTarget, check_energy, measurement_of
from aps_jax.sampling.checks import fit_shape
from aps_jax.sampling.run import Sampler, StepInfo, Trace, losses_by_row, make_info
from aps_jax.types import Array, Energy, ImageShape, Key, PyTree, Scalar


@flax.struct.dataclass(kw_only=True)
class PixelTarget(BaseTarget):
    """The law p(x) exp(-energy(x)) over images, where p is known by its denoiser.

    With a denoiser of latents it is p(z) exp(-energy(decode(z))) over those, and H, W, C below are
    the sizes h, w, d of their grid.

    Attributes:
      denoiser: continuous prior.
      batch: B.
    """

    denoiser: Denoiser
    batch: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def kind(self) -> str:
        """What samplers ask for by `NEEDS`."""
        return self.denoiser.kind

    @property
    def num_rows(self) -> int:
        """R = S * B."""
        return self.num_samples * self.batch

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of a row."""
        assert self.image_shape is not None  # These targets have one always.
        codec = self.denoiser.codec
        sides = self.image_shape if codec is None else codec.grid(self.image_shape)
        return (*sides, self.denoiser.num_channels)

    def denoise(self, x: Float[Array, "R H W C"], sigma: Scalar) -> Float[Array, "R H W C"]:
        """Mean of the clean images, given them with noise of std `sigma`; one call."""
        with jax.named_scope("denoiser"):
            levels = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x.shape[:1])
            return self.denoiser.apply(self.denoiser.params, x, levels)

    def noise(self, keys: Key) -> Float[Array, "R H W C"]:
        """Standard normal images, one per key [R]."""
        return jax.vmap(lambda key: jax.random.normal(key, self.shape, jnp.float32))(keys)

    def decode(self, x: Float[Array, "R H W C"]) -> Float[Array, "R ..."]:
        """The images of rows, not clipped: the rows themselves, unless they are latents."""
        if self.denoiser.codec is None:
            return x
        assert self.image_shape is not None
        return latents.decode(self.denoiser.codec, x, self.image_shape)

    def encode(self, images: Float[Array, "R ..."]) -> Float[Array, "R H W C"]:
        """The rows of images; ValueError where the codec has no encoder."""
        codec = self.denoiser.codec
        return images if codec is None else latents.encode(codec, images)

    def energy_of(self, x: Float[Array, "R H W C"]) -> Float[Array, " R"]:
        """The energy of rows, per row [R], differentiable in them."""
        return self.by_sample(self.energy, self.decode(x))

    def objective_of(self, x: Float[Array, "R H W C"]) -> Float[Array, " R"]:
        """The objective of rows, per row [R], differentiable in them."""
        return self.by_sample(self.objective, self.decode(x))

    def picture(self, found: Float[Array, "R H W C"]) -> Float[Array, "R ..."]:
        """The images of rows, clipped to [-1, 1]."""
        return jnp.clip(self.decode(found), -1, 1)

    def tokens_of(self, found: Array) -> None:
        """There are no tokens."""
        return None

    def num_masked(self, state: Any) -> Int[Array, " R"]:
        """There are no tokens: 0."""
        return jnp.zeros(self.num_rows, jnp.int32)


def make_pixel_target(
    denoiser: Denoiser,
    energy: Energy,
    *,
    image_shape: ImageShape,
    batch: int = 1,
    num_samples: int = 1,
    objective: Energy | None = None,
) -> PixelTarget:
    """A target of any energy of images, such as a reward.

    Args:
      denoiser: continuous prior, of images or of latents.
      energy: of images [B, H, W, C].
      image_shape: (H, W).
      batch: rows of the energy's data, B.
      num_samples: S per row of the energy's data.
      objective: what DPS makes small; the energy if left out.

    Raises:
      ValueError: the denoiser takes or gives rows of another shape, or the energy gives no number
        per row.
    """
    target = PixelTarget(
        denoiser=denoiser,
        energy=energy,
        objective=energy if objective is None else objective,
        batch=batch,
        num_samples=num_samples,
        image_shape=image_shape,
    )
    _check(target)
    return target


def pixel_target(params: PixelParams, y: PyTree, *, config: SharedConfig) -> PixelTarget:
    """The posterior of a measurement under the options of a sampler with a denoiser.

    Args:
      params: denoiser and operator (random state drawn).
      y: measurement of B images.
      config: options of the sampler: sigma, num_samples, image_shape and, where it has one,
        measurement_term.

    Raises:
      ValueError: shapes of y, operator, denoiser and configuration do not fit together.
    """
    denoiser = params.denoiser
    image_shape = fit_shape(
        params.operator, y, image_shape=config.image_shape,
        num_channels=denoiser.num_channels if denoiser.codec is None else 3,
    )  # fmt: skip
    energy = energies.gaussian(params.operator, y, config.sigma)
    is_norm = getattr(config, "measurement_term", "gaussian") == "norm"
    target = make_pixel_target(
        denoiser,
        energy,
        image_shape=image_shape,
        batch=jax.tree.leaves(y)[0].shape[0],
        num_samples=config.num_samples,
        objective=energies.norm(params.operator, y) if is_norm else None,
    )
    measurement = measurement_of(params.operator, y, config)
    return dataclasses.replace(target, measurement=measurement)


def _check(target: PixelTarget) -> None:
    """ValueError unless denoiser, codec and energies take what the target has."""
    shape, codec = (target.batch, *target.shape), target.denoiser.codec
    what = "images" if codec is None else "latents"
    if codec is not None and codec.quantizer.num_features != target.denoiser.num_channels:
        raise ValueError(
            f"the denoiser is one of latents of {target.denoiser.num_channels} numbers, and those "
            f"of its codec have {codec.quantizer.num_features}"
        )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jax.eval_shape(lambda x: target.denoise(x, 1.0), x)
    if getattr(found, "shape", None) != shape:
        raise ValueError(
            f"the denoiser must give {what} of the shape it takes, {shape}; it gives "
            f"{getattr(found, 'shape', found)}"
        )
    images = jax.eval_shape(target.decode, x)
    for energy in (target.energy, target.objective):
        check_energy(energy, jax.eval_shape(energy, images), target.batch)


def pixel_info(
    sampler: Sampler,
    target: PixelTarget,
    estimate: Float[Array, "R H W C"],
    *,
    losses: Float[Array, "M R"] | None = None,
    num_inner_steps: int | Array = 0,
) -> StepInfo:
    """What to tell of a step.

    Args:
      sampler: says whether to trace.
      target: what is sampled.
      estimate: of the clean rows, after the step.
      losses: objective at all inner steps [M, R], at least one; None without any.
      num_inner_steps: gradients of the operator, and of the decoder if there is one, in this step.
    """
    rows = estimate.shape[0]
    trace = None
    if sampler.trace:
        trace = Trace(losses_by_row(losses, rows), None, target.picture(estimate))
    return make_info(
        jnp.zeros(rows, jnp.int32),
        loss=None if losses is None else losses[-1],
        is_finite=jnp.all(jnp.isfinite(estimate), axis=(1, 2, 3)),
        num_inner_steps=num_inner_steps,
        trace=trace,
    )
