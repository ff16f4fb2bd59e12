"""Other posterior samplers on the same measurement energy as `aps_sample`.

Most have its prior and codec, too; those on pixels and on the codec's latents have a denoiser
(`aps_jax.denoiser`) instead of the prior.

Each is a frozen dataclass of options with the steps of `sampling.run.Sampler`; `sample` runs any of
them as `aps_sample` runs APS, and `config.evaluations()` says what it costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, cast

from aps_jax.config import APSConfig, SharedConfig
from aps_jax.denoiser import PixelParams
from aps_jax.sampler import make_aps
from aps_jax.samplers.aps_smc import APSSMCConfig
from aps_jax.samplers.best_of_n import BestOfNConfig
from aps_jax.samplers.daps import DAPSConfig
from aps_jax.samplers.ddrm import DDRMConfig
from aps_jax.samplers.diffpir import DiffPIRConfig
from aps_jax.samplers.dps import DPSConfig
from aps_jax.samplers.entrgi import EntRGiConfig
from aps_jax.samplers.g2d2 import G2D2Config
from aps_jax.samplers.latent_daps import LatentDAPSConfig
from aps_jax.samplers.maskgit import MaskGITConfig
from aps_jax.samplers.mmada import MMaDAConfig
from aps_jax.samplers.psld import PSLDConfig
from aps_jax.samplers.redge import ReDGEConfig
from aps_jax.samplers.resample import ReSampleConfig
from aps_jax.samplers.sgdd import SGDDConfig
from aps_jax.samplers.smc import SMCConfig
from aps_jax.samplers.straight_through import StraightThroughConfig
from aps_jax.samplers.svdd import SVDDConfig
from aps_jax.sampling.base import BaseTarget
from aps_jax.sampling.pixels import pixel_target
from aps_jax.sampling.run import Sampler, SampleResult, run
from aps_jax.sampling.target import measurement_target
from aps_jax.types import Array, Key, Params, PyTree


class Entry(NamedTuple):
    """An entry of `SAMPLERS`, as the class of its options declares it (`config.SamplerConfig`).

    Attributes:
      config: class of its options, which say how to sample; `config(...).evaluations()` counts
        model calls.
      summary: what it does, one line.
      paper: arXiv number of the method, or why there is none.
      defaults: names of options by where their defaults come from; every option is in one group.
    """

    config: type[SharedConfig]
    summary: str
    paper: str
    defaults: Mapping[str, tuple[str, ...]]


def _entry(kind: type[SharedConfig]) -> Entry:
    """The entry of a class of options; TypeError if it does not say where a default is from."""
    origin: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for source, names in vars(base).get("SOURCES", {}).items():
            origin |= dict.fromkeys(names, source)
    names = {field.name for field in dataclasses.fields(kind)}
    if differing := names ^ origin.keys():
        raise TypeError(f"SOURCES and options of {kind.__name__} differ: {sorted(differing)}")
    grouped: dict[str, tuple[str, ...]] = {}
    for field in dataclasses.fields(kind):
        source = origin[field.name]
        grouped[source] = (*grouped.get(source, ()), field.name)
    return Entry(kind, kind.SUMMARY, kind.PAPER, grouped)


#: Samplers by name.
SAMPLERS: dict[str, Entry] = {
    kind.NAME: _entry(kind)
    for kind in (
        APSConfig,
        MaskGITConfig,
        MMaDAConfig,
        BestOfNConfig,
        StraightThroughConfig,
        SVDDConfig,
        G2D2Config,
        SGDDConfig,
        SMCConfig,
        APSSMCConfig,
        EntRGiConfig,
        ReDGEConfig,
        DPSConfig,
        DDRMConfig,
        DAPSConfig,
        DiffPIRConfig,
        PSLDConfig,
        ReSampleConfig,
        LatentDAPSConfig,
    )
}

__all__ = [
    "SAMPLERS",
    "APSSMCConfig",
    "BestOfNConfig",
    "DAPSConfig",
    "DDRMConfig",
    "DPSConfig",
    "DiffPIRConfig",
    "EntRGiConfig",
    "G2D2Config",
    "LatentDAPSConfig",
    "MMaDAConfig",
    "MaskGITConfig",
    "PSLDConfig",
    "ReDGEConfig",
    "ReSampleConfig",
    "SGDDConfig",
    "SMCConfig",
    "SVDDConfig",
    "Entry",
    "StraightThroughConfig",
    "sample",
    "sample_target",
    "sampler_of",
    "target_of",
]


def sample(
    params: Params | PixelParams,
    y: PyTree,
    key: Key,
    *,
    config: SharedConfig,
    known_tokens: Array | None = None,
) -> SampleResult:
    """Samples as `aps_sample` does, by the sampler whose options `config` is.

    Args:
      params: as for `aps_sample`; `PixelParams` for the samplers with a denoiser.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options of any sampler; static for `jax.jit`, or an argument like the others.
      known_tokens: as for `aps_sample`; None for the samplers with a denoiser.

    Returns:
      As `aps_sample`; what a step is, and `info.loss`, is said by the class of the options. The
      samplers with a denoiser have no tokens: None.

    Raises:
      ValueError: shapes of y, operator, codec, prior and configuration do not fit together, or the
        sampler needs another kind of model.
    """
    target = target_of(params, y, config=config, known_tokens=known_tokens)
    return run(sampler_of(config), target, key)


def sample_target(target: BaseTarget, key: Key, *, config: SharedConfig) -> SampleResult:
    """Samples any target, such as a reward of `sampling.target.make_target`; pure, so jit it.

    Args:
      target: prior, codec and energy; of `sampling.pixels.make_pixel_target` for those with a
        denoiser.
      key: one typed key, or one per row of the energy's data.
      config: options of any sampler; those of the target itself are in `target`.

    Returns:
      As `aps_sample`.

    Raises:
      ValueError: the sampler needs another kind of model.
    """
    check_model(config, has=target.kind)
    return run(sampler_of(config), target, key)


def target_of(
    params: Params | PixelParams,
    y: PyTree,
    *,
    config: SharedConfig,
    known_tokens: Array | None = None,
) -> BaseTarget:
    """What the sampler of `config` draws from; arguments and errors are those of `sample`."""
    check_model(config, has=params.denoiser.kind if isinstance(params, PixelParams) else "prior")
    if not isinstance(params, PixelParams):
        return measurement_target(params, y, config=config, known_tokens=known_tokens)
    if known_tokens is not None:
        raise ValueError(f"known_tokens are of priors over tokens; {config.NAME!r} takes none")
    return pixel_target(params, y, config=config)


#: What samplers need, in words.
MODELS = {
    "prior": "a prior over tokens",
    "denoiser": "a denoiser of pixels",
    "latent denoiser": "a denoiser of latents",
}


def samplers_of(kind: str) -> list[str]:
    """Names of the samplers that need one kind of model, a key of `MODELS`."""
    return [name for name, entry in SAMPLERS.items() if entry.config.NEEDS == kind]


def check_model(config: SharedConfig, *, has: str) -> None:
    """ValueError if the sampler of `config` needs another kind of model than `has`."""
    if config.NEEDS != has:
        cure = "" if config.NEEDS == "prior" else ", or give your denoiser in aps_jax.PixelParams"
        raise ValueError(
            f"sampler {config.NAME!r} needs a model with {MODELS[config.NEEDS]}; this one has "
            f"{MODELS[has]}: choose one of {', '.join(samplers_of(has))}{cure}"
        )


def sampler_of(config: SharedConfig) -> Sampler:
    """The sampler that a configuration describes."""
    return make_aps(config) if isinstance(config, APSConfig) else cast(Sampler, config)
