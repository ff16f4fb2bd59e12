"""Measurement terms by name: what gradient methods make small in place of the energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aps_jax import energies
from aps_jax.sampling.leaves import is_absent
from aps_jax.types import Energy, Params, Perceptual, PyTree


def _gaussian(params: Params, y: PyTree, config: Any, num_tokens: int) -> Energy:
    return energies.gaussian(params.operator, y, config.sigma)


def _norm(params: Params, y: PyTree, config: Any, num_tokens: int) -> Energy:
    return energies.norm(params.operator, y)


def _l1(params: Params, y: PyTree, config: Any, num_tokens: int) -> Energy:
    perceptual: Perceptual | None = None
    if not is_absent(config.perceptual_weight) and params.operator.is_image:
        perceptual = params.perceptual
        if perceptual is None:
            raise ValueError(
                "perceptual_weight needs Params.perceptual; load it with aps_jax.load_lpips() "
                "or set perceptual_weight=0"
            )
    energy = energies.l1_lpips(params.operator, y, perceptual, config.perceptual_weight)
    # The factor keeps the gradient of a token, and what `prior_weight` means, independent of the
    # image's size.
    return energies.scaled(energy, num_tokens)


#: `(params, y, options of the sampler, number of tokens) -> energy`, by `measurement_term`.
TERMS: dict[str, Callable[[Params, PyTree, Any, int], Energy]] = {
    "gaussian": _gaussian,
    "norm": _norm,
    "l1": _l1,
}
