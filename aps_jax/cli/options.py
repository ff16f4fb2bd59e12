"""Options of the commands, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from aps_jax import presets

_MAX_SEED = 2**32


def _named(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar)


def _optional(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


_Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restore:
    """Restores a photo by Anchored Posterior Sampling, or by another sampler.

    Without --measured, IMAGE is a clean photo: it is degraded, restored and scored. With
    --measured, IMAGE is the degraded image itself. Results go to the folder --out.

    Attributes:
      image: photo, or measurement (image file or .npy); the bundled sample photo if left out.
      task: what was done to the photo; `aps-jax tasks` lists them with their options.
      measured: IMAGE is the measurement itself, not a clean photo.
      model: photo64, face64, or a model folder.
      dtype: of the networks' activations; bfloat16 is faster on GPUs and TPUs, not on a CPU. The
        model's own if left out.
      prompt: what the image shows, for models that read text; see --guidance-scale.
      sampler: aps, aps-i, aps-l, aps-ii or another; `aps-jax samplers` lists them with their
        options.
      preset: draft, balanced (default) or paper; of aps and its variants only.
      budget: decoder evaluations; decides the number of inner steps, candidates or particles, and
        for most samplers that of timesteps unless --num-steps is given.
      num_steps: timesteps, instead of the preset's or the sampler's own.
      num_inner_steps: optimiser steps per timestep, likewise.
      option: any other option of the sampler as NAME=VALUE; may be repeated.
      num_samples: posterior samples; more than one adds their mean and standard deviation.
      draw: proposal per token: quantized, categorical (default of several samples, unless they are
        remasked at random or have Gumbel noise) or argmax.
      guidance_scale: how much more the prompt counts than no prompt at all; 0 is off.
      sigma: noise standard deviation on the pixel scale [-1, 1]; with 0 the Gaussian likelihood
        of the presets assumes 0.05.
      seed: of degradation, noise and sampling.
      size: first resize and crop the photo to a square of so many pixels.
      out: folder for the results, made if needed.
      resume: continue the interrupted run in the folder.
      overwrite: replace earlier results in the folder.
      paste_known: inpainting only: put the measured pixels back into the restored image.
      save_steps: also save the image at every timestep.
      scale: super_resolution: factor.
      fraction: inpainting_random: share of missing pixels; compressed_sensing: measurements.
      box_size: inpainting_box: side in pixels.
      margin: inpainting_box: distance to the border in pixels.
      std: gaussian_blur: standard deviation in pixels.
      kernel_size: gaussian_blur, motion_blur: side of the kernel in pixels.
      intensity: motion_blur: shakiness, 0 to 1.
      kernel: blur: kernel file, .npy as it is or a grey image, scaled to sum 1.
      mask: inpainting_mask: image or .npy, white or 1 where a pixel is known.
      quality: jpeg: 1 to 100.
      bits: quantization: bits per channel.
      gain: hdr: factor.
      oversample: phase_retrieval: padding factor.
      pattern: demosaicing: rggb, bggr, grbg or gbrg.
      ensemble: compressed_sensing: signs or gaussian.
      weights: nonlinear_blur: folder written by `python -m convert.kernel_wizard`.
    """

    image: Annotated[Path | None, tyro.conf.Positional, _optional("[IMAGE]")] = None
    task: Annotated[str, _named("NAME")] = "super_resolution"
    measured: _Flag = False
    model: Annotated[str, _named("photo64|face64|DIR")] = "photo64"
    dtype: Annotated[str | None, _optional("float32|bfloat16")] = None
    prompt: Annotated[str | None, _optional("TEXT")] = None
    sampler: Annotated[str, _named("NAME")] = "aps"
    preset: Annotated[str | None, _optional("NAME")] = None
    budget: Annotated[int | None, _optional("N")] = None
    num_steps: Annotated[int | None, _optional("N")] = None
    num_inner_steps: Annotated[int | None, _optional("M")] = None
    option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")
    ] = ()
    num_samples: Annotated[int, _named("S")] = 1
    draw: Annotated[str | None, _named("NAME")] = None
    guidance_scale: Annotated[float, _named("G")] = 0.0
    sigma: float = 0.05
    seed: int = 0
    size: Annotated[int | None, _optional("PX")] = None
    out: Annotated[Path, _named("DIR")] = Path("restored")
    resume: _Flag = False
    overwrite: _Flag = False
    paste_known: _Flag = False
    save_steps: _Flag = False
    scale: Annotated[int | None, _optional("N")] = None
    fraction: Annotated[float | None, _optional("SHARE")] = None
    box_size: Annotated[int | None, _optional("PX")] = None
    margin: Annotated[int | None, _optional("PX")] = None
    std: Annotated[float | None, _optional("PX")] = None
    kernel_size: Annotated[int | None, _optional("PX")] = None
    intensity: Annotated[float | None, _optional("X")] = None
    kernel: Annotated[Path | None, _optional("FILE")] = None
    mask: Annotated[Path | None, _optional("FILE")] = None
    quality: Annotated[int | None, _optional("N")] = None
    bits: Annotated[int | None, _optional("N")] = None
    gain: Annotated[float | None, _optional("X")] = None
    oversample: Annotated[float | None, _optional("X")] = None
    pattern: Annotated[str | None, _optional("NAME")] = None
    ensemble: Annotated[str | None, _optional("NAME")] = None
    weights: Annotated[Path | None, _optional("DIR")] = None


#: Fields of `Restore` that are options of a task.
TASK_OPTIONS = (
    "scale", "fraction", "box_size", "margin", "std", "kernel_size", "intensity", "kernel", "mask",
    "quality", "bits", "gain", "oversample", "pattern", "ensemble",
    "weights",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """Lists the measurement tasks and their options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samplers:
    """Lists the samplers, their papers, and where the default of each option comes from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """Lists the models in this package, and describes model folders.

    Attributes:
      folders: model folders to describe as well.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, _named("[DIR ...]")] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Checks the installation; exit code 1 if it cannot restore photos.

    Attributes:
      model: photo64, face64, or a model folder.
    """

    model: Annotated[str, _named("photo64|face64|DIR")] = "photo64"


def check(options: Restore) -> None:
    """Finds what is wrong with the options alone, before anything is loaded."""
    if not 0 <= options.sigma < math.inf:
        raise ValueError(f"--sigma must be a number >= 0, got {options.sigma}")
    if not 0 <= options.seed < _MAX_SEED:
        raise ValueError(f"--seed must be from 0 to {_MAX_SEED - 1}, got {options.seed}")
    if not 0 <= options.guidance_scale < math.inf:
        raise ValueError(f"--guidance-scale must be a number >= 0, got {options.guidance_scale}")
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other; choose one")
    if options.measured and options.image is None:
        raise ValueError("--measured needs an IMAGE, the measurement; name its file")
    if options.measured and options.size is not None:
        raise ValueError("--size is for clean photos; a measurement has the size it has")
    config_of(options)


def config_of(options: Restore) -> Any:
    """Options of the sampler; ValueError if one is unknown, not its own or out of range."""
    if options.budget is not None and options.budget < 1:
        raise ValueError(f"--budget must be at least 1, got {options.budget}")
    flags = {
        "num_steps": options.num_steps,
        "num_inner_steps": options.num_inner_steps,
        "num_samples": options.num_samples,
        "draw": options.draw,
        "guidance_scale": options.guidance_scale or None,
        "sigma": options.sigma or None,
    }
    chosen = presets.parse_options(options.sampler, options.option)
    for name in chosen.keys() & flags.keys():
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"--option {name} has a flag of its own; use {flag}")
    if options.save_steps:
        flags["trace"] = True
    return presets.make_config(
        preset=options.preset, sampler=options.sampler, budget=options.budget, **flags, **chosen
    )


def command_of(options: Restore, **changes: Any) -> str:
    """The command line with these options, `changes` applied; most defaults are left out."""
    options = dataclasses.replace(options, **changes)
    words = ["aps-jax", "restore"]
    if options.image is not None:
        words.append(os.fspath(options.image))
    for field in dataclasses.fields(Restore):
        value = getattr(options, field.name)
        flag = "--" + field.name.replace("_", "-")
        is_shown = field.name in ("task", "sampler", "sigma", "seed", "out")
        if field.name == "image" or (value == field.default and not is_shown):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag] if item is True else [flag, str(item)]
    return shlex.join(words)
