"""The pictures of the README, made by the command line alone from pictures inside the package.

python -m experiments.gallery

Of the six draws of an edit, the one that was chosen by eye is shown. Each run keeps its folder in
`--work`; a run that is there already is not repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aps_jax import cli, images
from aps_jax.cli.stylize import style_path
from experiments.command import command

#: Options of `restore` that all restorations share.
_FACE = ("restore", "--model", "face64")
_PHOTO = ("restore", "--model", "photo64")
_EDIT = ("edit", "face.png", "--num-samples", "6")
#: Rectangles of the aligned face: rows and columns.
_EYES = (slice(24, 36), slice(12, 52))
_MOUTH = (slice(40, 56), slice(16, 48))
#: Runs by name: words of the command line, with the file names that `_inputs` writes.
RUNS: dict[str, tuple[str, ...]] = {
    "box": (
        *_FACE, "--task", "inpainting_box", "--box-size", "32", "--margin", "16",
        "--num-samples", "4",
    ),
    "from 8x8": (*_FACE, "--task", "super_resolution", "--scale", "8", "--num-samples", "4"),
    "from 16x16": (*_FACE, "--task", "super_resolution", "--scale", "4", "--num-samples", "4"),
    "eyeglasses": (
        *_EDIT, "--mask", "eyes.png", "--prompt", "eyeglasses", "--guidance-scale", "1",
    ),
    "unsmiling": (*_EDIT, "--mask", "mouth.png", "--prompt", "unsmiling, closed mouth"),
    "x4": (*_PHOTO, "--task", "super_resolution"),
    "blur": (*_PHOTO, "--task", "gaussian_blur"),
    "mosaic": ("stylize", "photo.png", "--style", "mosaic"),
    "swirls": ("stylize", "photo.png", "--style", "swirls"),
}  # fmt: skip
#: Rows of panels: label and file, in the folder of inputs or of a run.
ROWS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("face", "face.png"),
        ("its middle is missing", "box/measurement.png"),
        ("one sample", "box/samples/sample_01.png"),
        ("another", "box/samples/sample_02.png"),
        ("mean of four", "box/mean.png"),
    ),
    (
        ("face", "face.png"),
        ("8x8 pixels", "from 8x8/measurement.png"),
        ("mean of four", "from 8x8/mean.png"),
        ("16x16 pixels", "from 16x16/measurement.png"),
        ("mean of four", "from 16x16/mean.png"),
    ),
    (
        ("face", "face.png"),
        ("eyes drawn again", "eyes_view.png"),
        ('"eyeglasses"', "eyeglasses/samples/sample_05.png"),
        ("mouth drawn again", "mouth_view.png"),
        ('"unsmiling"', "unsmiling/samples/sample_06.png"),
    ),
    (
        ("photo", "photo.png"),
        ("x4 smaller", "x4/measurement.png"),
        ("restored", "x4/restored.png"),
        ("blurred", "blur/measurement.png"),
        ("restored", "blur/restored.png"),
    ),
    (
        ("photo", "photo.png"),
        ("a style", "mosaic_style.png"),
        ("stylized", "mosaic/stylized.png"),
        ("another", "swirls_style.png"),
        ("stylized", "swirls/stylized.png"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: PNG file to write.
      work: folder of the runs.
      seed: seed of the noise, the masks and the samplers.
    """

    out: Path = Path("experiments/results/gallery.png")
    work: Path = Path("runs/gallery")
    seed: int = 0


@command("gallery", memory_cure="close other programs and try again")
def main(arguments: Arguments) -> None:
    """Runs what is missing and writes one picture."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    _inputs(arguments.work)
    for name, words in RUNS.items():
        _run(arguments.work, name, words, arguments.seed)
    rows = [
        images.comparison(
            [(label, images.load_image(arguments.work / file)) for label, file in row]
        )
        for row in ROWS
    ]
    width = max(row.shape[1] for row in rows)
    rows = [
        np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    images.save_image(arguments.out, np.concatenate(rows, axis=0))


def _inputs(work: Path) -> None:
    face = images.sample_photo("face")
    images.save_image(work / "face.png", face)
    images.save_image(work / "photo.png", images.sample_photo())
    for name, place in (("eyes", _EYES), ("mouth", _MOUTH)):
        mask = np.ones((*face.shape[:2], 1), np.float32)
        mask[place] = -1
        images.save_image(work / f"{name}.png", mask)
        images.save_image(work / f"{name}_view.png", np.where(mask > 0, face, 0))
    side = images.sample_photo().shape[0]
    for style in ("mosaic", "swirls"):
        reference = images.load_image(style_path(style))
        images.save_image(work / f"{style}_style.png", images.center_crop(reference, side))


def _run(work: Path, name: str, words: Sequence[str], seed: int) -> None:
    folder = work / name
    if (folder / "result.json").exists():
        return
    words = [str(work / word) if (work / word).suffix == ".png" else word for word in words]
    going_on = ["--resume"] if folder.is_dir() else []
    if cli.main([*words, "--seed", str(seed), "--out", str(folder), *going_on]):
        raise ValueError(f"the run {name!r} failed; what it said is above")
