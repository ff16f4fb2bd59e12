"""Measurement tasks: what each operator is called, what it does and which options it takes.

The one place that declares them. The factories in `aps_jax.operators` take their checks, defaults
and documentation from it (`declared`), `aps-jax restore` its flags and `aps-jax tasks` its list. It
loads no jax, so that the help of the command line need not wait for it. A new task is an entry here
and a factory of the same name there.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from aps_jax.io.names import suggestion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a task.

    Attributes:
      kind: type of its value: int, float, str, `np.ndarray` for arrays or dict for weights.
      summary: meaning and range.
      metavar: what stands for its value in the help of the command line.
      default: value if not given; None lets the operator choose, as the summary says.
      is_required: True if it must be given.
      flag: its name on the command line, if that is another one.
      check: `(name, value) -> value` of the right type; ValueError if it is out of range.
    """

    kind: type
    summary: str
    metavar: str
    default: Any = None
    is_required: bool = False
    flag: str | None = None
    check: Callable[[str, Any], Any] = lambda name, value: value


def _as_whole(name: str, value: Any, *, low: int, high: int | None, odd: bool) -> int:
    """`value` as an int; ValueError unless it is a whole number in range."""
    bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
    required = f"{'an odd' if odd else 'a whole'} number {bounds}"
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    whole = int(value) if is_whole else low - 1
    if whole < low or (high is not None and whole > high) or (odd and not whole % 2):
        raise ValueError(f"{name} must be {required}, got {value!r}")
    return whole


def _as_real(name: str, value: Any, *, bounds: str) -> float:
    """`value` as a float; ValueError unless it is a finite number within an interval "[a, b)"."""
    low, high = (float(end) for end in bounds[1:-1].split(","))
    is_real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    real = float(value) if is_real else math.nan
    above = real > low or (real == low and bounds[0] == "[")
    below = real < high or (real == high and bounds[-1] == "]")
    if not (above and below):
        raise ValueError(f"{name} must be a number in {bounds}, got {value!r}")
    return real


def _as_word(name: str, value: Any, *, words: Sequence[str]) -> str:
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}")
    return value


def _as_sides(name: str, value: Any) -> tuple[int, int]:
    """(height, width) of one number for both or of two; ValueError unless they are >= 1."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be one number or (height, width), got {value!r}")
    height, width = (_as_whole(name, side, low=1, high=None, odd=False) for side in sides)
    return (height, width)


def _whole(
    summary: str,
    default: int | None = None,
    *,
    low: int,
    high: int | None = None,
    odd: bool = False,
    unset: str = "",
    metavar: str = "N",
) -> Option:
    """A whole number in range; `unset` says what happens without one."""
    bounds = f">= {low}" if high is None else f"{low} to {high}"
    return Option(
        kind=int, default=default, metavar=metavar,
        summary=f"{summary}, {'odd, ' * odd}{bounds}{unset and '; by default '}{unset}",
        check=functools.partial(_as_whole, low=low, high=high, odd=odd),
    )  # fmt: skip


def _real(
    summary: str,
    default: float | None = None,
    *,
    bounds: str,
    unset: str = "",
    metavar: str = "X",
) -> Option:
    """A number within `bounds`, an interval such as "[0, 1)"; `unset` as for `_whole`."""
    return Option(
        kind=float, default=default, metavar=metavar,
        summary=f"{summary}, in {bounds}{unset and '; by default '}{unset}",
        check=functools.partial(_as_real, bounds=bounds),
    )  # fmt: skip


def _word(summary: str, *words: str) -> Option:
    """One of some words; the first is the default."""
    return Option(
        kind=str, default=words[0], metavar="|".join(words), summary=summary,
        check=functools.partial(_as_word, words=words),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A named measurement operator.

    Attributes:
      name: key in `TASKS`, and name of the factory.
      summary: one line for people.
      options: options by name.
      is_random: True if the operator has random state that `operator.init` must draw.
    """

    name: str
    summary: str
    options: Mapping[str, Option]
    is_random: bool = False

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option: those given, checked, and the defaults of the others.

        Raises:
          ValueError: for an option that is unknown, missing or out of range.
        """
        for name in given:
            if name not in self.options:
                raise ValueError(
                    f"task {self.name!r} has no option {name!r}"
                    f"{suggestion(name, self.options)}; options: "
                    f"{', '.join(self.options) or 'none'}"
                )
        values = {}
        for name, option in self.options.items():
            value = given.get(name, option.default)
            if value is None and option.is_required:
                raise ValueError(f"task {self.name!r} needs the option {name!r}: {option.summary}")
            values[name] = value if value is None else option.check(name, value)
        return values


def _task(name: str, summary: str, *, is_random: bool = False, **options: Option) -> Task:
    return Task(name=name, summary=summary, options=options, is_random=is_random)


def _kernel_size(low: int) -> Option:
    unset = "61 for images from 256 pixels on, less below"
    return _whole("side of the kernel in pixels", low=low, odd=True, unset=unset, metavar="PX")


_ALL: Sequence[Task] = (
    _task(
        "super_resolution", "antialiased bicubic downsampling",
        scale=_whole("factor", 4, low=1),
    ),
    _task(
        "gaussian_blur", "Gaussian blur",
        std=_real(
            "standard deviation in pixels", bounds="(0, inf)", metavar="PX",
            unset="3 min(1, side / 256), at least 1",
        ),
        kernel_size=_kernel_size(1),
    ),
    _task(
        "motion_blur", "blur along a random path", is_random=True,
        intensity=_real("shakiness of the path", 0.5, bounds="[0, 1]"),
        kernel_size=_kernel_size(3),
    ),
    _task(
        "blur", "correlation with your own kernel",
        kernel=Option(
            kind=np.ndarray, is_required=True, metavar="FILE",
            summary="weights [kh, kw]; a file is .npy as it is, or a grey image, scaled to sum 1",
        ),
    ),
    _task(
        "inpainting_random", "random pixels are missing", is_random=True,
        fraction=_real("share of missing pixels", 0.7, bounds="[0, 1)", metavar="SHARE"),
    ),
    _task(
        "inpainting_box", "a box at a random place is missing", is_random=True,
        box_size=Option(
            kind=int, metavar="PX", check=_as_sides,
            summary="side of the box in pixels, >= 1; by default half the image",
        ),
        margin=_whole(
            "distance to the border in pixels", low=0, unset="an eighth of the image", metavar="PX"
        ),
    ),
    _task(
        "inpainting_mask", "the pixels of your own mask are missing",
        mask=Option(
            kind=np.ndarray, is_required=True, metavar="FILE",
            summary="[H, W], or one per image [B, H, W, 1]; 1, in a picture white, where measured",
        ),
    ),
    _task(
        "hdr", "overexposure, clip(gain x, -1, 1)",
        gain=_real("factor before clipping", 2.0, bounds="(0, inf)"),
    ),
    _task(
        "phase_retrieval", "Fourier amplitudes of the padded image",
        oversample=_real("padding factor", 2.0, bounds="[0, inf)"),
    ),
    _task(
        "nonlinear_blur", "blur by the BKSE network; needs its converted weights",
        params=Option(
            kind=dict, is_required=True, metavar="DIR", flag="weights",
            summary="KernelWizard weights of GOPRO_wVAE.pth, by convert.kernel_wizard",
        ),
    ),
    _task("denoising", "only noise is to be removed"),
    _task("colorization", "only the grey image is measured"),
    _task(
        "demosaicing", "one colour per pixel, in a Bayer pattern",
        pattern=_word(
            "colours of the 2x2 tile at the top left, by rows", "rggb", "bggr", "grbg", "gbrg"
        ),
    ),
    _task(
        "jpeg", "JPEG-like compression",
        quality=_whole("from worst to best", 20, low=1, high=100),
    ),
    _task(
        "quantization", "rounding to 2**bits levels per channel",
        bits=_whole("bits per channel", 2, low=1, high=16),
    ),
    _task(
        "compressed_sensing", "random projections of each channel, for small images",
        is_random=True,
        fraction=_real(
            "measurements per pixel", bounds="(0, 1]", unset="a quarter", metavar="SHARE"
        ),
        num_measurements=_whole("measurements", low=1, unset="given by the share"),
        ensemble=_word("entries of the matrix", "signs", "gaussian"),
    ),
)  # fmt: skip

#: Every task by name.
TASKS: Mapping[str, Task] = types.MappingProxyType({task.name: task for task in _ALL})


def declared(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A factory whose options are checked, completed and documented by its entry in `TASKS`.

    It is written with the bare names of its options and gets all of them, in range. What is no
    option of the task passes through.
    """
    task = TASKS[factory.__name__]
    signature = inspect.signature(factory)
    signature = signature.replace(
        parameters=[
            parameter.replace(default=task.options[name].default)
            if name in task.options and not task.options[name].is_required
            else parameter
            for name, parameter in signature.parameters.items()
        ]
    )

    @functools.wraps(factory)
    def checked(*args: Any, **options: Any) -> Any:
        given = signature.bind_partial(*args, **options).arguments
        own = {name: value for name, value in given.items() if name in task.options}
        rest = {name: value for name, value in given.items() if name not in task.options}
        return factory(**task.checked(own), **rest)

    checked.__signature__ = signature  # type: ignore[attr-defined]
    checked.__doc__ = _documented(inspect.getdoc(factory) or "", task)
    return checked


def _documented(text: str, task: Task) -> str:
    """A Google docstring with the task's options as its arguments."""
    lines = [f"  {name}: {option.summary}." for name, option in task.options.items()]
    if not lines:
        return text
    head, returns, tail = text.partition("Returns:")
    return head.rstrip() + "\n\nArgs:\n" + "\n".join(lines) + "\n\n" + returns + tail
