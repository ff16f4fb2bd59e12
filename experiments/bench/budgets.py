"""Budgets: what a sampler may do, in decoder evaluations, seconds or FLOPs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from aps_jax.config import SharedConfig
from experiments.bench.settings import Count, Number, Part, Settings

if TYPE_CHECKING:
    from experiments.bench.study import Method

_Cost = Annotated[Number, Field(ge=0)]

#: What operators and starts may add to the calls of the networks, as a share of the budget.
TOLERANCE = 0.02


class Calls(Settings):
    """GFLOPs of one call, for one photo.

    Attributes:
      denoiser: of the prior over tokens, or of the denoiser of pixels; with its gradient for
        samplers that take one through it.
      decoder: forward.
      decoder_gradient: forward and backward.
    """

    denoiser: _Cost
    decoder: _Cost
    decoder_gradient: _Cost


class OtherCalls(Settings):
    """`Calls` of a method whose networks are others than the budget's; None where they are not."""

    denoiser: _Cost | None = None
    decoder: _Cost | None = None
    decoder_gradient: _Cost | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """A limit in GFLOPs per sample, final picture included.

    Attributes:
      most: the limit.
      calls: what is counted.
    """

    most: float
    calls: Calls

    def cost(self, config: SharedConfig) -> float:
        """GFLOPs of the networks per sample."""
        made = config.evaluations()
        return (
            made.denoiser * self.calls.denoiser
            + made.decoder * self.calls.decoder
            + made.decoder_gradient * self.calls.decoder_gradient
        )

    def require(self, label: str, flops: Any) -> None:
        """ValueError if a method's counted FLOPs are beyond the limit."""
        if flops > (1 + TOLERANCE) * 1e9 * self.most:
            raise ValueError(
                f"method {label!r} makes {flops / 1e9:.0f} GFLOPs per photo, beyond the budget of "
                f"{self.most:g}: correct the budget's `calls`, or the method's"
            )


class Budget(Part):
    """How much work a method may do per sample: `evaluations` or `gflops`.

    Attributes:
      evaluations: runs of the decoder.
      gflops: floating-point operations of all networks, in 1e9, as `calls` counts them.
      calls: what a call of each network costs.
      seconds_of: instead of a number of its own, everyone gets the seconds per photo that this
        method takes for `evaluations`.
      tasks: labels of the tasks that it is for; None for all.
    """

    evaluations: Count | None = None
    gflops: Annotated[Number, Field(gt=0)] | None = None
    calls: Calls | None = None
    seconds_of: str | None = None
    tasks: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _has_one_unit(self) -> Self:
        if (self.evaluations is None) == (self.gflops is None):
            raise ValueError("needs evaluations, or gflops and calls")
        if (self.gflops is None) != (self.calls is None) or (self.gflops and self.seconds_of):
            raise ValueError("gflops and calls belong together, without seconds_of")
        return self

    def limit(self, method: Method) -> int | Work:
        """What a method may do: a number of decoder evaluations, or of FLOPs."""
        if self.calls is None:
            assert self.evaluations is not None  # One of the two is there.
            return self.evaluations
        own = method.calls.model_dump(exclude_none=True)
        return Work(self.gflops or 0.0, self.calls.changed(**own))
