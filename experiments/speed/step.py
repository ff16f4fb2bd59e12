"""One problem of the sampler, and functions of its inner loop to time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import aps_jax
from aps_jax.sampler import make_aps
from aps_jax.sampling import objective
from aps_jax.sampling.target import Target, measurement_target
from aps_jax.scores.lpips import MIN_SIDE, PerceptualUnavailable, load_lpips
from aps_jax.types import Array, Codec, Params


def images(batch: int, side: int) -> Array:
    """Noise in [-1, 1]: [B, side, side, 3]."""
    return jax.random.uniform(jax.random.key(0), (batch, side, side, 3), minval=-1, maxval=1)


def codes_like(codec: Codec, shape: tuple[int, ...]) -> Array:
    """Random codes of +-1 for a grid [B, h, w]."""
    shape = (*shape, codec.quantizer.num_features)
    return jnp.sign(jax.random.normal(jax.random.key(1), shape))


#: The published sampler, compiled for each configuration.
sample = jax.jit(aps_jax.aps_sample, static_argnames="config")


class Step:
    """One problem, all masked, and functions of its inner loop.

    Attributes:
      params: models and operator.
      y: its measurement.
      config: options.
      tokens: [B, L], all masked.
      log_prior: [B, L, K].
    """

    def __init__(self, params: Params, batch: int, side: int, config: aps_jax.APSConfig) -> None:
        self.params, self.config, self.side = params, config, side
        self.y = params.operator(images(batch, side))
        self.grid: tuple[int, int] = (side // params.codec.stride,) * 2
        self.tokens = jnp.full((batch, self.grid[0] * self.grid[1]), params.codec.num_codes)
        logits = jax.jit(params.prior.apply)(params.prior.params, self.tokens_grid())
        self.log_prior = jax.nn.log_softmax(logits.reshape(*self.tokens.shape, -1))
        self.optimizer = optax.adam(config.learning_rate)
        self.image_shape = (side, side)
        self.opt_state = self.optimizer.init(self.log_prior)

    def tokens_grid(self) -> Array:
        """Tokens [B, h, w]."""
        return self.tokens.reshape(-1, *self.grid)

    def target(self, params: Params, y: Array, tokens: Array) -> Target:
        """What the sampler would make of the same arguments."""
        whole = measurement_target(params, y, config=self.config)
        return whole.replace(tokens=tokens, grid=self.grid)

    def total(self, params: Params, y: Array, phi: Array, log_prior: Array, tokens: Array) -> Array:
        """Sum of the objective over the batch."""
        weight = self.config.prior_weight or None
        target = self.target(params, y, tokens)
        return jnp.sum(objective.loss(target, phi, log_prior, tokens, weight))

    def half(self) -> Step:
        """The same with its lower half known, and arrays of logits for the upper one alone."""
        step, codec, (height, width) = copy.copy(self), self.params.codec, self.grid
        step.grid = (height // 2, width)
        known = codes_like(codec, (len(self.tokens), height - height // 2, width))

        def decode(params: Any, codes: Array) -> Array:
            return codec.decode(params, jnp.concatenate([codes, known], axis=1))

        step.params = self.params.replace(codec=codec.replace(decode=decode))
        count = height // 2 * width
        step.tokens, step.log_prior = self.tokens[:, :count], self.log_prior[:, :count]
        step.opt_state = self.optimizer.init(step.log_prior)
        return step

    def gradient(self) -> Callable[..., Array]:
        """Jitted gradient of the logits, of (params, y, phi, log_prior, tokens)."""
        return jax.jit(jax.grad(self.total, argnums=2))

    def arguments(self) -> tuple[Any, ...]:
        """What `gradient` takes."""
        return self.params, self.y, self.log_prior, self.log_prior, self.tokens

    def alone(self) -> Callable[[], Any]:
        """One inner iteration as a jitted call, which goes on from the last in the same memory."""

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def iterate(phi, opt_state, params, y, log_prior, tokens):
            grads = jax.grad(self.total, argnums=2)(params, y, phi, log_prior, tokens)
            updates, opt_state = self.optimizer.update(grads, opt_state)
            return phi + updates, opt_state

        carry = jax.tree.map(jnp.copy, (self.log_prior, self.opt_state))

        def run() -> Any:
            nonlocal carry
            carry = iterate(*carry, self.params, self.y, self.log_prior, self.tokens)
            return carry

        return run

    def loop(self) -> Callable[[], Any]:
        """The inner loop of `config.num_inner_steps` iterations, compiled."""

        @jax.jit
        def refine(params, y, phi, log_prior, tokens):
            sampler, target = make_aps(self.config), self.target(params, y, tokens)
            # What the measurement says is of the whole field, of which `half` has the first tokens.
            whole = measurement_target(params, y, config=self.config)
            state = jax.tree.map(
                lambda leaf: leaf[:, : tokens.shape[1]] if leaf.ndim > 1 else leaf,
                sampler.init(whole, whole.keys(jax.random.key(0))),
            )
            return sampler.refine(target, state, phi, log_prior).phi

        return lambda: refine(*self.arguments())


def with_lpips(params: Params, image_size: int) -> Params | None:
    """Identity measurements with LPIPS, or None where it is not installed or the image small."""
    if image_size < MIN_SIDE:
        return None
    try:
        distance = load_lpips()
    except PerceptualUnavailable:
        return None
    return params.replace(operator=aps_jax.operators.denoising(), perceptual=distance)
