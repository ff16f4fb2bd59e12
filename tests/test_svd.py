"""Singular value decompositions of operators, against NumPy's on the operator's own matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import operators
from aps_jax.operators.svd import circular_svd
from aps_jax.types import Operator, bind

SIDES = (6, 8)
KERNEL = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def convolve(kernel, x):
    """The circular sum, written out; the centre is at (1, 2)."""
    shifts = [(a, b) for a in range(3) for b in range(4)]
    return sum(kernel[a, b] * jnp.roll(x, (a - 1, b - 2), (1, 2)) for a, b in shifts)


OPERATORS = {
    "denoising": operators.denoising(),
    "colorization": operators.colorization(),
    "inpainting": operators.inpainting_random(fraction=0.4),
    "super_resolution": operators.super_resolution(scale=2),
    "uneven": operators.super_resolution(scale=4),
    "gaussian_blur": operators.gaussian_blur(std=1.2),
    "circular": Operator(
        apply=bind(convolve), name="circular", params=jnp.asarray(KERNEL), svd=bind(circular_svd)
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_decomposition(name):
    operator = OPERATORS[name].init(jax.random.key(0), SIDES)
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.normal(size=(2, *SIDES, 3)), jnp.float32) for _ in range(2))

    @jax.jit
    def parts(operator, x, other):
        svd = operator.svd(operator.params, x.shape)
        y = operator(x)
        # A basis of one image, to see the whole matrix.
        basis = jnp.eye(x[0].size).reshape(-1, *x.shape[1:])
        values = jnp.broadcast_to(svd.values, (1, *x.shape[1:]))
        found = svd.forward(x)
        return (
            found, svd.backward(found), svd.forward(other), svd.measured(y), svd.values * found, y,
            values, operator(basis).reshape(len(basis), -1),
        )  # fmt: skip

    found, back, found_other, measured, expected, y, values, matrix = map(
        np.asarray, parts(operator, x, other)
    )
    np.testing.assert_allclose(back, x, atol=2e-5)
    inner = np.sum(np.conj(found) * found_other)
    np.testing.assert_allclose(inner, np.sum(x * other), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(measured, expected, atol=2e-5)
    # U^T keeps what A can reach.
    np.testing.assert_allclose(np.sum(np.abs(measured) ** 2), np.sum(y**2), rtol=1e-4)
    own = np.sort(np.linalg.svd(np.float64(matrix), compute_uv=False))[::-1]
    wanted = np.sort(values.ravel())[::-1]
    np.testing.assert_allclose(wanted[: len(own)], own, atol=1e-5 + 2e-5 * own[0])
    np.testing.assert_allclose(wanted[len(own) :], 0, atol=1e-6)


def test_operators_without_one():
    for operator in (
        operators.blur(KERNEL),
        operators.hdr(),
        operators.compose(operators.denoising(), operators.denoising()),
        operators.stack([operators.denoising()]),
    ):
        assert operator.svd is None
