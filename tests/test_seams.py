"""Samples of the embedded prior over fields larger than its window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import load_pretrained
from aps_jax.codec.magvit2 import decode_tokens
from aps_jax.prior.windows import window_starts
from experiments.train.completion import complete


def step_at_borders(images, stride, borders):
    """Mean step between pixels across the token borders `borders`, over that across all others."""
    steps = []
    for axis in (1, 2):
        x = np.moveaxis(images, axis, -1)
        across = np.abs(x[..., stride::stride] - x[..., stride - 1 : -1 : stride])
        steps.append(across.reshape(-1, across.shape[-1]).mean(axis=0))
    steps = np.mean(steps, axis=0)
    is_border = np.isin(np.arange(1, len(steps) + 1), borders)
    return steps[is_border].mean() / steps[~is_border].mean()


@pytest.mark.slow
def test_windows_leave_no_seams_at_256_pixels():
    """64x64 tokens of the embedded prior, against tiles that know nothing of each other."""
    model = load_pretrained("photo64")
    window, side = model.prior.window, 64
    starts = window_starts(side, window)
    edges = {edge for start in starts for edge in (start, start + window)} - {0, side}

    def sampled(batch, grid):
        tokens = jnp.full((batch, *grid), model.codec.num_codes, jnp.int32)
        tokens = complete(jax.random.key(0), model.prior, tokens, num_steps=32)
        return np.asarray(jax.jit(decode_tokens)(model.codec, tokens))

    field = sampled(4, (side, side))
    assert step_at_borders(field, model.codec.stride, sorted(edges)) == pytest.approx(1, abs=0.06)

    tiles = sampled(32, (window, window)).reshape(2, 4, 4, 64, 64, 3)
    tiled = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(2, 256, 256, 3)
    assert step_at_borders(tiled, model.codec.stride, [16, 32, 48]) > 1.3
