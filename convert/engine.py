"""Converts published checkpoints to model folders that `aps_jax.load_pretrained` reads.

`convert` streams: tensors are copied piece by piece from a memory map of the source, so that next
to nothing is held in memory. The target appears whole or not at all; what an interrupted conversion
did is kept beside it, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console

import aps_jax
from aps_jax.io import checkpoint

from .hub import Located, locate
from .job import Job, compare_all, copy_all, progress, take_up
from .rules import Place, Rule, place_tensors
from .sources import Source, open_source
from .staging import open_staging, staging_folder
from .stores import Format
from .target import check_space, check_target, publish

Dtype = Literal["float32", "float16", "bfloat16"]
#: Weights of so many bytes become an Orbax checkpoint, smaller ones one safetensors file.
ORBAX_BYTES = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What a checkpoint turns out to be.

    Attributes:
      config: sizes of the model, a dataclass of JSON values.
      init: `(key, config) -> params`; only its shapes are used.
      card: further sections of the card.
      files: files to be copied into the folder, such as a tokenizer, by their names there.
    """

    config: Any
    init: Callable[[Any, Any], Any]
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints of one architecture.

    Attributes:
      name: module under `convert`.
      section: "codec" or "prior", the half of a model folder that is written, or another part.
      rules: where every tensor goes.
      build: finds out the sizes from the tensors; they are checked against config.json where there
        is one. Takes the source and the dtype asked for, or None.
      default_dtype: dtype of the weights unless one is asked for.
      checked: tensors that follow from the sizes and are dropped, by name, each with the value that
        it must have if it is there.
      ignored: how the names of tensors begin that are of no use here.
    """

    name: str
    section: Literal["codec", "prior", "kernel_wizard", "clip", "dino", "reward_model"]
    rules: tuple[Rule, ...]
    build: Callable[[Source, str], Built]
    default_dtype: Dtype
    checked: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did.

    Attributes:
      folder: model folder.
      kind: format of the weights.
      num_params: weights written.
      num_bytes: their size.
      num_resumed: tensors that an interrupted conversion had done already.
      rounding: largest difference that the dtype made, relative to the largest weight of the same
        tensor; None if it was not verified.
    """

    folder: Path
    kind: Format
    num_params: int
    num_bytes: int
    num_resumed: int
    rounding: float | None


def convert(
    family: Family,
    source: str | os.PathLike[str],
    target: Path,
    *,
    dtype: Dtype | None = None,
    kind: Format | None = None,
    revision: str | None = None,
    verify: bool = False,
    console: Console | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Report:
    """Converts a checkpoint into a new model folder, or into one that lacks this half.

    Args:
      family: kind of checkpoint.
      source: folder, weights file, index, or `owner/name` on the Hugging Face hub.
      target: model folder; made if needed.
      dtype: of the weights; None means the family's own.
      kind: format of the weights; None means one safetensors file below `ORBAX_BYTES` and an Orbax
        checkpoint from there on.
      revision: branch, tag or commit of a hub repository.
      verify: read the result back and compare every number with the source.
      console: where progress is shown; None shows nothing.
      notify: takes one line about an unfinished conversion that was found.

    Raises:
      ConversionError: the source is no whole checkpoint of this family, or the target is taken.
      OSError: a file cannot be read or written.
    """
    check_target(target, family.section)
    plan = _plan(family, locate(source, revision), dtype or family.default_dtype, kind)
    folder = staging_folder(target, family.section)
    check_space(target, plan.num_bytes, folder)
    with open_staging(folder, plan.identity, notify) as staging, progress(console) as advance:
        weights = staging.model / checkpoint.weights_name(family.section, plan.kind)
        is_split = family.section in ("prior", "reward_model")
        job = Job(plan.kind, weights, plan.specs, plan.places, is_split)
        store = take_up(job, staging, plan.identity, notify)
        if num_resumed := len(staging.done):
            num_tensors = len(plan.source.shapes)
            notify(f"going on with {folder}: {num_resumed} of {num_tensors} tensors done")
        hashes = copy_all(plan.source, store, job, plan.checked, staging, advance)
        del store
        rounding = compare_all(plan.source, job, advance) if verify else None
        for name, path in plan.built.files.items():
            shutil.copyfile(path, staging.model / name)
        names = (weights.name, *plan.built.files)
        publish(staging.model, target, names, plan.card(family.section, hashes))
    return Report(
        folder=target,
        kind=plan.kind,
        num_params=plan.num_params,
        num_bytes=plan.num_bytes,
        num_resumed=num_resumed,
        rounding=rounding,
    )


class _Plan(NamedTuple):
    """What will be written, before anything is.

    Attributes:
      source: the checkpoint.
      origin: where it is from.
      built: the model that it turns out to be.
      converter: name and version of what writes it.
      kind: format of the weights.
      dtype: theirs.
      specs: shape and dtype of every weight.
      checked: tensors that are compared and dropped, by name.
      places: place of every tensor.
      sections: of the card, but for where the weights are from.
    """

    source: Source
    origin: Mapping[str, Any]
    built: Built
    converter: str
    kind: Format
    dtype: Dtype
    specs: Mapping[str, jax.ShapeDtypeStruct]
    checked: Mapping[str, np.ndarray]
    places: Mapping[str, Place]
    sections: Mapping[str, Any]

    @property
    def num_params(self) -> int:
        """Weights in all."""
        return _num_params(self.specs)

    @property
    def num_bytes(self) -> int:
        """Their size."""
        return self.num_params * jax.numpy.dtype(self.dtype).itemsize

    @property
    def identity(self) -> dict[str, Any]:
        """What is converted to what: an unfinished conversion of anything else begins anew."""
        return {
            "converter": self.converter,
            "format": self.kind,
            "dtype": str(self.dtype),
            "files": {path.name: path.stat().st_size for path in self.source.files},
            **self.sections,
        }

    def card(self, section: str, hashes: Mapping[str, str]) -> dict[str, Any]:
        """Sections of the card, with the SHA-256 of each file that was read."""
        origin = {
            **self.origin,
            "files_sha256": hashes,
            "dtype": str(self.dtype),
            "converter": self.converter,
        }
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            **self.sections,
            f"{section}_source": origin,
        }


def _plan(family: Family, located: Located, dtype: Dtype, kind: Format | None) -> _Plan:
    """Finds out the model and where its tensors go; ConversionError if they do not fit."""
    source = open_source(located.path)
    built = family.build(source, dtype)
    abstract = jax.eval_shape(lambda key: built.init(key, built.config), jax.random.key(0))
    specs = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype)
        for path, leaf in checkpoint.flat_arrays(abstract).items()
    }
    checked = family.checked(built.config)
    dropped = {name for name in source.shapes if name.startswith(family.ignored)}
    num_bytes = _num_params(specs) * jax.numpy.dtype(dtype).itemsize
    return _Plan(
        source=source,
        origin=located.origin,
        built=built,
        converter=f"convert.{family.name} {aps_jax.__version__}",
        kind=kind or ("safetensors" if num_bytes < ORBAX_BYTES else "orbax"),
        dtype=dtype,
        specs=specs,
        checked=checked,
        places=place_tensors(source, family.rules, specs, optional={*checked, *dropped}),
        sections={family.section: dataclasses.asdict(built.config), **built.card},
    )


def _num_params(specs: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())
