"""New operators from old ones: one after the other, or side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aps_jax.types import Array, ImageShape, Key, Operator, PyTree, bind


def compose(outer: Operator, inner: Operator) -> Operator:
    """The operator A(x) = outer(inner(x)); `inner` must give images [B, H, W, C].

    `init` draws the random state of both. `observed` is that of `outer`: pixels that `inner` leaves
    out are not traced through it, so put a mask last (`compose(inpainting_random(), hdr())`).

    Args:
      outer: operator applied second.
      inner: operator applied first.

    Returns:
      Operator with params (outer's, inner's).
    """
    _require_operators("compose", (outer, inner))
    observed = outer.observed and bind(_observed_outer, observed=outer.observed)
    return Operator(
        apply=bind(_apply_composed, outer=_skeleton(outer), inner=_skeleton(inner)),
        name=f"{outer.name}({inner.name})",
        params=(outer.params, inner.params),
        image_shape=bind(_composed_shape, outer=outer.image_shape, inner=inner.image_shape),
        observed=observed,
        is_linear=outer.is_linear and inner.is_linear,
        has_true_gradient=outer.has_true_gradient and inner.has_true_gradient,
        is_image=outer.is_image and inner.is_image,
        draw=_draw_with(_draw_composed, (outer, inner)),
    )


def stack(operators: Sequence[Operator]) -> Operator:
    """Several measurements of one image; `y` is the tuple of theirs.

    `init` draws the random state of all members, each from its own key. Members must agree on the
    image size behind their measurements when `image_shape` is asked. `is_image` means that every
    member of `y` is an image.

    Args:
      operators: at least one operator; stacks may hold stacks.

    Returns:
      Operator with the tuple of the members' params.

    Raises:
      ValueError: if `operators` is empty or holds something else.
    """
    members = tuple(operators)
    _require_operators("stack", members)
    observed = None
    if any(member.observed is not None for member in members):
        observed = bind(_observed_stack, members=tuple(member.observed for member in members))
    return Operator(
        apply=bind(_apply_stack, members=tuple(map(_skeleton, members))),
        name=f"stack({', '.join(member.name for member in members)})",
        params=tuple(member.params for member in members),
        image_shape=bind(_stacked_shape, members=tuple(m.image_shape for m in members)),
        observed=observed,
        is_linear=all(member.is_linear for member in members),
        has_true_gradient=all(member.has_true_gradient for member in members),
        is_image=all(member.is_image for member in members),
        draw=_draw_with(_draw_stack, members),
    )


def _require_operators(name: str, members: Sequence[Any]) -> None:
    if not members or not all(isinstance(member, Operator) for member in members):
        raise ValueError(f"{name} needs at least one Operator and nothing else, got {members!r}")


def _skeleton(operator: Operator) -> Operator:
    """The operator without its arrays: hashable, so it can be a static setting."""
    return dataclasses.replace(operator, params=None)


def _draw_with(draw: Any, members: Sequence[Operator]) -> Any:
    has_state = any(m.sample_params is not None or m.draw is not None for m in members)
    return bind(draw, members=tuple(map(_skeleton, members))) if has_state else None


def _restore(operator: Operator, members: Sequence[Operator]) -> list[Operator]:
    pairs = zip(members, operator.params, strict=True)
    return [dataclasses.replace(member, params=params) for member, params in pairs]


def _apply_composed(params: PyTree, x: Array, *, outer: Operator, inner: Operator) -> PyTree:
    middle = dataclasses.replace(inner, params=params[1])(x)
    if not isinstance(middle, jax.Array) or middle.ndim != 4:
        raise ValueError(
            f"compose: {outer.name!r} needs images [B, H, W, C], but {inner.name!r} gives "
            f"{jax.tree.map(jnp.shape, middle)}"
        )
    return dataclasses.replace(outer, params=params[0])(middle)


def _composed_shape(y_shape: Any, *, outer: Any, inner: Any) -> ImageShape:
    return inner((1, *outer(y_shape), 3))


def _observed_outer(params: PyTree, y_shape: Any, *, observed: Any) -> PyTree:
    return observed(params[0], y_shape)


def _draw_composed(
    operator: Operator, key: Key, image_shape: ImageShape, *, members: tuple[Operator, ...]
) -> Operator:
    outer, inner = _restore(operator, members)
    outer_key, inner_key = jax.random.split(key)
    inner = inner.init(inner_key, image_shape)
    middle_shape = inner.output_shape((1, *image_shape, 3))[1:3]
    return compose(outer.init(outer_key, middle_shape), inner)


def _apply_stack(params: PyTree, x: Array, *, members: tuple[Operator, ...]) -> PyTree:
    pairs = zip(members, params, strict=True)
    return tuple(dataclasses.replace(member, params=own)(x) for member, own in pairs)


def _stacked_shape(y_shape: Any, *, members: tuple[Any, ...]) -> ImageShape:
    shapes = [member(own) for member, own in zip(members, y_shape, strict=True)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"stack: the measurements belong to images of different sizes: {shapes}")
    return shapes[0]


def _observed_stack(params: PyTree, y_shape: Any, *, members: tuple[Any, ...]) -> PyTree:
    masks = []
    for observed, own, shape in zip(members, params, y_shape, strict=True):
        masks.append(_all_observed(shape) if observed is None else observed(own, shape))
    return tuple(masks)


def _all_observed(shape: Any) -> PyTree:
    if all(isinstance(side, int) for side in shape):
        return jnp.ones((1,) * len(shape), "float32")
    return tuple(map(_all_observed, shape))


def _draw_stack(
    operator: Operator, key: Key, image_shape: ImageShape, *, members: tuple[Operator, ...]
) -> Operator:
    drawn = [
        member.init(member_key, image_shape)
        for member, member_key in zip(
            _restore(operator, members), jax.random.split(key, len(members)), strict=True
        )
    ]
    return stack(drawn)
