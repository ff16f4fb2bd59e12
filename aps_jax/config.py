"""Options of Anchored Posterior Sampling, its named variants and presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aps_jax.sampling.schedules import SCHEDULES

#: Rules of ReMDM for samplers that keep a scheduled number of tokens; "none" is off.
REMDM_RULES = ("none", "cap", "rescale")

_CHOICES = {
    "draw": ("quantized", "categorical", "argmax"),
    "remasking": ("anchored", "standard", "random"),
    "remdm": REMDM_RULES,
    "rule": ("count", "threshold"),
    "schedule": tuple(sorted(SCHEDULES)),
    "threshold_schedule": ("cosine", "fixed"),
    "learning_rate_schedule": ("constant", "cosine"),
    "measurement_term": ("l1", "gaussian"),
    "prior_term": ("overlap", "kl"),
    "prior_weighting": ("uniform", "elbo"),
    "warm_start": ("none", "logits", "displacement"),
}


class Evaluations(NamedTuple):
    """Model calls per sample of one measurement.

    Attributes:
      denoiser: forward passes of the prior; guidance takes two per call.
      decoder: forward passes of decoder and operator, the final picture included.
      decoder_gradient: forward and backward passes of decoder and operator.
    """

    denoiser: int
    decoder: int
    decoder_gradient: int


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
) -> None:
    """ValueError that names the first option of `config` that is out of range.

    Args:
      config: dataclass whose fields are named below.
      choices: allowed words by option.
      integers: least value by option.
      positive: options that are finite and above 0.
      not_negative: options that are finite and at least 0.
      shares: options in [0, 1], or None.
    """
    for name, words in (choices or {}).items():
        if getattr(config, name) not in words:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose from {list(words)}")
    for name, least in (integers or {}).items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    for name in positive:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be positive, got {getattr(config, name)!r}")
    for name in not_negative:
        if not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)!r}")
    for name in shares:
        if getattr(config, name) is not None and not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(config, name)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class APSConfig:
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
      adam_eps: epsilon of Adam (ours). Gradients below it barely move their logit, so larger values
        leave codes that the prior thinks unlikely where they are.
      measurement_term: "l1" (mean absolute error + perceptual_weight * LPIPS) or "gaussian"
        (squared error / 2 sigma^2).
      perceptual_weight: lambda_p, used where the measurement is an image; the paper has 1e-3.
      sigma: noise std of the "gaussian" term.
      prior_weight: lambda_prior of the prior term; 0 is the published Algorithm 1.
      prior_term: "overlap" is -log <x_phi, x_theta> (Theorem 3.3); "kl" is KL(x_phi || x_theta),
        which does not reward certainty (ours).
      prior_weighting: "elbo" scales the prior term by w_t (Theorem 3.3), "uniform" by 1 (ours).
      prior_temperature: divides the prior's logits (ours).
      warm_start: where phi starts at each timestep: "none" at the prior's logits; "logits" at the
        previous phi; "displacement" at the new logits plus the previous phi minus the previous
        logits (both ours).
      warm_moments: carry Adam's moments over as well (ours).
      evidence_floor: scales Adam's updates by how much the measurement says about each token
        (`aps_jax.sampling.sensitivity`), those of the prior term included, and lets a warm start
        carry over only as much of phi; the rest starts at the current prior's logits, raised by
        `encoder_start`. 0 is off (ours).
      encoder_start: raise the logits that phi starts from near the codes that the encoder has for a
        smooth estimate of the image, by 2 nats times this per bit of LFQ
        (`aps_jax.sampling.estimate`): at every timestep of a cold start, at the first of a warm
        start (and, with `evidence_floor`, at the others for what the measurement does not say). 0
        is off (ours).
      early_stop: freeze an image's phi once its smoothed loss changes by less than this share per
        inner step, several steps in a row; 0 never (ours).
      remasking: whose confidence decides what is kept: "anchored" the tilted x_phi (APS-II),
        "standard" the prior x_theta (APS-I), "random" nobody's (control).
      remdm: mask anchors again by the rule of ReMDM (arXiv:2503.00307): "none", "cap" or "rescale"
        (ours; `aps_jax.sampling.remasking.remdm_chance`). As many more tokens become anchors.
      remask_strength: of `remdm`, in [0, 1]; None takes its paper's, for many more timesteps.
      draw: proposal per token: "quantized" nearest code to the mean code, "categorical" sample of
        x_phi, "argmax" of x_phi.
      rule: "count" keeps a scheduled number, "threshold" all above a confidence.
      schedule: gamma, the share of masked tokens over progress, by name.
      threshold: confidence in [0, 1] that the threshold rule starts from.
      threshold_schedule: "cosine" lowers the threshold to 0, "fixed" keeps it.
      gumbel_temperature: tau of the noise tau * (1 - i/T) on the log-confidence of the count rule.
      guidance_scale: g of classifier-free guidance, (1 + g) cond - g uncond; 0 is off.
      decode_scale: decode this many times larger and average down ("aps-l" has 2).
      num_samples: posterior samples per measurement. They differ only where something is random:
        `draw="categorical"`, `remasking="random"` or `gumbel_temperature > 0`.
      trace: also return losses of all inner steps and the tokens and image of every timestep.
      image_shape: (H, W), or None to infer it from the operator and the measurement.
    """

    num_steps: int = 15
    num_inner_steps: int = 100
    learning_rate: float = 1.0
    learning_rate_schedule: str = "constant"
    keep_best: bool = False
    adam_eps: float = 1e-8
    measurement_term: str = "l1"
    perceptual_weight: float = 0.0
    sigma: float = 0.05
    prior_weight: float = 0.0
    prior_term: str = "overlap"
    prior_weighting: str = "uniform"
    prior_temperature: float = 1.0
    warm_start: str = "none"
    warm_moments: bool = False
    evidence_floor: float = 0.0
    encoder_start: float = 0.0
    early_stop: float = 0.0
    remasking: str = "anchored"
    remdm: str = "none"
    remask_strength: float | None = None
    draw: str = "quantized"
    rule: str = "count"
    schedule: str = "cosine"
    threshold: float = 0.9
    threshold_schedule: str = "cosine"
    gumbel_temperature: float = 0.0
    guidance_scale: float = 0.0
    decode_scale: int = 1
    num_samples: int = 1
    trace: bool = False
    image_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_options(
            self,
            choices=_CHOICES,
            integers={"num_steps": 1, "num_inner_steps": 0, "decode_scale": 1, "num_samples": 1},
            positive=("learning_rate", "adam_eps", "sigma", "prior_temperature"),
            not_negative=(
                "perceptual_weight",
                "prior_weight",
                "evidence_floor",
                "encoder_start",
                "early_stop",
                "gumbel_temperature",
            ),
            shares=("threshold", "remask_strength"),
        )
        if self.warm_moments and self.early_stop > 0:
            raise ValueError(
                "warm_moments and early_stop exclude each other: images stop after different "
                "numbers of steps, and Adam counts steps once for the whole batch"
            )
        if self.image_shape is not None:
            object.__setattr__(self, "image_shape", tuple(self.image_shape))

    def evaluations(self) -> Evaluations:
        """Model calls per sample; with `early_stop` the most that there can be."""
        return Evaluations(
            denoiser=self.num_steps * num_passes(self.guidance_scale),
            decoder=1 + (self.num_steps if self.trace else 0),
            decoder_gradient=self.num_steps * self.num_inner_steps,
        )


#: Options that define the variants of the paper.
VARIANTS: dict[str, dict[str, Any]] = {
    "aps-i": {"remasking": "standard"},
    "aps": {"remasking": "anchored"},
    "aps-ii": {"remasking": "anchored"},
    "aps-l": {"remasking": "anchored", "decode_scale": 2},
}
