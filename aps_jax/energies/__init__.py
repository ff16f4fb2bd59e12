"""Energies: what a sample is wanted to make small, minus a log-likelihood or minus a reward.

An energy is an `aps_jax.types.Energy`, a function with its arrays. Yours is one, too:

    def warm(params, data, x):  # x: images [B, H, W, 3] in [-1, 1]
        return params * jnp.mean((x - data) ** 2, axis=(1, 2, 3))

    energy = Energy(apply=warm, params=jnp.float32(50.0), data=colours)  # colours: [B, 1, 1, 3]
    target = make_target(model.prior, model.codec, energy, image_shape=(64, 64), batch=len(colours))
    result = jax.jit(sample_target)(target, jax.random.key(0), config=APSConfig(num_inner_steps=5))

`make_target` is in `aps_jax.sampling.target`, `sample_target` in `aps_jax.samplers`. The presets
are for measurements.
"""

from __future__ import annotations

from aps_jax.energies.combine import on_region, scaled, total
from aps_jax.energies.features import content, style
from aps_jax.energies.measurement import gaussian, known, l1_lpips, norm
from aps_jax.energies.rewards import classifier, clip_image, clip_text, text_reward
from aps_jax.types import Energy

__all__ = [
    "Energy", "classifier", "clip_image", "clip_text", "content", "gaussian", "known", "l1_lpips",
    "norm", "on_region", "scaled", "style", "text_reward", "total",
]  # fmt: skip
