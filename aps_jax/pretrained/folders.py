"""Model folders: where they are, and the weights of one part of one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from aps_jax import sharding
from aps_jax.io import checkpoint
from aps_jax.io.names import suggestion
from aps_jax.types import Key, PyTree

_EMBEDDED = Path(__file__).parents[1] / "data"
#: Models inside the package, by name: the folders that have a prior.
EMBEDDED_MODELS = tuple(sorted(file.parent.name for file in _EMBEDDED.glob("*/prior.safetensors")))
#: What activations may be computed in.
DTYPES = ("float32", "bfloat16")


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


def load_section(
    folder: Path,
    card: dict[str, Any],
    section: str,
    kind: type[Any],
    init: Callable[[Key, Any], PyTree],
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> tuple[Any, PyTree]:
    """Configuration, its dtype replaced if one is given, and weights of one part of a model.

    Args:
      folder: model folder.
      card: its card.
      section: name of the part in the card, and of its weights.
      kind: class of its configuration.
      init: `(key, configuration) -> weights`, for their shapes.
      mesh: devices to load to; the matrices of transformers are split over "model".
      dtype: of activations, in place of the card's.

    Raises:
      ValueError: another dtype, or heads or matrices that the mesh cannot split.
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or lacks this part.
    """
    path = folder / checkpoint.CARD_NAME
    if section not in card:
        raise checkpoint.CheckpointError(
            f"model card {path} lacks the configuration of a {section}: it is of text (aps-jax "
            f"write), or a part of a model: convert or train the {section} into the same folder"
        )
    config = checkpoint.parse_config(kind, card[section], path)
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
        config = dataclasses.replace(config, dtype=dtype)
    abstract = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    shardings = None
    if mesh is not None and section in ("prior", "reward_model"):
        sharding.require_whole_heads(config.num_heads, config.num_kv_heads, mesh)
        shardings = sharding.prior_shardings(abstract, mesh)
    elif mesh is not None:
        shardings = jax.tree.map(lambda leaf: sharding.replicated(mesh), abstract)
    return config, checkpoint.load_params(
        checkpoint.weights_path(folder, section), abstract, shardings
    )
