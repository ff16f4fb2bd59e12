"""The optimiser of every training, and the moving average of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from experiments.train.config import RunConfig


class TrainState(NamedTuple):
    """Everything a resumed run needs; batches are functions of (seed, step)."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_optimizer(config: RunConfig, *, b2: float = 0.99) -> optax.GradientTransformation:
    """Clipped gradients, linear warm-up, cosine decay to zero, weight decay on matrices only.

    "muon" orthogonalises the updates of convolution kernels (HWIO) and of layer-stacked matrices
    [layers, in, out] (https://kellerjordan.github.io/posts/muon) and leaves every other leaf to
    AdamW. Its updates have AdamW's size (0.2 per entry, arXiv 2502.16982), so that one magnitude of
    learning rates serves both.
    """
    # A short run warms up for half of its steps.
    warmup = min(config.warmup, config.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    decay = config.weight_decay

    def is_matrix(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    if config.optimizer == "adamw":
        optimizer = optax.adamw(schedule, b2=b2, weight_decay=decay, mask=is_matrix)
    elif config.optimizer == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            weight_decay=decay,
            weight_decay_mask=is_matrix,
            adam_b2=b2,
            adam_weight_decay=decay,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,
        )
    else:
        raise ValueError(f"unknown optimizer {config.optimizer!r}: choose muon or adamw")
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def _muon_axes(params: Any) -> Any:
    """Reduction and output axes of the leaves that Muon updates, None for the others."""
    axes = {
        3: optax.contrib.MuonDimensionNumbers((1,), (2,)),
        4: optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,)),
    }
    return jax.tree.map(lambda leaf: axes.get(leaf.ndim), params)


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One optimiser step; the average warms up so that early weights are forgotten."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    return TrainState(step, params, opt_state, ema)


def make_update(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    key: jax.Array,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled step `(state, *inputs)` that follows `loss(params, *inputs, key)` downwards.

    The loss also returns the terms that are logged; its key is a function of the step alone.
    """

    @jax.jit
    def update(state: TrainState, *inputs: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        own = jax.random.fold_in(key, state.step)
        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params, *inputs, own)
        return apply_gradients(state, grads, optimizer, ema_decay), terms

    return update
