"""Direct straight-through optimisation of the tokens, without a prior: what the codec alone can do.

No published source; the defaults are ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from aps_jax.codec.expectation import nearest, straight_through
from aps_jax.codec.lfq import LFQ
from aps_jax.config import Evaluations, Knob, check_options
from aps_jax.samplers.config import GradientConfig
from aps_jax.sampling import starts
from aps_jax.sampling.leaves import as_pytree, is_absent
from aps_jax.sampling.optimizers import lenient
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, most_likely
from aps_jax.types import Array, Key, PyTree


class _State(NamedTuple):
    variables: Array
    opt_state: PyTree
    tokens: Array  # those of the least loss so far
    loss: Array
    step: Array


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThroughConfig(GradientConfig):
    """Minimises the measurement term over codes; ends with the hard codes of the least loss seen.

    The prior is not called. A step is one step of Adam, and `info.loss` the least loss so far. All
    options are ours.

    Attributes:
      num_inner_steps: Adam steps; the learning rate falls to 0 along a cosine.
      learning_rate: 0.05 suits bits, 0.1 suits tokens.
      variables: "bits" optimises d numbers per token (codes of signs only), "tokens" K logits,
        "auto" bits with one such code per token (LFQ) and else tokens.
      estimator: "straight_through" decodes the hard code, "relaxed" the soft one (the result is
        quantised all the same; the loss in `info` is then that of the soft code).
      temperature: tau of tanh(s / tau), or of softmax(phi / tau).
      init_noise: std of the normal noise that the variables start from.
    """

    NAME: ClassVar = "straight_through"
    SUMMARY: ClassVar = (
        "the codec alone: optimise codes by the straight-through estimator, no prior"
    )
    PAPER: ClassVar = "arXiv:1308.3432"
    SOURCES: ClassVar = {
        "ours": ("num_inner_steps", "variables", "estimator", "temperature", "init_noise")
    }
    KNOB: ClassVar = Knob("num_inner_steps")

    num_inner_steps: int = 1000
    learning_rate: float = 0.05
    variables: str = "auto"
    estimator: str = "straight_through"
    temperature: float = 1.0
    init_noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_inner_steps": 1},
            choices={
                "variables": ("auto", "bits", "tokens"),
                "estimator": ("straight_through", "relaxed"),
            },
            positive=("temperature",),
            not_negative=("init_noise",),
        )

        if self.num_samples > 1 and is_absent(self.init_noise):
            raise ValueError(
                f"num_samples={self.num_samples} would give equal samples, since nothing is random "
                "here: set init_noise above 0"
            )

    @property
    def num_iterations(self) -> int:
        """Steps of Adam."""
        return self.num_inner_steps

    def init(self, target: Target, keys: Key) -> _State:
        """Variables at noise, or near the encoder's codes.

        Raises:
          ValueError: `variables="bits"` without a codebook of 2**d codes of d signs.
        """
        quantizer = target.codec.quantizer
        if self.variables == "bits" and not isinstance(quantizer, LFQ):
            raise ValueError(
                "variables='bits' needs a codebook of signs (LFQ), got a table of "
                f"{quantizer.num_codes} codes of {quantizer.num_features} numbers; use "
                "variables='tokens'"
            )
        size = quantizer.num_features if self._are_bits(target) else quantizer.num_codes
        shape = (target.tokens.shape[1], size)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
        variables = self.init_noise * noise + self._start(target)
        return _State(
            variables=variables,
            opt_state=self._optimizer.init(variables),
            # Where no loss is ever finite, the first code stands in for the unknown tokens.
            tokens=jnp.where(target.is_unknown, 0, target.tokens),
            loss=jnp.full(target.tokens.shape[0], jnp.inf, jnp.float32),
            step=jnp.zeros((), jnp.int32),
        )

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """One step of Adam."""

        def total(variables: Array) -> tuple[Array, tuple[Array, Array]]:
            codes, tokens = self._codes(target, variables)
            losses = target.objective_of(codes)
            return jnp.sum(losses), (losses, tokens)

        grads, (losses, tokens) = jax.grad(total, has_aux=True)(state.variables)
        updates, opt_state = self._optimizer.update(grads, state.opt_state)
        is_better = losses < state.loss
        state = _State(
            variables=state.variables + cast(Array, updates),
            opt_state=opt_state,
            tokens=jnp.where(is_better[:, None], tokens, state.tokens),
            loss=jnp.where(is_better, losses, state.loss),
            step=state.step + 1,
        )
        info = step_info(
            self, target, state.tokens, state.tokens,
            loss=state.loss, losses=losses[None], num_inner_steps=1,
        )  # fmt: skip
        return state, info

    def _are_bits(self, target: Target) -> bool:
        """Whether the variables are numbers behind signs, not logits of tokens."""
        if self.variables == "auto":
            return isinstance(target.codec.quantizer, LFQ)
        return self.variables == "bits"

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        rates: Any = optax.cosine_decay_schedule(self.learning_rate, self.num_inner_steps)
        return lenient(optax.adam(rates))

    def _start(self, target: Target) -> Array | float:
        """Where the variables begin, but for noise: 0, or the encoder's bits or logits."""
        if is_absent(self.encoder_start):
            return 0.0
        tokens = starts.smooth_tokens(target)
        if self._are_bits(target):
            return self.encoder_start * target.codes(tokens)
        return starts.encoder_logits(target, tokens, self.encoder_start)

    def _codes(self, target: Target, variables: Array) -> tuple[Array, Array]:
        """Codes to decode [R, L, d] and the tokens that they stand for; known tokens stay."""
        if self._are_bits(target):
            soft = jnp.tanh(variables / self.temperature)
            tokens = nearest(target.codec, jax.lax.stop_gradient(variables), target.grid)
        else:
            soft = target.expected_code(variables / self.temperature)
            tokens = most_likely(variables)
        tokens = target.known(tokens)
        if self.estimator == "straight_through":
            soft = straight_through(soft, target.codes(tokens))
        return target.known_codes(soft), tokens

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(denoiser=0, decoder=1, decoder_gradient=self.num_inner_steps)
