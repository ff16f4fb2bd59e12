"""Restores a folder of images on as many devices and hosts as there are.

    python -m experiments.sweep PHOTOS --size 64 --task super_resolution --out runs/sweep
    python -m experiments.sweep SWEEP.json --out runs/sweep

Every host takes each n-th image of the sorted list, spreads its batches over its own devices and
writes an image and a row at a time. Batches never cross hosts: a host that dies stops nobody, and
the same command, on any number of hosts, does only what is missing. An image's noise and samples
depend on the seed and its name alone, not on hosts, devices, batches or their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import aps_jax
from aps_jax import images, pretrained, sharding
from aps_jax.cli import errors, inputs
from aps_jax.cli import options as cli_options
from aps_jax.cli import restore as command
from aps_jax.io import checkpoint
from aps_jax.operators import make_operator
from aps_jax.samplers import sample
from aps_jax.scores import report
from aps_jax.types import Key, Params, Perceptual
from experiments import batches, hosts, memory, rows, sources

PROGRAM = "sweep"
MANIFEST = "sweep.json"
MEMORY_CURE = (
    "set a smaller --batch-size, restore smaller images (--size) or share the prior with a larger "
    "--num-model"
)
_Hidden = tyro.conf.Suppress[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(cli_options.Restore):
    """Restores many images; the options of one restoration are those of `aps-jax restore`.

    Attributes:
      image: folder of images, text file with one path per line, MODULE:NAME of a source with random
        access (Grain's, or any other), or JSON file of options.
      batch_size: images at once on this host; 4 per device if left out.
      num_data: groups of this host's devices that images are spread over; all if left out.
      num_model: devices that share one copy of the prior.
      coordinator: HOST:PORT of process 0; Slurm, GKE and TPU pods need none.
      cluster: ask JAX for the other processes although no variable of a scheduler tells of them, as
        on TPU pods.
      num_processes: number of processes, with --coordinator.
      process_id: which one this is, with --coordinator.
      join_seconds: how long to wait for the other processes.
    """

    image: Annotated[Path | None, tyro.conf.Positional] = None
    out: Path = Path("runs/sweep")
    batch_size: int | None = None
    num_data: int | None = None
    num_model: int = 1
    coordinator: str | None = None
    cluster: bool = False
    num_processes: int | None = None
    process_id: int | None = None
    join_seconds: float = 300.0
    resume: _Hidden = False
    overwrite: _Hidden = False
    paste_known: _Hidden = False
    save_steps: _Hidden = False


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
            if not (self.target(name).is_file() and sources.has_hash(image, finished.get(name)))
        }

    def target(self, name: str) -> Path:
        """File of a restored image."""
        return self.options.out / "images" / f"{name}.png"

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
                    _say(f"{row['name']} was left out: {row['reason']}")
                _say(f"host {self.place.index} of {self.place.count}: {done} of {count} images")
        return failed

    def _restore(self, jobs: list[batches.Job]) -> list[dict[str, Any]]:
        """Restores jobs of one kind, writes their images and returns their rows."""
        problem = jobs[0].problem
        distance = self._lpips(problem)
        notes: list[str] = []
        config = dataclasses.replace(self.config, image_shape=problem.image_shape)
        config = command.settle_perceptual(config, problem, distance, notes)
        # Filled up with the last image, so that every batch has one shape.
        filled = jobs + jobs[-1:] * (self.batch_size - len(jobs))
        params = Params(
            prior=self.model.prior,
            codec=self.model.codec,
            operator=batches.operator_of(self.options, filled),
            perceptual=distance if command.perceptual_weight(config) > 0 else None,
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
                reason = "the objective is not finite; lower learning_rate or prior_weight"
                table.append(row | {"status": "diverged", "reason": reason})
                continue
            image = jnp.asarray(result.images[index])
            images.save_image(self.target(job.name), image)
            residual = report.data_residual(job.problem.operator, image, job.problem.y)
            row |= {"residual": residual["root_mean_square"], "seconds": round(seconds, 3)}
            if job.problem.photo is not None:
                row |= report.scores({"restored": image}, job.problem.photo[0], distance)[
                    "restored"
                ]
            table.append(row | ({"notes": notes} if notes else {}))
        return table

    def _lpips(self, problem: inputs.Problem) -> Perceptual | None:
        """LPIPS for images of one kind, loaded once; those that are too small have none."""
        if min(problem.image_shape) < command.LPIPS_SIDE:
            return None
        if not self._tried_distance:
            notes: list[str] = []
            distance = command.load_distance(problem, self.config, notes)
            self._distance = jax.device_put(distance, sharding.replicated(self.mesh))
            self._tried_distance = True
            for note in notes:
                if command.perceptual_weight(self.config) > 0 and self._distance is None:
                    raise ValueError(
                        f"the perceptual term needs LPIPS on every host; {note}; or sweep without "
                        "it: --option perceptual_weight=0"
                    )
                _say(f"note: {note}")
        return self._distance

    def _sample(
        self, params: Params, y: Any, keys: Key, config: Any
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
            result = jax.device_get(self._compiled[kind](params, y, keys))
            return result, time.perf_counter() - began
        except Exception as error:
            if not errors.is_out_of_memory(error):
                raise
            compiled = self._compiled.get(kind)
            raise memory.MemoryShortage(
                memory.advice(compiled, self.batch_size, self.mesh)
            ) from error


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


def _check_task(options: Sweep) -> None:
    """ValueError if the task or its options are wrong whatever the image."""
    given = inputs.task_options(options)
    # Measurements with transparent pixels have their own masks.
    if options.task != "inpainting_mask" or not options.measured or "mask" in given:
        make_operator(options.task, **given)


def _say(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def read_options(argv: Sequence[str]) -> Sweep:
    """Options of the command line, over those of a JSON file if the first argument is one.

    Raises:
      ValueError: if the file is no mapping of options.
      SystemExit: as tyro does, for help and for what cannot be understood, in the file too.
    """
    argv, default = list(argv), Sweep()
    if argv and argv[0].endswith(".json"):
        path = Path(argv.pop(0))
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            values = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a JSON object of options ({error})") from None
        try:
            words = _words(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        default = tyro.cli(Sweep, args=words, prog=str(path))
    return tyro.cli(Sweep, args=argv, prog=PROGRAM, default=default)


def _words(values: Mapping[str, Any]) -> list[str]:
    """Options of a JSON file as words of a command line, for the checks of one.

    Raises:
      ValueError: for an unknown name, and for a flag that is neither true nor false.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Sweep)}
    words = []
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f"unknown option {name!r}; see --help")
        flag = name.replace("_", "-")
        if isinstance(defaults[name], bool):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "image":
            words.insert(0, str(value))
        elif value is not None:
            items = value if isinstance(value, list) else [value]
            words += [f"--{flag}={item}" for item in items]
    return words


def run(options: Sweep) -> int:
    """Does this host's share; 0 if every image of it has a result, 1 if some could not be used."""
    if options.image is None:
        raise ValueError(
            "name a folder of images, a list of paths, MODULE:NAME or a JSON file of options"
        )
    cli_options.check(options)
    command.check_prompt(options)
    _check_task(options)
    if options.num_samples != 1:
        raise ValueError(
            "--num-samples must be 1 here; for more samples of an image, sweep again with another "
            "--seed and --out"
        )
    place = hosts.join(
        options.coordinator,
        options.num_processes,
        options.process_id,
        seconds=options.join_seconds,
        is_cluster=options.cluster,
        fail=hosts.give_up(PROGRAM),
    )
    found = sources.named_images(options.image)
    host = Host(options, place)
    rows.claim(options.out / MANIFEST, _identity(options, host.config))
    try:
        with rows.alone(host.log):
            failed = host.run(found)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command does what is missing") from None
    if failed:
        _say(f"{failed} images have no result; {host.log} says why")
    return 1 if failed else 0


def _identity(options: Sweep, config: Any) -> dict[str, Any]:
    """What every result of one folder has in common."""
    facts = command.run_facts(options, config)
    for name in ("kernel", "mask"):
        path = getattr(options, name)
        if path is not None:
            facts["task"]["options"][name] = checkpoint.fingerprint(path)
    if options.weights is not None:  # A folder, of which the values count.
        card = options.weights / checkpoint.CARD_NAME
        weights = checkpoint.weights_path(options.weights, "kernel_wizard")
        facts["task"]["options"]["weights"] = {
            path.name: checkpoint.fingerprint(path) for path in (card, weights)
        }
    return facts | {"model": facts["model"]["sha256"], "size": options.size}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return errors.guarded(lambda: run(read_options(argv)), PROGRAM, memory_cure=MEMORY_CURE)


if __name__ == "__main__":
    sys.exit(main())
