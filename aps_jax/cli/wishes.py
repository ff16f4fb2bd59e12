"""Options of `aps-jax edit` and `aps-jax stylize`, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from aps_jax import presets
from aps_jax.cli.common import Flag, check_run, chosen_options, flag_of, named, optional
from aps_jax.config import VARIANTS

#: Options of APS for wishes instead of measurements. Nothing measured says where to start inside a
#: mask; a picture that is only to be changed a little says it everywhere.
_PART = {
    "encoder_start": 0.0,
    "sensitivity_floor": 0.0,
    "draw": "categorical",
    # To `KNOWN_SIGMA` as the presets' 0.1 is to their sigma of 0.05.
    "data_consistency": 0.2,
}
_WHOLE = {"encoder_start": 0.5, "sensitivity_floor": 0.0, "data_consistency": 0.0}
#: How much words count in an edit, and its rewards, where nothing is said; chosen by eye.
GUIDANCE, REWARD_WEIGHT = 2.0, 20.0
#: Half the timesteps of a restoration look as well, and the features of a style take their time.
_STYLE_STEPS = 4
#: Options of the samplers that draw from the prior alone.
_PRIOR_STEPS = {"maskgit": {"num_steps": 12}, "best_of_n": {"num_steps": 12, "num_candidates": 8}}


_Words = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What both commands are told, beside what they are for.

    Attributes:
      dtype: of the networks' activations; the model's own if left out.
      prompt: what the picture is to show, for models that read text.
      negative: what it is not to show, likewise.
      sampler: any of `aps-jax samplers` that reads what is wished for.
      preset: draft, balanced, fine, faces or paper; of aps and its variants only.
      num_steps: timesteps, instead of the preset's or the sampler's own.
      num_inner_steps: optimiser steps per timestep, likewise.
      option: any other option of the sampler as NAME=VALUE; may be repeated.
      num_samples: samples, each another answer to the same wish.
      seed: of sampling.
      size: first resize and crop the picture to a square of so many pixels.
      out: folder for the results, made if needed.
      resume: continue the interrupted run in the folder.
      overwrite: replace earlier results in the folder.
    """

    dtype: Annotated[str | None, optional("float32|bfloat16")] = None
    prompt: Annotated[str | None, optional("TEXT")] = None
    negative: Annotated[str | None, optional("TEXT")] = None
    sampler: Annotated[str | None, optional("NAME")] = None
    preset: Annotated[str | None, optional("NAME")] = None
    num_steps: Annotated[int | None, optional("N")] = None
    num_inner_steps: Annotated[int | None, optional("M")] = None
    option: Annotated[_Words, named("NAME=VALUE")] = ()
    num_samples: Annotated[int, named("S")] = 1
    seed: int = 0
    size: Annotated[int | None, optional("PX")] = None
    resume: Flag = False
    overwrite: Flag = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(Wish):
    """Changes a face by words or rewards, in a part of the picture or all over.

    With --mask, tokens that lie wholly outside it are given and never change. Without, all of the
    picture is drawn again, and --likeness holds it to what it was.

    Attributes:
      image: the picture.
      mask: picture of the same size, black or transparent where the picture may change, white
        where it stays.
      reward: an attribute of the face as NAME=1 or NAME=0, judged by the embedded classifier; may
        be repeated.
      reward_weight: how much the rewards count against the prior, 20 if left out.
      guidance_scale: how much more the words count than no words at all, 2 if left out; 0 is off.
      likeness: without a mask, how much the picture holds to what it was.
      paste_known: put the pixels outside the mask back into the result.
      model: face64, or a model folder.
    """

    image: Annotated[Path, tyro.conf.Positional, named("IMAGE")]
    mask: Annotated[Path | None, optional("FILE")] = None
    reward: Annotated[_Words, named("NAME=VALUE")] = ()
    reward_weight: Annotated[float | None, optional("W")] = None
    guidance_scale: Annotated[float | None, optional("G")] = None
    likeness: Annotated[float | None, optional("W")] = None
    paste_known: Flag = False
    model: Annotated[str, named("face64|DIR")] = "face64"
    out: Annotated[Path, named("DIR")] = Path("edited")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stylize(Wish):
    """Paints a photo in the style of another picture.

    The style is that of VGG16's Gram matrices, the content that of its features (LPIPS's weights:
    aps-jax convert lpips).

    Attributes:
      image: the photo, whose content stays.
      style: swirls, mosaic or woodcut, which are in the package, or a picture file.
      strength: how much the style counts against the content.
      style_size: first resize the style to this shorter side: smaller makes finer strokes.
      guidance_scale: how much more the words count than no words at all, for models that read text;
        not at all if left out.
      model: photo64, or a model folder.
    """

    image: Annotated[Path, tyro.conf.Positional, named("CONTENT")]
    style: Annotated[str, named("swirls|mosaic|woodcut|FILE")]
    strength: Annotated[float, named("S")] = 1.0
    style_size: Annotated[int | None, optional("PX")] = None
    guidance_scale: Annotated[float | None, optional("G")] = None
    model: Annotated[str, named("photo64|DIR")] = "photo64"
    out: Annotated[Path, named("DIR")] = Path("stylized")


def check(options: Any) -> None:
    """Finds what is wrong with the options alone, before anything is loaded."""
    check_run(options, not_negative=("guidance_scale", "reward_weight", "likeness", "strength"))
    if isinstance(options, Edit):
        _check_edit(options)
    guidance_of(options)
    config_of(options)


def _check_edit(options: Edit) -> None:
    wanted = rewards_of(options)
    for flag, text in (("--prompt", options.prompt), ("--negative", options.negative)):
        if text is not None and not text.strip():
            raise ValueError(f"{flag} has no words; leave it out")
    if options.prompt is None and options.negative is None and not wanted:
        raise ValueError("nothing is wished for; give --prompt, --negative or --reward")
    if options.mask is not None and options.likeness is not None:
        raise ValueError("--likeness is for edits without --mask, which keeps what it covers")
    if options.paste_known and options.mask is None:
        raise ValueError("--paste-known needs a --mask, which says what is known")
    if options.reward_weight is not None and not wanted:
        raise ValueError("--reward-weight is that of a --reward, and there is none")


def guidance_of(options: Any) -> float | None:
    """How much the words count more than none; None where there are none, or they do not.

    Raises:
      ValueError: guidance is asked for without words, or words that only guidance reads without it.
    """
    scale = options.guidance_scale
    if options.prompt is None and options.negative is None:
        if scale:
            raise ValueError("--guidance-scale is of words; give --prompt or --negative")
        return None
    if scale is None:
        scale = GUIDANCE if isinstance(options, Edit) else 0.0
    if options.negative is not None and not scale:
        raise ValueError("--negative is read by guidance alone; set --guidance-scale above 0")
    return scale or None


def rewards_of(options: Edit) -> dict[str, float]:
    """Wanted attributes by name; ValueError for a word of another form."""
    wanted: dict[str, float] = {}
    for word in options.reward:
        name, equals, text = word.partition("=")
        if not equals or text not in ("0", "1"):
            raise ValueError(f"--reward {word} must be NAME=1 (there) or NAME=0 (absent)")
        if name in wanted:
            raise ValueError(f"--reward {name} is given twice")
        wanted[name] = float(text)
    return wanted


def sampler_name(options: Any) -> str:
    """The sampler asked for; by default those that keep to the prior inside a mask.

    What is inside is held by nothing but the prior, so gradients of a reward end in patches that
    please the classifier alone; the best of a few of the prior's own draws cannot.
    """
    if options.sampler is not None:
        return options.sampler
    if getattr(options, "mask", None) is None:
        return "aps"
    return "best_of_n" if options.reward else "maskgit"


def config_of(options: Any) -> Any:
    """Options of the sampler; ValueError if one is unknown, not its own or out of range."""
    sampler = sampler_name(options)
    flags = {
        "num_steps": options.num_steps,
        "num_inner_steps": options.num_inner_steps,
        "num_samples": options.num_samples,
        "guidance_scale": guidance_of(options),
    }
    chosen = chosen_options(options, sampler, {name: flag_of(name) for name in flags})
    for name in chosen.keys() & {"sigma", "measurement_term", "perceptual_weight"}:
        raise ValueError(f"--option {name} is of measurements; there is none here, leave it out")
    known = presets.option_types(presets.config_class(sampler))
    is_whole = getattr(options, "mask", None) is None
    ours: dict[str, Any] = _WHOLE if is_whole else _PART
    if isinstance(options, Stylize) and options.preset is None:
        ours = ours | {"num_steps": _STYLE_STEPS}
    if sampler not in VARIANTS:
        shared = {"encoder_start": 0.0, "data_consistency": ours["data_consistency"]}
        ours = shared | _PRIOR_STEPS.get(sampler, {})
    given = {name: value for name, value in (flags | chosen).items() if value is not None}
    given = {name: value for name, value in ours.items() if name in known} | given
    config = presets.make_config(preset=options.preset, sampler=sampler, **given)
    if config.KNOB is None and (is_whole or getattr(options, "reward", ())):
        raise ValueError(
            f"--sampler {sampler} draws from the prior alone and looks at no picture, so no style, "
            "reward or likeness is followed; choose another one"
        )
    if is_whole and config.data_consistency:
        raise ValueError(
            "--option data_consistency is for edits with a --mask, which says what is known; "
            "leave it out"
        )
    return config
