"""Runs a sampler from the host: progress, snapshots and resume.

`restore` calls the same `step` as the scan of `aps_jax.sampling.run` does, compiled once, so the
samples are the same; whatever needs the host happens between steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.config import SharedConfig
from aps_jax.denoiser import PixelParams
from aps_jax.flops import flops_of, flops_per_second
from aps_jax.io.snapshot import Snapshot, SnapshotError
from aps_jax.presets import config_class
from aps_jax.samplers import check_model, sampler_of, target_of
from aps_jax.sampling.base import BaseTarget
from aps_jax.sampling.checks import check_measured_values
from aps_jax.sampling.run import SampleResult, StepInfo, Trace, collect
from aps_jax.types import Array, Key, Params, PyTree

__all__ = [
    "DivergedError", "Restored", "Snapshot", "SnapshotError", "StepReport", "restore",
    "restore_target",
]  # fmt: skip

#: Seconds between snapshots, so that writing them never takes longer than the steps.
SNAPSHOT_SECONDS = 1.0
#: Share of the rate of matrix products at which timesteps run on two CPU cores, measured by
#: `experiments.speed` with the preset "balanced".
_RATE_SHARE = 0.46


@jax.jit
def _init(config: SharedConfig, target: BaseTarget, key: Key) -> Any:
    return sampler_of(config).init(target, target.keys(key))


@jax.jit
def _step(config: SharedConfig, target: BaseTarget, state: Any, key: Key) -> tuple[Any, StepInfo]:
    return sampler_of(config).step(target, state, target.keys(key))


@jax.jit
def _finish(
    config: SharedConfig, target: BaseTarget, state: Any, info: StepInfo, key: Key
) -> SampleResult:
    return collect(target, sampler_of(config).finish(target, state, target.keys(key)), info)


class DivergedError(ArithmeticError):
    """The objective became NaN or infinite."""


def lower(config: SharedConfig) -> list[str]:
    """What to do about a sampler that diverged, "lower X or Y", if it has such options."""
    options = ("learning_rate", "step_size", "prior_weight")
    names = " or ".join(name for name in options if hasattr(config, name))
    return [f"lower {names}"] if names else []


class StepReport(NamedTuple):
    """What `on_step` is told: once before the first step, then after each.

    Attributes:
      num_done: steps done.
      num_steps: steps in all.
      loss: objective at the last inner step, mean over images and samples; NaN before the first
        step. For the "l1" term it is divided by the number of tokens, so it reads as a mean
        absolute error plus the other terms.
      num_masked: tokens still masked, mean over images and samples.
      trace: of the last step, per row, where the options ask for it.
      seconds: in the first report alone, what the steps that are left will take, a rough guess from
        their arithmetic; None where that says too little, as on accelerators.
    """

    num_done: int
    num_steps: int
    loss: float
    num_masked: float
    trace: Trace | None = None
    seconds: float | None = None


class Restored(NamedTuple):
    """Samples and what they cost.

    Attributes:
      result: as from `aps_sample`.
      seconds: wall-clock time: "compile" of the step, "sample" and "decode" (the last decoding
        and data consistency, with their own compilation). Time before an interruption is included
        in "sample".
      calls: evaluations summed over images and samples: "denoiser", "decoder_gradient" (forward and
        backward) and "decoder" (forward only).
    """

    result: SampleResult
    seconds: dict[str, float]
    calls: dict[str, int]


def restore(
    params: Params | PixelParams,
    y: PyTree,
    key: Key,
    *,
    config: SharedConfig,
    sampler: str = "aps",
    known_tokens: Array | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    snapshot: Snapshot | None = None,
) -> Restored:
    """Samples like `aps_sample`, from a host loop over one compiled step.

    Args:
      params: as for `aps_jax.samplers.sample`.
      y: as for `aps_sample`; also NumPy arrays.
      key: as for `aps_sample`.
      config: options of the sampler, such as `presets.make_config` gives.
      sampler: key of `VARIANTS` or of `aps_jax.samplers.SAMPLERS`.
      known_tokens: as for `aps_sample`.
      on_step: as for `restore_target`, and so is `snapshot`.
      snapshot: see `on_step`.

    Returns:
      As `restore_target`.

    Raises:
      ValueError: as `aps_sample`; or for an unknown sampler or another sampler's options.
      SnapshotError: as `restore_target`.
      DivergedError: as `restore_target`.
    """
    kind = config_class(sampler)
    if type(config) is not kind:
        raise ValueError(
            f"sampler {sampler!r} takes a {kind.__name__}, got a {type(config).__name__}; "
            "presets.make_config makes the right one"
        )
    y = jax.tree.map(jnp.asarray, y)
    target = target_of(params, y, config=config, known_tokens=known_tokens)
    check_measured_values(params.operator, y, float(config.sigma))
    return restore_target(target, key, config=config, on_step=on_step, snapshot=snapshot)


def restore_target(
    target: BaseTarget,
    key: Key,
    *,
    config: SharedConfig,
    on_step: Callable[[StepReport], None] | None = None,
    snapshot: Snapshot | None = None,
) -> Restored:
    """Samples like `aps_jax.samplers.sample_target`, from a host loop over one compiled step.

    Ctrl-C gets through at any moment except while something compiles; the snapshot is then that of
    the last finished step.

    Args:
      target: prior, energy and known tokens.
      key: as for `aps_sample`.
      config: options of a sampler; those of what is sampled are the target's.
      on_step: called with a `StepReport` before the first and after each step.
      snapshot: written after steps, at most once in `SNAPSHOT_SECONDS` and when interrupted, and
        read first if it `is_resuming`. The caller removes it once the result is safe.

    Returns:
      The samples and what they cost. The same arguments give the same samples, resumed or not.

    Raises:
      ValueError: the sampler cannot draw from the target.
      SnapshotError: if the snapshot cannot be resumed from.
      DivergedError: as soon as the objective is not finite.
    """
    check_model(config, has=target.kind)
    loop = _Loop(config, target, key)
    if snapshot is not None and snapshot.is_resuming:
        loop.resume(snapshot)
    else:
        loop.begin()
    loop.compile()
    loop.report(on_step, is_first=True)
    saved_at = time.perf_counter()
    try:
        while loop.num_done < loop.num_steps:
            loop.advance()
            is_due = time.perf_counter() - saved_at > SNAPSHOT_SECONDS
            if snapshot is not None and (is_due or loop.num_done == loop.num_steps):
                loop.save(snapshot)
                saved_at = time.perf_counter()
            loop.report(on_step)
    except KeyboardInterrupt:
        if snapshot is not None:
            loop.save(snapshot)
        raise
    return loop.finish()


class _Loop:
    """The run so far; steps replace its state at once, so it is whole at any moment."""

    def __init__(self, config: SharedConfig, target: BaseTarget, key: Key) -> None:
        self.config, self.target, self.key = config, target, key
        self.num_steps: int = sampler_of(config).num_iterations
        self.seconds = {"compile": 0.0, "sample": 0.0, "decode": 0.0}
        self.progress: tuple[Any, list[StepInfo]] = (None, [])

    @property
    def num_done(self) -> int:
        return len(self.progress[1])

    def begin(self) -> None:
        clock = time.perf_counter()
        init = _init.lower(self.config, self.target, self.key).compile()
        self.seconds["compile"] += time.perf_counter() - clock
        clock = time.perf_counter()
        state = init(self.config, self.target, self.key)
        _wait(state)
        self.seconds["sample"] += time.perf_counter() - clock
        self.progress = (state, [])

    def resume(self, snapshot: Snapshot) -> None:
        start = jax.eval_shape(_init, self.config, self.target, self.key)
        info = jax.eval_shape(_step, self.config, self.target, start, self.key)[1]
        state, infos, self.seconds["sample"] = snapshot.load(start, info)
        self.progress = (state, infos)

    def compile(self) -> None:
        """Ahead, so that it can be timed; a second run of the same shapes finds it cached."""
        clock = time.perf_counter()
        if self.num_done < self.num_steps:
            state = self.progress[0]
            traced = _step.trace(self.config, self.target, state, self.key)
            self._step = traced.lower().compile()
            self._jaxpr = traced.jaxpr.jaxpr
        self.seconds["compile"] += time.perf_counter() - clock

    def advance(self) -> None:
        clock = time.perf_counter()
        state, infos = self.progress
        state, info = self._step(self.config, self.target, state, self.key)
        _wait((state, info))
        info = jax.device_get(info)
        if not np.all(info.is_finite):
            raise DivergedError(
                f"the objective is not finite after step {len(infos) + 1} of {self.num_steps}; "
                + ", or ".join(["check the measurement", *lower(self.config)])
            )
        self.progress = (state, [*infos, info])
        self.seconds["sample"] += time.perf_counter() - clock

    def save(self, snapshot: Snapshot) -> None:
        if self.num_done:
            snapshot.save(*self.progress, self.seconds["sample"])

    def report(
        self, on_step: Callable[[StepReport], None] | None, *, is_first: bool = False
    ) -> None:
        if on_step is None:
            return
        state, infos = self.progress
        loss = math.nan
        if infos:
            is_l1 = getattr(self.config, "measurement_term", "") == "l1"
            loss = float(np.mean(infos[-1].loss)) / (state.tokens.shape[1] if is_l1 else 1)
        # Some states begin their next round at once, so it is the step that knows what it left.
        num_masked = infos[-1].num_masked if infos else self.target.num_masked(state)
        trace = infos[-1].trace if infos else None
        masked = float(np.mean(num_masked))
        seconds = self.guess() if is_first else None
        on_step(StepReport(len(infos), self.num_steps, loss, masked, trace, seconds))

    def guess(self) -> float | None:
        """Seconds of the steps that are left; see `StepReport`."""
        left = self.num_steps - self.num_done
        if not left or jax.default_backend() != "cpu":
            return None
        try:
            flops = flops_of(self._jaxpr)
        except ValueError:  # A loop whose rounds nobody can count ahead.
            return None
        return left * flops / (_RATE_SHARE * flops_per_second())

    def finish(self) -> Restored:
        clock = time.perf_counter()
        state, infos = self.progress
        info = jax.tree.map(lambda *rows: np.stack(rows), *infos)
        result = _finish(self.config, self.target, state, info, self.key)
        _wait(result)
        self.seconds["decode"] = time.perf_counter() - clock
        rows = self.target.num_rows
        calls = self.config.evaluations()._asdict()
        return Restored(result, self.seconds, {name: rows * count for name, count in calls.items()})


def _wait(tree: PyTree) -> None:
    """Waits for arrays in short naps, because `block_until_ready` holds back Ctrl-C."""
    nap = 0.001
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(tree)):
        time.sleep(nap)
        nap = min(2 * nap, 0.02)
