"""Other posterior samplers on the same prior, codec and measurement energy as `aps_sample`.

Each has the signature of `aps_sample`, returns a `SampleResult`, and says with
`config.evaluations()` what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aps_jax.config import APSConfig
from aps_jax.presets import VARIANTS
from aps_jax.sampler import SampleResult, aps_sample
from aps_jax.samplers.best_of_n import BestOfNConfig, best_of_n_sample
from aps_jax.samplers.entrgi import EntRGiConfig, entrgi_sample
from aps_jax.samplers.g2d2 import G2D2Config, g2d2_sample
from aps_jax.samplers.maskgit import MaskGITConfig, maskgit_sample
from aps_jax.samplers.mmada import MMaDAConfig, mmada_sample
from aps_jax.samplers.redge import ReDGEConfig, redge_sample
from aps_jax.samplers.sgdd import SGDDConfig, sgdd_sample
from aps_jax.samplers.smc import SMCConfig, smc_sample
from aps_jax.samplers.straight_through import StraightThroughConfig, straight_through_sample
from aps_jax.samplers.svdd import SVDDConfig, svdd_sample


class Sampler(NamedTuple):
    """An entry of `SAMPLERS`.

    Attributes:
      sample: `(params, y, key, *, config, known_tokens=None) -> SampleResult`.
      config: class of its options; `config(...).evaluations()` counts model calls.
      summary: what it does, one line.
      paper: arXiv number of the method, or why there is none.
      defaults: names of options by where their defaults come from; every option is in one group.
    """

    sample: Callable[..., SampleResult]
    config: type[Any]
    summary: str
    paper: str
    defaults: Mapping[str, tuple[str, ...]]


_SHAPE = ("decode_scale", "num_samples", "image_shape")
_COMMON = {"paper of APS": ("sigma",), "neutral": _SHAPE}
_CALLS = {"paper of APS": ("sigma",), "neutral": (*_SHAPE, "guidance_scale", "prior_temperature")}
_NO_LPIPS = {**_COMMON, "neutral": (*_SHAPE, "perceptual_weight", "encoder_start")}
_REMDM = {"paper of ReMDM": ("remask_strength",)}
_NEUTRAL = (*_CALLS["neutral"], "remdm")
_GUIDED = {**_CALLS, **_REMDM, "neutral": (*_NEUTRAL, "perceptual_weight", "encoder_start")}
_MASKGIT_CODE = {
    "code of MaskGIT": ("schedule", "reveal", "gumbel_temperature"),
    "paper of ReMDM": ("remask_strength",),
}
_UNUSED_REVEALS = {
    "code of MaskGIT": ("gumbel_temperature",),
    "paper of ReMDM": ("remask_strength",),
}

#: Samplers by name.
SAMPLERS: dict[str, Sampler] = {
    "aps": Sampler(
        aps_sample,
        APSConfig,
        "Anchored Posterior Sampling; also aps-i, aps-ii, aps-l and the presets",
        "arXiv:2510.02291",
        {
            "its paper": (
                "num_steps", "num_inner_steps", "learning_rate", "measurement_term", "sigma",
                "prior_weight", "prior_term", "remasking", "draw",
            ),
            "code of MMaDA": ("rule", "schedule"),
            "Adam": ("adam_eps",),
            "neutral": (
                "perceptual_weight", "prior_temperature", "learning_rate_schedule", "keep_best",
                "warm_start", "warm_moments", "evidence_floor", "encoder_start", "early_stop",
                "gumbel_temperature", "guidance_scale", "remdm", "trace", *_SHAPE,
            ),
            **_REMDM,
            "ours": ("prior_weighting", "threshold", "threshold_schedule"),
        },
    ),
    "maskgit": Sampler(
        maskgit_sample,
        MaskGITConfig,
        "samples of the prior, no measurement",
        "arXiv:2202.04200",
        {**_CALLS, **_MASKGIT_CODE, "ours": ("num_steps",)},
    ),
    "mmada": Sampler(
        mmada_sample,
        MMaDAConfig,
        "samples of the prior exactly as MMaDA's code draws them, no measurement",
        "arXiv:2505.15809",
        {**_CALLS, "code of MMaDA": ("num_steps", "gumbel_temperature")},
    ),
    "best_of_n": Sampler(
        best_of_n_sample,
        BestOfNConfig,
        "n samples of the prior, the one that fits best",
        "no paper",
        {**_CALLS, **_MASKGIT_CODE, "ours": ("num_steps", "num_candidates")},
    ),
    "straight_through": Sampler(
        straight_through_sample,
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
    "svdd_pm": Sampler(
        svdd_sample,
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
    "g2d2": Sampler(
        g2d2_sample,
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
    "sgdd": Sampler(
        sgdd_sample,
        SGDDConfig,
        "SGDD: split Gibbs with Metropolis-Hastings, adapted to masked priors (ours)",
        "arXiv:2503.01161",
        {
            **_CALLS,
            **_REMDM,
            "neutral": _NEUTRAL,
            "its code": ("looseness", "proposal"),
            "ours": (
                "num_steps", "num_likelihood_steps", "num_denoise_steps", "method", "coupling",
                "first_noise", "last_noise",
            ),
        },
    ),
    "smc": Sampler(
        smc_sample,
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
    "entrgi": Sampler(
        entrgi_sample,
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
    "redge": Sampler(
        redge_sample,
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
    "Sampler",
    "StraightThroughConfig",
    "best_of_n_sample",
    "entrgi_sample",
    "g2d2_sample",
    "maskgit_sample",
    "mmada_sample",
    "redge_sample",
    "sgdd_sample",
    "smc_sample",
    "straight_through_sample",
    "svdd_sample",
]


def sample_function(name: str) -> Callable[..., SampleResult]:
    """The function of a sampler, or of a variant of APS; `config` decides which variant it is.

    Raises:
      KeyError: unknown name; `presets.config_class` says so in better words.
    """
    return aps_sample if name in VARIANTS else SAMPLERS[name].sample
