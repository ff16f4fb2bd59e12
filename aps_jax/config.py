"""Options of Anchored Posterior Sampling, its named variants and presets."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

from aps_jax.schedules import SCHEDULES

_CHOICES = {
    "draw": ("quantized", "categorical", "argmax"),
    "remasking": ("anchored", "standard", "random"),
    "rule": ("count", "threshold", "fixed_threshold"),
    "schedule": tuple(sorted(SCHEDULES)),
    "learning_rate_schedule": ("constant", "cosine"),
    "measurement_term": ("l1", "gaussian"),
    "prior_weighting": ("uniform", "elbo"),
}


class Evaluations(NamedTuple):
    """Model calls per sample of one measurement.

    Samplers on pixels have no decoder: there, the decoder's counts are the operator's alone.

    Attributes:
      denoiser: forward passes of the prior, or of the denoiser; guidance takes two per call.
      decoder: forward passes of decoder and operator, the final picture included and those of a
        trace, one per step, left out.
      decoder_gradient: forward and backward passes of decoder and operator.
    """

    denoiser: int
    decoder: int
    decoder_gradient: int


class Knob(NamedTuple):
    """What a budget of decoder evaluations changes (`aps_jax.samplers.budget`).

    Attributes:
      name: option that takes up the budget.
      least: its least useful value.
      scales_steps: `num_steps` shrinks and grows with it, each by the square root of the change,
        unless it is fixed.
    """

    name: str
    least: int = 1
    scales_steps: bool = False


def num_passes(guidance_scale: float) -> int:
    """Forward passes of the prior per call: two with classifier-free guidance."""
    return 1 if guidance_scale == 0 else 2


def check_options(
    config: Any,
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    integers: Mapping[str, int] | None = None,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
    falling: Sequence[str] = (),
) -> None:
    """ValueError that names the first option of `config` that is out of range.

    Numbers of NumPy and JAX become Python's. What a transformation of JAX has put in place of a
    number is left alone, since nobody can know its value.

    Args:
      config: frozen dataclass whose fields are named below.
      choices: allowed words by option.
      integers: least value by option.
      positive: options that are finite and above 0.
      not_negative: options that are finite and at least 0.
      shares: options in [0, 1], or None.
      falling: numbers of which none is larger than the one before.
    """
    for name, words in (choices or {}).items():
        if getattr(config, name) not in words:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose from {list(words)}")
    for name, least in (integers or {}).items():
        value = _plain_number(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    ranges = (
        (positive, lambda value: 0 < value < math.inf, "be positive"),
        (not_negative, lambda value: 0 <= value < math.inf, "not be negative"),
        (shares, lambda value: 0 <= value <= 1, "be in [0, 1]"),
    )
    for names, is_fine, words in ranges:
        for name in names:
            value = _plain_number(config, name)
            if value is None and names is shares:
                continue
            if getattr(value, "shape", None) == () and not isinstance(value, int | float):
                continue  # An abstract value of JAX.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not is_fine(value):
                raise ValueError(f"{name} must {words}, got {value!r}")
    for larger, smaller in itertools.pairwise(falling):
        values = [_plain_number(config, name) for name in (larger, smaller)]
        if all(isinstance(value, int | float) for value in values) and values[0] < values[1]:
            raise ValueError(
                f"{smaller} must not be above {larger}, got {values[1]!r} and {values[0]!r}"
            )


def _pair(shape: Any) -> tuple[int, int]:
    """(H, W) of any two positive integers."""
    sides = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise ValueError(f"image_shape must be (height, width) in pixels, got {shape!r}")
    return int(sides[0]), int(sides[1])


def _plain_number(config: Any, name: str) -> Any:
    """The option; numbers of NumPy and concrete ones of JAX are stored as Python's first."""
    value = getattr(config, name)
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        with contextlib.suppress(Exception):  # Abstract values refuse.
            value = value.item()
            object.__setattr__(config, name, value)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """Options of every sampler.

    Subclasses declare what `aps_jax.samplers.SAMPLERS`, the command line and budgets say of them:

    - `NAME`: key of `SAMPLERS`.
    - `SUMMARY`: what it does, one line.
    - `PAPER`: arXiv number of the method, or why there is none.
    - `SOURCES`: names of options by where their defaults come from; of those that are not named,
      the base class has told.
    - `KNOB`: what a budget changes; None where the decoder is not called on the way.
    - `NEEDS`: what it draws from, "prior" (over tokens, with a codec), "denoiser" (of pixels) or
      "latent denoiser" (of the latents of a codec).

    Attributes:
      sigma: noise std of the measurement energy ||A(x) - y||^2 / (2 sigma^2), one for all samplers.
      data_consistency: what is sampled comes to explain the measurement at the end, also where the
        codec cannot show it, by the change of least energy whose neighbouring pixels differ by this
        std (`aps_jax.sampling.smooth`). The tokens stay, and so does all where the gradient of the
        operator is a stand-in (`Operator.has_true_gradient`). 0 is off (ours).
      decode_scale: decode this many times larger and average down ("aps-l" has 2).
      num_samples: samples per measurement.
      trace: also return losses of inner steps and the tokens and image of every step.
      image_shape: (H, W), or None to infer it from the operator and the measurement.
    """

    NAME: ClassVar[str]
    SUMMARY: ClassVar[str]
    PAPER: ClassVar[str]
    SOURCES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "paper of APS": ("sigma",),
        "neutral": ("data_consistency", "decode_scale", "num_samples", "trace", "image_shape"),
    }
    KNOB: ClassVar[Knob | None] = None
    NEEDS: ClassVar[str] = "prior"

    sigma: float = 0.05
    data_consistency: float = 0.0
    decode_scale: int = 1
    num_samples: int = 1
    trace: bool = False
    image_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_options(
            self,
            positive=("sigma",),
            not_negative=("data_consistency",),
            integers={"decode_scale": 1, "num_samples": 1},
        )
        if self.image_shape is not None:
            object.__setattr__(self, "image_shape", _pair(self.image_shape))

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        raise NotImplementedError(f"{type(self).__name__} counts no model calls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class APSConfig(SharedConfig):
    """Static options of `aps_sample`; hashable, so a static argument of `jax.jit`.

    The defaults are the published algorithm (arXiv:2510.02291) without its perceptual term, which
    needs LPIPS weights. Options marked (ours) are not in the paper.

    Attributes:
      num_steps: timesteps T.
      num_inner_steps: Adam steps M per timestep; 0 leaves the prior's logits as they are.
      learning_rate: of Adam on the logits phi.
      learning_rate_schedule: "constant", or "cosine" to 0 over all inner steps of all timesteps,
        which suits a warm start (ours).
      keep_best: each timestep ends with the phi of the least objective that the second half of its
        inner steps has evaluated, in place of the last; a single step has no choice (ours).
      measurement_term: "l1" (mean absolute error + perceptual_weight * LPIPS) or "gaussian"
        (squared error / 2 sigma^2).
      perceptual_weight: lambda_p, used where the measurement is an image; the paper has 1e-3.
      prior_weight: lambda_prior of the prior term; 0 is the published Algorithm 1.
      prior_weighting: "elbo" scales the prior term by w_t (Theorem 3.3), "uniform" by 1 (ours).
      warm_start: phi starts at the previous timestep's phi instead of the prior's logits (ours).
      sensitivity_floor: scales Adam's updates by how much the measurement says about each token
        (`aps_jax.sampling.sensitivity`), those of the prior term included, and lets a warm start
        carry over only as much of phi; the rest starts at the current prior's logits, raised by
        `encoder_start`. 0 is off (ours).
      encoder_start: raise the logits that phi starts from near the codes that the encoder has for a
        smooth estimate of the image, by 2 nats times this per bit of LFQ (with other codebooks,
        per such a part of their spread; `aps_jax.sampling.starts`): at every timestep of a cold
        start, at the first of a warm start (and, with `sensitivity_floor`, at the others for what
        the measurement does not say). 0 is off (ours).
      start_where_measured: raise those logits only as far as the measurement says something about a
        token, by the same factor as `sensitivity_floor`, without which it changes nothing. What is
        not measured then starts at the prior: a hole is filled by it and not by the smooth image
        (ours).
      remasking: whose confidence decides what is kept: "anchored" the tilted x_phi (APS-II),
        "standard" the prior x_theta (APS-I), "random" nobody's (control).
      draw: proposal per token: "quantized" nearest code to the mean code, "categorical" sample of
        x_phi, "argmax" of x_phi.
      rule: "count" keeps a scheduled number, "threshold" all above a confidence that falls from
        `threshold` to 0 along a cosine (ours), "fixed_threshold" all above `threshold`.
      schedule: gamma, the share of masked tokens over progress, by name.
      threshold: confidence in [0, 1].
      guidance_scale: g of classifier-free guidance, (1 + g) cond - g uncond; 0 is off.
      num_samples: posterior samples per measurement. They must differ, so something must be
        random: `draw="categorical"`, or `remasking="random"` over several timesteps.
    """

    NAME: ClassVar = "aps"
    SUMMARY: ClassVar = "Anchored Posterior Sampling; also aps-i, aps-ii, aps-l and the presets"
    PAPER: ClassVar = "arXiv:2510.02291"
    SOURCES: ClassVar = {
        "its paper": (
            "num_steps", "num_inner_steps", "learning_rate", "measurement_term", "sigma",
            "prior_weight", "remasking", "draw",
        ),
        "code of MMaDA": ("rule", "schedule"),
        "neutral": (
            "perceptual_weight", "learning_rate_schedule", "keep_best", "warm_start",
            "sensitivity_floor", "encoder_start", "start_where_measured", "guidance_scale",
        ),
        "ours": ("prior_weighting", "threshold"),
    }  # fmt: skip
    KNOB: ClassVar = Knob("num_inner_steps")

    num_steps: int = 15
    num_inner_steps: int = 100
    learning_rate: float = 1.0
    learning_rate_schedule: str = "constant"
    keep_best: bool = False
    measurement_term: str = "l1"
    perceptual_weight: float = 0.0
    prior_weight: float = 0.0
    prior_weighting: str = "uniform"
    warm_start: bool = False
    sensitivity_floor: float = 0.0
    encoder_start: float = 0.0
    start_where_measured: bool = False
    remasking: str = "anchored"
    draw: str = "quantized"
    rule: str = "count"
    schedule: str = "cosine"
    threshold: float = 0.9
    guidance_scale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            choices=_CHOICES,
            integers={"num_steps": 1, "num_inner_steps": 0},
            positive=("learning_rate",),
            not_negative=(
                "perceptual_weight",
                "prior_weight",
                "sensitivity_floor",
                "encoder_start",
                "guidance_scale",
            ),
            shares=("threshold",),
        )
        if self.num_samples > 1 and not self.is_random:
            raise ValueError(
                f"num_samples={self.num_samples} would give equal samples, since nothing is random "
                'here: set draw="categorical", or remasking="random" with num_steps above 1'
            )

    @property
    def is_random(self) -> bool:
        """Whether two samples of one measurement differ."""
        return self.draw == "categorical" or (self.remasking == "random" and self.num_steps > 1)

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(
            denoiser=self.num_steps * num_passes(self.guidance_scale),
            decoder=1,
            decoder_gradient=self.num_steps * self.num_inner_steps,
        )


#: Options that define the variants of the paper. Those that name no remasking have the default,
#: which several samples may replace (`aps_jax.presets.make_config`).
VARIANTS: dict[str, dict[str, Any]] = {
    "aps-i": {"remasking": "standard"},
    "aps": {},
    "aps-ii": {"remasking": "anchored"},
    "aps-l": {"decode_scale": 2},
}
