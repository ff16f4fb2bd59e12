"""Pictures between files and the page: what is drawn on, what was drawn, what came out."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aps_jax import images
from aps_jax.cli.inputs import sample_for
from aps_jax.cli.wished import square
from aps_jax.io.files import PathLike

#: Least side of a picture on the page; small ones are enlarged pixel by pixel.
SHOWN = 384


def enlarged(x: Any) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a picture [h, w, 1 or 3], floats in [-1, 1] or uint8."""
    x = np.asarray(x)
    pixels = x if x.dtype == np.uint8 else images.to_uint8(x)
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    factor = max(1, round(SHOWN / max(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def read(path: PathLike) -> np.ndarray:
    """Pixels uint8 [H, W, 3], enlarged, of a picture that a run has written."""
    return enlarged(images.load_image(path))


def load(path: PathLike | None, size: int | None, model: str) -> np.ndarray:
    """The picture [H, W, 3] as the command will see it.

    Args:
      path: a picture file; None takes the bundled one that fits the model.
      size: side of the square that is cut out; None leaves it as it is.
      model: name or folder of the model.

    Raises:
      ValueError: it is no picture, or too small.
    """
    photo = sample_for(model) if path is None else images.load_image(path)
    return photo if size is None else square(photo, size)


def drawn(editor: Mapping[str, Any] | None, shape: tuple[int, int]) -> np.ndarray | None:
    """Bool [H, W], True where somebody has drawn over the picture; None if nowhere."""
    if editor is None:
        return None
    covered = np.zeros(shape, bool)
    for layer in editor.get("layers") or ():
        strokes = Image.fromarray(np.asarray(layer)[..., -1])
        resized = strokes.resize((shape[1], shape[0]), Image.Resampling.BOX)
        covered |= np.asarray(resized) > 127
    return covered if covered.any() else None


def save_mask(path: Path, missing: np.ndarray) -> Path:
    """Writes a mask as the commands read it: black where `missing` [H, W]."""
    images.save_image(path, np.where(missing, 0, 255).astype(np.uint8)[..., None])
    return path


def pack(out: Path) -> Path:
    """A .zip file of every result in a folder, beside it."""
    target = out.parent / "result.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in record(out)["files"]:
            archive.write(out / name, name)
    return target


def record(out: Path) -> dict[str, Any]:
    """What result.json says."""
    return json.loads((out / "result.json").read_text())
