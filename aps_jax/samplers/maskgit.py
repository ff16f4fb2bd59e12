"""MaskGIT (arXiv:2202.04200): samples of the prior, whatever the measurement says.

z <- all masked
for i = 1..T: draw every masked token, keep the most confident, mask the rest again
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from aps_jax.config import Evaluations
from aps_jax.samplers import decoding
from aps_jax.samplers.config import DecodingConfig
from aps_jax.samplers.decoding import Decoding
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target
from aps_jax.types import Key


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGITConfig(DecodingConfig):
    """Samples of the prior; of the measurement only its shape is read.

    Source: arXiv:2202.04200, section 3.2. With `reveal="random"` and one token per step it is an
    exact sampler of a perfect prior; "confidence" prefers the prior's likely images. The defaults
    are MaskGIT's, with APS's 15 steps (ours); its code has 12 to 16 steps and a noise temperature
    of 4.5. `sigma` is not used, and `info.loss` is NaN, for there is no objective.
    """

    NAME: ClassVar = "maskgit"
    SUMMARY: ClassVar = "samples of the prior, no measurement"
    PAPER: ClassVar = "arXiv:2202.04200"

    def init(self, target: Target, keys: Key) -> Decoding:
        """Everything masked but the known tokens."""
        return decoding.start(target.tokens)

    def step(self, target: Target, state: Decoding, keys: Key) -> tuple[Decoding, StepInfo]:
        """One call of the prior; some of its draws are kept."""
        state, estimate = decoding.decode_step(self, target, keys, state, state.step)
        return state, step_info(self, target, state.tokens, estimate)

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(self.num_steps * self.num_passes, decoder=1, decoder_gradient=0)
