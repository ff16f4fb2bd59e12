"""Saves and loads weights beside the JSON configuration that built them.

A model folder holds `card.json` and, for each of codec and prior, either one safetensors file or an
Orbax checkpoint (a folder), whose parts devices and hosts read on their own. Loading never
unpickles anything; every tensor is checked against the shapes that the configuration implies.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
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

_Specs = Mapping[str, jax.ShapeDtypeStruct]
_Shardings = Mapping[str, jax.sharding.Sharding] | None

CARD_NAME = "card.json"
#: Of model folders; raised when older versions of this package could misread them.
FORMAT_VERSION = 1
#: Least host memory in GB for reading an Orbax checkpoint; more if a single part needs it.
_READ_GB = 1


class CheckpointError(ValueError):
    """A model folder is missing, damaged or does not fit its configuration."""


class FormatError(CheckpointError):
    """A model folder was written by a newer version of this package."""


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


def weights_name(section: str, kind: str) -> str:
    """Name of the weights of `section`, "codec" or "prior", in a model folder.

    `kind` is "safetensors", a file, or "orbax", a folder.
    """
    return {"safetensors": f"{section}.safetensors", "orbax": section}[kind]


def weights_path(folder: Path, section: str) -> Path:
    """Weights of one half of a model folder, in whichever format; those of safetensors if none."""
    orbax = folder / weights_name(section, "orbax")
    return orbax if orbax.is_dir() else folder / weights_name(section, "safetensors")


def load_params(path: Path, abstract: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Loads the arrays that `abstract` names, in its shapes and dtypes.

    With `shardings`, each device gets only its own part: nothing is whole on one device or in host
    memory, except what a sharding copies to every device.

    Args:
      path: a safetensors file, or the folder of an Orbax checkpoint.
      abstract: nested dict of `jax.ShapeDtypeStruct`, as from `jax.eval_shape`.
      shardings: one `jax.sharding.Sharding` per array; None puts all on the default device.

    Raises:
      CheckpointError: if the file is missing or damaged, or its names or shapes differ; the message
        names the first offending tensor.
    """
    expected = traverse_util.flatten_dict(abstract, sep="/")
    if shardings is not None:
        shardings = traverse_util.flatten_dict(shardings, sep="/")
    load = _load_orbax if path.is_dir() else _load_safetensors
    return traverse_util.unflatten_dict(load(path, expected, shardings), sep="/")


def _load_safetensors(path: Path, expected: _Specs, shardings: _Shardings) -> dict[str, jax.Array]:
    try:
        tensors = open_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"weights file {path} does not exist") from None
    except (TensorFileError, OSError) as error:
        raise CheckpointError(
            f"weights file {path} is damaged or truncated ({error}); fetch or convert it again"
        ) from None
    _check_shapes(path, {name: array.shape for name, array in tensors.items()}, expected)
    # Copies: jax may otherwise keep a view of the memory map, that is of the file.
    if shardings is None:
        return {name: jnp.array(tensors[name], spec.dtype) for name, spec in expected.items()}

    def load(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        tensor = tensors[name]
        return jax.make_array_from_callback(
            spec.shape, shardings[name], lambda index: np.array(tensor[index], spec.dtype)
        )

    return {name: load(name, spec) for name, spec in expected.items()}


def _load_orbax(path: Path, expected: _Specs, shardings: _Shardings) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    if shardings is None:
        device = jnp.zeros(()).sharding  # The default device, where everything else goes too.
        shardings = dict.fromkeys(expected, device)
    parts = [
        math.prod(shardings[name].shard_shape(spec.shape)) * np.dtype(spec.dtype).itemsize
        for name, spec in expected.items()
    ]
    limit = max(_READ_GB, math.ceil(4 * max(parts, default=0) / 1e9))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, restore_concurrent_gb=limit
    )
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            found = checkpointer.metadata(path.absolute()).item_metadata.tree
            found = traverse_util.flatten_dict(found, sep="/")
            shapes = {name: tuple(facts.shape) for name, facts in found.items()}
            _check_shapes(path, shapes, expected)
            args = {
                name: ocp.ArrayRestoreArgs(sharding=shardings[name], dtype=spec.dtype)
                for name, spec in expected.items()
            }
            args = traverse_util.unflatten_dict(args, sep="/")
            restored = checkpointer.restore(
                path.absolute(), args=ocp.args.PyTreeRestore(restore_args=args)
            )
        except (CheckpointError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax has no class of its own for damaged checkpoints.
            reason = str(error.__cause__ or error).splitlines()[0]
            raise CheckpointError(
                f"weights folder {path} is damaged or incomplete ({reason}); "
                "fetch or convert it again"
            ) from None
    return traverse_util.flatten_dict(restored, sep="/")


def _check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], expected: _Specs) -> None:
    what = "folder" if path.is_dir() else "file"
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"weights {what} {path} lacks tensor {name!r} of this configuration")
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"weights {what} {path} has tensor {name!r}, unknown to its configuration"
        )
    for name, spec in expected.items():
        if found[name] != spec.shape:
            raise CheckpointError(
                f"tensor {name!r} in {path} has shape {found[name]}; "
                f"its configuration needs {spec.shape}"
            )


def read_card(folder: Path) -> dict[str, Any]:
    """The JSON card of a model folder.

    Raises:
      CheckpointError: it is missing or not JSON, or of a newer format than this version reads.
    """
    path = folder / CARD_NAME
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CARD_NAME}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"model card {path} cannot be read: {error}") from None
    if not isinstance(card, dict):
        raise CheckpointError(f"model card {path} must be a JSON object")
    version = card.get("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FormatError(
            f"{folder} has format version {version}; this aps_jax reads up to {FORMAT_VERSION}, "
            "so update it"
        )
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
