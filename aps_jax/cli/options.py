"""Options of the commands, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from aps_jax import presets
from aps_jax.cli.common import Flag, check_run, chosen_options, flag_of, named, optional
from aps_jax.config import VARIANTS, SharedConfig
from aps_jax.tasks import TASKS, Option, Task

#: Formats of the animation of --save-video, which are the suffixes of its file.
VIDEO_FORMATS = ("webp", "gif")

#: What --estimate takes.
ESTIMATES = ("sample", "mean")


_Options = TypeVar("_Options")


def _tasks_by_option() -> dict[str, list[tuple[Task, Option]]]:
    found: dict[str, list[tuple[Task, Option]]] = {}
    for task in TASKS.values():
        for name, option in task.options.items():
            found.setdefault(option.flag or name, []).append((task, option))
    return found


#: The tasks that have an option, by the field of `Restore` that holds its value.
TASK_OPTIONS = _tasks_by_option()


def _task_flag(uses: Sequence[tuple[Task, Option]]) -> Any:
    """Type of a field of `Restore` for an option of tasks, with its help."""
    meanings: dict[str, list[str]] = {}
    for task, option in uses:
        shown = "" if option.default is None else f" (default: {option.default})"
        meanings.setdefault(option.summary + shown, []).append(task.name)
    text = ". ".join(f"{', '.join(names)}: {meaning}" for meaning, names in meanings.items())
    option = uses[0][1]
    kind: Any = option.kind if option.kind in (int, float, str) else Path
    look = tyro.conf.arg(metavar=option.metavar, help=f"{text}.", help_behavior_hint="")
    return Annotated[kind | None, look]


def _with_task_flags(options: type[_Options]) -> type[_Options]:
    """Adds a field, None if not given, for every option of a task."""
    for field, uses in TASK_OPTIONS.items():
        options.__annotations__[field] = _task_flag(uses)
        setattr(options, field, None)
    return options


@dataclasses.dataclass(frozen=True, kw_only=True)
@_with_task_flags
class Restore:
    """Restores a photo by Anchored Posterior Sampling, or by another sampler.

    Without --measured, IMAGE is a clean photo: it is degraded, restored and scored. With
    --measured, IMAGE is the degraded image itself. Results go to the folder --out. The options of
    the tasks come last.

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
      preset: draft, balanced, fine, faces or paper, of aps and its variants only; the model's own
        if left out, which is balanced for most.
      budget: decoder evaluations; decides the number of inner steps, candidates or particles, and
        for most samplers that of timesteps unless --num-steps is given.
      num_steps: timesteps, instead of the preset's or the sampler's own.
      num_inner_steps: optimiser steps per timestep, likewise.
      option: any other option of the sampler as NAME=VALUE; may be repeated.
      num_samples: posterior samples; more than one adds their mean and standard deviation.
      estimate: what is restored of several samples: sample (the first) or mean (of all, the closest
        to the photo on average, and smoother than any of them).
      draw: proposal per token: quantized, categorical (default of several samples, unless they are
        remasked at random, as those of the preset faces and of a mean are) or argmax.
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
      save_video: also save the timesteps as an animation, trajectory.webp or trajectory.gif.
      show_tokens: draw over the animation which tokens have been revealed.
    """

    image: Annotated[Path | None, tyro.conf.Positional, optional("[IMAGE]")] = None
    task: Annotated[str, named("NAME")] = "super_resolution"
    measured: Flag = False
    model: Annotated[str, named("photo64|face64|DIR")] = "photo64"
    dtype: Annotated[str | None, optional("float32|bfloat16")] = None
    prompt: Annotated[str | None, optional("TEXT")] = None
    sampler: Annotated[str, named("NAME")] = "aps"
    preset: Annotated[str | None, optional("NAME")] = None
    budget: Annotated[int | None, optional("N")] = None
    num_steps: Annotated[int | None, optional("N")] = None
    num_inner_steps: Annotated[int | None, optional("M")] = None
    option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")
    ] = ()
    num_samples: Annotated[int, named("S")] = 1
    estimate: Annotated[str, named("sample|mean")] = "sample"
    draw: Annotated[str | None, named("NAME")] = None
    guidance_scale: Annotated[float, named("G")] = 0.0
    sigma: float = 0.05
    seed: int = 0
    size: Annotated[int | None, optional("PX")] = None
    out: Annotated[Path, named("DIR")] = Path("restored")
    resume: Flag = False
    overwrite: Flag = False
    paste_known: Flag = False
    save_steps: Flag = False
    save_video: Annotated[str | None, optional("webp|gif")] = None
    show_tokens: Flag = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align:
    """Crops a face of a photo to the framing of the model face64.

    Faces and eyes are found by OpenCV (extra "faces"), or the eyes are given by hand.

    Attributes:
      image: photo with a face.
      out: picture to write, .png or .jpg.
      eyes: centres of both eyes in pixels from the top left corner, such as 203,101 248,103.
      face: which face, counted from 1 from left to right, where the photo has several.
      size: side of the picture in pixels; face64 takes 64.
      overwrite: replace the file --out.
    """

    image: Annotated[Path, tyro.conf.Positional, named("IMAGE")]
    out: Annotated[Path, named("FILE")] = Path("face.png")
    eyes: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="X,Y X,Y")] = None
    face: Annotated[int | None, optional("N")] = None
    size: Annotated[int, named("PX")] = 64
    overwrite: Flag = False


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

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, named("[DIR ...]")] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Checks the installation; exit code 1 if it cannot restore photos.

    Attributes:
      model: photo64, face64, or a model folder.
    """

    model: Annotated[str, named("photo64|face64|DIR")] = "photo64"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Restores and edits pictures in a browser tab; nothing leaves this machine.

    Needs Gradio: pip install 'aps_jax[demo]'. Ctrl-C ends it and deletes what visitors made.

    Attributes:
      port: of 127.0.0.1; the first free one from 7860 on if left out.
      open: also open the browser.
    """

    port: Annotated[int | None, optional("PORT")] = None
    open: Flag = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Converts published weights; without a NAME it lists the converters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Restores a folder of images on as many devices and hosts as there are."""


def task_file(options: Restore, name: str) -> Path | None:
    """The file or folder that an option of tasks, such as `mask`, was given as."""
    return getattr(options, name)  # These fields are added at run time.


def check_align(options: Align) -> None:
    """Finds what is wrong with the options of `align` alone."""
    if options.face is not None and options.face < 1:
        raise ValueError(f"--face counts from 1, got {options.face}")
    if options.face is not None and options.eyes is not None:
        raise ValueError("--face and --eyes exclude each other; choose one")
    if not 8 <= options.size <= 1024:
        raise ValueError(f"--size must be from 8 to 1024, got {options.size}")


def check(options: Restore) -> None:
    """Finds what is wrong with the options alone, before anything is loaded."""
    check_run(options, not_negative=("sigma", "guidance_scale"))
    if options.measured and options.image is None:
        raise ValueError("--measured needs an IMAGE, the measurement; name its file")
    if options.measured and options.size is not None:
        raise ValueError("--size is for clean photos; a measurement has the size it has")
    if options.estimate not in ESTIMATES:
        raise ValueError(f"--estimate must be {' or '.join(ESTIMATES)}, got {options.estimate!r}")
    if options.estimate == "mean" and options.num_samples == 1:
        raise ValueError("--estimate mean is that of several samples; add --num-samples 8")
    if options.save_video not in (None, *VIDEO_FORMATS):
        names = " or ".join(VIDEO_FORMATS)
        raise ValueError(f"--save-video must be {names}, got {options.save_video!r}")
    if options.show_tokens and not options.save_video:
        raise ValueError("--show-tokens draws over the animation; add --save-video webp")
    config = config_of(options)
    if options.show_tokens and config.NEEDS != "prior":
        raise ValueError(f"sampler {options.sampler!r} has no tokens; leave out --show-tokens")


def config_of(options: Restore) -> SharedConfig:
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
    chosen = chosen_options(options, options.sampler, {name: flag_of(name) for name in flags})
    if options.save_steps or options.save_video:
        flags["trace"] = True
    if options.estimate == "mean" and options.sampler in VARIANTS and options.draw is None:
        # The means are level, and these samples are the better ones.
        if "remasking" not in VARIANTS[options.sampler]:
            chosen = {"remasking": "random"} | chosen
    return presets.make_config(
        preset=preset_of(options), sampler=options.sampler, budget=options.budget, **flags, **chosen
    )


def preset_of(options: Restore) -> str | None:
    """The preset asked for, else the model's own; None for samplers without any."""
    if options.preset is None and options.sampler in VARIANTS:
        return presets.preset_of(options.model)
    return options.preset


def command_of(options: Any, **changes: Any) -> str:
    """The command line with these options, `changes` applied; most defaults are left out.

    Args:
      options: those of a command whose class is named after it; a field `image` is the positional
        argument.
      **changes: fields to replace.
    """
    options = dataclasses.replace(options, **changes)
    words = ["aps-jax", type(options).__name__.lower()]
    if getattr(options, "image", None) is not None:
        image = os.fspath(options.image)
        words.append(os.path.join(os.curdir, image) if image.startswith("-") else image)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        flag = "--" + field.name.replace("_", "-")
        is_shown = field.name in ("task", "sampler", "sigma", "seed", "out")
        if field.name == "image" or value is None or (value == field.default and not is_shown):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            text = str(item)
            if item is True:
                words.append(flag)
            else:  # What begins with a dash would be taken for another option.
                words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(words)
