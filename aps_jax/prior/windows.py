"""Token fields larger than the grid a prior was trained on, covered by overlapping windows."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.types import Array, Prior


def window_starts(length: int, window: int, overlap: float = 0.25) -> tuple[int, ...]:
    """First positions of evenly spread windows that cover `length` tokens along one axis.

    All lie inside the field, and neighbours share at least `overlap`, in [0, 1), of their tokens.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"the overlap of windows must be in [0, 1), got {overlap}")
    if length <= window:
        return (0,)
    stride = max(1, window - math.ceil(overlap * window))
    count = math.ceil((length - window) / stride) + 1
    return tuple(round(index * (length - window) / (count - 1)) for index in range(count))


def blend_weights(length: int, window: int, overlap: float = 0.25) -> np.ndarray:
    """Share of every window in every token along one axis, float32 [windows, min(window, length)].

    Raised cosine, largest at the window's centre and positive everywhere; over the windows that
    cover a token the shares sum to 1.
    """
    starts = window_starts(length, window, overlap)
    size = min(window, length)
    profile = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + size] += profile
    shares = np.stack([profile / total[start : start + size] for start in starts])
    return shares.astype(np.float32)


def prior_logits(prior: Prior, tokens: Array, *, is_unconditional: bool = False) -> Array:
    """Logits of the prior on a token field of any size.

    A field that fits the prior's window is one plain call. A larger one is cut into overlapping
    windows, which run as one batched call; their log-probabilities are averaged with weights that
    favour the centre of a window. That is the normalised geometric mean of the windows' opinions,
    and images of the batch never influence each other.

    Args:
      prior: `prior.window` is the largest grid side it takes, `prior.overlap` the least share of
        a window that its neighbours have too.
      tokens: int [B, h, w] in [0, K], K for the mask; grids of other numbers of axes are never cut.
      is_unconditional: use `prior.apply_unconditional`.

    Returns:
      Float32 logits [B, h, w, K]; normalised log-probabilities only up to a constant per token.

    Raises:
      ValueError: if the prior has no unconditional form and one is asked for.
    """
    apply = prior.apply_unconditional if is_unconditional else prior.apply
    if apply is None:
        raise ValueError("this prior has no unconditional form")
    window = prior.window
    if window is None or tokens.ndim != 3 or max(tokens.shape[1:]) <= window:
        return apply(prior.params, tokens)
    _, height, width = tokens.shape

    rows, columns = (window_starts(side, window, prior.overlap) for side in (height, width))
    size_h, size_w = min(window, height), min(window, width)
    pieces = jnp.stack(
        [
            jnp.stack([tokens[:, top : top + size_h, left : left + size_w] for left in columns])
            for top in rows
        ]
    )
    # vmap keeps [B, h, w] at the prior, so prompts of one row per image still match.
    over_columns = jax.vmap(apply, in_axes=(None, 0))
    logits = jax.vmap(over_columns, in_axes=(None, 0))(prior.params, pieces)
    logits = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

    # [rows, columns, B, size_h, size_w, K] -> strips as wide as the field -> the field.
    share_h, share_w = (blend_weights(side, window, prior.overlap) for side in (height, width))
    strips = jnp.zeros((*logits.shape[:1], *logits.shape[2:4], width, prior.num_codes), jnp.float32)
    for index, left in enumerate(columns):
        share = share_w[index][None, None, None, :, None]
        strips = strips.at[..., left : left + size_w, :].add(logits[:, index] * share)
    field = jnp.zeros((*tokens.shape, prior.num_codes), jnp.float32)
    for index, top in enumerate(rows):
        share = share_h[index][None, :, None, None]
        field = field.at[:, top : top + size_h].add(strips[index] * share)
    return field


def cover_field(
    x: Array, *, grid: tuple[int, int], stride: int, decode_scale: int, mode: str
) -> Array:
    """Images [B, H, W, C] as large as what a field decodes to, [B, h * stride, w * stride, C].

    Args:
      x: what is enlarged (nearest) and continued at the right and at the bottom.
      grid: (h, w) of the field, which may reach past the images.
      stride: decoded pixels per token along each axis.
      decode_scale: how many times larger than the images the codec decodes.
      mode: "edge" continues the last rows and columns, "constant" zeros.
    """
    x = jnp.repeat(jnp.repeat(x, decode_scale, axis=1), decode_scale, axis=2)
    height, width = (side * stride for side in grid)
    past_edges = ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0))
    return jnp.pad(x, past_edges, mode=mode)
