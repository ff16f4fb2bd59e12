"""ReDGE (arXiv:2601.00781): G2D2's layout with a reparameterised diffusion as the estimator.

z <- all masked
for i = 1..T:
  phi <- the prior's log-probabilities; clean tokens stay one-hot
  phi <- Adam steps on measurement term(sample of phi) + kl_weight KL(softmax(phi) || prior),
         the sample being differentiable in phi
  z <- a draw from phi; then mask a scheduled number, anywhere
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax.codec.expectation import straight_through
from aps_jax.config import check_options
from aps_jax.samplers.config import StarConfig
from aps_jax.samplers.g2d2 import star_transition
from aps_jax.sampling import starts
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.inner_loop import descend
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.objective import kl_term
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, most_likely, split
from aps_jax.types import Array, Key


class _State(NamedTuple):
    tokens: Array
    step: Array
    estimate: Array | None  # tokens of the smooth start, if phi begins near them


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReDGEConfig(StarConfig):
    """G2D2's layout with a better estimator of the gradient; clean tokens stay one-hot.

    `info.loss` is the objective at the last inner step. The defaults are the released MaskGIT
    demo's. That demo multiplies its own reward by 100 and guides with scale 3; here the measurement
    term has weight 1 and guidance is off unless asked for.

    Attributes:
      learning_rate: of Adam.
      measurement_weight: of the measurement term.
      kl_weight: of the exact KL, summed over masked tokens.
      estimator: "redge"; "gumbel", straight-through Gumbel-softmax; or "straight_through", a draw
        with the gradient of softmax(phi).
      gumbel_temperature: of "gumbel".
      num_diffusion_steps: n of "redge", the noise levels of its reverse diffusion; 3 to 9.
      first_noise: t_1 of "redge", the least noise level but 0; 0.3 to 0.9.
    """

    NAME: ClassVar = "redge"
    SUMMARY: ClassVar = "ReDGE: gradients through a reparameterised diffusion"
    PAPER: ClassVar = "arXiv:2601.00781"
    SOURCES: ClassVar = {
        "its code, MaskGIT demo": (
            "num_steps", "num_inner_steps", "learning_rate", "kl_weight", "estimator",
            "gumbel_temperature", "num_diffusion_steps", "first_noise",
        ),
        "ours": ("measurement_weight", "schedule"),
    }  # fmt: skip
    STATIC_FLOATS: ClassVar = ("first_noise",)  # It decides the levels of the reverse diffusion.

    num_steps: int = 20
    num_inner_steps: int = 20
    learning_rate: float = 0.5
    measurement_weight: float = 1.0
    kl_weight: float = 1.0
    estimator: str = "redge"
    gumbel_temperature: float = 0.5
    num_diffusion_steps: int = 5
    first_noise: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_diffusion_steps": 3},
            choices={"estimator": ("redge", "gumbel", "straight_through")},
            not_negative=("measurement_weight", "kl_weight"),
            positive=("gumbel_temperature", "first_noise"),
            shares=("first_noise",),
        )

    def init(self, target: Target, keys: Key) -> _State:
        """Everything masked but the known tokens."""
        estimate = starts.estimate_if(target, self.encoder_start)
        return _State(target.tokens, jnp.zeros((), jnp.int32), estimate)

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """One timestep."""
        i, tokens = state.step, state.tokens
        keys_refine, keys_draw, keys_mask = split(fold(keys, i), 3)
        log_prior = target.carried_log_prior(tokens)
        phi = starts.raised(target, log_prior, state.estimate, self.encoder_start)
        is_masked = tokens == target.mask

        def losses_of(phi: Array, j: Array) -> Array:
            codes = self.sample_code(target, fold(keys_refine, j), phi)
            codes = target.known_codes(codes, tokens)
            kl = jnp.where(is_masked, kl_term(phi, log_prior, is_exact=True), 0.0)
            losses = self.measurement_weight * target.objective_of(codes)
            return losses + self.kl_weight * jnp.sum(kl, axis=-1)

        refined = descend(losses_of, phi, optax.adam(self.learning_rate), self.num_inner_steps)
        # Clean tokens are not optimised, so they are drawn again as they are.
        clean = jnp.where(is_masked, draw_tokens(keys_draw, refined.phi), tokens)
        moved = star_transition(self, target, keys_mask, clean, i)
        info = step_info(
            self, target, moved, jnp.where(is_masked, most_likely(refined.phi), tokens),
            loss=refined.loss if self.num_inner_steps else None,
            losses=refined.losses, num_inner_steps=self.num_inner_steps,
        )  # fmt: skip
        return state._replace(tokens=moved, step=i + 1), info

    def sample_code(self, target: Target, keys: Key, phi: Array) -> Array:
        """Codes [R, L, d] of draws from softmax(phi), with the gradient of a soft sample."""
        keys_noise, keys_draw = split(keys, 2)
        if self.estimator == "straight_through":
            soft = jax.nn.softmax(phi, axis=-1)
        elif self.estimator == "gumbel":
            noise = jax.vmap(lambda key: jax.random.gumbel(key, phi.shape[1:], jnp.float32))
            soft = jax.nn.softmax((phi + noise(keys_noise)) / self.gumbel_temperature, axis=-1)
        else:
            noise = jax.vmap(lambda key: jax.random.normal(key, phi.shape[1:], jnp.float32))
            soft = diffuse(
                phi,
                noise(keys_noise),
                num_diffusion_steps=self.num_diffusion_steps,
                first_noise=self.first_noise,
            )
        log_probs = jnp.log(soft + jnp.finfo(jnp.float32).tiny)
        if self.estimator == "gumbel":
            tokens = most_likely(log_probs)
        else:
            tokens = draw_tokens(keys_draw, jax.lax.stop_gradient(log_probs))
        return straight_through(target.expected_code(log_probs), target.codes(tokens))


def diffuse(phi: Array, x: Array, *, num_diffusion_steps: int, first_noise: float) -> Array:
    """Deterministic reverse diffusion from normal noise to a nearly one-hot sample of softmax(phi).

    The clean variable is one-hot, x_t = alpha_t x_0 + sigma_t noise with sigma = 1 - alpha, so its
    posterior mean is softmax(phi + alpha_t x_t / sigma_t^2), exactly, without a network.

    Args:
      phi: logits [R, L, K].
      x: standard normal noise [R, L, K].
      num_diffusion_steps: n noise levels; more make the sample's law closer to softmax(phi).
      first_noise: the least level of noise but 0.

    Returns:
      The last posterior mean [R, L, K], differentiable in phi.
    """
    alphas = np.append(1.0, np.linspace(1 - first_noise, 1e-4, num_diffusion_steps - 1))
    soft = jax.nn.softmax(phi, axis=-1)
    for t in range(num_diffusion_steps - 1, 0, -1):
        alpha_t, sigma_t = float(alphas[t]), float(1 - alphas[t])
        alpha_s, sigma_s = float(alphas[t - 1]), float(1 - alphas[t - 1])
        soft = jax.nn.softmax(phi + alpha_t * x / sigma_t**2, axis=-1)
        x = alpha_s * soft + sigma_s * (x - alpha_t * soft) / sigma_t
    return soft
