"""What all targets have, whatever is sampled: an energy, and rows that never influence each other.

A row is one sample of one measurement. S samples of B measurements become R = S * B rows here,
once, sample-major: row s * B + b is sample s of measurement b.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from aps_jax.config import SharedConfig
from aps_jax.sampling.leaves import is_absent, or_none
from aps_jax.sampling.smooth import smooth_estimate
from aps_jax.types import Array, Energy, ImageShape, Key, Operator, PyTree, Scalar, image_keys


@flax.struct.dataclass
class Measurement:
    """y = A(x) + sigma n, for those who look at more of it than an energy tells.

    Attributes:
      operator: A, its random state drawn.
      y: measurement of B images.
      sigma: std of the noise.
      consistency: std of the differences of neighbouring pixels in the change by which samples
        come to explain y (`sampling.smooth`); a larger one follows y more. None leaves the samples
        as the models made them.
    """

    operator: Operator
    y: PyTree
    sigma: Scalar
    consistency: Scalar | None = None


def measurement_of(operator: Operator, y: PyTree, config: SharedConfig) -> Measurement:
    """The measurement as the options of a sampler see it (`sigma`, `data_consistency`)."""
    sigma = jnp.asarray(config.sigma, jnp.float32)
    return Measurement(operator, y, sigma, or_none(config.data_consistency))


@flax.struct.dataclass(kw_only=True)
class BaseTarget:
    """A prior times exp(-energy); what it is over, tokens, pixels or latents, subclasses say.

    Attributes:
      energy: -log-likelihood up to a constant, or minus a reward, by which candidates are weighed.
      objective: what gradient methods make small in its place; often the energy itself.
      measurement: the measurement behind the energy; None for rewards.
      num_samples: S.
      image_shape: (H, W); None where what is sampled is no image.
    """

    energy: Energy
    objective: Energy
    measurement: Measurement | None = None
    num_samples: int = flax.struct.field(pytree_node=False, default=1)
    image_shape: ImageShape | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def num_rows(self) -> int:
        """R = S * B."""
        raise NotImplementedError

    def picture(self, found: Array, /) -> Float[Array, "R ..."]:
        """Images [R, H, W, C] in [-1, 1] of what a sampler's `finish` returns."""
        raise NotImplementedError

    def consistent(self, images: Float[Array, "R ..."]) -> Float[Array, "R ..."]:
        """Images of rows, brought to explain the measurement if that asks for it.

        They stay as they are where the operator's gradient is a stand-in, which would never let
        them rest.
        """
        measurement = self.measurement
        smoothness = None if measurement is None else measurement.consistency
        if measurement is None or smoothness is None or is_absent(smoothness):
            return images
        if not measurement.operator.has_true_gradient:
            return images
        assert self.image_shape is not None  # Measurements are of images.
        change = functools.partial(
            smooth_estimate, measurement.operator, measurement.y, image_shape=self.image_shape,
            sigma=measurement.sigma, smoothness=smoothness,
        )  # fmt: skip
        with jax.named_scope("consistency"):
            return self.by_sample(lambda x: change(around=x), images)

    def tokens_of(self, found: Array) -> Int[Array, "R L"] | None:
        """The tokens in what a sampler's `finish` returns; None where there are none."""
        raise NotImplementedError

    def num_masked(self, state: Any) -> Int[Array, " R"]:
        """Tokens of a sampler's state that are masked, per row [R]; 0 where there are none."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What samplers ask for by `NEEDS`: "prior", "denoiser" or "latent denoiser"."""
        raise NotImplementedError

    def by_sample(self, function: Callable[[Array], Array], x: Float[Array, "R ..."]) -> Array:
        """A function of the B rows of one sample, such as an energy, for all R rows."""
        if self.num_samples == 1:
            return function(x)
        grouped = x.reshape(self.num_samples, -1, *x.shape[1:])
        found = jax.vmap(function)(grouped)
        return found.reshape(x.shape[0], *found.shape[2:])

    def rows(self, leaf: Array) -> Array:
        """An array per measurement [B, ...] for every row [R, ...]."""
        return jnp.concatenate([leaf] * self.num_samples)

    def keys(self, key: Key) -> Key:
        """One key per row [R] from one typed key, or one per measurement [B]."""
        return row_keys(key, self.num_rows, self.num_samples)


def row_keys(key: Key, rows: int, num_samples: int) -> Key:
    """One key per row [S * B] from one key, or one per measurement [B]."""
    keys = image_keys(key, rows // num_samples)
    per_sample = jax.vmap(lambda sample: jax.vmap(lambda k: jax.random.fold_in(k, sample))(keys))(
        jnp.arange(num_samples, dtype=jnp.int32)
    )
    return per_sample.reshape(rows)


def check_energy(energy: Energy, given: Any, batch: int) -> None:
    """ValueError unless `given`, what an energy gives, is one number per row."""
    if getattr(given, "shape", None) != (batch,):
        raise ValueError(
            f"{energy.name} must give one number per row, shape ({batch},); it gives "
            f"{getattr(given, 'shape', given)}: leave the batch axis out of its sums"
        )
