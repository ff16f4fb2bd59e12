"""Measurement operators: factories of `Operator`, combinations of them, and `measure`.

Every factory takes keyword arguments, declared in `aps_jax.tasks`, checks them at once and returns
an `aps_jax.types.Operator` for images of any size. Operators with random state (mask, kernel,
matrix) are drawn by `operator.init(key, images)`. All spatial operators act on each channel alone,
never mix images and work in float32.
"""

from __future__ import annotations

from typing import Any

from aps_jax.io.names import choose
from aps_jax.operators.blur import blur, gaussian_blur, motion_blur
from aps_jax.operators.color import colorization, demosaicing
from aps_jax.operators.combine import compose, stack
from aps_jax.operators.compressed import compressed_sensing
from aps_jax.operators.inpainting import inpainting_box, inpainting_mask, inpainting_random
from aps_jax.operators.jpeg import jpeg
from aps_jax.operators.kernel_wizard import nonlinear_blur
from aps_jax.operators.measure import measure
from aps_jax.operators.nonlinear import denoising, hdr, phase_retrieval, quantization
from aps_jax.operators.resample import super_resolution
from aps_jax.tasks import TASKS
from aps_jax.types import Operator

__all__ = [
    "Operator",
    "blur",
    "colorization",
    "compose",
    "compressed_sensing",
    "demosaicing",
    "denoising",
    "gaussian_blur",
    "hdr",
    "inpainting_box",
    "inpainting_mask",
    "inpainting_random",
    "jpeg",
    "make_operator",
    "measure",
    "motion_blur",
    "nonlinear_blur",
    "phase_retrieval",
    "quantization",
    "stack",
    "super_resolution",
]


def make_operator(name: str, **options: Any) -> Operator:
    """Builds the operator of a named task; draw its random state with `operator.init`.

    Args:
      name: key of `aps_jax.tasks.TASKS`.
      **options: options of that task; the others keep their defaults.

    Raises:
      ValueError: for a task or an option that is unknown, missing or out of range.
    """
    values = choose("task", name, TASKS).checked(options)
    return globals()[name](**values)
