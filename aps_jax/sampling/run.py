"""One contract for all samplers, and the one loop that runs them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from aps_jax.config import Evaluations
from aps_jax.sampling.base import BaseTarget
from aps_jax.sampling.target import Target
from aps_jax.types import Array, Key


class StepInfo(NamedTuple):
    """What a sampler tells of one step, per row.

    Attributes:
      loss: objective [R]; NaN for samplers without one.
      is_finite: bool [R].
      num_masked: int32 [R], tokens that are still masked; 0 without tokens.
      num_inner_steps: int32 [R], gradients of the decoder, or of the operator on pixels.
      trace: what `config.trace` asks for, else None.
    """

    loss: Float[Array, " R"]
    is_finite: Bool[Array, " R"]
    num_masked: Int[Array, " R"]
    num_inner_steps: Int[Array, " R"]
    trace: Trace | None


class Trace(NamedTuple):
    """What happened inside a step, per row.

    Attributes:
      losses: objective at every inner step [R, M]; M = 0 for samplers without any.
      tokens: int32 [R, L] after the step, K where masked; None without tokens.
      images: [R, H, W, 3] in [-1, 1] of these tokens, with the step's estimate of masked ones; the
        step's estimate of the clean image for samplers with a denoiser.
    """

    losses: Float[Array, "R M"]
    tokens: Int[Array, "R L"] | None
    images: Float[Array, "R ..."]


@runtime_checkable
class Sampler(Protocol):
    """How to draw from a target, one step at a time; a frozen dataclass of options.

    The target is a `Target` for samplers over tokens and a `PixelTarget` for those with a denoiser.
    The state is a NamedTuple of arrays: `step`, the int32 number of steps done, and `tokens`, int32
    [R, L] with K where masked, or `x`, the images or latents [R, H, W, C] at work.

    Attributes:
      num_iterations: steps from `init` to `finish`.
      trace: whether steps are traced.
    """

    @property
    def num_iterations(self) -> int: ...  # noqa: D102

    @property
    def trace(self) -> bool: ...  # noqa: D102

    def init(self, target: Any, keys: Key) -> Any:
        """The state before the first step, for keys [R], one per row."""
        ...

    def step(self, target: Any, state: Any, keys: Key) -> tuple[Any, StepInfo]:
        """One step; the same keys [R] every time, to be folded with `state.step`."""
        ...

    def finish(self, target: Any, state: Any, keys: Key) -> Array:
        """Clean tokens [R, L], or images or latents [R, H, W, C], of the last state."""
        ...

    def evaluations(self) -> Evaluations:
        """Model calls per row."""
        ...


class SampleResult(NamedTuple):
    """Posterior samples.

    Attributes:
      images: the first sample per measurement, float32 [B, H, W, 3] in [-1, 1].
      tokens: its tokens, int32 [B, L], row-major over the token grid; None without tokens.
      info: per-step scalars with leading axes [T, B, S], and the trace likewise, if asked for.
      samples: all samples [B, S, H, W, 3].
      mean: pixelwise mean over the samples [B, H, W, 3]: of all images, the one of least expected
        squared error, as far as S samples tell. It is smoother than any sample.
      std: pixelwise standard deviation over the samples; 0 for a single one.
      decoded: `samples` as the models alone have them, before data consistency, which also
        explains what is wrong with an operator.
    """

    images: Float[Array, "B ..."]
    tokens: Int[Array, "B L"] | None
    info: StepInfo
    samples: Float[Array, "B S ..."]
    mean: Float[Array, "B ..."]
    std: Float[Array, "B ..."]
    decoded: Float[Array, "B S ..."]


def run(sampler: Sampler, target: BaseTarget, key: Key) -> SampleResult:
    """Draws S samples for each of B measurements; pure, so jit it.

    Args:
      sampler: options of a sampler, with its steps.
      target: what to sample.
      key: one typed key, folded with the row of the batch, or one key per measurement [B]. Sample
        (b, s) depends on its own key and data only.
    """
    keys = target.keys(key)

    def step(state: Any, _: None) -> tuple[Any, StepInfo]:
        return sampler.step(target, state, keys)

    start = sampler.init(target, keys)
    state, info = jax.lax.scan(step, start, None, length=sampler.num_iterations)
    return collect(target, sampler.finish(target, state, keys), info)


def step_info(
    sampler: Sampler,
    target: Target,
    tokens: Int[Array, "R L"],
    estimate: Int[Array, "R L"],
    *,
    loss: Float[Array, " R"] | None = None,
    losses: Float[Array, "M R"] | None = None,
    is_finite: Bool[Array, " R"] | None = None,
    num_inner_steps: int = 0,
) -> StepInfo:
    """What to tell of a step.

    Args:
      sampler: says whether to trace.
      target: what is sampled.
      tokens: int32 [R, L] after the step.
      estimate: clean tokens [R, L] that masks would become; looked at in traces only.
      loss: objective [R], None without one.
      losses: of all inner steps [M, R].
      is_finite: bool [R] of anything else that must be.
      num_inner_steps: gradients of the decoder in this step.
    """
    trace = None
    if sampler.trace:
        clean = jnp.where(tokens == target.mask, estimate, tokens)
        trace = Trace(losses_by_row(losses, tokens.shape[0]), tokens, target.picture(clean))
    return make_info(
        jnp.sum(tokens == target.mask, axis=-1, dtype=jnp.int32),
        loss=loss,
        is_finite=is_finite,
        num_inner_steps=num_inner_steps,
        trace=trace,
    )


def make_info(
    num_masked: Int[Array, " R"],
    *,
    loss: Float[Array, " R"] | None,
    is_finite: Bool[Array, " R"] | None,
    num_inner_steps: int | Array,
    trace: Trace | None,
) -> StepInfo:
    """What to tell of a step of any sampler; arguments as for `step_info`."""
    rows = num_masked.shape[0]
    finite = jnp.ones(rows, bool) if is_finite is None else is_finite
    if loss is None:
        loss = jnp.full(rows, jnp.nan, jnp.float32)
    else:
        finite &= jnp.isfinite(loss)
    return StepInfo(
        loss=loss,
        is_finite=finite,
        num_masked=num_masked,
        num_inner_steps=jnp.full(rows, num_inner_steps, jnp.int32),
        trace=trace,
    )


def losses_by_row(losses: Float[Array, "M R"] | None, rows: int) -> Float[Array, "R M"]:
    """Losses of all inner steps as a trace has them; M is 0 without any."""
    return jnp.zeros((rows, 0), jnp.float32) if losses is None else losses.T


def collect(target: BaseTarget, found: Array, info: StepInfo) -> SampleResult:
    """The result of what `finish` returns, and infos with leading axes [T, R]."""

    def by_sample(leaf: Array) -> Array:
        # Sizes in full: a trace of no inner steps has no numbers to infer one from.
        batch = leaf.shape[0] // target.num_samples
        return jnp.swapaxes(leaf.reshape(target.num_samples, batch, *leaf.shape[1:]), 0, 1)

    pictures = target.picture(found)
    samples = by_sample(target.consistent(pictures))
    tokens = target.tokens_of(found)
    return SampleResult(
        images=samples[:, 0],
        tokens=None if tokens is None else by_sample(tokens)[:, 0],
        info=jax.tree.map(jax.vmap(by_sample), info),
        samples=samples,
        mean=jnp.mean(samples, axis=1),
        std=jnp.std(samples, axis=1),
        decoded=by_sample(pictures),
    )
