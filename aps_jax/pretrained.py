"""Loads a codec and a prior together, from the package or from a model folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aps_jax import checkpoint, sharding
from aps_jax.names import suggestion
from aps_jax.prior import PromptConfig, frame_prompt, make_prior, make_prompted_prior
from aps_jax.tokenizer import CodecConfig, init_codec_params, make_codec
from aps_jax.transformer import TransformerConfig, init_transformer_params
from aps_jax.types import Array, Codec, Key, Prior, PyTree

_EMBEDDED = Path(__file__).parent / "data"
#: Models inside the package, by name.
EMBEDDED_MODELS = ("photo64",)


class Model(NamedTuple):
    """A prior and the codec whose tokens it was trained on, with the card that describes them."""

    prior: Prior
    codec: Codec
    card: dict[str, Any]


def load_pretrained(
    name: str | os.PathLike[str],
    *,
    prompt_ids: Array | Sequence[int] = (),
    mesh: Mesh | None = None,
) -> Model:
    """Loads an embedded model by name, or any model folder by path.

    Args:
      name: "photo64", or a model folder: `card.json` and the weights of codec and prior.
      prompt_ids: text of the prompt as for `load_prior`.
      mesh: devices to load to, as `aps_jax.sharding.shard_params` would lay the model out; each
        reads only its own part of the prior. None loads to the default device.

    Raises:
      ValueError: no such model.
      aps_jax.checkpoint.CheckpointError: the folder is damaged or does not fit its configuration.
    """
    folder = model_folder(name)
    card = checkpoint.read_card(folder)
    prior = load_prior(folder, card, prompt_ids=prompt_ids, mesh=mesh)
    return Model(prior=prior, codec=load_codec(folder, card, mesh=mesh), card=card)


def model_folder(name: str | os.PathLike[str]) -> Path:
    """Folder behind a model's name or path; ValueError if there is none."""
    if str(name) in EMBEDDED_MODELS:
        return _EMBEDDED / str(name)
    folder = Path(name)
    if folder.is_dir():
        return folder
    raise ValueError(
        f"no model {str(name)!r}: neither a folder nor one of {', '.join(EMBEDDED_MODELS)}"
        f"{suggestion(str(name), EMBEDDED_MODELS)}"
    )


def load_codec(
    folder: Path, card: dict[str, Any] | None = None, *, mesh: Mesh | None = None
) -> Codec:
    """The codec of a model folder, alone; whole on every device of a `mesh`."""
    card = checkpoint.read_card(folder) if card is None else card
    codec = make_codec(*_load(folder, card, "codec", CodecConfig, init_codec_params, mesh))
    return codec if mesh is None else jax.device_put(codec, sharding.replicated(mesh))


def load_prior(
    folder: Path,
    card: dict[str, Any] | None = None,
    *,
    prompt_ids: Array | Sequence[int] = (),
    mesh: Mesh | None = None,
) -> Prior:
    """The prior of a model folder, alone.

    Args:
      folder: model folder.
      card: its card, if it has been read already.
      prompt_ids: text ids int [P], or [B, P] for one prompt per image, for a model that takes
        prompts; the ids that frame a prompt are added here.
      mesh: devices to load to, its matrices split over "model".

    Raises:
      ValueError: a prompt for a model that takes none, or matrices that the mesh cannot split.
      aps_jax.checkpoint.CheckpointError: the folder is damaged or does not fit its configuration.
    """
    card = checkpoint.read_card(folder) if card is None else card
    window = card.get("prior_window")
    text = np.asarray(prompt_ids, np.int32)
    if "prompt" not in card and text.size:
        raise ValueError(f"the prior in {folder} takes no prompt; leave prompt_ids out")
    config, params = _load(folder, card, "prior", TransformerConfig, init_transformer_params, mesh)
    if "prompt" not in card:
        return make_prior(config, params, window=window)
    path = folder / checkpoint.CARD_NAME
    prompt = checkpoint.parse_config(PromptConfig, card["prompt"], path)
    framed, unconditional = frame_prompt(prompt, text)
    prior = make_prompted_prior(
        config,
        params,
        num_codes=prompt.num_codes,
        image_offset=prompt.image_offset,
        mask_token_id=prompt.mask_token_id,
        begin_id=prompt.begin_id,
        end_id=prompt.end_id,
        prompt_ids=jnp.asarray(framed),
        uncond_prompt_ids=jnp.asarray(unconditional),
        pad_token_id=prompt.pad_token_id,
        window=window,
    )
    if mesh is None:
        return prior
    shardings = sharding.prior_shardings(prior.params, mesh)
    return prior.replace(params=jax.device_put(prior.params, shardings))


def _load(
    folder: Path,
    card: dict[str, Any],
    section: str,
    kind: Callable[..., Any],
    init: Callable[[Key, Any], PyTree],
    mesh: Mesh | None,
) -> tuple[Any, PyTree]:
    """Configuration and weights of one half of a model."""
    path = folder / checkpoint.CARD_NAME
    config = checkpoint.parse_config(kind, card.get(section), path)
    abstract = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    shardings = None
    if mesh is not None and section == "prior":
        shardings = sharding.prior_shardings(abstract, mesh)
    elif mesh is not None:
        shardings = jax.tree.map(lambda leaf: sharding.replicated(mesh), abstract)
    return config, checkpoint.load_params(
        checkpoint.weights_path(folder, section), abstract, shardings
    )
