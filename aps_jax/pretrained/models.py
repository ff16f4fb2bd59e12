"""Loads a codec and a prior together, from the package or from a model folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from aps_jax import sharding
from aps_jax.codec.magvit2 import CodecConfig, init_codec_params, make_codec
from aps_jax.io import checkpoint
from aps_jax.pretrained.folders import load_section, model_folder
from aps_jax.prior.bundle import make_prior, make_prompted_prior
from aps_jax.prior.prompts import PromptConfig, TextIds, frame_prompt
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.text.tokenizer import encode_prompt
from aps_jax.types import Codec, Prior


class Card(dict[str, Any]):
    """What `card.json` says of a model; hashable by its text, so that `jax.jit` takes a `Model`."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True, default=str))


@flax.struct.dataclass
class Model:
    """A prior and the codec whose tokens it was trained on, with the card that describes them.

    A pytree whose leaves are the weights: `jax.jit`, `jax.device_put` and `jax.tree.map` take it.

    Attributes:
      prior: masked transformer.
      codec: image tokenizer.
      card: contents of `card.json`, static; not to be changed.
    """

    prior: Prior
    codec: Codec
    card: dict[str, Any] = flax.struct.field(pytree_node=False, default_factory=Card)

    def __post_init__(self) -> None:
        object.__setattr__(self, "card", Card(self.card))


def load_pretrained(
    name: str | os.PathLike[str],
    *,
    prompt: str | Sequence[str] | None = None,
    prompt_ids: TextIds = (),
    negative: str | None = None,
    mask_padding: bool = True,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> Model:
    """Loads an embedded model by name, or any model folder by path.

    Args:
      name: an embedded model ("photo64", "face64"), or a model folder: `card.json` and the weights
        of codec and prior.
      prompt: as for `load_prior`.
      prompt_ids: as for `load_prior`.
      negative: as for `load_prior`.
      mask_padding: as for `load_prior`.
      mesh: devices to load to, as `aps_jax.sharding.shard_params` would lay the model out; each
        reads only its own part of the prior. None loads to the default device.
      dtype: of the activations of both networks, "float32" or "bfloat16" (for accelerators); the
        card's if left out. Weights keep theirs, and logits, images and everything that the sampler
        does with them are float32 either way.

    Raises:
      ValueError: no such model, a prompt that it does not take, or another dtype.
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or does not fit its card.
    """
    folder = model_folder(name)
    card = checkpoint.read_card(folder)
    prior = load_prior(
        folder, card, prompt=prompt, prompt_ids=prompt_ids, negative=negative,
        mask_padding=mask_padding, mesh=mesh, dtype=dtype,
    )  # fmt: skip
    codec = load_codec(folder, card, mesh=mesh, dtype=dtype)
    return Model(prior=prior, codec=codec, card=card)


def load_codec(
    folder: Path,
    card: dict[str, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> Codec:
    """The codec of a model folder, alone; whole on every device of a `mesh`.

    Activations have the card's dtype, or `dtype` as for `load_pretrained`.
    """
    card = checkpoint.read_card(folder) if card is None else card
    codec = make_codec(
        *load_section(folder, card, "codec", CodecConfig, init_codec_params, mesh, dtype)
    )
    if mesh is None:
        return codec
    return jax.device_put(sharding.spread_codec(codec, mesh), sharding.replicated(mesh))


def load_prior(
    folder: Path,
    card: dict[str, Any] | None = None,
    *,
    prompt: str | Sequence[str] | None = None,
    prompt_ids: TextIds = (),
    negative: str | None = None,
    mask_padding: bool = True,
    is_text: bool = False,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> Prior:
    """The prior of a model folder, alone.

    Args:
      folder: model folder.
      card: its card, if it has been read already.
      prompt: text, or one text per image, for a model that takes prompts; needs the folder's
        tokenizer.json and the `text` extra.
      prompt_ids: the same as ids int [P] or [B, P], or B lists of any lengths; the ids that frame a
        prompt are added here.
      negative: text that takes the place of no prompt in guidance, (1 + g) cond - g uncond, which
        then leads away from it.
      mask_padding: hide the pads that fill a prompt up from everything else, and leave out those
        that no prompt of the batch needs. False pads every prompt to the length of training and
        lets the image see the pads; the published code of MMaDA has had both.
      is_text: the prior over text instead of over images, of a model with both (MMaDA).
      mesh: devices to load to, its matrices split over "model".
      dtype: of activations, as for `load_pretrained`.

    Raises:
      ValueError: another dtype, a prompt for a model that takes none, one that is too long, no
        text prior, or heads or matrices that the mesh cannot split.
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or does not fit its card.
    """
    card = checkpoint.read_card(folder) if card is None else card
    section = "text_prompt" if is_text and "text_prompt" in card else "prompt"
    _check_prompt(
        folder, card, section, prompt=prompt, prompt_ids=prompt_ids, negative=negative,
        is_text=is_text,
    )  # fmt: skip
    framed = None
    if section in card:
        frame = checkpoint.parse_config(PromptConfig, card[section], folder / checkpoint.CARD_NAME)
        text = prompt_ids if prompt is None else encode_prompt(folder, prompt)
        framed = (frame, *_framed(folder, frame, text, negative, mask_padding=mask_padding))
    config, params = load_section(
        folder, card, "prior", TransformerConfig, init_transformer_params, mesh, dtype
    )
    window = None if is_text else card.get("prior_window")
    if framed is None:
        prior = make_prior(config, params, window=window)
    else:
        frame, ids, unconditional = framed
        _check_ids(ids, config.vocab_size)
        prior = make_prompted_prior(
            config, params, prompt=frame, prompt_ids=ids, uncond_prompt_ids=unconditional,
            mask_padding=mask_padding, window=window,
        )  # fmt: skip
    return prior if mesh is None else _to_mesh(prior, mesh)


def _framed(
    folder: Path, frame: PromptConfig, text: TextIds, negative: str | None, *, mask_padding: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Framed ids of a prompt, and of what guidance leads away from."""
    ids, unconditional = frame_prompt(frame, text, mask_padding=mask_padding)
    if negative is not None:
        away = encode_prompt(folder, negative)
        unconditional = frame_prompt(frame, away, mask_padding=mask_padding)[0]
    return ids, unconditional


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"prompt ids must be in [0, {vocab_size}), the model's vocabulary")


def _to_mesh(prior: Prior, mesh: Mesh) -> Prior:
    """The prior on the devices of a mesh, its matrices split over "model"."""
    shardings = sharding.prior_shardings(prior.params, mesh)
    prior = dataclasses.replace(prior, params=jax.device_put(prior.params, shardings))
    return sharding.spread_prior(prior, mesh)


def _check_prompt(
    folder: Path,
    card: dict[str, Any],
    section: str,
    *,
    prompt: str | Sequence[str] | None,
    prompt_ids: TextIds,
    negative: str | None,
    is_text: bool,
) -> None:
    """ValueError if the prompt is given twice, or to a model that takes none."""
    if prompt is not None and len(prompt_ids):
        raise ValueError("a prompt is text (prompt) or ids (prompt_ids), not both; give one")
    has_words = prompt is not None or negative is not None or len(prompt_ids)
    if section not in card and has_words:
        raise ValueError(f"the prior in {folder} takes no prompt; leave it out")
    if is_text and (section not in card or card[section].get("begin_id") is not None):
        raise ValueError(f"the prior in {folder} is over images only, not over text")
