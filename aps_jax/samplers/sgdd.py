"""SGDD (arXiv:2503.01161) on a masked prior: split Gibbs between the prior and the measurement.

Target: exp(-E(z)) p(x) D(x, z), where D keeps each token with probability 1 - u and refills it
uniformly otherwise; as u falls to 0 it becomes the posterior.

x, z <- uniform tokens
for k = 1..K, u_k falling:
  prior:      x ~ p(x) D(x, z)       masking and unmasking some tokens of z
  likelihood: z ~ exp(-E(z)) D(x, z) Metropolis-Hastings, one token at a time

The paper's prior diffuses with uniform noise; there the first step is denoising. Here the noise is
a mask and a uniform refill, which is our adaptation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.config import Evaluations, Knob, check_options
from aps_jax.samplers.config import PriorConfig
from aps_jax.sampling import remasking
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, split
from aps_jax.types import Array, Key


class _State(NamedTuple):
    x: Array
    tokens: Array  # z of the split Gibbs sampler
    step: Array


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SGDDConfig(PriorConfig):
    """Split Gibbs; ends with z of the last likelihood step, as the released code does.

    (The paper returns x.) `info.loss` is the energy of z.

    The published latent setting is 70 x (64 denoiser calls + 5000 proposals), 350,000 decodings per
    image; the defaults are a small budget (ours).

    Attributes:
      num_steps: K.
      num_likelihood_steps: Metropolis-Hastings proposals per step, each one decoding.
      num_denoise_steps: calls of the prior that complete a fully masked x. "renoise" takes
        ceil(u_k * num_denoise_steps), "gibbs" all.
      method: "renoise" masks each token of z with probability u_k and completes the rest; not
        reversible, so biased. "gibbs" is the exact partially collapsed Gibbs sampler, if it
        completes one token per call (num_denoise_steps >= L): it masks where z differs from x, and
        elsewhere with the small probability that a refill left the token as it was. With many codes
        it mixes slowly.
      coupling: D of the likelihood step: "exact", or "code" as in the released code, which lacks a
        factor 1 / (K - 1) per changed token and is looser by `looseness`.
      looseness: alpha, multiplies the diffusion time of the "code" coupling.
      proposal: "uniform" code (published) or "bit", one bit of the token flipped (LFQ; ours).
      first_noise: u_1.
      last_noise: u_K, reached geometrically; about 1 / L is small.
    """

    NAME: ClassVar = "sgdd"
    SUMMARY: ClassVar = (
        "SGDD: split Gibbs with Metropolis-Hastings, adapted to masked priors (ours)"
    )
    PAPER: ClassVar = "arXiv:2503.01161"
    SOURCES: ClassVar = {
        "its code": ("looseness", "proposal"),
        "ours": (
            "num_steps", "num_likelihood_steps", "num_denoise_steps", "method", "coupling",
            "first_noise", "last_noise",
        ),
    }  # fmt: skip
    KNOB: ClassVar = Knob("num_likelihood_steps", scales_steps=True)
    STATIC_FLOATS: ClassVar = ("first_noise", "last_noise")  # They decide the calls of the prior.

    num_steps: int = 20
    num_likelihood_steps: int = 100
    num_denoise_steps: int = 16
    method: str = "renoise"
    coupling: str = "exact"
    looseness: float = 10.0
    proposal: str = "uniform"
    first_noise: float = 1.0
    last_noise: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_steps": 1, "num_likelihood_steps": 0, "num_denoise_steps": 1},
            choices={
                "method": ("renoise", "gibbs"),
                "coupling": ("exact", "code"),
                "proposal": ("uniform", "bit"),
            },
            positive=("looseness", "first_noise", "last_noise"),
            shares=("first_noise", "last_noise"),
            falling=("first_noise", "last_noise"),
        )

    @property
    def noises(self) -> tuple[float, ...]:
        """u_k of each step."""
        return tuple(np.geomspace(self.first_noise, self.last_noise, self.num_steps).tolist())

    @property
    def denoise_steps(self) -> tuple[int, ...]:
        """Calls of the prior at each step."""
        if self.method == "gibbs":
            return (self.num_denoise_steps,) * self.num_steps
        # The small term undoes rounding: 0.3 * 10 must not become 4.
        return tuple(max(1, math.ceil(self.num_denoise_steps * u - 1e-9)) for u in self.noises)

    def init(self, target: Target, keys: Key) -> _State:
        """Uniform tokens.

        Raises:
          ValueError: `proposal="bit"` without a codebook of 2**d codes.
        """
        if self.proposal == "bit" and target.mask & (target.mask - 1):
            raise ValueError(f"proposal='bit' needs 2**d codes, got {target.mask}")

        def any_tokens(key: Key) -> Array:
            return jax.random.randint(key, target.tokens.shape[1:], 0, target.mask, jnp.int32)

        start = target.known(jax.vmap(any_tokens)(split(keys, 2)[0]))
        return _State(start, start, jnp.zeros((), jnp.int32))

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """Prior step, then likelihood step."""
        k, x, z = state.step, state.x, state.tokens
        keys = fold(split(keys, 2)[1], k)
        keys_noise, keys_denoise, keys_likelihood = split(keys, 3)
        u = jnp.asarray(self.noises, jnp.float32)[k]

        refill = u / target.mask
        chance = u if self.method == "renoise" else refill / (1 - u + refill)
        is_noised = remasking.pick(keys_noise, chance, target.is_unknown)
        if self.method == "gibbs":
            is_noised |= (z != x) & target.is_unknown
        noised = jnp.where(is_noised, target.mask, z)
        x = self.complete(
            target, keys_denoise, noised, jnp.asarray(self.denoise_steps, jnp.int32)[k]
        )

        # Gibbs needs z to go on from where it is; the published step starts at x.
        start = z if self.method == "gibbs" else x
        z, loss = self._likelihood_step(target, keys_likelihood, x, start, u)
        return _State(x, z, k + 1), step_info(self, target, z, z, loss=loss)

    def log_coupling(self, u: Array, num_codes: int) -> Array:
        """Log D of a changed token minus that of a kept one, at noise u."""
        if self.coupling == "exact":
            return jnp.log(u / num_codes) - jnp.log1p(u / num_codes - u)
        changed = (1 - (1 - u) ** self.looseness) * (num_codes - 1) / num_codes
        return jnp.log(changed + 1e-5) - jnp.log1p(-changed)

    def complete(self, target: Target, keys: Key, tokens: Array, num_steps: Array) -> Array:
        """Fills masks from the prior in random order, evenly over `num_steps` calls.

        One token per call, and thus exact for a perfect prior, if there are as many calls as masks.
        """
        num_masked = jnp.sum(tokens == target.mask, axis=-1, dtype=jnp.int32)

        def step(h: Array, tokens: Array) -> Array:
            keys_draw, keys_order = split(fold(keys, h), 2)
            proposal = draw_tokens(keys_draw, target.carried_log_prior(tokens))
            scores = remasking.random_scores(keys_order, tokens.shape)
            num_left = num_masked * (num_steps - h - 1) // num_steps
            is_kept = remasking.select_by_count(scores, tokens == target.mask, num_left)
            return jnp.where(is_kept, proposal, tokens)

        return jax.lax.fori_loop(0, num_steps, step, tokens)

    def _likelihood_step(
        self, target: Target, keys: Key, x: Array, z: Array, u: Array
    ) -> tuple[Array, Array]:
        """Metropolis-Hastings on exp(-E(z)) D(x, z), from z."""
        rows, length = z.shape
        num_bits = target.mask.bit_length() - 1
        log_change = self.log_coupling(u, target.mask)

        def propose(key: Key) -> tuple[Array, Array, Array, Array]:
            position, code, bit, accept = jax.random.split(key, 4)
            return (
                jax.random.randint(position, (), 0, length, jnp.int32),
                jax.random.randint(code, (), 0, target.mask, jnp.int32),
                jax.random.randint(bit, (), 0, num_bits, jnp.int32),
                jnp.log(jax.random.uniform(accept, (), jnp.float32)),
            )

        def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            z, loss = carry
            position, code, bit, log_uniform = jax.vmap(propose)(fold(keys, j))
            at = (jnp.arange(rows, dtype=jnp.int32), position)
            if self.proposal == "bit":
                code = z[at] ^ (1 << bit)
            proposal = z.at[at].set(code)
            proposed_loss = target.energy_of(proposal)
            change = (code != x[at]).astype(jnp.float32) - (z[at] != x[at]).astype(jnp.float32)
            is_accepted = log_uniform < loss - proposed_loss + log_change * change
            is_accepted &= target.is_unknown[at]
            z = jnp.where(is_accepted[:, None], proposal, z)
            return z, jnp.where(is_accepted, proposed_loss, loss)

        return jax.lax.fori_loop(0, self.num_likelihood_steps, step, (z, target.energy_of(z)))

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(
            denoiser=sum(self.denoise_steps) * self.num_passes,
            decoder=self.num_steps * (1 + self.num_likelihood_steps) + 1,
            decoder_gradient=0,
        )
