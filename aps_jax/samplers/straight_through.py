"""Direct straight-through optimisation of the tokens, without a prior: what the codec alone can do.

No published source; the defaults are ours.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from aps_jax.codec import lfq
from aps_jax.config import Evaluations, check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers.config import GradientConfig
from aps_jax.samplers.problem import (
    Problem,
    codes_of,
    encoder_bonus,
    finish,
    measurement_term,
    pose,
    smooth_tokens,
    step_info,
    with_known_codes,
    with_known_tokens,
)
from aps_jax.sampling.likelihood import expected_code
from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThroughConfig(GradientConfig):
    """Options of `straight_through_sample` (all ours).

    Attributes:
      num_inner_steps: Adam steps; the learning rate falls to 0 along a cosine.
      learning_rate: 0.05 suits bits, 0.1 suits tokens.
      variables: "bits" optimises d numbers per token (LFQ codebooks only), "tokens" K logits.
      estimator: "straight_through" decodes the hard code, "relaxed" the soft one (the result is
        quantised all the same; the loss in `info` is then that of the soft code).
      temperature: tau of tanh(s / tau), or of softmax(phi / tau).
      init_noise: std of the normal noise that the variables start from.
    """

    num_inner_steps: int = 1000
    learning_rate: float = 0.05
    variables: str = "bits"
    estimator: str = "straight_through"
    temperature: float = 1.0
    init_noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_inner_steps": 1},
            choices={
                "variables": ("bits", "tokens"),
                "estimator": ("straight_through", "relaxed"),
            },
            positive=("temperature",),
            not_negative=("init_noise",),
        )

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(denoiser=0, decoder=1, decoder_gradient=self.num_inner_steps)


class _State(NamedTuple):
    variables: Array
    opt_state: PyTree
    tokens: Array  # those of the least loss so far
    loss: Array


def straight_through_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: StraightThroughConfig = StraightThroughConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Minimises the measurement term over codes; returns the hard codes of the least loss seen.

    Args:
      params: as for `aps_sample`; the prior is not called.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; T of `info` is 1 and `info.loss` the least loss.

    Raises:
      ValueError: shapes do not fit together, or `variables="bits"` without an LFQ codebook.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)
    num_codes, num_bits = params.codec.codebook.shape
    if config.variables == "bits" and num_codes != 2**num_bits:
        raise ValueError(
            f"variables='bits' needs a codebook of 2**d codes of d bits, got {num_codes} codes of "
            f"{num_bits} numbers; use variables='tokens'"
        )
    size = num_bits if config.variables == "bits" else num_codes
    shape = (problem.tokens.shape[1], size)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(problem.keys)
    variables = config.init_noise * noise + _start(problem)
    rates = optax.cosine_decay_schedule(config.learning_rate, config.num_inner_steps)
    optimizer = lenient(optax.adam(rates))

    def total(variables: Array) -> tuple[Array, tuple[Array, Array]]:
        codes, tokens = _codes(problem, variables)
        losses = measurement_term(problem, codes)
        return jnp.sum(losses), (losses, tokens)

    def step(state: _State, _: None) -> tuple[_State, None]:
        grads, (losses, tokens) = jax.grad(total, has_aux=True)(state.variables)
        updates, opt_state = optimizer.update(grads, state.opt_state)
        is_better = losses < state.loss
        return _State(
            variables=state.variables + updates,
            opt_state=opt_state,
            tokens=jnp.where(is_better[:, None], tokens, state.tokens),
            loss=jnp.where(is_better, losses, state.loss),
        ), None

    start = _State(
        variables,
        optimizer.init(variables),
        # Where no loss is ever finite, the first code stands in for the unknown tokens.
        jnp.where(problem.is_unknown, 0, problem.tokens),
        jnp.full(problem.tokens.shape[0], jnp.inf, jnp.float32),
    )
    state, _ = jax.lax.scan(step, start, None, length=config.num_inner_steps)
    info: StepInfo = step_info(problem, state.tokens, state.loss)
    return finish(problem, state.tokens, jax.tree.map(lambda leaf: leaf[None], info))


def _start(problem: Problem) -> Array | float:
    """Where the variables begin, but for noise: 0, or the encoder's bits or logits."""
    config = problem.config
    assert isinstance(config, StraightThroughConfig)
    if config.encoder_start == 0 or config.variables == "tokens":
        return encoder_bonus(problem)
    return config.encoder_start * codes_of(problem, smooth_tokens(problem))


def _codes(problem: Problem, variables: Array) -> tuple[Array, Array]:
    """Codes to decode [R, L, d] and the tokens that they stand for; known tokens stay."""
    config, codec = problem.config, problem.params.codec
    assert isinstance(config, StraightThroughConfig)
    if config.variables == "bits":
        soft = jnp.tanh(variables / config.temperature)
        _, tokens = lfq.quantize(codec.codebook, jax.lax.stop_gradient(variables))
    else:
        soft = expected_code(codec, variables / config.temperature)
        tokens = jnp.argmax(variables, axis=-1).astype(jnp.int32)
    tokens = with_known_tokens(problem, tokens)
    if config.estimator == "straight_through":
        soft = lfq.straight_through(soft, codes_of(problem, tokens))
    return with_known_codes(problem, soft), tokens
