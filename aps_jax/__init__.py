"""Training-free posterior sampling with masked discrete diffusion models (arXiv:2510.02291)."""

from aps_jax import metrics, operators
from aps_jax.config import VARIANTS, APSConfig
from aps_jax.operators import measure
from aps_jax.perceptual import load_lpips
from aps_jax.pretrained import Model, load_pretrained
from aps_jax.sampler import SampleResult, aps_finish, aps_init, aps_sample, aps_step
from aps_jax.types import Codec, Operator, Params, Perceptual, Prior

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "APSConfig",
    "Codec",
    "Model",
    "Operator",
    "Params",
    "Perceptual",
    "Prior",
    "SampleResult",
    "aps_finish",
    "aps_init",
    "aps_sample",
    "aps_step",
    "load_lpips",
    "load_pretrained",
    "measure",
    "metrics",
    "operators",
]
