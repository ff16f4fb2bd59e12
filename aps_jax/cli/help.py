"""Help that fits one screen: `--help` shows what most people need, `--help-all` every option."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

#: Options that `--help` shows, of commands with more of them than fit one screen.
COMMON = {
    "restore": (
        "image", "task", "measured", "model", "prompt", "preset", "num_samples", "sigma", "seed",
        "size", "out", "resume", "overwrite", "save_video",
    ),
    "edit": (
        "image", "mask", "prompt", "negative", "reward", "guidance_scale", "likeness",
        "num_samples", "seed", "size", "out", "overwrite",
    ),
    "stylize": (
        "image", "style", "strength", "style_size", "prompt", "preset", "num_samples", "seed",
        "size", "out", "overwrite",
    ),
    "write": (
        "reward", "prompt", "model", "sampler", "num_samples", "weight", "length", "seed", "out",
        "resume", "overwrite",
    ),
    "sweep": (
        "image", "task", "measured", "model", "preset", "sigma", "seed", "size", "out",
        "batch_size", "num_model",
    ),
}  # fmt: skip

#: What `aps-jax` alone says.
WELCOME = """\
aps-jax restores pictures from measurements of them (small, blurred, with holes, too bright ...) by
sampling from a masked discrete diffusion model. Begin with one of these:

    aps-jax restore --out first         degrade a bundled photo, restore it, say how good it is
    aps-jax restore PHOTO.jpg --task inpainting_box --size 128 --out box     your own photo
    aps-jax restore SMALL.png --measured --task super_resolution --out large
                                        a picture that is small already, four times as large
    aps-jax demo                        the same in a browser tab: pip install 'aps_jax[demo]'

    aps-jax tasks                       what can have been done to a picture, and its options
    aps-jax samplers                    this method and others, with their papers
    aps-jax models                      the models in this package
    aps-jax doctor                      is everything installed, how fast is this machine

`aps-jax COMMAND --help` explains a command, `--help-all` all of its options.
Files named here in capitals are yours; a first run compiles for about half a minute."""


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The words with `--help-all` as the `--help` of every option."""
    return ["--help" if word == "--help-all" else word for word in argv]


def wants_brief(argv: Sequence[str]) -> bool:
    """Whether the words ask for the help of one screen."""
    return ("--help" in argv or "-h" in argv) and "--help-all" not in argv


def briefly(kinds: Mapping[str, type[Any]], argv: Sequence[str]) -> dict[str, type[Any]]:
    """The commands' options, those of the one whose short help is asked for cut down to it."""
    if not wants_brief(argv) or argv[0] not in kinds:
        return dict(kinds)
    return {**kinds, argv[0]: brief(kinds[argv[0]], argv[0])}


def brief(kind: type[Any], command: str) -> type[Any]:
    """The options of a command with those that are not `COMMON` left out of its help."""
    if command not in COMMON:
        return kind
    hints = typing.get_type_hints(kind, include_extras=True)
    hidden = [
        (
            field.name,
            tyro.conf.Suppress[hints[field.name]],
            dataclasses.field(default=field.default),
        )
        for field in dataclasses.fields(kind)
        if field.name not in COMMON[command]
    ]
    short = dataclasses.make_dataclass(
        kind.__name__, hidden, bases=(kind,), frozen=True, kw_only=True
    )
    short.__doc__ = kind.__doc__
    return short


def more(command: str) -> str:
    """The line below a short help that says how to see the rest."""
    return f"For the options of the tasks and all others: aps-jax {command} --help-all"
