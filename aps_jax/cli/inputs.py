"""What `aps-jax restore` is given: a photo to degrade, or a measurement."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import images
from aps_jax.cli.options import TASK_OPTIONS, Restore
from aps_jax.faces.framing import alignment_score
from aps_jax.io.checkpoint import read_card
from aps_jax.io.masks import SIDES, load_kernel, load_mask, opaque_pixels
from aps_jax.operators import make_operator, measure
from aps_jax.pretrained import load_kernel_wizard, model_folder
from aps_jax.sampling.checks import channels_last, check_measured_values
from aps_jax.tasks import TASKS
from aps_jax.types import Array, ImageShape, Key, Operator, PyTree

_measure = jax.jit(measure, static_argnames="sigma")


class Problem(NamedTuple):
    """What is to be restored: photo [1, H, W, 3] or None, measurement [1, ...], operator."""

    photo: Array | None
    y: Array
    operator: Operator
    image_shape: ImageShape
    source: dict[str, Any]


def degrade_photo(options: Restore, key_operator: Key, key_noise: Key) -> Problem:
    """Loads a clean photo, and measures it with fresh operator state and noise."""
    if options.image is None:
        photo = sample_for(options.model)
    else:
        photo = images.load_image(options.image)
    if options.size is not None:
        if not images.MIN_SIDE <= options.size <= min(photo.shape[:2]):
            raise ValueError(
                f"--size must be from {images.MIN_SIDE} to the photo's shorter side "
                f"{min(photo.shape[:2])}, got {options.size}"
            )
        photo = images.center_crop(images.resize_short_side(photo, options.size), options.size)
    image_shape = photo.shape[:2]
    operator = make_operator(options.task, **task_options(options))
    if operator.name == "compressed_sensing":
        drawn = jax.eval_shape(lambda key: operator.init(key, image_shape).params, key_operator)
        require_memory(4 * drawn.size, "the measurement matrix")
    operator = operator.init(key_operator, image_shape)
    x = jnp.asarray(photo)[None]
    y = _measure(key_noise, x, operator=operator, sigma=options.sigma)
    return Problem(x, y, operator, image_shape, _source(options.image))


def sample_for(model: str) -> np.ndarray:
    """The bundled picture [H, W, 3] in [-1, 1] that a model can know something of."""
    return images.sample_photo("face" if knows_faces_only(model) else "photo")


def knows_faces_only(model: str) -> bool:
    """True if a model's card says which framing its pictures have."""
    return "framing" in read_card(model_folder(model))


def framing_notes(model: str, photo: Array | None) -> list[str]:
    """A note where a model of aligned faces is given a photo [1, H, W, 3] that is none."""
    if photo is None or not knows_faces_only(model) or alignment_score(np.asarray(photo[0])) > 0:
        return []
    return [
        f"the picture does not look like a face in the framing of {model}; make one with "
        "aps-jax align"
    ]


def load_measured(options: Restore) -> Problem:
    """Loads a measurement, and finds the image size behind it."""
    path, task = options.image, options.task
    assert path is not None  # `options.check` has refused --measured without one.
    given = task_options(options)
    y = images.load_measurement(path)
    if y.ndim < 2:
        raise ValueError(f"{path} has shape {y.shape}; a measurement has at least two dimensions")
    if task == "inpainting_mask":
        given["mask"] = _measured_mask(path, given.get("mask"))
    operator = make_operator(task, **given)
    if TASKS[task].is_random:
        raise ValueError(f"--task {task} draws its operator at random; {_known_instead(task)}")
    is_array = path.suffix.lower() == ".npy"
    if not is_array and task == "phase_retrieval":
        raise ValueError(f"{path} holds colours, not amplitudes; give them as a .npy file")
    image_shape = operator.image_shape((1, *y.shape))
    if operator.is_image and (hint := channels_last((1, *y.shape))):
        raise ValueError(f"{path} has shape {y.shape}{hint}")
    if min(image_shape) < images.MIN_SIDE:
        raise ValueError(
            f"{path} belongs to an image of {image_shape[1]}x{image_shape[0]} pixels; both sides "
            f"must be at least {images.MIN_SIDE}"
        )
    expected = operator.output_shape((1, *image_shape, 3))[1:]
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
    try:
        check_measured_values(operator, y, options.sigma)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if operator.observed is not None:
        y = y * operator.observed(operator.params, y.shape)
    return Problem(None, y, operator, image_shape, _source(path))


def _measured_mask(path: Path, mask: np.ndarray | None) -> np.ndarray:
    """Mask [H, W] of a measurement: `mask`, or the pixels of the file that are not transparent."""
    is_array = path.suffix.lower() == ".npy"
    opaque = None if is_array else opaque_pixels(path)
    if mask is None:
        if opaque is None:
            raise ValueError(
                f"{path} does not say which pixels are missing; give --mask FILE, or make missing "
                f"pixels transparent ({SIDES})"
            )
        return opaque
    if opaque is not None and opaque.shape == mask.shape and (mask > opaque).any():
        raise ValueError(
            f"{path} has transparent pixels that --mask calls known; leave out --mask, or make "
            "them black in it"
        )
    return mask


def _known_instead(task: str) -> str:
    if task.startswith("inpainting"):
        return "use --task inpainting_mask and --mask FILE, white where a pixel is known"
    if task == "motion_blur":
        return "use --task blur and --kernel FILE"
    return "restore its measurements from Python"


def task_options(options: Restore) -> dict[str, Any]:
    """The task options that were given, files read; ValueError if one cannot be used."""
    given = {name: getattr(options, name) for name in TASK_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.task == "nonlinear_blur":
        given["params"] = _load_weights(given.pop("weights", None))

    if "kernel" in given:
        given["kernel"] = load_kernel(given["kernel"])
    if "mask" in given:
        given["mask"] = load_mask(given["mask"])
    return given


def _load_weights(folder: Path | None) -> PyTree:
    if folder is None:
        raise ValueError(
            "--task nonlinear_blur needs --weights DIR, written by aps-jax convert kernel_wizard "
            "from GOPRO_wVAE.pth, which the README of "
            "github.com/VinAIResearch/blur-kernel-space-exploring links"
        )
    return load_kernel_wizard(folder)


def _source(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"path": None, "sha256": None}
    return {"path": os.fspath(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def given_options(options: Restore) -> dict[str, Any]:
    """The task options that were given, as JSON values."""
    given = {name: getattr(options, name) for name in TASK_OPTIONS}
    return {
        name: os.fspath(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None
    }


def require_memory(size: float, what: str) -> None:
    """Raises ValueError if `what` needs more than the free memory; `size` is in bytes."""
    free = free_memory()
    if free is not None and size > free:
        raise ValueError(
            f"{what} need at least {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are "
            "free; restore a smaller image (--size) or fewer --num-samples"
        )


def free_memory() -> int | None:
    """Bytes that the device can still give, or None if it does not say."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None
