"""The timesteps of a run as an animation: what a trace keeps, drawn for people.

`trajectory` makes frames of the result of a run whose options say `trace=True`, and
`save_animation` writes them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aps_jax.images import to_uint8
from aps_jax.io.files import PathLike, write_atomically
from aps_jax.sampling.run import SampleResult

#: Formats by suffix, with what Pillow is told.
_FORMATS: dict[str, dict[str, Any]] = {
    ".webp": {"format": "WEBP", "quality": 90, "method": 4},
    ".gif": {"format": "GIF", "optimize": True},
}
_LINE = 26
#: Veil over tokens that are still masked, and the outline of those that were just revealed.
_VEIL, _NEW = (24, 26, 34, 165), (255, 150, 0, 255)


class Frame(NamedTuple):
    """One picture of an animation: pixels uint8 [H, W, 3] and the words below it."""

    pixels: np.ndarray
    caption: str


def trajectory(
    result: SampleResult,
    *,
    measurement: np.ndarray | None = None,
    tokens_in: tuple[int, int] | None = None,
    mask: int = 0,
    stride: float = 1,
    min_height: int = 256,
) -> list[Frame]:
    """The first sample of the first image, one frame per timestep.

    Args:
      result: of a run with `trace=True`.
      measurement: picture [h, w, 1 or 3] in [-1, 1] to begin with.
      tokens_in: (rows, columns) of the token grid, to draw which tokens have been revealed.
      mask: the mask token, with `tokens_in`.
      stride: pixels of the image per token, with `tokens_in`.
      min_height: least height of a frame in pixels; pixels are enlarged as they are.

    Raises:
      ValueError: the run kept no trace, or of something that is no picture.
    """
    trace = result.info.trace
    if trace is None:
        raise ValueError("the run kept no timesteps; sample with trace=True")
    pictures = np.asarray(trace.images)[:, 0, 0]
    if pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
        raise ValueError(f"timesteps have shape {pictures.shape[1:]}; only pictures can be drawn")
    if trace.tokens is None and tokens_in is not None:
        raise ValueError("samplers on pixels have no tokens to show; leave out tokens_in")
    shape = pictures.shape[1:3]
    frames = []
    if measurement is not None:
        frames.append(Frame(_enlarged(measurement, shape, min_height), "measurement"))
    masked = None if tokens_in is None else np.asarray(trace.tokens)[:, 0, 0] == mask
    for index, picture in enumerate(pictures):
        pixels = _enlarged(picture, shape, min_height)
        left = ""
        if masked is not None and tokens_in is not None:
            is_new = ~masked[index] & (masked[index - 1] if index else True)
            side = stride * len(pixels) / shape[0]
            pixels = draw_tokens(pixels, masked[index], is_new, tokens_in, side)
            left = f", {masked[index].sum()} of {masked[index].size} tokens masked"
        frames.append(Frame(pixels, f"timestep {index + 1} of {len(pictures)}{left}"))
    last = np.asarray(result.images)[0]
    return [*frames, Frame(_enlarged(last, shape, min_height), "restored")]


def draw_tokens(
    pixels: np.ndarray,
    is_masked: np.ndarray,
    is_new: np.ndarray,
    grid: tuple[int, int],
    side: float,
) -> np.ndarray:
    """A picture with masked tokens veiled and those that were just revealed outlined.

    Args:
      pixels: uint8 [H, W, 3].
      is_masked: bool [L], row-major over the grid; several tokens per place count by their share.
      is_new: bool [L].
      grid: (rows, columns).
      side: pixels of the picture per token.
    """
    veil = Image.new("RGBA", (pixels.shape[1], pixels.shape[0]), (0, 0, 0, 0))
    draw = ImageDraw.Draw(veil)
    masked, new = (flags.reshape(*grid, -1) for flags in (is_masked, is_new))
    for row, column in np.ndindex(*grid):
        box = [round(at * side) for at in (column, row)]
        box += [round((at + 1) * side) - 1 for at in (column, row)]
        share = float(masked[row, column].mean())
        if share:
            draw.rectangle(box, fill=(*_VEIL[:3], round(_VEIL[3] * share)))
        if new[row, column].any():
            draw.rectangle(box, outline=_NEW)
    return np.asarray(Image.alpha_composite(Image.fromarray(pixels).convert("RGBA"), veil))[..., :3]


def save_animation(path: PathLike, frames: Sequence[Frame], *, milliseconds: int = 450) -> None:
    """Writes frames of one size, with their captions, to an endless .webp or .gif file.

    Args:
      path: file to write; replaced in one step if it exists.
      frames: at least one; the last stays four times as long.
      milliseconds: per frame.

    Raises:
      ValueError: no frames, or another suffix.
      OSError: the file cannot be written.
    """
    path = Path(path)
    options = _FORMATS.get(path.suffix.lower())
    if options is None:
        raise ValueError(f"cannot write {path}: an animation is a .webp or a .gif file")
    if not frames:
        raise ValueError("an animation needs at least one frame")
    pages = [_page(frame) for frame in frames]
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(pages) - 1) + [4 * milliseconds]
    pages[0].save(
        buffer, save_all=True, append_images=pages[1:], duration=durations, loop=0, **options
    )
    write_atomically(path, buffer.getvalue())


def _page(frame: Frame) -> Image.Image:
    height, width = frame.pixels.shape[:2]
    page = Image.new("RGB", (width, height + _LINE), "white")
    page.paste(Image.fromarray(frame.pixels), (0, 0))
    font = ImageFont.load_default(13)
    place = (width // 2, height + _LINE // 2)
    ImageDraw.Draw(page).text(place, frame.caption, "black", font, anchor="mm")
    return page


def _enlarged(x: np.ndarray, shape: tuple[int, int], min_height: int) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a picture, `shape` times the least whole number that is enough."""
    pixels = to_uint8(x)
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    factor = math.ceil(min_height / shape[0])
    size = (shape[1] * factor, shape[0] * factor)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))
