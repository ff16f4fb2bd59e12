"""Energies made of others: weighted, added, restricted to a part of the image."""

from __future__ import annotations

from typing import Any

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


def on_region(energy: Energy, *, rows: tuple[int, int], columns: tuple[int, int]) -> Energy:
    """An energy of one rectangle of the image; what lies outside is free.

    Args:
      energy: of images as large as the rectangle.
      rows: first row and the one after the last.
      columns: likewise.
    """
    return Energy(
        apply=bind(_on_region, inner=energy.apply, rows=tuple(rows), columns=tuple(columns)),
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
) -> Float[Array, " B"]:
    return inner(params, data, x[:, slice(*rows), slice(*columns)])
