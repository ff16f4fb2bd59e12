"""Runs a sampler from the host: progress, snapshots and resume.

For APS `restore` calls the same `aps_step` as `aps_sample` does, compiled once, so the samples are
the same; whatever needs the host happens between timesteps. The other samplers run in one piece.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from aps_jax.config import APSConfig
from aps_jax.io.files import write_atomically
from aps_jax.io.rows import first_difference
from aps_jax.presets import config_class
from aps_jax.sampler import (
    SampleResult,
    SamplerState,
    StepInfo,
    Trace,
    aps_finish,
    aps_init,
    aps_step,
)
from aps_jax.samplers import sample_function
from aps_jax.types import Array, Key, Params, PyTree

_init = jax.jit(aps_init, static_argnames="config")
_step = jax.jit(aps_step, static_argnames="config")
_finish = jax.jit(aps_finish, static_argnames="config")


class DivergedError(ArithmeticError):
    """The objective became NaN or infinite."""


class SnapshotError(ValueError):
    """A snapshot is damaged or belongs to another run."""


class StepReport(NamedTuple):
    """What `on_step` is told: once before the first timestep, then after each.

    Attributes:
      num_done: timesteps done.
      num_steps: timesteps in all.
      loss: objective at the last inner step, mean over images and samples; NaN before the first
        timestep. For the "l1" term it is divided by the number of tokens, so it reads as a mean
        absolute error plus the other terms.
      num_masked: tokens still masked, mean over images and samples.
    """

    num_done: int
    num_steps: int
    loss: float
    num_masked: float


class Restored(NamedTuple):
    """Samples and what they cost.

    Attributes:
      result: as from `aps_sample`.
      seconds: wall-clock time: "compile" of the timestep, "sample" and "decode" (the last decoding
        with its own compilation). Time before an interruption is included in "sample".
      calls: evaluations summed over images and samples: "denoiser", "decoder_gradient" (forward and
        backward) and "decoder" (forward only).
    """

    result: SampleResult
    seconds: dict[str, float]
    calls: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A file that holds the state after the last finished timestep.

    Attributes:
      path: the file; every write replaces it in one step.
      identity: JSON values that name everything the result depends on. A run resumes only from a
        snapshot with the same identity.
      is_resuming: start from the file instead of from the beginning.
    """

    path: Path
    identity: Mapping[str, Any]
    is_resuming: bool = False

    def save(self, state: SamplerState, infos: list[StepInfo], seconds: float) -> None:
        """Replaces the file."""
        tensors = _named("state", state) | _named("info", _stack(infos))
        metadata = {"identity": json.dumps(self.identity), "seconds": repr(seconds)}
        write_atomically(self.path, save_tensors(tensors, metadata))

    def load(self, start: SamplerState) -> tuple[SamplerState, list[StepInfo], float]:
        """State, one `StepInfo` per finished timestep, and the seconds that they took.

        Args:
          start: the state at the beginning, which has the shapes to expect.

        Raises:
          SnapshotError: if the file is missing, damaged or of a run with another identity.
        """
        try:
            with safe_open(self.path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            identity = json.loads(metadata["identity"])
            seconds = float(metadata["seconds"])
        except FileNotFoundError:
            raise SnapshotError(f"there is no snapshot {self.path} to resume from") from None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise SnapshotError(
                f"snapshot {self.path} is damaged ({error}); delete it and start again"
            ) from None
        self._require_same(identity)
        try:
            return _unpack(tensors, start) + (seconds,)
        except (KeyError, ValueError) as error:
            raise SnapshotError(
                f"snapshot {self.path} does not fit this run ({error}); delete it and start again"
            ) from None

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def _require_same(self, identity: Mapping[str, Any]) -> None:
        difference = first_difference(identity, json.loads(json.dumps(self.identity)))
        if difference:
            raise SnapshotError(
                f"snapshot {self.path} is of another run: {difference}; use the same settings or "
                "start again"
            )


def restore(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: Any,
    sampler: str = "aps",
    known_tokens: Array | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    snapshot: Snapshot | None = None,
) -> Restored:
    """Samples like `aps_sample`, from a host loop over one compiled timestep, or like another.

    Ctrl-C gets through at any moment except while something compiles; the snapshot is then that of
    the last finished timestep. Samplers other than APS run in one piece: they write no snapshot,
    and `on_step` hears of their beginning and end.

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`; also NumPy arrays.
      key: as for `aps_sample`.
      config: options of the sampler, such as `presets.make_config` gives.
      sampler: key of `VARIANTS` or of `aps_jax.samplers.SAMPLERS`.
      known_tokens: as for `aps_sample`.
      on_step: called with a `StepReport` before the first and after each timestep.
      snapshot: written after each timestep, and read first if it `is_resuming`. The caller removes
        it once the result is safe.

    Returns:
      The samples and what they cost. The same arguments give the same samples, resumed or not.

    Raises:
      ValueError: as `aps_sample`; or for an unknown sampler or another sampler's options.
      SnapshotError: if the snapshot cannot be resumed from.
      DivergedError: as soon as the objective is not finite.
    """
    y = jax.tree.map(jnp.asarray, y)
    kind = config_class(sampler)
    if type(config) is not kind:
        raise ValueError(
            f"sampler {sampler!r} takes a {kind.__name__}, got a {type(config).__name__}; "
            "presets.make_config makes the right one"
        )
    if kind is not APSConfig:
        return _restore_at_once(
            params, y, key, config, sampler, known_tokens=known_tokens, on_step=on_step,
            snapshot=snapshot,
        )  # fmt: skip
    infos: list[StepInfo] = []
    seconds = {"compile": 0.0, "sample": 0.0, "decode": 0.0}
    clock = time.perf_counter()
    start = _init.lower(params, y, config=config, known_tokens=known_tokens)
    if snapshot is not None and snapshot.is_resuming:
        state, infos, seconds["sample"] = snapshot.load(start.out_info)
    else:
        start = start.compile()
        seconds["compile"] = time.perf_counter() - clock
        clock = time.perf_counter()
        state = start(params, y, known_tokens=known_tokens)
        _wait(state)
        seconds["sample"] = time.perf_counter() - clock

    clock = time.perf_counter()
    if len(infos) < config.num_steps:
        # Compiled ahead, so that it can be timed; a second run of the same shapes finds it cached.
        step = _step.lower(params, y, state, key, config=config).compile()
    seconds["compile"] += time.perf_counter() - clock
    _report(on_step, infos, state, params, config)

    for done in range(len(infos) + 1, config.num_steps + 1):
        clock = time.perf_counter()
        state, info = step(params, y, state, key)
        _wait((state, info))
        infos.append(jax.device_get(info))
        # The gradient of |NaN| is finite, so the logits alone do not show a loss that is not.
        losses = infos[-1].loss if config.num_inner_steps else 0.0
        if not (np.all(infos[-1].is_finite) and np.all(np.isfinite(losses))):
            raise DivergedError(
                f"the objective is not finite after timestep {done} of {config.num_steps}; check "
                "the measurement, or lower learning_rate or prior_weight"
            )
        seconds["sample"] += time.perf_counter() - clock
        if snapshot is not None:
            snapshot.save(state, infos, seconds["sample"])
        _report(on_step, infos, state, params, config)

    clock = time.perf_counter()
    result = _finish(params, y, state, _stack(infos), config=config)
    _wait(result)
    seconds["decode"] = time.perf_counter() - clock
    rows = state.tokens.shape[0]
    passes = 1 if config.guidance_scale == 0 else 2
    calls = {
        "denoiser": rows * config.num_steps * passes,
        "decoder_gradient": int(sum(np.sum(info.num_inner_steps) for info in infos)),
        "decoder": rows * (1 + (config.num_steps if config.trace else 0)),
    }
    return Restored(result, seconds, calls)


def _restore_at_once(
    params: Params,
    y: PyTree,
    key: Key,
    config: Any,
    sampler: str,
    *,
    known_tokens: Array | None,
    on_step: Callable[[StepReport], None] | None,
    snapshot: Snapshot | None,
) -> Restored:
    if snapshot is not None and snapshot.is_resuming:
        raise SnapshotError(f"sampler {sampler!r} runs in one piece; there is nothing to resume")
    clock = time.perf_counter()
    sample = jax.jit(sample_function(sampler), static_argnames="config")
    run = sample.lower(params, y, key, config=config, known_tokens=known_tokens).compile()
    seconds = {"compile": time.perf_counter() - clock, "sample": 0.0, "decode": 0.0}
    grid = run.out_info.tokens.shape
    if on_step is not None:
        on_step(StepReport(0, 1, math.nan, float(grid[1])))
    clock = time.perf_counter()
    result = run(params, y, key, known_tokens=known_tokens)
    _wait(result)
    seconds["sample"] = time.perf_counter() - clock
    info = jax.device_get(result.info)
    if not np.all(info.is_finite):
        raise DivergedError(
            f"the objective of {sampler} is not finite; check the measurement, or lower the "
            "sampler's learning_rate if it has one"
        )
    if on_step is not None:
        on_step(StepReport(1, 1, float(np.mean(info.loss[-1])), 0.0))
    rows = grid[0] * config.num_samples
    calls = {name: rows * count for name, count in config.evaluations()._asdict().items()}
    return Restored(result, seconds, calls)


def _wait(tree: PyTree) -> None:
    """Waits for arrays in short naps, because `block_until_ready` holds back Ctrl-C."""
    nap = 0.001
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(tree)):
        time.sleep(nap)
        nap = min(2 * nap, 0.02)


def _report(
    on_step: Callable[[StepReport], None] | None,
    infos: list[StepInfo],
    state: SamplerState,
    params: Params,
    config: APSConfig,
) -> None:
    if on_step is None:
        return
    loss = math.nan
    if infos:
        per_token = state.tokens.shape[1] if config.measurement_term == "l1" else 1
        loss = float(np.mean(infos[-1].loss)) / per_token
    num_masked = np.sum(np.asarray(state.tokens) == params.codec.num_codes, axis=1)
    on_step(StepReport(len(infos), config.num_steps, loss, float(np.mean(num_masked))))


def _stack(infos: list[StepInfo]) -> StepInfo:
    return jax.tree.map(lambda *rows: np.stack(rows), *infos)


def _named(prefix: str, tree: PyTree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {prefix + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _unpack(
    tensors: Mapping[str, np.ndarray], start: SamplerState
) -> tuple[SamplerState, list[StepInfo]]:
    """Inverse of what `Snapshot.save` wrote; KeyError or ValueError if something does not fit."""

    def fill(path: Any, leaf: Array) -> Array:
        value = tensors["state" + jax.tree_util.keystr(path)]
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise ValueError(f"state has shape {value.shape}, this run needs {leaf.shape}")
        return jnp.asarray(value)

    state = jax.tree_util.tree_map_with_path(fill, start)
    rows = {name: tensors[f"info.{name}"] for name in StepInfo._fields if f"info.{name}" in tensors}
    trace = {
        name: tensors[f"info.trace.{name}"]
        for name in Trace._fields
        if f"info.trace.{name}" in tensors
    }
    stacked = StepInfo(**rows, trace=Trace(**trace) if trace else None) if rows else None
    if stacked is None or len(stacked.loss) != int(state.step):
        raise ValueError("its history is incomplete")
    return state, [
        jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(stacked.loss))
    ]
