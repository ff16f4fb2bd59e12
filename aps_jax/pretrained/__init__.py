"""Loads models: a codec and a prior together, either alone, and networks that stand alone."""

from aps_jax.pretrained.folders import DTYPES, EMBEDDED_MODELS, model_folder
from aps_jax.pretrained.models import Card, Model, load_codec, load_pretrained, load_prior
from aps_jax.pretrained.networks import (
    load_clip,
    load_denoiser,
    load_dino,
    load_kernel_wizard,
    load_reward,
)

__all__ = [
    "DTYPES", "EMBEDDED_MODELS", "Card", "Model", "load_clip", "load_codec", "load_denoiser",
    "load_dino", "load_kernel_wizard", "load_pretrained", "load_prior", "load_reward",
    "model_folder",
]  # fmt: skip
