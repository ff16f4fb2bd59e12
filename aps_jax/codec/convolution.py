"""2-D convolutions whose input gradients stay fast inside compiled loops on CPU.

XLA's CPU backend computes the automatic input gradient of a convolution from a transposed view of
the kernel. Inside a `fori_loop` or `scan` body that view is never materialised and the compiler
falls back to a path more than ten times slower. Here the input gradient is written as an ordinary
forward convolution with an explicitly flipped and transposed kernel, which takes the fast path
everywhere (`python -m experiments.speed` measures it).

On images of a few pixels, such as the deepest features of LPIPS, that path is slow too, up to 90
times; there a convolution is one matrix product with the pixels' neighbourhoods.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aps_jax.types import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")


#: Output pixels up to which a convolution is a matrix product.
_FEW_PIXELS = 16


Padding = tuple[tuple[int, int], ...]


def _forward(x: Array, kernel: Array, padding: Padding, precision: Any) -> Array:
    taps = kernel.shape[:2]
    height, width = (
        size + sum(pads) - tap + 1
        for size, pads, tap in zip(x.shape[1:3], padding, taps, strict=True)
    )
    if height * width > _FEW_PIXELS:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=_LAYOUT, precision=precision
        )
    # Padding is negative where a gradient goes back through generous padding.
    edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
    near = [
        padded[:, row : row + height, column : column + width]
        for row in range(taps[0])
        for column in range(taps[1])
    ]
    near = jnp.concatenate(near, axis=-1)
    return jnp.matmul(near, kernel.reshape(-1, kernel.shape[-1]), precision=precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _unit_stride(x: Array, kernel: Array, padding: Padding, precision: Any) -> Array:
    return _forward(x, kernel, padding, precision)


def _unit_stride_fwd(x, kernel, padding, precision):
    return _unit_stride(x, kernel, padding, precision), (x, kernel)


def _unit_stride_bwd(padding, precision, residuals, cotangent):
    x, kernel = residuals
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    reverse = tuple(
        (size - 1 - low, size - 1 - high)
        for size, (low, high) in zip(kernel.shape[:2], padding, strict=True)
    )
    grad_x = _forward(cotangent, flipped, reverse, precision)
    # Unused by the sampler, whose weights are frozen: dead code there, needed for training.
    _, kernel_vjp = jax.vjp(lambda k: _forward(x, k, padding, precision), kernel)
    return grad_x, kernel_vjp(cotangent)[0]


_unit_stride.defvjp(_unit_stride_fwd, _unit_stride_bwd)


def _chosen(precision: Any) -> Any:
    """`precision`, or that of the `jax.default_matmul_precision` around the call.

    A written-out gradient is traced after such a context has been left, so it must be told.
    """
    if precision is not None:
        return precision
    # JAX adds its options to `config` at run time.
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **options: Any,
) -> Array:
    """Drop-in for `jax.lax.conv_general_dilated` in `flax.linen.Conv` (NHWC, HWIO).

    Unit-stride, undilated, ungrouped convolutions take the custom gradient; all others are passed
    on unchanged. The custom gradient has no forward mode (`jax.jvp`) and the precision of the
    forward pass.

    Args:
      lhs: images [B, H, W, C].
      rhs: kernel [kh, kw, C, O].
      window_strides: (rows, columns).
      padding: "SAME", "VALID" or one (low, high) pair per axis.
      lhs_dilation: as in `jax.lax`.
      rhs_dilation: as in `jax.lax`.
      dimension_numbers: as in `jax.lax`; the fast path is for NHWC/HWIO.
      feature_group_count: as in `jax.lax`.
      precision: as in `jax.lax`.
      **options: as in `jax.lax`; any but None is passed on, too.

    Returns:
      Images [B, H', W', O].
    """
    plain = all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    plain = plain and feature_group_count == 1 and tuple(window_strides) == (1, 1)
    given, ours = (
        jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout)
        for layout in (dimension_numbers, _LAYOUT)
    )
    if not plain or given != ours or any(value is not None for value in options.values()):
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            **options,
        )
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _unit_stride(lhs, rhs, pads, _chosen(precision))


def upsampled_conv(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    precision: Any = None,
    **_: Any,
) -> Array:
    """Nearest-neighbour doubling and a 3x3 "SAME" convolution in one, for `flax.linen.Conv`.

    Doubled pixels meet the kernel in pairs, so every output row or column of one parity sees two
    input rows or columns: four 2x2 convolutions of summed kernels on the small grid, with 4/9 of
    the multiplications and the same result up to rounding.

    Args:
      lhs: images [B, H, W, C] before doubling.
      rhs: kernel [3, 3, C, O].
      window_strides: (1, 1).
      padding: "SAME".
      precision: as in `jax.lax`.

    Returns:
      Images [B, 2 H, 2 W, O].

    Raises:
      ValueError: for another kernel, stride or padding.
    """
    if rhs.shape[:2] != (3, 3) or tuple(window_strides) != (1, 1) or padding != "SAME":
        raise ValueError(
            "upsampled_conv is a 3x3 convolution of stride 1 with SAME padding; received "
            f"{rhs.shape[:2]}, {tuple(window_strides)} and {padding}"
        )
    rows = []
    for row in range(2):
        columns = []
        for column in range(2):
            kernel = _paired(_paired(rhs, 0, row), 1, column)
            sides = ((1 - row, row), (1 - column, column))
            columns.append(_unit_stride(lhs, kernel, sides, _chosen(precision)))
        rows.append(jnp.stack(columns, axis=3))
    batch, height, width = lhs.shape[:3]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, rhs.shape[-1])


def _paired(kernel: Array, axis: int, parity: int) -> Array:
    """The three taps along `axis` as the two that outputs of one parity see."""
    first, second, third = jnp.split(kernel, 3, axis)
    pair = [first, second + third] if parity == 0 else [first + second, third]
    return jnp.concatenate(pair, axis)
