"""What single decisions of the library are worth: the inner loop with one of them undone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import aps_jax
from aps_jax.codec import convolution
from aps_jax.codec import magvit2 as tokenizer
from aps_jax.codec.vq import VQ
from aps_jax.presets import make_config
from aps_jax.types import Array, Params
from experiments.speed import timing
from experiments.speed.step import Step, with_lpips


def _doubled_first(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> Array:
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    return convolution.conv_general_dilated(x, kernel, strides, padding, **options)


def _flax_norm(num_groups: int, epsilon: float, dtype: str, *, name: str) -> nn.Module:
    return nn.GroupNorm(
        num_groups=num_groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name
    )


def lever_section(params: Params, arguments: Any) -> dict[str, Any]:
    """The inner loop with one thing done the plain way, over the library's own."""
    config = aps_jax.APSConfig(num_steps=1, num_inner_steps=arguments.inner_steps)
    size = (arguments.batch_size, arguments.image_size)
    plain_codec = params.codec.replace(quantizer=VQ(params.codec.codebook))
    runs = {
        "library": Step(params, *size, config).loop(),
        "mean code by product": Step(params.replace(codec=plain_codec), *size, config).loop(),
    }
    # Compiled while the replacement is in place; a compiled function is not traced again.
    compiled = {name: _compiled(run) for name, run in runs.items()}
    for name, attribute, value in (
        ("doubling before the convolution", "upsampled_conv", _doubled_first),
        ("group norm of Flax", "GroupNorm", _flax_norm),
        ("residual blocks computed again", "ResidualBlock", nn.remat(tokenizer.ResidualBlock)),
    ):
        ours = getattr(tokenizer, attribute)
        setattr(tokenizer, attribute, value)
        try:
            compiled[name] = _compiled(Step(params, *size, config).loop())
        finally:
            setattr(tokenizer, attribute, ours)
    balanced = make_config(preset="balanced", num_steps=1, num_inner_steps=arguments.inner_steps)
    step = Step(params, *size, balanced)
    # By what they are forms of.
    rivals = {
        "library": compiled,
        "balanced": {
            "balanced": step.loop(),
            "balanced, half of the tokens": step.half().loop(),
        },
    }
    own = with_lpips(params, arguments.image_size)
    if own is not None:
        perceptual = dataclasses.replace(config, perceptual_weight=1e-3)
        whole = own.replace(perceptual=own.perceptual.replace(describe=None, compare=None))
        rivals["LPIPS library"] = {
            "LPIPS library": Step(own, *size, perceptual).loop(),
            "LPIPS, features of y every time": Step(whole, *size, perceptual).loop(),
        }
    runs = {name: run for forms in rivals.values() for name, run in forms.items()}
    seconds = timing.interleave(runs, arguments.repeats)
    return {
        name: timing.spread(seconds[name] / arguments.inner_steps)
        | {
            f"over {base}": timing.ratio(seconds[name], seconds[base]),
            f"cpu over {base}": timing.ratio(seconds[name][:, 1], seconds[base][:, 1]),
        }
        for base, forms in rivals.items()
        for name in forms
    }


def _compiled(run: Callable[[], Any]) -> Callable[[], Any]:
    jax.block_until_ready(run())
    return run
