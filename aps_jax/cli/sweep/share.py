"""One host's share of a sweep: its images in batches over its own devices.

Every host takes each n-th image of the sorted list and writes an image and a row at a time. Batches
never cross hosts: a host that dies stops nobody, and the same command, on any number of hosts, does
only what is missing. An image's noise and samples depend on the seed and its name alone, not on
hosts, devices, batches or their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax import images, pretrained, sharding
from aps_jax.cli import errors, inputs, perceptual
from aps_jax.cli import options as cli_options
from aps_jax.cli.sweep import batches, hosts, memory, sources
from aps_jax.cli.sweep.options import PROGRAM, Sweep
from aps_jax.config import SharedConfig
from aps_jax.io import rows
from aps_jax.restore import lower
from aps_jax.samplers import sample
from aps_jax.scores import report
from aps_jax.types import Key, Params, Perceptual

#: Bytes of a file name, on nearly all file systems.
_LONGEST_NAME = 255


class Host:
    """One host's share of a sweep.

    Attributes:
      options: command line.
      config: sampler options, of images of any size.
      place: which host this is.
      mesh: this host's devices.
      batch_size: images at once.
      model: prior and codec.
    """

    def __init__(self, options: Sweep, place: hosts.Place) -> None:
        self.options, self.place = options, place
        self.config = cli_options.config_of(options)
        if self.config.NEEDS != "prior":
            raise ValueError(
                f"sweeps take samplers over tokens, and {options.sampler!r} has a denoiser; "
                "restore pictures one by one with aps-jax restore"
            )
        self.mesh = sharding.make_mesh(
            options.num_data, options.num_model, devices=jax.local_devices()
        )
        groups = self.mesh.shape[sharding.DATA]
        self.batch_size = 4 * self.mesh.size if options.batch_size is None else options.batch_size
        if self.batch_size < 1 or self.batch_size % groups:
            raise ValueError(
                f"--batch-size must be a positive multiple of the {groups} groups of devices that "
                f"share it, got {self.batch_size}"
            )
        # Each device reads its own part: one alone may not hold the whole prior.
        with memory.loading(options.model, self.mesh):
            self.model = pretrained.load_pretrained(
                options.model, prompt=options.prompt, mesh=self.mesh, dtype=options.dtype
            )
        self.log = options.out / f"rows-{place.index:04}.jsonl"
        self._jitted = jax.jit(sample)
        self._compiled: dict[Any, Any] = {}
        self._distance: Perceptual | None = None
        self._tried_distance = False

    def pending(self, found: dict[str, sources.Item]) -> dict[str, sources.Item]:
        """This host's images that have no result yet."""
        share = dict(list(found.items())[self.place.index :: self.place.count])
        finished = _finished(self.options.out)
        return {
            name: image
            for name, image in share.items()
            if not (
                os.path.isfile(self.target(name)) and sources.has_hash(image, finished.get(name))
            )
        }

    def target(self, name: str) -> Path:
        """File of a restored image."""
        *folders, last = name.split("/")
        return self.options.out.joinpath("images", *folders, _with_suffix(last))

    def run(self, found: dict[str, sources.Item]) -> int:
        """Restores what is missing of this host's share; returns how many images failed."""
        pending = self.pending(found)
        count, failed, done = len(pending), 0, 0
        groups = batches.group(self.options, pending, self.batch_size)
        with contextlib.closing(groups):  # Ends the thread that reads.
            for batch in groups:
                results = self._restore(batch) if isinstance(batch, list) else [batch]
                rows.append(self.log, results)
                done += len(results)
                bad = [row for row in results if row["status"] != "restored"]
                failed += len(bad)
                for row in bad:
                    say(f"{row['name']} was left out: {row['reason']}")
                say(f"host {self.place.index} of {self.place.count}: {done} of {count} images")
        return failed

    def _restore(self, jobs: list[batches.Job]) -> list[dict[str, Any]]:
        """Restores jobs of one kind, writes their images and returns their rows."""
        problem = jobs[0].problem
        distance = self._lpips(problem)
        notes: list[str] = []
        config = dataclasses.replace(self.config, image_shape=problem.image_shape)
        config = perceptual.settle(config, problem, distance, notes)
        # Filled up with the last image, so that every batch has one shape.
        filled = jobs + jobs[-1:] * (self.batch_size - len(jobs))
        params = Params(
            prior=self.model.prior,
            codec=self.model.codec,
            operator=batches.operator_of(self.options, filled),
            perceptual=distance if perceptual.weight(config) > 0 else None,
        )
        y = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(j.problem.y for j in filled))
        keys = jnp.stack([job.key for job in filled])
        result, seconds = self._sample(params, y, keys, config)
        seconds /= len(jobs)

        table = []
        is_finite = np.all(result.info.is_finite, axis=(0, 2))
        for index, job in enumerate(jobs):
            row = {"name": job.name, "status": "restored", "sha256": job.problem.source["sha256"]}
            if not is_finite[index]:
                reason = "; ".join(["the objective is not finite", *lower(config)])
                table.append(row | {"status": "diverged", "reason": reason})
                continue
            image = jnp.asarray(result.images[index])
            try:
                images.save_image(self.target(job.name), image)
            except OSError as error:
                _require_folder(self.options.out, error)
                table.append(row | {"status": "unwritable", "reason": str(error)})
                continue
            sigma = self.options.sigma
            residual = report.data_residual(
                job.problem.operator, image, job.problem.y, sigma=sigma,
                decoded=jnp.asarray(result.decoded[index, 0]),
            )  # fmt: skip
            row |= {
                "residual": residual["root_mean_square"],
                "decoded_residual": residual["decoded_root_mean_square"],
                "residual_is_far": residual["is_far"],
                "seconds": round(seconds, 3),
            }
            own_notes = notes + report.residual_notes(residual, sigma)
            if job.problem.photo is not None:
                row |= report.scores({"restored": image}, job.problem.photo[0], distance)[
                    "restored"
                ]
            table.append(row | ({"notes": own_notes} if own_notes else {}))
        return table

    def _lpips(self, problem: inputs.Problem) -> Perceptual | None:
        """LPIPS for images of one kind, loaded once; those that are too small have none."""
        if min(problem.image_shape) < perceptual.MIN_SIDE:
            return None
        if not self._tried_distance:
            notes: list[str] = []
            distance = perceptual.load(problem, self.config, notes)
            self._distance = jax.device_put(distance, sharding.replicated(self.mesh))
            self._tried_distance = True
            for note in notes:
                if perceptual.weight(self.config) > 0 and self._distance is None:
                    raise ValueError(
                        f"the perceptual term needs LPIPS on every host; {note}; or sweep without "
                        "it: --option perceptual_weight=0"
                    )
                say(f"note: {note}")
        return self._distance

    def _sample(
        self, params: Params, y: Any, keys: Key, config: SharedConfig
    ) -> tuple[aps_jax.SampleResult, float]:
        """One batch over this host's devices, back as NumPy arrays, and its seconds.

        The first batch of a kind compiles before its time begins.
        """
        params = sharding.shard_params(params, self.mesh)
        y, keys = sharding.shard_batch((y, keys), self.mesh)
        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves((params.operator, y)))
        kind = (jax.tree.structure((params, y)), shapes, config)
        try:
            if kind not in self._compiled:
                compiled = self._jitted.lower(params, y, keys, config=config).compile()
                memory.require_fitting(compiled, self.batch_size, self.mesh)
                self._compiled[kind] = compiled
            began = time.perf_counter()
            result = jax.device_get(self._compiled[kind](params, y, keys, config=config))
            return result, time.perf_counter() - began
        except Exception as error:
            if not errors.is_out_of_memory(error):
                raise
            compiled = self._compiled.get(kind)
            raise memory.MemoryShortage(
                memory.advice(compiled, self.batch_size, self.mesh)
            ) from error


def _with_suffix(name: str) -> str:
    """`name`.png, shortened and with a hash of the whole where no file may be called so."""
    if len(os.fsencode(name)) <= _LONGEST_NAME - 4:
        return f"{name}.png"
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    head = os.fsencode(name)[: _LONGEST_NAME - 4 - 1 - len(digest)].decode("utf-8", "ignore")
    return f"{head}.{digest}.png"


def _require_folder(out: Path, error: OSError) -> None:
    """Raises `error` again if the folder takes no files at all, so that it is not one image's."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        raise error
    try:
        tempfile.TemporaryFile(dir=out).close()
    except OSError:
        raise error from None


def _finished(out: Path) -> dict[str, str]:
    """Hash, by name, of the images that any host has restored.

    Raises:
      rows.ForeignResults: if a row does not have it.
    """
    finished = {}
    for log in sorted(out.glob("rows-*.jsonl")):
        for row in rows.read(log, ("name", "status")):
            if row["status"] != "restored":
                continue
            if "sha256" not in row:
                raise rows.ForeignResults(
                    f"{log} has a row of {row['name']} without the hash of its image, so it is of "
                    "another program or version; choose another --out"
                )
            finished[row["name"]] = row["sha256"]
    return finished


def say(text: str) -> None:
    """A line on stderr, where all that a sweep tells goes."""
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
