"""Energies of a measurement y of the image x, for an operator A."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aps_jax.operators.inpainting import inpainting_mask
from aps_jax.operators.residuals import absolute_error, squared_error
from aps_jax.types import Array, Energy, Operator, Perceptual, PyTree, Scalar


def gaussian(operator: Operator, y: PyTree, sigma: Scalar) -> Energy:
    """-log p(y | x) = ||A(x) - y||^2 / (2 sigma^2) up to a constant.

    Args:
      operator: A, its random state drawn.
      y: measurement of B images.
      sigma: std of the noise, a positive number.
    """
    return Energy(
        apply=_gaussian, params=(operator, jnp.asarray(sigma, jnp.float32)), data=y, name="gaussian"
    )


def known(image: Array, mask: Array | np.ndarray, sigma: Scalar) -> Energy:
    """||x - image||^2 / (2 sigma^2) of the pixels that are to stay as they are.

    Args:
      image: B images [B, H, W, 3] in [-1, 1].
      mask: [H, W], [H, W, 1] or [B, H, W, 1], 1 where a pixel is to stay and 0 where it is free.
      sigma: how far a pixel may move, a positive number.
    """
    operator = inpainting_mask(mask)
    return dataclasses.replace(gaussian(operator, operator(image), sigma), name="known")


def norm(operator: Operator, y: PyTree) -> Energy:
    """||A(x) - y||, not squared, as in the code of DPS and G2D2."""
    return Energy(apply=_norm, params=operator, data=y, name="norm")


def l1_lpips(
    operator: Operator, y: PyTree, perceptual: Perceptual | None = None, weight: Scalar = 0.0
) -> Energy:
    """Mean |A(x) - y| + weight LPIPS(A(x), y), the measurement term of the paper's algorithm.

    Args:
      operator: A, its random state drawn.
      y: measurement of B images.
      perceptual: LPIPS; None leaves its term out, and so does an operator whose y is no image.
      weight: lambda_p; the paper has 1e-3.
    """
    if perceptual is None or not operator.is_image:
        return Energy(apply=_l1, params=operator, data=y, name="l1")
    with jax.named_scope("perceptual"):
        features = [perceptual.reference(_as_rgb(leaf)) for leaf in jax.tree.leaves(y)]
    params = (operator, perceptual, jnp.asarray(weight, jnp.float32))
    return Energy(apply=_l1_lpips, params=params, data=(y, features), name="l1_lpips")


def _measured(operator: Operator, x: Array) -> PyTree:
    with jax.named_scope("operator"):
        return operator(x)


def _gaussian(
    params: tuple[Operator, Array], y: PyTree, x: Float[Array, "B H W C"]
) -> Float[Array, " B"]:
    operator, sigma = params
    with jax.default_matmul_precision("float32"):
        return squared_error(operator, _measured(operator, x), y) / (2 * sigma**2)


def _norm(operator: Operator, y: PyTree, x: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    with jax.default_matmul_precision("float32"):
        square = squared_error(operator, _measured(operator, x), y)
    # The least normal number keeps the gradient finite where the fit is perfect.
    return jnp.sqrt(square + jnp.finfo(jnp.float32).tiny)


def _l1(operator: Operator, y: PyTree, x: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    with jax.default_matmul_precision("float32"):
        return absolute_error(operator, _measured(operator, x), y)


def _l1_lpips(
    params: tuple[Operator, Perceptual, Array],
    data: tuple[PyTree, list[PyTree]],
    x: Float[Array, "B H W 3"],
) -> Float[Array, " B"]:
    (operator, perceptual, weight), (y, features) = params, data
    with jax.default_matmul_precision("float32"):
        prediction = _measured(operator, x)
        loss = absolute_error(operator, prediction, y)
        with jax.named_scope("perceptual"):
            for leaf, feature in zip(jax.tree.leaves(prediction), features, strict=True):
                loss = loss + weight * perceptual.distance_to(_as_rgb(leaf), feature)
    return loss


def _as_rgb(image: Array) -> Array:
    return jnp.broadcast_to(image, (*image.shape[:3], 3))
