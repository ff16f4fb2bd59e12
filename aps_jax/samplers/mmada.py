"""MMaDA's own text-to-image generation: samples of the prior, to compare runs token by token.

It is MaskGIT's decoding as MMaDA's code has it (Show-o's has the same), which differs from
`maskgit` here in what follows.

- Counts are floor(L * cos(pi/2 * r)) in float32, where r = i/T is the progress: 511 of 1024 tokens
  at r = 2/3, not 512. Ours are rounded down from exact numbers.
- L is all tokens of the image, not those unknown at the start: where half is given, every step
  reveals only one token until the schedule falls below one half.
- At least one token is masked after every step, so that the last step draws one token at least;
  with more steps than tokens the last one is drawn again and again. Ours may end early.
- The noise on the log-confidence is multiplied by 1 - r at every step: from 1, in five steps, 0.8,
  0.48, 0.192, 0.0384, 0. Ours is 4.5 * (1 - r).
- A token is the largest of p / e with exponential noise e, which is how torch draws one.

MMaDA's code runs in the model's dtype, often bfloat16; here all this is float32 after the logits.
For the same tokens as a run in torch, let that take the numbers of `draw_noise`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.config import Evaluations, check_options
from aps_jax.samplers.config import PriorConfig
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, split
from aps_jax.types import Array, Key

#: Least probability and least uniform number that a logarithm is taken of.
_TINY = 1e-20


class Noise(NamedTuple):
    """All chance of one step, float32.

    Attributes:
      exponential: [R, L, K], of rate 1, for the draw of the tokens.
      uniform: [R, L] in [0, 1), for the choice of those that stay.
    """

    exponential: Array
    uniform: Array


def draw_noise(keys: Key, step: Array | int, shape: tuple[int, int]) -> Noise:
    """The noise of step i in [0, T) for rows of keys [R] and of shape (L, K)."""
    keys_draw, keys_keep = split(fold(keys, step), 2)
    return Noise(
        jax.vmap(lambda key: jax.random.exponential(key, shape, jnp.float32))(keys_draw),
        jax.vmap(lambda key: jax.random.uniform(key, shape[:1], jnp.float32))(keys_keep),
    )


def scheduled_counts(num_steps: int, num_tokens: int) -> np.ndarray:
    """Tokens that the schedule leaves masked after each step, int32 [T]; the last is -1.

    Every operation is rounded to float32, as on tensors, so that cos(pi/3) comes out just below one
    half and cos(pi/2) just below zero.
    """
    progress = np.float32(np.arange(1, num_steps + 1) / num_steps)
    angles = np.float32(np.float32(progress * np.float32(np.pi)) * np.float32(0.5))
    shares = np.float32(np.cos(np.float64(angles)))
    return np.floor(np.float32(num_tokens) * shares).astype(np.int32)


def temperatures(num_steps: int, start: float) -> np.ndarray:
    """Noise temperature of each step, float32 [T]: `start` times all (1 - r) so far."""
    progress = np.arange(1, num_steps + 1) / num_steps
    return (start * np.cumprod(1 - progress)).astype(np.float32)


def transition(
    tokens: Array, probs: Array, noise: Noise, count: Array, temperature: Array
) -> tuple[Array, Array]:
    """One step of MMaDA's decoding.

    Args:
      tokens: int32 [R, L], K where masked.
      probs: the prior's [R, L, K] for these tokens.
      noise: of this step.
      count: what `scheduled_counts` has for this step.
      temperature: what `temperatures` has for this step.

    Returns:
      The tokens of the next step, and those without a mask that the last step gives; int32 [R, L].
    """
    mask = probs.shape[-1]
    is_unknown = tokens == mask
    drawn = jnp.argmax(probs / noise.exponential, axis=-1).astype(jnp.int32)
    proposal = jnp.where(is_unknown, drawn, tokens)
    chosen = jnp.take_along_axis(probs, proposal[..., None], axis=-1)[..., 0]
    # Known tokens are as certain as float32 can say: log 88.7, out of the reach of the noise.
    chosen = jnp.where(is_unknown, chosen, jnp.finfo(jnp.float32).max)
    gumbel = -jnp.log(jnp.maximum(-jnp.log(jnp.maximum(noise.uniform, _TINY)), _TINY))
    confidence = jnp.log(jnp.maximum(chosen, _TINY)) + temperature * gumbel
    num_masked = jnp.maximum(
        1, jnp.minimum(jnp.sum(is_unknown, axis=-1, dtype=jnp.int32) - 1, count)
    )
    cut = jnp.take_along_axis(jnp.sort(confidence), num_masked[:, None], axis=-1, mode="clip")
    # Where nothing is unknown the original would mask a given token; we never do.
    return jnp.where((confidence < cut) & is_unknown, mask, proposal), proposal


class _State(NamedTuple):
    tokens: Array
    step: Array


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class MMaDAConfig(PriorConfig):
    """Samples of the prior as MMaDA's code draws them; of the measurement only its shape is read.

    Source: arXiv:2505.15809 and the `t2i_generate` of its code, whose defaults these are; its
    README has 15 steps and `guidance_scale` 3.5. `sigma` is not used, and `info.loss` is NaN, for
    there is no objective.

    Attributes:
      num_steps: timesteps T.
      gumbel_temperature: tau before the first step; step i multiplies it by 1 - i/T.
    """

    NAME: ClassVar = "mmada"
    SUMMARY: ClassVar = "samples of the prior exactly as MMaDA's code draws them, no measurement"
    PAPER: ClassVar = "arXiv:2505.15809"
    SOURCES: ClassVar = {"code of MMaDA": ("num_steps", "gumbel_temperature")}
    STATIC_FLOATS: ClassVar = ("gumbel_temperature",)  # Rounded as Python rounds it.

    num_steps: int = 18
    gumbel_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, integers={"num_steps": 1}, not_negative=("gumbel_temperature",))

    def init(self, target: Target, keys: Key) -> _State:
        """Everything masked but the known tokens."""
        return _State(target.tokens, jnp.zeros((), jnp.int32))

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """One call of the prior; the surest draws are kept, but for one at least."""
        i, num_tokens = state.step, target.tokens.shape[1]
        counts = jnp.asarray(scheduled_counts(self.num_steps, num_tokens))
        taus = jnp.asarray(temperatures(self.num_steps, self.gumbel_temperature))
        probs = jnp.exp(target.log_prior(state.tokens))
        noise = draw_noise(keys, i, (num_tokens, target.mask))
        tokens, proposal = transition(state.tokens, probs, noise, counts[i], taus[i])
        tokens = jnp.where(i == self.num_steps - 1, proposal, tokens)
        return _State(tokens, i + 1), step_info(self, target, tokens, proposal)

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(self.num_steps * self.num_passes, decoder=1, decoder_gradient=0)
