"""A file that an interrupted run goes on from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from aps_jax.io.files import write_atomically
from aps_jax.io.rows import first_difference
from aps_jax.types import Array, PyTree


class SnapshotError(ValueError):
    """A snapshot is damaged or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A file that holds the state after the last finished step.

    Attributes:
      path: the file; every write replaces it in one step.
      identity: JSON values that name everything the result depends on. A run resumes only from a
        snapshot with the same identity.
      is_resuming: start from the file instead of from the beginning.
    """

    path: Path
    identity: Mapping[str, Any]
    is_resuming: bool = False

    def save(self, state: PyTree, infos: list[Any], seconds: float) -> None:
        """Replaces the file.

        Args:
          state: arrays of the sampler.
          infos: what each finished step told, all of one structure.
          seconds: time that they took.
        """
        stacked = jax.tree.map(lambda *rows: np.stack(rows), *infos)
        tensors = _named("state", state) | _named("info", stacked)
        metadata = {"identity": json.dumps(self.identity), "seconds": repr(seconds)}
        write_atomically(self.path, save_tensors(tensors, metadata))

    def load(self, start: PyTree, info: PyTree) -> tuple[Any, list[Any], float]:
        """The state, what each finished step told, and the seconds that they took.

        Args:
          start: the state at the beginning, or its shapes.
          info: what one step tells, or its shapes.

        Raises:
          SnapshotError: if the file is missing, damaged or of a run with another identity.
        """
        try:
            with safe_open(self.path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            identity = json.loads(metadata["identity"])
            seconds = float(metadata["seconds"])
        except FileNotFoundError:
            raise SnapshotError(f"there is no snapshot {self.path} to resume from") from None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise SnapshotError(
                f"snapshot {self.path} is damaged ({error}); delete it and start again"
            ) from None
        self._require_same(identity)
        try:
            state = _fill("state", tensors, start, num_steps=None)
            num_steps = int(state.step)
            stacked = _fill("info", tensors, info, num_steps=num_steps)
        except (KeyError, ValueError) as error:
            raise SnapshotError(
                f"snapshot {self.path} does not fit this run ({error}); delete it and start again"
            ) from None
        infos = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_steps)]
        return jax.tree.map(jnp.asarray, state), infos, seconds

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def _require_same(self, identity: Mapping[str, Any]) -> None:
        difference = first_difference(identity, json.loads(json.dumps(self.identity)))
        if difference:
            raise SnapshotError(
                f"snapshot {self.path} is of another run: {difference}; use the same settings or "
                "start again"
            )


def _named(prefix: str, tree: PyTree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {prefix + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _fill(
    prefix: str, tensors: Mapping[str, np.ndarray], tree: PyTree, *, num_steps: int | None
) -> Any:
    """Inverse of `_named`, with an axis for steps if there are some; KeyError or ValueError."""

    def fill(path: Any, leaf: Array) -> np.ndarray:
        value = tensors[prefix + jax.tree_util.keystr(path)]
        shape = leaf.shape if num_steps is None else (num_steps, *leaf.shape)
        if value.shape != shape or value.dtype != leaf.dtype:
            raise ValueError(f"{prefix} has shape {value.shape}, this run needs {shape}")
        return value

    return jax.tree_util.tree_map_with_path(fill, tree)
