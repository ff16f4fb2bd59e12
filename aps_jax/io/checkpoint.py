"""Saves and loads weights beside the JSON configuration that built them.

A model folder holds `card.json` and, for each of codec and prior, either one safetensors file or an
Orbax checkpoint (a folder), whose parts devices and hosts read on their own. Loading never
unpickles anything; every tensor is checked against the shapes that the configuration implies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save as save_tensors

from aps_jax.io.files import write_atomically
from aps_jax.io.orbax_arrays import ArrayError, describe_arrays, open_array, read
from aps_jax.io.tensors import TensorFileError, open_tensors
from aps_jax.types import PyTree

_Specs = Mapping[str, jax.ShapeDtypeStruct]
_Shardings = Mapping[str, jax.sharding.Sharding] | None

CARD_NAME = "card.json"
#: Of model folders; raised when older versions of this package could misread them.
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A model folder is missing, damaged or does not fit its configuration."""


class FormatError(CheckpointError):
    """A model folder was written by a newer version of this package."""


def flat_arrays(tree: PyTree) -> dict[str, Any]:
    """The leaves of nested dicts by their paths, "a/b/c"."""
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def save_params(path: Path, params: PyTree, dtype: str = "float32") -> None:
    """Saves a nested dict of arrays, floating ones cast to `dtype` ("float16" halves them)."""
    flat = flat_arrays(jax.device_get(params))
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


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of the names, sizes and descriptions of the files of an Orbax checkpoint.

    The chunks of such a checkpoint carry checksums of their own, and its card the hashes of what it
    was made from: reading all of it again for every run would take longer than many runs.
    """
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
            if file.name == "zarr.json":
                digest.update(file.read_bytes())
    return digest.hexdigest()


def load_params(path: Path, abstract: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Loads the arrays that `abstract` names, in its shapes and dtypes.

    With `shardings`, each device gets only its own part, and nothing is whole on one device but
    what a sharding copies to every device. Arrays are read one after the other: host memory needs
    room for about two copies of the largest.

    Args:
      path: a safetensors file, or the folder of an Orbax checkpoint.
      abstract: nested dict of `jax.ShapeDtypeStruct`, as from `jax.eval_shape`.
      shardings: one `jax.sharding.Sharding` per array; None puts all on the default device.

    Raises:
      CheckpointError: if the file is missing or damaged, or its names or shapes differ; the message
        names the first offending tensor.
    """
    expected = flat_arrays(abstract)
    if shardings is not None:
        shardings = flat_arrays(shardings)
    load = _load_orbax if path.is_dir() else _load_safetensors
    return traverse_util.unflatten_dict(load(path, expected, shardings), sep="/")


def count_weights(path: Path) -> tuple[int, str]:
    """Number of weights of a file or folder and their dtypes, from its headers alone.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    try:
        if path.is_dir():
            found = list(describe_arrays(path).values())
        else:
            found = [(array.shape, array.dtype.name) for array in open_tensors(path).values()]
    except (OSError, ArrayError, TensorFileError) as error:
        raise CheckpointError(f"weights {path} are missing or damaged: {error}") from None
    dtypes = sorted({dtype for _, dtype in found})
    return sum(math.prod(shape) for shape, _ in found), " and ".join(dtypes) or "none"


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
    if shardings is None:
        shardings = dict.fromkeys(expected, jnp.zeros(()).sharding)  # The default device.

    def load(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        array = open_array(path, name)
        return jax.make_array_from_callback(
            spec.shape,
            shardings[name],
            lambda index: read(array, index or ()).astype(spec.dtype, copy=False),
        )

    try:
        shapes = {name: shape for name, (shape, _) in describe_arrays(path).items()}
        _check_shapes(path, shapes, expected)
        # One after the other, waited for: no more than one array is on its way to the devices.
        return {name: jax.block_until_ready(load(name, spec)) for name, spec in expected.items()}
    except CheckpointError:
        raise
    except (ArrayError, OSError) as error:
        raise CheckpointError(
            f"weights folder {path} is damaged or incomplete ({error}); fetch or convert it again"
        ) from None


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
        card = json.loads(path.read_text("utf-8-sig"))
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


def parse_config(kind: type[Any], values: Any, path: Path) -> Any:
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
