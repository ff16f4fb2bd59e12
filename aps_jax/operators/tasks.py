"""Named measurement tasks with their options, for command lines and experiments.

A task picks the settings that depend on the image size, which the factories in `aps_jax.operators`
leave to the caller: blurs shrink with images below 256 pixels (see `blur_sizes`).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aps_jax import operators
from aps_jax.io.names import choose, suggestion
from aps_jax.operators import kernel_wizard
from aps_jax.operators._checks import real
from aps_jax.types import ImageShape, Operator, PyTree

#: Image side for which the published blurs are meant.
_PAPER_SIDE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a task.

    Attributes:
      kind: type of its value: int, float, str, `np.ndarray` for arrays or dict for weights.
      summary: meaning and range.
      default: value if not given; None lets the task choose by the image size.
      is_required: True if it must be given.
    """

    kind: type
    summary: str
    default: Any = None
    is_required: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A named way to build a measurement operator for images of one size.

    Attributes:
      name: key in `TASKS`.
      summary: one line for people.
      options: options by name.
      is_random: True if the operator has random state that `operator.init` must draw.
      factory: `(image_shape, **options) -> Operator`, given every option.
    """

    name: str
    summary: str
    factory: Callable[..., Operator]
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    is_random: bool = False

    def make(self, image_shape: ImageShape, **options: Any) -> Operator:
        """Builds the operator for images of `image_shape`; random state is not drawn yet.

        Raises:
          ValueError: for an option that is unknown, missing or out of range.
        """
        for name in options:
            if name not in self.options:
                raise ValueError(
                    f"task {self.name!r} has no option {name!r}"
                    f"{suggestion(name, self.options)}; options: "
                    f"{', '.join(self.options) or 'none'}"
                )
        values = {name: option.default for name, option in self.options.items()} | options
        for name, option in self.options.items():
            if option.is_required and values[name] is None:
                raise ValueError(f"task {self.name!r} needs the option {name!r}: {option.summary}")
        if len(image_shape) != 2 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (height, width) in pixels, got {image_shape!r}")
        return self.factory(image_shape, **values)


def make_operator(name: str, image_shape: ImageShape, **options: Any) -> Operator:
    """Builds the operator of a named task; draw its random state with `operator.init`.

    Args:
      name: key of `TASKS`.
      image_shape: (height, width) of the images to measure.
      **options: options of that task; the others keep their defaults.

    Returns:
      The operator, random state not drawn yet.

    Raises:
      ValueError: for a task or an option that is unknown, missing or out of range.
    """
    return choose("task", name, TASKS).make(image_shape, **options)


def blur_sizes(image_shape: ImageShape) -> tuple[int, float]:
    """Kernel size and Gaussian std of the blur tasks, relative to the shorter image side.

    From 256 pixels on they are the published 61 and 3.0. Below they shrink with the side, to no
    less than 5 and 1.0: 15 and 1.0 at 64 pixels.
    """
    ratio = min(1.0, min(image_shape) / _PAPER_SIDE)
    return max(5, 2 * int(30 * ratio) + 1), max(1.0, 3.0 * ratio)


def _any_size(factory: Callable[..., Operator]) -> Callable[..., Operator]:
    """Adapts a factory whose settings do not depend on the image size."""

    def make(image_shape: ImageShape, **options: Any) -> Operator:
        del image_shape
        return factory(**options)

    return make


def _gaussian_blur(
    image_shape: ImageShape, *, std: float | None, kernel_size: int | None
) -> Operator:
    default_size, default_std = blur_sizes(image_shape)
    std = default_std if std is None else real("std", std, open_low=True)
    if kernel_size is None:  # Never smaller than the Gaussian's own support.
        kernel_size = max(default_size, 2 * int(4 * std + 0.5) + 1)
    return operators.gaussian_blur(kernel_size=kernel_size, std=std)


def _motion_blur(image_shape: ImageShape, *, intensity: float, kernel_size: int | None) -> Operator:
    kernel_size = blur_sizes(image_shape)[0] if kernel_size is None else kernel_size
    return operators.motion_blur(kernel_size=kernel_size, intensity=intensity)


def _inpainting_box(
    image_shape: ImageShape, *, box_size: int | None, margin: int | None
) -> Operator:
    del image_shape
    return operators.inpainting_box(size=box_size, margin=margin)


def _inpainting_mask(image_shape: ImageShape, *, mask: np.ndarray) -> Operator:
    operator = operators.inpainting_mask(mask)
    got = operator.params.shape[-3:-1]
    if got != tuple(image_shape):
        raise ValueError(f"mask is for images of {got}, required {tuple(image_shape)}")
    return operator


def _nonlinear_blur(image_shape: ImageShape, *, params: PyTree) -> Operator:
    del image_shape
    return operators.nonlinear_blur(params, config=kernel_wizard.config_of(params))


_KERNEL_SIZE = Option(
    kind=int, summary="side of the kernel in pixels, odd; 61 from 256 pixels on, less below"
)

_ALL_TASKS = (
    Task(
        name="super_resolution",
        summary="antialiased bicubic downsampling",
        factory=_any_size(operators.super_resolution),
        options={"scale": Option(kind=int, default=4, summary="factor, >= 1")},
    ),
    Task(
        name="gaussian_blur",
        summary="Gaussian blur; std 3.0 * min(1, side / 256) pixels, at least 1.0",
        factory=_gaussian_blur,
        options={
            "std": Option(kind=float, summary="standard deviation in pixels, > 0"),
            "kernel_size": _KERNEL_SIZE,
        },
    ),
    Task(
        name="motion_blur",
        summary="blur along a random path; kernel 61 from 256-pixel images on, less below",
        factory=_motion_blur,
        options={
            "intensity": Option(kind=float, default=0.5, summary="shakiness, 0 to 1"),
            "kernel_size": _KERNEL_SIZE,
        },
        is_random=True,
    ),
    Task(
        name="blur",
        summary="correlation with your own kernel",
        factory=_any_size(operators.blur),
        options={
            "kernel": Option(kind=np.ndarray, is_required=True, summary="weights [kh, kw]"),
        },
    ),
    Task(
        name="inpainting_random",
        summary="random pixels are missing",
        factory=_any_size(operators.inpainting_random),
        options={
            "fraction": Option(kind=float, default=0.7, summary="share of missing pixels, [0, 1)")
        },
        is_random=True,
    ),
    Task(
        name="inpainting_box",
        summary="a box at a random place is missing",
        factory=_inpainting_box,
        options={
            "box_size": Option(kind=int, summary="side in pixels; half the image by default"),
            "margin": Option(kind=int, summary="distance to the border; an eighth by default"),
        },
        is_random=True,
    ),
    Task(
        name="inpainting_mask",
        summary="the pixels of your own mask are missing",
        factory=_inpainting_mask,
        options={
            "mask": Option(
                kind=np.ndarray, is_required=True, summary="[H, W], 1 = measured, 0 = missing"
            )
        },
    ),
    Task(
        name="hdr",
        summary="overexposure, clip(gain x, -1, 1)",
        factory=_any_size(operators.hdr),
        options={"gain": Option(kind=float, default=2.0, summary="factor, > 0")},
    ),
    Task(
        name="phase_retrieval",
        summary="Fourier amplitudes of the padded image",
        factory=_any_size(operators.phase_retrieval),
        options={"oversample": Option(kind=float, default=2.0, summary="padding factor, >= 0")},
    ),
    Task(
        name="nonlinear_blur",
        summary="blur by the BKSE network; needs its converted weights",
        factory=_nonlinear_blur,
        options={
            "params": Option(
                kind=dict,
                is_required=True,
                summary="KernelWizard weights of GOPRO_wVAE.pth, by aps-jax convert",
            )
        },
    ),
    Task(
        name="denoising",
        summary="only noise is to be removed",
        factory=_any_size(operators.denoising),
    ),
    Task(
        name="colorization",
        summary="only the grey image is measured",
        factory=_any_size(operators.colorization),
    ),
    Task(
        name="demosaicing",
        summary="one colour per pixel, in a Bayer pattern",
        factory=_any_size(operators.demosaicing),
        options={"pattern": Option(kind=str, default="rggb", summary="rggb, bggr, grbg or gbrg")},
    ),
    Task(
        name="jpeg",
        summary="JPEG-like compression",
        factory=_any_size(operators.jpeg),
        options={"quality": Option(kind=int, default=20, summary="1 (worst) to 100")},
    ),
    Task(
        name="quantization",
        summary="rounding to 2**bits levels per channel",
        factory=_any_size(operators.quantization),
        options={"bits": Option(kind=int, default=2, summary="bits per channel, 1 to 16")},
    ),
    Task(
        name="compressed_sensing",
        summary="random projections of each channel, for small images",
        factory=_any_size(operators.compressed_sensing),
        options={
            "fraction": Option(kind=float, default=0.25, summary="measurements per pixel, (0, 1]"),
            "ensemble": Option(kind=str, default="signs", summary="signs or gaussian"),
        },
        is_random=True,
    ),
)

#: Every task by name.
TASKS: Mapping[str, Task] = types.MappingProxyType({task.name: task for task in _ALL_TASKS})
