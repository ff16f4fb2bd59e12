"""Loads networks that stand alone: judges, rewards, operators' weights and denoisers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from aps_jax.denoiser import Denoiser
from aps_jax.io import checkpoint
from aps_jax.operators.kernel_wizard import KernelWizardConfig, init_network_params
from aps_jax.pretrained.folders import load_section, model_folder
from aps_jax.pretrained.models import load_codec
from aps_jax.prior.patch_denoiser import (
    PatchDenoiserConfig,
    init_patch_denoiser_params,
    make_patch_denoiser,
)
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.scores.clip import ClipConfig, ClipModel, init_clip_params
from aps_jax.scores.dino import DinoModel, init_dino_params
from aps_jax.scores.vit import VitConfig
from aps_jax.text.reward_model import RewardFrame, RewardModel, frame_ids, make_reward
from aps_jax.text.tokenizer import CLIP_TOKENIZER, REWARD_TOKENIZER, load_tokenizer
from aps_jax.types import PyTree


def load_kernel_wizard(folder: Path) -> PyTree:
    """Weights for `aps_jax.operators.nonlinear_blur`, from a folder by `aps-jax convert`.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no such weights.
    """
    card = checkpoint.read_card(folder)
    return load_section(folder, card, "kernel_wizard", KernelWizardConfig, init_network_params)[1]


def load_clip(folder: Path) -> ClipModel:
    """CLIP, from a folder by `aps-jax convert clip`; weights and activations are float32.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no CLIP.
      ValueError: the tokenizer is damaged, or its extra is not installed.
    """
    card = checkpoint.read_card(folder)
    config, params = load_section(folder, card, "clip", ClipConfig, init_clip_params)
    has_tokenizer = (folder / CLIP_TOKENIZER).is_file()
    tokenizer = load_tokenizer(folder, CLIP_TOKENIZER) if has_tokenizer else None
    return ClipModel(params=params, config=config, tokenizer=tokenizer)


def load_dino(folder: Path) -> DinoModel:
    """DINO, from a folder by `aps-jax convert dino`; weights and activations are float32.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no DINO.
    """
    card = checkpoint.read_card(folder)
    config, params = load_section(folder, card, "dino", VitConfig, init_dino_params)
    return DinoModel(params=params, config=config)


def load_reward(
    folder: Path,
    prompt: str | Sequence[str],
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> RewardModel:
    """A reward of answers to a prompt, from a folder by `aps-jax convert reward`.

    Args:
      folder: the model folder.
      prompt: the user's turn, or one for each of B answers; the frame is added here.
      mesh: devices to load to, as for `load_pretrained`.
      dtype: of activations, as for `load_pretrained`.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no reward model.
      ValueError: another dtype, or a tokenizer that is damaged or of another model.
    """
    card = checkpoint.read_card(folder)
    config, params = load_section(
        folder, card, "reward_model", TransformerConfig, init_transformer_params, mesh, dtype
    )
    path = folder / checkpoint.CARD_NAME
    frame = checkpoint.parse_config(RewardFrame, card.get("reward_frame"), path)
    tokenizer = load_tokenizer(folder, REWARD_TOKENIZER)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    framed = [frame_ids(frame, tokenizer, one) for one in prompts]
    if not framed:
        raise ValueError("a reward model reads answers to a prompt; give at least one prompt")
    return make_reward(
        config,
        params,
        before_ids=[before for before, _ in framed],
        after_ids=framed[0][1],
        pad_token_id=frame.pad_token_id,
    )


def load_denoiser(
    name: str | os.PathLike[str], *, is_latent: bool = False, dtype: str | None = None
) -> Denoiser:
    """The denoiser of a model folder, for the samplers on pixels or on latents.

    Args:
      name: model folder, such as `experiments.train_diffusion` writes.
      is_latent: the one of latents, with the codec of the same folder.
      dtype: of activations, as for `load_pretrained`; of a codec's, too.

    Raises:
      ValueError: no such folder, or another dtype.
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no denoiser.
    """
    folder = model_folder(name)
    card = checkpoint.read_card(folder)
    section = "latent_denoiser" if is_latent else "denoiser"
    config, params = load_section(
        folder, card, section, PatchDenoiserConfig, init_patch_denoiser_params, dtype=dtype
    )
    codec = load_codec(folder, card, dtype=dtype) if is_latent else None
    return make_patch_denoiser(config, params, codec)
