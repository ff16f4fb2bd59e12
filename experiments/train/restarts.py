"""Restarts of the rows of a learned table that no token uses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec.vq import nearest_row
from aps_jax.types import Array, PyTree
from experiments.train.optimizer import TrainState

#: Latest batches that a row must have been used in.
_NUM_BATCHES = 16


class Restarts:
    """Puts dead rows of the table of "vq" where features are; does nothing with other codebooks.

    A row far from all features never gets a gradient. Every `config.restart_every` steps, rows that
    are nearest to no feature of the latest batches become features drawn from these, as in Jukebox
    (arXiv:2005.00341, section 3.1). The last quarter of a training is without.

    A training that goes on from a checkpoint repeats the uninterrupted one where checkpoints are at
    multiples of `restart_every`.
    """

    def __init__(self, config: Any, encode: Callable[[PyTree, Array], Array]) -> None:
        is_learned = config.codec.quantizer == "vq" and not config.freeze_encoder
        self.every = config.restart_every if is_learned else 0
        self.until, self.seed = 3 * config.steps // 4, config.seed
        self.batches: deque[Array] = deque(maxlen=_NUM_BATCHES)
        self._encode = jax.jit(encode)

    def __call__(self, state: TrainState, batch: Array) -> TrainState:
        """The state for this batch's step."""
        if not self.every:
            return state
        self.batches.append(batch)
        step = int(state.step)
        if step >= self.until or (step + 1) % self.every:
            return state
        features = [np.asarray(self._encode(state.params, x)) for x in self.batches]
        width = features[0].shape[-1]
        features = np.concatenate([part.reshape(-1, width) for part in features])
        return _restarted(state, features, np.random.default_rng((self.seed, 2, step)))


_nearest = jax.jit(nearest_row)


def _restarted(state: TrainState, features: np.ndarray, rng: np.random.Generator) -> TrainState:
    table = np.array(state.params["quantizer"]["table"])
    is_dead = np.bincount(np.asarray(_nearest(table, features)), minlength=len(table)) == 0
    count = int(is_dead.sum())
    rows = features[rng.choice(len(features), size=count, replace=count > len(features))]

    def with_rows(params: PyTree) -> PyTree:
        changed = np.array(params["quantizer"]["table"])
        changed[is_dead] = rows
        return params | {"quantizer": {"table": jnp.asarray(changed)}}

    return state._replace(params=with_rows(state.params), ema=with_rows(state.ema))
