"""What `aps-jax edit` and `aps-jax stylize` share: from a target to a folder of results."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import images, pretrained
from aps_jax.cli import facts, memory
from aps_jax.cli.folder import ResultFolder
from aps_jax.cli.options import command_of
from aps_jax.cli.outputs import work_of
from aps_jax.cli.progress import is_listened_to, watched
from aps_jax.cli.wishes import config_of, guidance_of, sampler_name
from aps_jax.io.checkpoint import read_card
from aps_jax.restore import Restored, restore_target
from aps_jax.sampling.leaves import or_none
from aps_jax.sampling.target import Target
from aps_jax.text.tokenizer import load_tokenizer
from aps_jax.types import Array

#: Scores of a picture by name; None where one cannot be computed.
Figures = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command has made of its options.

    Attributes:
      target: what is sampled, of one picture.
      sources: files behind it by name, each with its path, where it has one, and its SHA-256.
      settings: the command's own options that the samples depend on, as JSON values.
      panels: pictures by label that the comparison shows before the result.
      figures: scores of a picture [H, W, 3].
      compared: pictures by name that are scored beside the result.
      settled: the result as it is shown, of a sample [H, W, 3].
      files: other pictures to write, by file name.
      notes: for the user.
    """

    target: Target
    sources: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    panels: Sequence[tuple[str, Any]]
    figures: Callable[[Array], Figures]
    compared: Mapping[str, Array]
    settled: Callable[[Array], Array] = lambda image: image
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


def run(options: Any, name: str, make: Callable[[Any, pretrained.Model], Job]) -> int:
    """Runs a command into the folder --out; returns the exit code.

    Args:
      options: the command's, a `wishes.Wish`.
      name: what has been done to the picture; the result is NAME.png.
      make: reads the command's files.
    """
    began = time.perf_counter()
    config_of(options)
    files = (f"{name}.png", "comparison.png", "mask.png", "style.png")
    folder = ResultFolder(
        options.out, files, ("samples/sample_*.png",),
        is_resuming=options.resume, is_overwriting=options.overwrite,
    )  # fmt: skip
    folder.check()
    _check_words(options)
    with folder.taken(again=command_of(options, resume=True, overwrite=False)):
        return _run(options, name, make, folder, began)


def _run(
    options: Any,
    name: str,
    make: Callable[[Any, pretrained.Model], Job],
    folder: ResultFolder,
    began: float,
) -> int:
    model = pretrained.load_pretrained(
        options.model, prompt=options.prompt, negative=options.negative, dtype=options.dtype
    )
    job = make(options, model)
    target = job.target
    config = dataclasses.replace(
        config_of(options), image_shape=target.image_shape, trace=is_listened_to()
    )
    memory.check(config, model, target)
    record = _facts(options, config, job)
    hashes = {place: source["sha256"] for place, source in job.sources.items()}
    snapshot = folder.snapshot(record | {"files": hashes, "model": record["model"]["sha256"]})
    folder.try_files(record | {"sources": job.sources})
    restored = watched(
        lambda on_step: restore_target(
            target, jax.random.key(options.seed), config=config, on_step=on_step, snapshot=snapshot
        ),
        work=work_of(config),
        snapshot=snapshot,
        memory_advice=lambda: memory.advice(config, model, target),
    )
    samples = [job.settled(sample) for sample in restored.result.samples[0]]
    table = {key: job.figures(image) for key, image in job.compared.items()}
    table[name] = job.figures(samples[0])
    folder.publish(
        lambda place: _write_pictures(place, name, job, samples),
        lambda: _record(options, record, job, restored, table, began),
    )
    snapshot.remove()
    _summarise(options, job, config, table, time.perf_counter() - began)
    return 0


def fields_of(options: Any) -> dict[str, Any]:
    """What a sampler's options say of the target: fields of `sampling.target.make_target`."""
    config = config_of(options)
    return {
        "guidance_scale": guidance_of(options),
        "num_samples": options.num_samples,
        "decode_scale": config.decode_scale,
        "prior_temperature": or_none(getattr(config, "prior_temperature", 1.0), 1.0),
    }


def _facts(options: Any, config: Any, job: Job) -> dict[str, Any]:
    """Everything the samples depend on but the files, as JSON values."""
    words = {"prompt": options.prompt, "negative": options.negative}
    has_words = any(text is not None for text in words.values())
    return {
        "settings": {**job.settings, **words, "size": options.size},
        "sampler": sampler_name(options),
        **facts.model_facts(options, config, has_words=has_words),
        "image_shape": list(job.target.image_shape or ()),
        "device": facts.device_facts(),
    }


def _record(
    options: Any,
    record: Mapping[str, Any],
    job: Job,
    restored: Restored,
    table: Mapping[str, Figures],
    began: float,
) -> dict[str, Any]:
    info = jax.device_get(restored.result.info)
    return {
        "command": command_of(options, resume=False, overwrite=False),
        **record,
        "sources": job.sources,
        "figures": table,
        "history": {"loss": info.loss[:, 0], "num_masked": info.num_masked[:, 0]},
        "seconds": facts.seconds_of(restored, began),
        "model_calls": restored.calls,
        "notes": list(job.notes),
    }


def _write_pictures(folder: Path, name: str, job: Job, samples: Sequence[Array]) -> None:
    images.save_image(folder / f"{name}.png", samples[0])
    for file, picture in job.files.items():
        images.save_image(folder / file, picture)
    panels = [*job.panels, (name, samples[0])]
    if len(samples) > 1:
        for index, sample in enumerate(samples, start=1):
            images.save_image(folder / "samples" / f"sample_{index:02}.png", sample)
        panels += [(f"sample {index}", x) for index, x in enumerate(samples[1:4], start=2)]
    images.save_image(folder / "comparison.png", images.comparison(panels))


def _summarise(
    options: Any, job: Job, config: Any, table: Mapping[str, Figures], seconds: float
) -> None:
    height, width = job.target.image_shape or (0, 0)
    print(f"{width}x{height}, {sampler_name(options)}, {work_of(config)}, seed {options.seed}")
    columns = list(next(iter(table.values())))
    width = max(14, *(len(column) + 2 for column in columns))
    print(f"{'':22}" + "".join(f"{column.replace('_', ' '):>{width}}" for column in columns))
    for key, row in table.items():
        cells = ("-" if row[c] is None else f"{row[c]:.3f}" for c in columns)
        print(f"{key.replace('_', ' '):22}" + "".join(f"{cell:>{width}}" for cell in cells))
    for note in job.notes:
        print(f"note: {note}")
    print(f"{options.out / 'comparison.png'} and more, after {seconds:.1f} s")


def load_photo(path: Path, size: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The photo [H, W, 3], cut to a square if a size is given, and where it is from."""
    photo = images.load_image(path)
    source = {"path": os.fspath(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return photo if size is None else square(photo, size), source


def square(photo: Any, size: int) -> np.ndarray:
    """The middle of a photo [H, W, C] as a square of so many pixels.

    Raises:
      ValueError: the photo is smaller than that.
    """
    if not images.MIN_SIDE <= size <= min(photo.shape[:2]):
        raise ValueError(
            f"--size must be from {images.MIN_SIDE} to the photo's shorter side "
            f"{min(photo.shape[:2])}, got {size}"
        )
    return images.center_crop(images.resize_short_side(photo, size), size)


def batch(photo: np.ndarray) -> Array:
    """Images [1, H, W, 3] of one photo."""
    return jnp.asarray(photo, jnp.float32)[None]


def _check_words(options: Any) -> None:
    """Finds out from the card and the tokenizer alone whether the model takes these words."""
    folder = pretrained.model_folder(options.model)
    words = {"--prompt": options.prompt, "--negative": options.negative}
    given = {flag: text for flag, text in words.items() if text is not None}
    if given and "prompt" not in read_card(folder):
        flag = next(iter(given))
        raise ValueError(f"--model {options.model} reads no text; leave out {flag}")
    for text in given.values():
        load_tokenizer(folder).encode(text)
