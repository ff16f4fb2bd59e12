"""Other posterior samplers on the same prior, codec and measurement energy as `aps_sample`.

Each is a frozen dataclass of options with the steps of `sampling.run.Sampler`; `sample` runs any of
them as `aps_sample` runs APS, and `config.evaluations()` says what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from aps_jax.config import APSConfig
from aps_jax.sampler import make_aps
from aps_jax.samplers.best_of_n import BestOfNConfig
from aps_jax.samplers.entrgi import EntRGiConfig
from aps_jax.samplers.g2d2 import G2D2Config
from aps_jax.samplers.maskgit import MaskGITConfig
from aps_jax.samplers.mmada import MMaDAConfig
from aps_jax.samplers.redge import ReDGEConfig
from aps_jax.samplers.sgdd import SGDDConfig
from aps_jax.samplers.smc import SMCConfig
from aps_jax.samplers.straight_through import StraightThroughConfig
from aps_jax.samplers.svdd import SVDDConfig
from aps_jax.sampling.run import Sampler, SampleResult, run
from aps_jax.sampling.target import measurement_target
from aps_jax.types import Array, Key, Params, PyTree


class Entry(NamedTuple):
    """An entry of `SAMPLERS`.

    Attributes:
      config: class of its options, which say how to sample; `config(...).evaluations()` counts
        model calls.
      summary: what it does, one line.
      paper: arXiv number of the method, or why there is none.
      defaults: names of options by where their defaults come from; every option is in one group.
    """

    config: type[Any]
    summary: str
    paper: str
    defaults: Mapping[str, tuple[str, ...]]


_SHAPE = ("decode_scale", "num_samples", "image_shape", "trace")
_COMMON = {"paper of APS": ("sigma",), "neutral": _SHAPE}
_CALLS = {"paper of APS": ("sigma",), "neutral": (*_SHAPE, "guidance_scale", "prior_temperature")}
_NO_LPIPS = {**_COMMON, "neutral": (*_SHAPE, "perceptual_weight", "encoder_start")}
_GUIDED = {**_CALLS, "neutral": (*_CALLS["neutral"], "perceptual_weight", "encoder_start")}
_MASKGIT_CODE = {
    "code of MaskGIT": ("schedule", "reveal", "gumbel_temperature"),
    "paper of ReMDM": ("remask_strength",),
}
_UNUSED_REVEALS = {
    "code of MaskGIT": ("gumbel_temperature",),
    "paper of ReMDM": ("remask_strength",),
}

#: Samplers by name.
SAMPLERS: dict[str, Entry] = {
    "aps": Entry(
        APSConfig,
        "Anchored Posterior Sampling; also aps-i, aps-ii, aps-l and the presets",
        "arXiv:2510.02291",
        {
            "its paper": (
                "num_steps", "num_inner_steps", "learning_rate", "measurement_term", "sigma",
                "prior_weight", "remasking", "draw",
            ),
            "code of MMaDA": ("rule", "schedule"),
            "neutral": (
                "perceptual_weight", "prior_temperature", "learning_rate_schedule", "keep_best",
                "warm_start", "sensitivity_floor", "encoder_start", "guidance_scale", *_SHAPE,
            ),
            "ours": ("prior_weighting", "threshold", "threshold_schedule"),
        },
    ),
    "maskgit": Entry(
        MaskGITConfig,
        "samples of the prior, no measurement",
        "arXiv:2202.04200",
        {**_CALLS, **_MASKGIT_CODE, "ours": ("num_steps",)},
    ),
    "mmada": Entry(
        MMaDAConfig,
        "samples of the prior exactly as MMaDA's code draws them, no measurement",
        "arXiv:2505.15809",
        {**_CALLS, "code of MMaDA": ("num_steps", "gumbel_temperature")},
    ),
    "best_of_n": Entry(
        BestOfNConfig,
        "n samples of the prior, the one that fits best",
        "no paper",
        {**_CALLS, **_MASKGIT_CODE, "ours": ("num_steps", "num_candidates")},
    ),
    "straight_through": Entry(
        StraightThroughConfig,
        "the codec alone: optimise codes by the straight-through estimator, no prior",
        "arXiv:1308.3432",
        {
            **_NO_LPIPS,
            "ours": (
                "measurement_term", "learning_rate", "num_inner_steps", "variables", "estimator",
                "temperature", "init_noise",
            ),
        },
    ),
    "svdd_pm": Entry(
        SVDDConfig,
        "SVDD-PM: the best of several next states, at every step",
        "arXiv:2408.08252",
        {
            **_CALLS,
            **_UNUSED_REVEALS,
            "its code": ("num_steps", "schedule", "reveal", "num_candidates", "selection"),
            "its paper": ("selection_temperature",),
        },
    ),
    "g2d2": Entry(
        G2D2Config,
        "G2D2: variational logits by Gumbel-softmax, star-shaped or Markov",
        "arXiv:2410.14710",
        {
            **_GUIDED,
            "its code, preset for super-resolution": (
                "num_steps", "num_inner_steps", "schedule", "measurement_term", "learning_rate",
                "learning_rate_span", "kl_weight", "kl_span", "kl_exact", "kl_on_unmasked",
                "forget", "gumbel_temperature", "top_p", "uniform_mass",
            ),
            "its paper": ("transition",),
        },
    ),
    "sgdd": Entry(
        SGDDConfig,
        "SGDD: split Gibbs with Metropolis-Hastings, adapted to masked priors (ours)",
        "arXiv:2503.01161",
        {
            **_CALLS,
            "its code": ("looseness", "proposal"),
            "ours": (
                "num_steps", "num_likelihood_steps", "num_denoise_steps", "method", "coupling",
                "first_noise", "last_noise",
            ),
        },
    ),
    "smc": Entry(
        SMCConfig,
        "weighted, resampled particles: Feynman-Kac steering and SMC-DDM, base proposals",
        "arXiv:2501.06848, arXiv:2505.22524",
        {
            **_CALLS,
            **_UNUSED_REVEALS,
            "code of Feynman-Kac steering": ("num_particles", "num_fills", "fill", "reveal"),
            "code of SMC-DDM": ("num_steps", "ramp", "ess_threshold"),
            "abstract of GRAS (2026)": ("weights",),
            "ours": (
                "schedule", "reward_weight", "temperature", "resample_interval", "output",
            ),
        },
    ),
    "entrgi": Entry(
        EntRGiConfig,
        "EntRGi: gradients at an entropy-aware mix of hard and soft codes",
        "arXiv:2602.05000",
        {
            **_GUIDED,
            "its code": (
                "num_steps", "num_inner_steps", "learning_rate", "num_trajectories", "mixing",
                "temperature", "top_p", "order", "schedule",
            ),
            "ours": ("measurement_term",),
        },
    ),
    "redge": Entry(
        ReDGEConfig,
        "ReDGE: gradients through a reparameterised diffusion",
        "arXiv:2601.00781",
        {
            **_GUIDED,
            "its code, MaskGIT demo": (
                "num_steps", "num_inner_steps", "learning_rate", "kl_weight", "estimator",
                "gumbel_temperature", "num_diffusion_steps", "first_noise",
            ),
            "ours": ("measurement_term", "measurement_weight", "schedule"),
        },
    ),
}  # fmt: skip

__all__ = [
    "SAMPLERS",
    "BestOfNConfig",
    "EntRGiConfig",
    "G2D2Config",
    "MMaDAConfig",
    "MaskGITConfig",
    "ReDGEConfig",
    "SGDDConfig",
    "SMCConfig",
    "SVDDConfig",
    "Entry",
    "StraightThroughConfig",
    "sample",
    "sampler_of",
]


def sample(
    params: Params, y: PyTree, key: Key, *, config: Any, known_tokens: Array | None = None
) -> SampleResult:
    """Samples as `aps_sample` does, by the sampler whose options `config` is.

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options of any sampler; static for `jax.jit`, or an argument like the others.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; what a step is, and `info.loss`, is said by the class of the options.

    Raises:
      ValueError: shapes of y, operator, codec, prior and configuration do not fit together.
    """
    target = measurement_target(params, y, config=config, known_tokens=known_tokens)
    return run(sampler_of(config), target, key)


def sampler_of(config: Any) -> Sampler:
    """The sampler that a configuration describes."""
    return make_aps(config) if isinstance(config, APSConfig) else config
