"""Energies made of others: weighted, added, restricted to a part of the image."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from aps_jax.types import Array, Energy, PyTree, Scalar, bind


def scaled(energy: Energy, weight: Scalar) -> Energy:
    """`weight` times an energy; a leaf, so that other weights need no other compilation."""
    params = (energy.params, jnp.asarray(weight, jnp.float32))
    return Energy(
        apply=bind(_scaled, inner=energy.apply), params=params, data=energy.data, name=energy.name
    )


def total(*energies: Energy) -> Energy:
    """The sum of energies, so the product of what they stand for."""
    return Energy(
        apply=bind(_total, inner=tuple(energy.apply for energy in energies)),
        params=tuple(energy.params for energy in energies),
        data=tuple(energy.data for energy in energies),
        name=" + ".join(energy.name for energy in energies),
    )


def on_region(
    energy: Energy,
    *,
    rows: tuple[int, int],
    columns: tuple[int, int],
    size: tuple[int, int] | None = None,
) -> Energy:
    """An energy of one rectangle of the image; what lies outside is free.

    Args:
      energy: of images as large as the rectangle, or of `size`.
      rows: first row and the one after the last.
      columns: likewise.
      size: (H, W) that the rectangle is brought to first, for networks that take one size; by
        triangles as wide as the larger of the two pixels, so small sizes do not alias.
    """
    settings = {"rows": tuple(rows), "columns": tuple(columns)}
    return Energy(
        apply=bind(_on_region, inner=energy.apply, size=size and tuple(size), **settings),
        params=energy.params,
        data=energy.data,
        name=energy.name,
    )


def _scaled(
    params: tuple[PyTree, Array], data: PyTree, x: Array, *, inner: Any
) -> Float[Array, " B"]:
    inner_params, weight = params
    return weight * inner(inner_params, data, x)


def _total(
    params: tuple[PyTree, ...], data: tuple[PyTree, ...], x: Array, *, inner: Any
) -> Float[Array, " B"]:
    values = [fn(p, d, x) for fn, p, d in zip(inner, params, data, strict=True)]
    return jnp.sum(jnp.stack(values), axis=0)


def _on_region(
    params: PyTree,
    data: PyTree,
    x: Float[Array, "B H W C"],
    *,
    inner: Any,
    rows: tuple[int, int],
    columns: tuple[int, int],
    size: tuple[int, int] | None,
) -> Float[Array, " B"]:
    part = x[:, slice(*rows), slice(*columns)]
    if size is not None:
        part = jax.image.resize(part, (part.shape[0], *size, part.shape[3]), "linear")
    return inner(params, data, part)
