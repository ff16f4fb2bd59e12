"""Best of n: samples of the prior, of which the one that fits the measurement best is kept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aps_jax.config import Evaluations, check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers import decoding
from aps_jax.samplers.config import DecodingConfig
from aps_jax.samplers.problem import energy, finish, fold, pose, step_info
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNConfig(DecodingConfig):
    """Options of `best_of_n_sample`; the budget decides n, so its default is ours.

    Attributes:
      num_candidates: n, drawn one after the other, so memory does not grow with it.
    """

    num_candidates: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, integers={"num_candidates": 1})

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        num_calls = self.num_candidates * self.num_steps * self.num_passes
        return Evaluations(num_calls, decoder=self.num_candidates + 1, decoder_gradient=0)


def best_of_n_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: BestOfNConfig = BestOfNConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Keeps the candidate of least energy, the first one on ties; not a posterior sample.

    Candidate j is the sample that `maskgit_sample` returns for the row's key folded with j.

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; T of `info` is n, and `info.loss` the least energy so far.

    Raises:
      ValueError: shapes do not fit together.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)

    def draw(j: Array) -> Array:
        keys = fold(problem.keys, j)
        return jax.lax.fori_loop(
            0,
            config.num_steps,
            lambda i, state: decoding.decode_step(problem, keys, state, i),
            decoding.start(problem.tokens),
        ).tokens

    def step(best: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], StepInfo]:
        tokens = draw(j)
        loss = energy(problem, tokens)
        # The first candidate stands even if its energy is NaN: a failed run has no masks either.
        is_better = (loss < best[1]) | (j == 0) | jnp.isnan(best[1])
        tokens = jnp.where(is_better[:, None], tokens, best[0])
        loss = jnp.where(is_better, loss, best[1])
        return (tokens, loss), step_info(problem, tokens, loss)

    start = (problem.tokens, jnp.full(problem.tokens.shape[0], jnp.inf, jnp.float32))
    (tokens, _), info = jax.lax.scan(
        step, start, jnp.arange(config.num_candidates, dtype=jnp.int32)
    )
    return finish(problem, tokens, info)
