"""What is sampled: a prior over tokens times exp(-energy) of what they decode to."""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from aps_jax import energies
from aps_jax.codec import expectation
from aps_jax.codec.expectation import Grid
from aps_jax.config import SharedConfig
from aps_jax.prior import guidance
from aps_jax.sampling.base import (
    BaseTarget,
    Measurement,
    check_energy,
    measurement_of,
    row_keys,
)
from aps_jax.sampling.checks import check_known_tokens, fit_shape
from aps_jax.sampling.leaves import or_none
from aps_jax.sampling.terms import TERMS
from aps_jax.types import (
    Array,
    Codec,
    Energy,
    ImageShape,
    Key,
    Params,
    Prior,
    PyTree,
    Scalar,
)


@flax.struct.dataclass(kw_only=True)
class Target(BaseTarget):
    """The law p(tokens) exp(-energy(decode(tokens))), and what a sampler may ask about it.

    Attributes:
      prior: masked transformer.
      codec: what turns tokens into images, or into whatever the energy reads.
      tokens: int32 [R, L], those given from the start; K where unknown.
      guidance_scale: g of classifier-free guidance, (1 + g) cond - g uncond; None is off.
      prior_temperature: divides the prior's logits; None is 1.
      grid: sizes of the token grid, of product L.
      decode_scale: decode this many times larger and average down.
    """

    prior: Prior
    codec: Codec
    tokens: Int[Array, "R L"]
    guidance_scale: Scalar | None = None
    prior_temperature: Scalar | None = None
    grid: Grid = flax.struct.field(pytree_node=False, default=())
    decode_scale: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def kind(self) -> str:
        """What samplers ask for by `NEEDS`."""
        return "prior"

    @property
    def num_rows(self) -> int:
        """R = S * B."""
        return self.tokens.shape[0]

    @property
    def mask(self) -> int:
        """K, the mask token."""
        return self.prior.num_codes

    @property
    def is_unknown(self) -> Bool[Array, "R L"]:
        """Bool [R, L], False where a token is given and must not change."""
        return self.tokens == self.mask

    def log_prior(self, tokens: Int[Array, "R L"]) -> Float[Array, "R L K"]:
        """Log x_theta [R, L, K] at tokens [R, L]: one call of the denoiser, without gradient."""
        return guidance.log_prior(
            self.prior,
            tokens,
            self.grid,
            guidance_scale=self.guidance_scale,
            prior_temperature=self.prior_temperature,
        )

    def carried_log_prior(self, tokens: Int[Array, "R L"]) -> Float[Array, "R L K"]:
        """`log_prior`, but one-hot where tokens are clean, as methods that redraw them need it."""
        return guidance.carry_over(self.log_prior(tokens), tokens)

    def codes(self, tokens: Int[Array, "R L"]) -> Float[Array, "R L d"]:
        """Codes [R, L, d] of clean tokens [R, L]."""
        return expectation.lookup(self.codec, tokens, self.grid)

    def known_codes(
        self, codes: Float[Array, "R L d"], tokens: Int[Array, "R L"] | None = None
    ) -> Float[Array, "R L d"]:
        """Codes [R, L, d] with those of the clean tokens in `tokens` [R, L] put back.

        `tokens` are by default those given from the start.
        """
        tokens = self.tokens if tokens is None else tokens
        is_masked = tokens == self.mask
        known = self.codes(jnp.where(is_masked, 0, tokens))
        return jnp.where(is_masked[..., None], codes, known)

    def known(self, tokens: Int[Array, "R L"]) -> Int[Array, "R L"]:
        """Tokens [R, L] with those given from the start put back."""
        return jnp.where(self.is_unknown, tokens, self.tokens)

    def expected_code(self, logits: Float[Array, "R L K"]) -> Float[Array, "R L d"]:
        """Mean codes [R, L, d] of logits [R, L, K]."""
        return expectation.expected_code(self.codec, logits, self.grid)

    def decode(self, codes: Float[Array, "R L d"]) -> Float[Array, "R ..."]:
        """What the energies read of codes [R, L, d]: images [R, H, W, 3], not clipped."""
        with jax.named_scope("decoder"):
            return expectation.decode(
                self.codec, codes, self.grid, self.image_shape, self.decode_scale
            )

    def picture(self, tokens: Int[Array, "R L"]) -> Float[Array, "R ..."]:
        """Images [R, H, W, 3] in [-1, 1] of clean tokens [R, L]; as it is if it is no image."""
        x = self.decode(self.codes(tokens))
        return x if self.image_shape is None else jnp.clip(x, -1, 1)

    def energy_of(self, tokens: Int[Array, "R L"]) -> Float[Array, " R"]:
        """The energy of clean tokens [R, L], per row [R]; one run of the decoder."""
        return self.by_sample(self.energy, self.decode(self.codes(tokens)))

    def objective_of(self, codes: Float[Array, "R L d"]) -> Float[Array, " R"]:
        """The objective of codes [R, L, d], per row [R], differentiable in them."""
        return self.by_sample(self.objective, self.decode(codes))

    def tokens_of(self, found: Int[Array, "R L"]) -> Int[Array, "R L"]:
        """The tokens [R, L] themselves."""
        return found

    def num_masked(self, state: Any) -> Int[Array, " R"]:
        """Tokens of a sampler's state that are masked, per row [R]."""
        return jnp.sum(state.tokens == self.mask, axis=1, dtype=jnp.int32)


__all__ = [
    "Measurement", "Target", "fold", "make_target", "measurement_target", "most_likely", "row_keys",
    "split", "start_tokens",
]  # fmt: skip


def fold(keys: Key, index: Array | int) -> Key:
    """Keys [R] folded with one index."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def split(keys: Key, num: int) -> Key:
    """`num` sets of keys [num, R] from keys [R], to be unpacked by use."""
    return jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, num))(keys), 0, 1)


def most_likely(log_probs: Float[Array, "R L K"]) -> Int[Array, "R L"]:
    """Clean tokens int32 [R, L]: the mode of each position of [R, L, K]."""
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)


def start_tokens(
    known_tokens: Array | None, shape: tuple[int, int], mask: int
) -> Int[Array, "B L"]:
    """Int32 [B, L]: the known tokens, or the mask everywhere.

    Raises:
      ValueError: known tokens of another shape, or none of the codes and not the mask.
    """
    if known_tokens is None:
        return jnp.full(shape, mask, jnp.int32)
    if known_tokens.shape != shape:
        raise ValueError(f"known_tokens has shape {known_tokens.shape}; this field needs {shape}")
    check_known_tokens(known_tokens, mask)
    return jnp.asarray(known_tokens, jnp.int32)


def make_target(
    prior: Prior,
    codec: Codec,
    energy: Energy,
    *,
    image_shape: ImageShape | None = None,
    grid: Grid | None = None,
    batch: int = 1,
    objective: Energy | None = None,
    num_samples: int = 1,
    known_tokens: Array | None = None,
    **fields: Any,
) -> Target:
    """A target of any energy, such as a reward; `aps_jax.samplers.sample_target` draws from it.

    Of a sampler's options those that say what is sampled do not apply here (sigma,
    data_consistency, measurement_term, num_samples, decode_scale, image_shape, guidance_scale,
    prior_temperature): they are arguments, or parts of a `measurement` that is given
    (`Measurement.consistency`).

    Args:
      prior: masked transformer.
      codec: tokenizer with as many codes as the prior.
      energy: see `Target`.
      image_shape: (H, W) of the images that the energy reads, clipped to [-1, 1] at the end; None
        where what is decoded is no image, and stays as it is.
      grid: sizes of the token grid; left out, that of images of `image_shape`.
      batch: rows of the energy's data, B.
      objective: see `Target`; the energy if left out.
      num_samples: S per row of the energy's data.
      known_tokens: int32 [B, L], K where unknown; L is the product of the grid.
      **fields: further fields of `Target`: guidance_scale, prior_temperature, decode_scale.

    Raises:
      ValueError: no size is given, prior and codec differ in their codes, known tokens have another
        shape or are no codes, or the energy does not give a number per row.
    """
    if grid is None:
        if image_shape is None:
            raise ValueError(
                "give image_shape=(H, W), or the grid of tokens where there is no image"
            )
        scale = fields.get("decode_scale", 1)
        grid = codec.grid((image_shape[0] * scale, image_shape[1] * scale))
    target = _target(
        prior, codec, energy, grid=grid, image_shape=image_shape, batch=batch, objective=objective,
        num_samples=num_samples, known_tokens=known_tokens, **fields,
    )  # fmt: skip
    some = jnp.zeros((batch, target.tokens.shape[1]), jnp.int32)
    for value in (target.energy, target.objective):
        given = jax.eval_shape(lambda value=value: value(target.decode(target.codes(some))))
        check_energy(value, given, batch)
    return target


def _target(
    prior: Prior,
    codec: Codec,
    energy: Energy,
    *,
    grid: Grid,
    batch: int,
    objective: Energy | None,
    num_samples: int,
    known_tokens: Array | None,
    **fields: Any,
) -> Target:
    if prior.num_codes != codec.num_codes:
        raise ValueError(f"the prior has {prior.num_codes} codes, the codec {codec.num_codes}")
    tokens = start_tokens(known_tokens, (batch, math.prod(grid)), prior.num_codes)
    return Target(
        prior=prior,
        codec=codec,
        energy=energy,
        objective=energy if objective is None else objective,
        tokens=jnp.tile(tokens, (num_samples, 1)),
        grid=tuple(grid),
        num_samples=num_samples,
        **fields,
    )


def measurement_target(
    params: Params, y: PyTree, *, config: SharedConfig, known_tokens: Array | None = None
) -> Target:
    """The posterior of a measurement under the options of a sampler.

    Args:
      params: prior, codec, operator (random state drawn) and, for a perceptual term, LPIPS.
      y: measurement of B images.
      config: any sampler's options: sigma, data_consistency, decode_scale, num_samples,
        image_shape, and, where it has them, measurement_term, perceptual_weight, guidance_scale
        and prior_temperature.
      known_tokens: int32 [B, L], K where unknown.

    Raises:
      ValueError: shapes of y, operator, codec, prior and configuration do not fit together.
    """
    image_shape = fit_shape(params.operator, y, image_shape=config.image_shape)
    side_h, side_w = (side * config.decode_scale for side in image_shape)
    grid = params.codec.grid((side_h, side_w))
    term = getattr(config, "measurement_term", "gaussian")
    return _target(
        params.prior,
        params.codec,
        energies.gaussian(params.operator, y, config.sigma),
        objective=TERMS[term](params, y, config, math.prod(grid)),
        grid=grid,
        batch=jax.tree.leaves(y)[0].shape[0],
        num_samples=config.num_samples,
        known_tokens=known_tokens,
        measurement=measurement_of(params.operator, y, config),
        guidance_scale=or_none(getattr(config, "guidance_scale", 0.0), 0.0),
        prior_temperature=or_none(getattr(config, "prior_temperature", 1.0), 1.0),
        image_shape=image_shape,
        decode_scale=config.decode_scale,
    )
