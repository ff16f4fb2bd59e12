"""Other posterior samplers on the same prior, codec and measurement energy as `aps_sample`.

Each has the signature of `aps_sample`, returns a `SampleResult`, and says with
`config.evaluations()` what it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from aps_jax.config import APSConfig
from aps_jax.sampler import SampleResult, aps_sample
from aps_jax.samplers.best_of_n import BestOfNConfig, best_of_n_sample
from aps_jax.samplers.entrgi import EntRGiConfig, entrgi_sample
from aps_jax.samplers.g2d2 import G2D2Config, g2d2_sample
from aps_jax.samplers.maskgit import MaskGITConfig, maskgit_sample
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
      source: where the method and its defaults come from, one line.
    """

    sample: Callable[..., SampleResult]
    config: type[Any]
    source: str


#: Samplers by name.
SAMPLERS: dict[str, Sampler] = {
    "aps": Sampler(aps_sample, APSConfig, "Anchored Posterior Sampling, arXiv:2510.02291"),
    "maskgit": Sampler(
        maskgit_sample, MaskGITConfig, "MaskGIT, arXiv:2202.04200; the prior, no measurement"
    ),
    "best_of_n": Sampler(
        best_of_n_sample, BestOfNConfig, "best of n MaskGIT samples (no paper; n ours)"
    ),
    "straight_through": Sampler(
        straight_through_sample,
        StraightThroughConfig,
        "straight-through estimator, arXiv:1308.3432, on the codec alone (defaults ours)",
    ),
    "svdd_pm": Sampler(svdd_sample, SVDDConfig, "SVDD-PM, arXiv:2408.08252; defaults of its code"),
    "g2d2": Sampler(
        g2d2_sample, G2D2Config, "G2D2, arXiv:2410.14710; defaults of its code's SR preset, star"
    ),
    "sgdd": Sampler(
        sgdd_sample, SGDDConfig, "SGDD, arXiv:2503.01161, adapted to masked priors (defaults ours)"
    ),
    "smc": Sampler(
        smc_sample,
        SMCConfig,
        "Feynman-Kac steering, arXiv:2501.06848, and SMC-DDM, arXiv:2505.22524; base proposals",
    ),
    "entrgi": Sampler(
        entrgi_sample, EntRGiConfig, "EntRGi, arXiv:2602.05000; defaults of its experiments"
    ),
    "redge": Sampler(
        redge_sample, ReDGEConfig, "ReDGE, arXiv:2601.00781; defaults of its MaskGIT demo"
    ),
}

__all__ = [
    "SAMPLERS",
    "BestOfNConfig",
    "EntRGiConfig",
    "G2D2Config",
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
    "redge_sample",
    "sgdd_sample",
    "smc_sample",
    "straight_through_sample",
    "svdd_sample",
]
