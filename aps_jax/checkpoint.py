"""Saves and loads models as safetensors files beside the JSON configuration that built them.

A model folder holds `codec.safetensors`, `prior.safetensors` and `card.json`. Loading never
unpickles anything; every tensor is checked against the shapes that the configuration implies.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save as save_tensors

from aps_jax.files import write_atomically
from aps_jax.tensors import TensorFileError, open_tensors
from aps_jax.types import PyTree

CARD_NAME = "card.json"


class CheckpointError(ValueError):
    """A model folder is missing, damaged or does not fit its configuration."""


def save_params(path: Path, params: PyTree, dtype: str = "float32") -> None:
    """Saves a nested dict of arrays, floating ones cast to `dtype` ("float16" halves them)."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    tensors = {
        name: np.ascontiguousarray(
            value.astype(dtype) if np.issubdtype(value.dtype, np.floating) else value
        )
        for name, value in flat.items()
    }
    write_atomically(path, save_tensors(tensors))


def load_params(path: Path, abstract: PyTree) -> PyTree:
    """Loads the arrays that `abstract` names, in its shapes and dtypes.

    Args:
      path: a safetensors file.
      abstract: nested dict of `jax.ShapeDtypeStruct`, as from `jax.eval_shape`.

    Raises:
      CheckpointError: if the file is missing or damaged, or its names or shapes differ; the message
        names the first offending tensor.
    """
    try:
        tensors = open_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"weights file {path} does not exist") from None
    except (TensorFileError, OSError) as error:
        raise CheckpointError(
            f"weights file {path} is damaged or truncated ({error}); fetch or convert it again"
        ) from None
    expected = traverse_util.flatten_dict(abstract, sep="/")
    for name in expected.keys() - tensors.keys():
        raise CheckpointError(f"weights file {path} lacks tensor {name!r} of this configuration")
    for name in tensors.keys() - expected.keys():
        raise CheckpointError(
            f"weights file {path} has tensor {name!r}, unknown to its configuration"
        )
    for name, spec in expected.items():
        if tensors[name].shape != spec.shape:
            raise CheckpointError(
                f"tensor {name!r} in {path} has shape {tensors[name].shape}; "
                f"its configuration needs {spec.shape}"
            )
    # Copies: jax may otherwise keep a view of the memory map, that is of the file.
    arrays = {name: jnp.array(tensors[name], spec.dtype) for name, spec in expected.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def read_card(folder: Path) -> dict[str, Any]:
    """The JSON card of a model folder; CheckpointError if it is missing or not JSON."""
    path = folder / CARD_NAME
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CARD_NAME}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"model card {path} cannot be read: {error}") from None
    if not isinstance(card, dict):
        raise CheckpointError(f"model card {path} must be a JSON object")
    return card


def update_card(folder: Path, **sections: Any) -> None:
    """Replaces top-level sections of a model folder's card, creating it if needed."""
    path = folder / CARD_NAME
    card = read_card(folder) if path.exists() else {}
    write_atomically(path, (json.dumps(card | sections, indent=2) + "\n").encode())


def parse_config(kind: Callable[..., Any], values: Any, path: Path) -> Any:
    """Builds a config dataclass from a card's section; unknown or missing fields are errors."""
    if not isinstance(values, dict):
        raise CheckpointError(f"model card {path} lacks the configuration of {kind.__name__}")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise CheckpointError(f"model card {path} has unknown {kind.__name__} fields {unknown}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"model card {path} has a wrong {kind.__name__}: {error}") from None
