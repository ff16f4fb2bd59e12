"""Training-free posterior sampling with masked discrete diffusion models (arXiv:2510.02291).

Names are imported on first use (PEP 562), so that `aps-jax --help` need not wait for jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aps_jax import metrics, operators, sharding
    from aps_jax.config import VARIANTS, APSConfig
    from aps_jax.denoiser import Denoiser, PixelParams
    from aps_jax.faces.attributes import load_attributes
    from aps_jax.images import sample_photo
    from aps_jax.notebook import posterior, show
    from aps_jax.operators import measure
    from aps_jax.presets import PRESETS, make_config
    from aps_jax.pretrained import Model, load_pretrained
    from aps_jax.sampler import SampleResult, aps_finish, aps_init, aps_sample, aps_step
    from aps_jax.scores.lpips import load_lpips
    from aps_jax.types import Codec, Operator, Params, Perceptual, Prior

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "VARIANTS",
    "APSConfig",
    "Codec",
    "Denoiser",
    "Model",
    "Operator",
    "Params",
    "Perceptual",
    "PixelParams",
    "Prior",
    "SampleResult",
    "aps_finish",
    "aps_init",
    "aps_sample",
    "aps_step",
    "load_attributes",
    "load_lpips",
    "load_pretrained",
    "make_config",
    "measure",
    "metrics",
    "operators",
    "posterior",
    "sample_photo",
    "sharding",
    "show",
]

_MODULES = {
    "config": ("VARIANTS", "APSConfig"),
    "denoiser": ("Denoiser", "PixelParams"),
    "faces.attributes": ("load_attributes",),
    "images": ("sample_photo",),
    "notebook": ("posterior", "show"),
    "operators": ("measure",),
    "presets": ("PRESETS", "make_config"),
    "scores.lpips": ("load_lpips",),
    "pretrained": ("Model", "load_pretrained"),
    "sampler": ("SampleResult", "aps_finish", "aps_init", "aps_sample", "aps_step"),
    "types": ("Codec", "Operator", "Params", "Perceptual", "Prior"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("metrics", "operators", "sharding"):
        return importlib.import_module(f"aps_jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'aps_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"aps_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
