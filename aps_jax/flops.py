"""Counts the floating-point operations of a traced function, and what a machine does of them.

Products and convolutions only, which are all but a few percent of what the models here do; loops
count as often as they run. XLA's own cost analysis counts the body of a loop once.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of `function(*args)`, two per multiplication and addition; takes shapes or arrays.

    Raises:
      ValueError: if it has a loop whose number of rounds is not known.
    """
    return flops_of(jax.make_jaxpr(function)(*args).jaxpr)


def flops_of(jaxpr: core.Jaxpr, *, of_branches: Callable[[list[float]], float] = max) -> float:
    """As `count_flops`, of what has been traced already.

    Args:
      jaxpr: such as `jax.jit(function).trace(*args).jaxpr.jaxpr` is.
      of_branches: what counts of branches of which one runs: `max` or `min` of their FLOPs.
    """
    # A custom gradient computes all cotangents; XLA drops those that nothing reads, and so do we.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(jaxpr, of_branches)


def _count(jaxpr: core.Jaxpr, of_branches: Callable[[list[float]], float]) -> float:
    return sum(_count_equation(equation, of_branches) for equation in jaxpr.eqns)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _count_equation(equation: core.JaxprEqn, of_branches: Callable[[list[float]], float]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = _shape(equation.invars[0])
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(_shape(equation.outvars[0]))
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = params["dimension_numbers"].rhs_spec[0]
        depth = math.prod(kernel) / kernel[out_features]
        return 2.0 * depth * math.prod(_shape(equation.outvars[0]))
    bodies = [_count(body, of_branches) for body in _bodies(params)]
    if name == "scan":
        return params["length"] * sum(bodies)
    if name == "while" and sum(bodies):
        raise ValueError("the function has a loop of an unknown number of rounds")
    if name == "cond":
        return of_branches(bodies)
    return sum(bodies)


def _bodies(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """What an equation calls; the oldest JAX that is supported has no public function for it."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            body = getattr(one, "jaxpr", one)
            if isinstance(body, core.Jaxpr):
                yield body


@functools.cache
def flops_per_second() -> float:
    """How fast this machine's default device multiplies matrices now, measured in under a second.

    Of three runs the middle one counts, since other programs may be busy.
    """
    side = 1024
    matrix = jnp.ones((side, side))
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(3):
        clock = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - clock)
    return 2.0 * side**3 / sorted(times)[1]
