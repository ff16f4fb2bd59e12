"""`aps-jax restore`: from files to files around `aps_jax.restore.restore`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

import aps_jax
from aps_jax import images, pretrained, report
from aps_jax.checkpoint import CARD_NAME
from aps_jax.cli import TASK_OPTIONS, Restore, command_of, config_of
from aps_jax.config import APSConfig
from aps_jax.field import field_shape
from aps_jax.perceptual import MIN_SIDE as LPIPS_SIDE
from aps_jax.perceptual import PerceptualUnavailable, load_lpips
from aps_jax.restore import DivergedError, Restored, Snapshot, StepReport, restore
from aps_jax.tasks import TASKS, make_operator
from aps_jax.types import Array, ImageShape, Operator, Params, Perceptual

STATE_NAME = ".state"
_SINGLE_FILES = (
    "restored.png", "measurement.png", "measurement.npy", "comparison.png", "mean.png", "std.png",
    "mask.png", "kernel.npy", "result.json",
)  # fmt: skip
_MANY_FILES = ("samples/sample_*.png", "steps/step_*.png")
#: Arrays as large as the logits that are alive at once in a timestep, at least.
_LOGIT_COPIES = 6


class Problem(NamedTuple):
    """What is to be restored: photo [1, H, W, 3] or None, measurement [1, ...], operator."""

    photo: Array | None
    y: Array
    operator: Operator
    image_shape: ImageShape
    source: dict[str, Any]


def run(options: Restore) -> int:
    """Restores one image as the options say; returns the exit code."""
    began = time.perf_counter()
    config = config_of(options)
    _check_folder(options)
    key_operator, key_noise, key_sample = jax.random.split(jax.random.key(options.seed), 3)
    if options.measured:
        problem = _load_measured(options)
    else:
        problem = _degrade_photo(options, key_operator, key_noise)
    if options.paste_known:
        report.paste_known(problem.operator, jnp.zeros((*problem.image_shape, 3)), problem.y)
    model = pretrained.load_pretrained(options.model)
    config = dataclasses.replace(config, image_shape=problem.image_shape)
    _check_memory(config, model)

    notes: list[str] = []
    distance = _load_distance(problem, config, notes)
    config = _settle_perceptual(config, problem, distance, notes)
    params = Params(
        prior=model.prior,
        codec=model.codec,
        operator=problem.operator,
        perceptual=distance if config.perceptual_weight > 0 else None,
    )
    facts = _identify(options, config, problem)
    snapshot = Snapshot(options.out / STATE_NAME, facts, options.resume)
    with _folder(options.out):
        restored = _sample(params, problem, key_sample, config, snapshot, options)
        outputs = Outputs(options, config, problem, restored, model, distance)
        outputs.facts |= {"notes": notes, **facts}
        outputs.write(began)
        snapshot.remove()
    outputs.summarise(time.perf_counter() - began)
    return 0


def _sample(
    params: Params,
    problem: Problem,
    key: Array,
    config: APSConfig,
    snapshot: Snapshot,
    options: Restore,
) -> Restored:
    try:
        with _progress(config) as on_step:
            return restore(
                params, problem.y, key, config=config, on_step=on_step, snapshot=snapshot
            )
    except KeyboardInterrupt:
        if snapshot.path.exists():
            again = command_of(options, resume=True, overwrite=False)
            raise KeyboardInterrupt(f"continue with: {again}") from None
        raise KeyboardInterrupt("nothing was written; run the same command again") from None
    except DivergedError:
        snapshot.remove()
        raise


# Inputs.


def _degrade_photo(options: Restore, key_operator: Array, key_noise: Array) -> Problem:
    photo = images.sample_photo() if options.image is None else images.load_image(options.image)
    if options.size is not None:
        if not images.MIN_SIDE <= options.size <= min(photo.shape[:2]):
            raise ValueError(
                f"--size must be from {images.MIN_SIDE} to the photo's shorter side "
                f"{min(photo.shape[:2])}, got {options.size}"
            )
        photo = images.center_crop(images.resize_short_side(photo, options.size), options.size)
    image_shape = photo.shape[:2]
    operator = make_operator(options.task, image_shape, **_task_options(options))
    if operator.name == "compressed_sensing":
        share = 0.25 if options.fraction is None else options.fraction
        size = 4 * share * (image_shape[0] * image_shape[1]) ** 2
        _require_memory(size, "the measurement matrix")
    operator = operator.init(key_operator, image_shape)
    x = jnp.asarray(photo)[None]
    y = aps_jax.measure(key_noise, x, operator=operator, sigma=options.sigma)
    return Problem(x, y, operator, image_shape, _source(options.image))


def _load_measured(options: Restore) -> Problem:
    path, task = options.image, options.task
    given = _task_options(options)
    y = images.load_measurement(path)
    if y.ndim < 2:
        raise ValueError(f"{path} has shape {y.shape}; a measurement has at least two dimensions")
    if task == "inpainting_mask" and "mask" not in given:
        given["mask"] = _opaque_pixels(path)
    make_operator(task, y.shape[:2], **given)
    if TASKS[task].is_random:
        raise ValueError(f"--task {task} draws its operator at random; {_known_instead(task)}")
    is_array = path.suffix.lower() == ".npy"
    operator = make_operator(task, y.shape[:2], **given)
    image_shape = operator.image_shape((1, *y.shape))
    operator = make_operator(task, image_shape, **given)
    if min(image_shape) < images.MIN_SIDE:
        raise ValueError(
            f"{path} belongs to an image of {image_shape[1]}x{image_shape[0]} pixels; both sides "
            f"must be at least {images.MIN_SIDE}"
        )
    expected = operator.output_shape((1, *image_shape, 3))[1:]
    if not is_array and task == "phase_retrieval":
        raise ValueError(f"{path} holds colours, not amplitudes; give them as a .npy file")
    if not is_array and expected[-1] == 1:
        y = images.load_measurement(path, channels=1)
    if y.shape[-1] == 1 and expected[-1] == 3:
        y = np.repeat(y, 3, axis=-1)
    if y.shape != expected:
        raise ValueError(
            f"{path} has shape {y.shape}; task {task!r} gives {expected} for images of "
            f"{image_shape}; choose the task and the options that made the file"
        )
    y = jnp.asarray(y)[None]
    if operator.observed is not None:
        y = y * operator.observed(operator.params, y.shape)
    return Problem(None, y, operator, image_shape, _source(path))


def _known_instead(task: str) -> str:
    if task.startswith("inpainting"):
        return "use --task inpainting_mask and --mask FILE, white where a pixel is known"
    if task == "motion_blur":
        return "use --task blur and --kernel FILE"
    return "restore its measurements from Python"


def _task_options(options: Restore) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in TASK_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.task == "nonlinear_blur":
        raise ValueError(
            "--task nonlinear_blur needs network weights, which only the Python function "
            "aps_jax.operators.nonlinear_blur takes; choose another task"
        )
    if "kernel" in given:
        kernel, is_picture = _load_matrix(options.kernel)
        if is_picture and kernel.sum() <= 0:
            raise ValueError(f"{options.kernel} is black; a kernel needs bright pixels")
        given["kernel"] = kernel / kernel.sum() if is_picture else kernel
    if "mask" in given:
        mask, is_picture = _load_matrix(options.mask)
        given["mask"] = (mask > 0.5).astype(np.float32) if is_picture else mask
    return given


def _load_matrix(path: Path) -> tuple[np.ndarray, bool]:
    """Numbers [H, W] of a .npy file, or brightness in [0, 1] of a picture; and which it was."""
    if path.suffix.lower() != ".npy" or not path.is_file():
        brightness = (images.load_measurement(path).mean(axis=-1) + 1) / 2
        return brightness, True
    try:
        matrix = np.load(path, allow_pickle=False)
    except Exception as error:  # A wrong magic, header or length, each with its own type.
        raise ValueError(f"{path} is not a whole .npy array of numbers ({error})") from None
    if matrix.ndim == 3 and matrix.shape[-1] == 1:
        matrix = matrix[..., 0]
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        raise ValueError(f"{path} has shape {matrix.shape} of {matrix.dtype}; need numbers [H, W]")
    return matrix.astype(np.float32), False


def _opaque_pixels(path: Path) -> np.ndarray:
    """Mask of the pixels of an image file that are not transparent at all."""
    help_text = "give --mask FILE, white where a pixel is known, or make missing pixels transparent"
    if path.suffix.lower() == ".npy":
        raise ValueError(f"{path} does not say which pixels are missing; {help_text}")
    with Image.open(path) as picture:
        alpha = np.asarray(ImageOps.exif_transpose(picture).convert("RGBA"))[..., 3]
    if (alpha == 255).all() or not (alpha == 255).any():
        raise ValueError(f"{path} does not say which pixels are missing; {help_text}")
    return (alpha == 255).astype(np.float32)


def _source(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"path": None, "sha256": None}
    return {"path": os.fspath(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# Checks before the work starts.


def _check_folder(options: Restore) -> None:
    out = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose a folder")
    has_state = (out / STATE_NAME).exists()
    if options.resume and not has_state:
        raise ValueError(f"--out {out} holds no interrupted run; leave out --resume")
    if options.resume or options.overwrite:
        return
    if has_state:
        raise ValueError(
            f"--out {out} holds an interrupted run; continue it with --resume or start again with "
            "--overwrite"
        )
    for name in _SINGLE_FILES:
        if (out / name).exists():
            raise ValueError(
                f"--out {out} already holds {name}; choose another folder or add --overwrite"
            )


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Makes the folder, proves that it takes files, and removes it again if nothing came of it."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            raise OSError(
                f"cannot write to --out {out}: {error.strerror}; choose another folder"
            ) from None
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # Only if it is empty.
        raise


def _check_memory(config: APSConfig, model: pretrained.Model) -> None:
    decoded = tuple(side * config.decode_scale for side in config.image_shape)
    rows, columns = field_shape(decoded, model.codec.stride)
    numbers = config.num_samples * rows * columns * model.codec.num_codes
    size = 4 * _LOGIT_COPIES * numbers
    what = (
        f"{config.num_samples} sample(s) of {config.image_shape[1]}x{config.image_shape[0]} pixels"
    )
    _require_memory(size, what)


def _require_memory(size: float, what: str) -> None:
    free = _free_memory()
    if free is not None and size > free:
        raise ValueError(
            f"{what} need at least {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are "
            "free; restore a smaller image (--size) or fewer --num-samples"
        )


def _free_memory() -> int | None:
    """Bytes that the device can still give, or None if it does not say."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _load_distance(problem: Problem, config: APSConfig, notes: list[str]) -> Perceptual | None:
    """LPIPS where something asks for it; a note says why not."""
    if problem.photo is None and config.perceptual_weight == 0:
        return None
    if min(problem.image_shape) < LPIPS_SIDE:
        notes.append(f"LPIPS was left out: the image is smaller than {LPIPS_SIDE} pixels")
        return None
    try:
        return load_lpips()
    except PerceptualUnavailable as error:
        notes.append(f"LPIPS was left out: {error}")
        return None


def _settle_perceptual(
    config: APSConfig, problem: Problem, distance: Perceptual | None, notes: list[str]
) -> APSConfig:
    """Drops the perceptual term where it cannot be computed, with a note."""
    if config.perceptual_weight == 0 or not problem.operator.is_image:
        return dataclasses.replace(config, perceptual_weight=0.0)
    if distance is not None and min(problem.y.shape[1:3]) >= LPIPS_SIDE:
        return config
    reason = "" if distance is None else f": the measurement is smaller than {LPIPS_SIDE} pixels"
    notes.append(f"the perceptual term of the preset was left out{reason}")
    return dataclasses.replace(config, perceptual_weight=0.0)


def _identify(options: Restore, config: APSConfig, problem: Problem) -> dict[str, Any]:
    """Everything the samples depend on, as JSON values."""
    arrays = hashlib.sha256()
    for leaf in jax.tree.leaves(problem.operator):
        arrays.update(np.asarray(leaf).tobytes())
    folder = pretrained.model_folder(options.model)
    names = (CARD_NAME, "codec.safetensors", "prior.safetensors")
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
    }
    device = jax.devices()[0]
    return {
        "task": {"name": options.task, "options": _given_options(options)},
        "sigma": options.sigma,
        "seed": options.seed,
        "is_measured": options.measured,
        "image": problem.source | {"shape": list(problem.image_shape)},
        "measurement_sha256": hashlib.sha256(np.asarray(problem.y).tobytes()).hexdigest(),
        "operator_sha256": arrays.hexdigest(),
        "model": {
            "name": options.model,
            "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
        },
        "config": dataclasses.asdict(config) | {"image_shape": list(config.image_shape)},
        "versions": {"aps_jax": aps_jax.__version__, "python": platform.python_version()} | versions,
        "device": {"platform": device.platform, "kind": device.device_kind, "cpus": os.cpu_count()},
    }  # fmt: skip


def _given_options(options: Restore) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in TASK_OPTIONS}
    return {
        name: os.fspath(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None
    }


# Progress.


@contextlib.contextmanager
def _progress(config: APSConfig) -> Iterator[Callable[[StepReport], None] | None]:
    """A bar on a terminal; elsewhere one plain line."""
    if not sys.stderr.isatty():
        print(
            f"sampling {config.num_steps} timesteps of {config.num_inner_steps} inner steps",
            file=sys.stderr,
        )
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("compiling", total=config.num_steps, figures="")

        def on_step(step: StepReport) -> None:
            figures = f"{step.num_masked:.0f} tokens masked"
            if step.num_done:
                figures = f"loss {step.loss:.4f}, {figures}"
            bar.update(job, description="sampling", completed=step.num_done, figures=figures)

        yield on_step


# Outputs.


class Outputs:
    """Scores and pictures of one restored image, and the folder they go to."""

    def __init__(
        self,
        options: Restore,
        config: APSConfig,
        problem: Problem,
        restored: Restored,
        model: pretrained.Model,
        distance: Perceptual | None,
    ) -> None:
        self.options, self.config, self.problem, self.restored = options, config, problem, restored
        self.result = jax.device_get(restored.result)
        self.image = restored.result.images[0]
        self.pasted = None
        if options.paste_known:
            self.pasted = report.paste_known(problem.operator, self.image, problem.y)
        self.trivial = report.baseline(problem.y, problem.operator, problem.image_shape)
        self.scores: dict[str, dict[str, float | None]] = {}
        if problem.photo is not None:
            self.scores = self._scores(model, distance)
        self.residual = report.data_residual(problem.operator, self.image, problem.y)
        self.facts: dict[str, Any] = {}

    def _scores(
        self, model: pretrained.Model, distance: Perceptual | None
    ) -> dict[str, dict[str, float | None]]:
        photo = self.problem.photo[0]
        candidates = {"restored": self.image}
        if self.pasted is not None:
            candidates["restored_pasted"] = self.pasted
        if self.config.num_samples > 1:
            candidates["mean_of_samples"] = self.restored.result.mean[0]
        if self.trivial is not None:
            candidates[self.trivial[0]] = self.trivial[1]
        ceiling = report.codec_reconstruction(model.codec, photo, self.config.decode_scale)
        candidates["codec_ceiling"] = ceiling
        return report.scores(candidates, photo, distance)

    def write(self, began: float) -> None:
        """Puts all files into a hidden folder first, then moves each in place, result.json last."""
        out = self.options.out
        staging = Path(tempfile.mkdtemp(dir=out, prefix=".new-"))
        try:
            self._write_pictures(staging)
            written = [path for path in sorted(staging.rglob("*")) if path.is_file()]
            names = [path.relative_to(staging).as_posix() for path in written] + ["result.json"]
            seconds = self.restored.seconds | {"total": time.perf_counter() - began}
            result = {
                "command": command_of(self.options, resume=False, overwrite=False),
                **self.facts,
                "sampler": self.options.sampler,
                "preset": self.options.preset,
                "metrics": self.scores or None,
                "residual": self.residual,
                "history": {
                    "loss": self.result.info.loss[:, :, 0],
                    "num_masked": self.result.info.num_masked[:, :, 0],
                },
                "seconds": {name: round(value, 3) for name, value in seconds.items()},
                "model_calls": self.restored.calls,
                "std_white": report.spread_view(self.result.std[0])[1],
                "files": names,
            }
            images.write_json_atomic(staging / "result.json", result)
            self._clear(out)
            for name in names:
                (out / name).parent.mkdir(exist_ok=True)
                os.replace(staging / name, out / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @staticmethod
    def _clear(out: Path) -> None:
        """Removes an earlier run's files, the record of its success first."""
        for name in reversed(_SINGLE_FILES):
            (out / name).unlink(missing_ok=True)
        for pattern in _MANY_FILES:
            for path in out.glob(pattern):
                path.unlink()

    def _write_pictures(self, folder: Path) -> None:
        problem, result = self.problem, self.result
        shown = self.image if self.pasted is None else self.pasted
        view = report.measurement_view(problem.y, problem.operator, problem.image_shape)
        images.save_image(folder / "restored.png", shown)
        images.save_image(folder / "measurement.png", view)
        images.save_array(folder / "measurement.npy", problem.y[0])
        params = problem.operator.params
        if problem.operator.name.startswith("inpainting"):
            images.save_image(folder / "mask.png", 2 * np.asarray(params) - 1)
        elif problem.operator.name in ("blur", "motion_blur"):
            images.save_array(folder / "kernel.npy", params)

        panels = [("measurement", view, self._caption(self.trivial[0] if self.trivial else ""))]
        if problem.photo is not None:
            panels.insert(0, ("photo", problem.photo[0], ""))
        best = "restored" if self.pasted is None else "restored_pasted"
        panels.append(("restored", shown, self._caption(best)))
        if self.config.num_samples > 1:
            std, white = report.spread_view(result.std[0])
            images.save_image(folder / "mean.png", result.mean[0])
            images.save_image(folder / "std.png", std)
            panels.append(("mean of samples", result.mean[0], self._caption("mean_of_samples")))
            panels.append(("std", std, f"white = {white:.2g}"))
            for index, sample in enumerate(result.samples[0], start=1):
                images.save_image(folder / "samples" / f"sample_{index:02}.png", sample)
        if self.options.save_steps:
            for index, rows in enumerate(result.info.trace.images, start=1):
                images.save_image(folder / "steps" / f"step_{index:02}.png", rows[0])
        canvas = images.comparison(
            [(label, picture) for label, picture, _ in panels],
            captions=[caption for _, _, caption in panels],
        )
        images.save_image(folder / "comparison.png", canvas)

    def _caption(self, name: str) -> str:
        if name not in self.scores:
            return ""
        prefix = "bicubic " if name == "bicubic" else ""
        return f"{prefix}{_figure(self.scores[name]['psnr'], '.2f')} dB"

    def summarise(self, seconds: float) -> None:
        """Prints what a person wants to know."""
        options, config = self.options, self.config
        height, width = self.problem.image_shape
        print(
            f"{options.task} {width}x{height}, {options.sampler}, {config.num_steps} x "
            f"{config.num_inner_steps} steps, seed {options.seed}"
        )
        if self.scores:
            print(f"{'':16}{'PSNR':>8}{'SSIM':>8}{'LPIPS':>8}")
            for name, row in self.scores.items():
                cells = (
                    _figure(row[score], digits)
                    for score, digits in (("psnr", ".2f"), ("ssim", ".3f"), ("lpips", ".3f"))
                )
                print(f"{name.replace('_', ' '):16}" + "".join(f"{cell:>8}" for cell in cells))
        rms = self.residual["root_mean_square"]
        print(f"residual {rms:.4f} (root mean square; the noise has {options.sigma:g})")
        for note in self.facts["notes"]:
            print(f"note: {note}")
        spent = self.restored.seconds
        print(
            f"{options.out / 'comparison.png'} and more, after {seconds:.1f} s (compiling "
            f"{spent['compile']:.1f}, sampling {spent['sample']:.1f})"
        )


def _figure(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)
