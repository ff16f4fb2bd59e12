"""MaskGIT (arXiv:2202.04200): samples of the prior, whatever the measurement says.

z <- all masked
for i = 1..T: draw every masked token, keep the most confident, mask the rest again
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aps_jax.config import Evaluations
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers import decoding
from aps_jax.samplers.config import DecodingConfig
from aps_jax.samplers.problem import finish, pose, step_info
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGITConfig(DecodingConfig):
    """Options of `maskgit_sample`; the defaults are MaskGIT's, with APS's 15 steps (ours).

    MaskGIT's code has 12 to 16 steps and a noise temperature of 4.5. `sigma` is not used.
    """

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(self.num_steps * self.num_passes, decoder=1, decoder_gradient=0)


def maskgit_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: MaskGITConfig = MaskGITConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Samples from the prior; of the measurement only its shape is read.

    Source: arXiv:2202.04200, section 3.2. With `reveal="random"` and one token per step it is an
    exact sampler of a perfect prior; "confidence" prefers the prior's likely images.

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; `info.loss` is NaN, for there is no objective.

    Raises:
      ValueError: shapes do not fit together.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)

    def step(state: decoding.Decoding, i: Array) -> tuple[decoding.Decoding, StepInfo]:
        state = decoding.decode_step(problem, problem.keys, state, i)
        return state, step_info(problem, state.tokens)

    start = decoding.start(problem.tokens)
    state, info = jax.lax.scan(step, start, jnp.arange(config.num_steps, dtype=jnp.int32))
    return finish(problem, state.tokens, info)
