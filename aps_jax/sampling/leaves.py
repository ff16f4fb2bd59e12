"""Options as pytrees: numbers that leave the program as it is are leaves, the rest is static.

A sampler's configuration can be an ordinary argument of a jitted function, and one compilation then
serves all noise levels, rates and weights; or a static one, since it is hashable. An option that
is 0 is absent: it stays static, so that nothing is computed for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def is_absent(value: Any, absent: float = 0.0) -> bool:
    """Whether a number that turns a part of a sampler on says that there is none."""
    return value is None or (isinstance(value, int | float) and value == absent)


def or_none(value: Any, absent: float = 0.0) -> Any:
    """The number, or None where it says that its part is absent."""
    return None if is_absent(value, absent) else value


def as_pytree(cls: type[T]) -> type[T]:
    """Registers a frozen dataclass of options; its class may name `STATIC_FLOATS`."""
    fixed = getattr(cls, "STATIC_FLOATS", ())
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    floats = {f.name for f in fields if str(f.type).startswith("float") and f.name not in fixed}

    def flatten(config: Any) -> tuple[tuple[Any, ...], tuple[tuple[str, ...], tuple[Any, ...]]]:
        values = {field.name: getattr(config, field.name) for field in fields}
        leaves = {n: v for n, v in values.items() if n in floats and not is_absent(v)}
        static = tuple((n, v) for n, v in values.items() if n not in leaves)
        return tuple(leaves.values()), (tuple(leaves), static)

    def unflatten(names: tuple[tuple[str, ...], tuple[Any, ...]], leaves: tuple[Any, ...]) -> Any:
        config = object.__new__(cls)
        for name, value in (*zip(names[0], leaves, strict=True), *names[1]):
            object.__setattr__(config, name, value)
        return config

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls
