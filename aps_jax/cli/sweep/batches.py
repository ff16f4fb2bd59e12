"""Images of a sweep, measured and grouped into batches, while earlier batches are restored."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.cli import inputs
from aps_jax.cli.options import Restore, task_file
from aps_jax.cli.sweep import sources
from aps_jax.io import rows
from aps_jax.types import Key, Operator

#: Batches of images that may wait in memory for others of their kind.
WAITING_BATCHES = 4


class Job(NamedTuple):
    """One image to restore, measured."""

    name: str
    problem: inputs.Problem
    key: Key


def image_key(seed: int, name: str) -> Key:
    """The key of everything random about one image."""
    number = int.from_bytes(
        hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big"
    )
    return jax.random.fold_in(jax.random.key(seed), number)


def measure_image(options: Restore, name: str, image: sources.Item) -> Job:
    """Loads one image and measures it; the operator's random state is the same for all images."""
    key_noise, key_sample = jax.random.split(image_key(options.seed, name))
    with sources.as_file(image) as path:
        one = dataclasses.replace(options, image=path)
        if options.measured:
            return Job(name, inputs.load_measured(one), key_sample)
        key_operator = jax.random.fold_in(jax.random.key(options.seed), 0)
        return Job(name, inputs.degrade_photo(one, key_operator, key_noise), key_sample)


def group(
    options: Restore, images: Mapping[str, sources.Item], batch_size: int
) -> Generator[list[Job] | rows.Row, None, None]:
    """Full batches of one kind, then the rest; a row instead for what cannot be read.

    Where images of many kinds come, the most of one kind go before there are enough of them: what
    waits is held in memory, and would be lost with the process. The next batch is read while the
    caller is busy with the one before.
    """
    waiting: dict[Any, list[Job]] = {}
    read = functools.partial(measure_image, options)
    for name, measured in sources.read_ahead(read, images, batch_size):
        try:
            job = measured.result()
        except (OSError, ValueError) as error:
            yield {"name": name, "status": "unreadable", "reason": str(error)}
            continue
        kind = _kind(job.problem)
        jobs = waiting.setdefault(kind, [])
        if jobs and not _has_masks(options):  # One copy of weights or of a measurement matrix.
            operator = jobs[0].problem.operator
            job = job._replace(problem=job.problem._replace(operator=operator))
        jobs.append(job)
        if len(jobs) == batch_size:
            yield waiting.pop(kind)
        elif sum(map(len, waiting.values())) > WAITING_BATCHES * batch_size:
            yield waiting.pop(max(waiting, key=lambda kind: len(waiting[kind])))
    while waiting:
        yield waiting.pop(next(iter(waiting)))


def _kind(problem: inputs.Problem) -> Any:
    """Images of one kind share a batch: the arrays of y and operator have equal shapes.

    Operators of one kind are equal but for masks that come with the images: their random state
    depends on seed and size alone, everything else of them on the options.
    """
    arrays = (problem.y, problem.operator)
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(arrays))
    return problem.image_shape, jax.tree.structure(arrays), shapes


def operator_of(options: Restore, jobs: list[Job]) -> Operator:
    """The operator of a batch; masks that come with the images get an axis for them."""
    operator = jobs[0].problem.operator
    if not _has_masks(options):
        return operator
    return dataclasses.replace(
        operator, params=jnp.stack([job.problem.operator.params for job in jobs])
    )


def _has_masks(options: Restore) -> bool:
    """Whether each image says by its transparent pixels what is missing."""
    return (
        options.measured
        and options.task == "inpainting_mask"
        and task_file(options, "mask") is None
    )
