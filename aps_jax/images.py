"""Files to arrays and back: the edge of the library, in NumPy and Pillow.

Inside, an image is float32 [H, W, C] in [-1, 1]. Anything wrong with a file ends here, as an error
of one line that names the file, the cause and the cure.
"""

from __future__ import annotations

import importlib.resources
import io
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from aps_jax.io.arrays import MAX_PIXELS, existing_file, open_array
from aps_jax.io.color import srgb_image
from aps_jax.io.files import PathLike, write_atomically
from aps_jax.io.names import choose
from aps_jax.io.pictures import read_picture

#: Smallest side of a photo to restore.
MIN_SIDE = 8
#: Files of the pictures that ship with the package, by name.
SAMPLES = {
    "photo": "sample_photo.png",
    "face": "sample_face.png",
    "portrait": "sample_portrait.jpg",
}
#: A float array may leave [-1, 1] by this much (rounding); it is clipped back.
_RANGE_TOLERANCE = 1e-3
_SPELLINGS = str.maketrans({"×": "x", "σ": "sigma", "–": "-", "—": "-", "−": "-", "±": "+-"})
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
#: What Pillow draws text with; the plain kind where it was built without FreeType.
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def from_uint8(pixels: Any) -> np.ndarray:
    """Maps integers 0..255 to float32 in [-1, 1]; `to_uint8` inverts it exactly."""
    return np.asarray(pixels, np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(x: Any) -> np.ndarray:
    """Clips `x` to [-1, 1] and rounds to 0..255.

    Raises:
      ValueError: if `x` contains NaN, which has no colour.
    """
    x = np.asarray(x, np.float32)
    if np.isnan(x).any():
        raise ValueError("image contains NaN; the computation that made it diverged")
    return np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def _as_pixels(x: Any) -> np.ndarray:
    """Image [H, W, 1 or 3], with or without a batch axis of 1, as uint8."""
    x = np.asarray(x)
    if x.ndim == 4 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != 3 or x.shape[-1] not in (1, 3) or 0 in x.shape:
        raise ValueError(f"expected one image [H, W, 1 or 3], received shape {x.shape}")
    if x.dtype.kind in "biu" and x.dtype != np.uint8:
        raise ValueError(f"an image must be floats in [-1, 1] or uint8, received {x.dtype}")
    return x if x.dtype == np.uint8 else to_uint8(x)


def load_image(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Loads a photo from any file Pillow reads, or from a .npy array.

    Image files: EXIF rotation is applied, colours become sRGB (by the file's ICC profile or, in a
    PNG, its gAMA chunk, as browsers do; CMYK without a profile as R = (1 - C)(1 - K)), transparency
    is composited on white, grey is repeated to three channels, 16-bit PNG and TIFF files keep their
    depth unless a profile has to be applied, and of an animation the first frame is taken. Numbers
    whose white no standard defines (32-bit integers, signed ones, floats) are refused. Arrays are
    [H, W], [H, W, C] or [1, H, W, C] with C = 1 or 3: uint8, or floats in [-1, 1].

    Args:
      path: file to read.
      max_pixels: refuse larger images before decoding them.

    Returns:
      float32 [H, W, 3] in [-1, 1], both sides at least 8.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a whole image with usable values.
    """
    path = existing_file(path)
    if path.suffix.lower() != ".npy":
        x = srgb_image(path, read_picture(path, max_pixels))
    else:
        x = _read_array(path, max_pixels)
        if x.ndim == 4 and x.shape[0] == 1:
            x = x[0]
        if x.ndim == 2:
            x = x[..., None]
        if x.ndim != 3 or x.shape[-1] not in (1, 3):
            hint = "; channels come last" if x.ndim == 3 and x.shape[0] in (1, 3) else ""
            raise ValueError(
                f"{path} has shape {x.shape}; expected [H, W], [H, W, 1 or 3] or [1, H, W, C]{hint}"
            )
        largest = float(np.abs(x).max(initial=0))
        if largest > 1 + _RANGE_TOLERANCE:
            raise ValueError(
                f"{path} has values up to {largest:g} in size; scale the image to [-1, 1] "
                "(noisy data is a measurement, not an image)"
            )
        x = np.clip(x, -1, 1)
    height, width = x.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"{path} is {width}x{height} pixels; both sides must be at least {MIN_SIDE}"
        )
    return x if x.shape[-1] == 3 else np.repeat(x, 3, axis=-1)


def load_measurement(
    path: PathLike, *, channels: int = 3, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Loads a measurement y; only a .npy file keeps values that noise pushed out of [-1, 1].

    Args:
      path: an image file, read as by `load_image`, or a .npy array of floats of any
        range: [H, W] gets a channel axis, [1, H, W, C] loses its batch axis, and any other shape
        is returned as stored.
      channels: 3, or 1 to get an image file as [H, W, 1]; it must then be grey. Ignored for .npy.
      max_pixels: refuse larger files before decoding them.

    Returns:
      float32 array without a batch axis, all values finite.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a whole image or array of finite numbers.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, received {channels}")
    path = existing_file(path)
    if path.suffix.lower() == ".npy":
        y = _read_floats(path, open_array(path, max_pixels))
        if y.ndim == 4 and y.shape[0] == 1:
            return y[0]
        return y[..., None] if y.ndim == 2 else y
    y = srgb_image(path, read_picture(path, max_pixels))
    if channels == 3:
        return y
    if (y != y[..., :1]).any():
        raise ValueError(f"{path} is in colour; this measurement needs a grey image")
    return y[..., :1]


def _read_array(path: Path, max_pixels: int) -> np.ndarray:
    array = open_array(path, max_pixels)
    if array.dtype == np.uint8:
        return from_uint8(array)
    return _read_floats(path, array)


def _read_floats(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f":
        raise ValueError(
            f"{path} has dtype {array.dtype}; save floats on the scale [-1, 1], x / 127.5 - 1 of "
            "0..255, or a picture file"
        )
    with np.errstate(over="ignore"):
        array = np.array(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{path} contains NaN or infinity; every value must be a finite number")
    return array


def save_image(path: PathLike, x: Any) -> None:
    """Clips, rounds to 8 bits and writes a .png (exact) or .jpg file; makes missing folders.

    PNG files are tagged as sRGB; untagged JPEG files are sRGB by custom.

    Args:
      path: file to write; replaced in one step if it exists.
      x: image [H, W, 1 or 3] or [1, H, W, C], floats in [-1, 1] or uint8.

    Raises:
      ValueError: if `x` is not one image, contains NaN, or the suffix is unknown.
      OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot write {path}: unknown suffix {path.suffix!r}; use .png")
    pixels = _as_pixels(x)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    tags = PngInfo()
    tags.add(b"sRGB", b"\0")  # Rendering intent: perceptual, the usual one of photos.
    image.save(buffer, format=_FORMATS[path.suffix.lower()], quality=95, pnginfo=tags)
    write_atomically(path, buffer.getvalue())


def save_array(path: PathLike, x: Any) -> None:
    """Writes numbers to a .npy file, unclipped and at full precision; makes missing folders.

    Raises:
      ValueError: if the suffix is not .npy or `x` does not hold numbers.
      OSError: if the file cannot be written.
    """
    if Path(path).suffix.lower() != ".npy":
        raise ValueError(f"cannot write {path}: arrays are stored as .npy")
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(x), allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def center_crop(x: Any, size: int) -> np.ndarray:
    """Cuts the central `size` x `size` square out of an image [H, W, C].

    Raises:
      ValueError: if the image is smaller than that.
    """
    x = np.asarray(x)
    height, width = x.shape[:2]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"cannot crop {size}x{size} from an image of {width}x{height} pixels")
    top, left = (height - size) // 2, (width - size) // 2
    return x[top : top + size, left : left + size]


def resize_short_side(x: Any, size: int) -> np.ndarray:
    """Resizes an image [H, W, C] so that its shorter side is `size`, keeping its proportions.

    Pillow's antialiased bicubic filter (a = -0.5) on float32 values, clipped to [-1, 1] again
    because it overshoots at edges.

    Raises:
      ValueError: integers, whose scale is another one, or a size below 1.
    """
    x = np.asarray(x)
    if x.dtype.kind in "biu":
        raise ValueError(f"an image to resize must be floats in [-1, 1], received {x.dtype}")
    x = x.astype(np.float32)
    height, width = x.shape[:2]
    if size < 1:
        raise ValueError(f"size must be at least 1, received {size}")
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    channels = [
        Image.fromarray(np.ascontiguousarray(x[..., c])).resize(target, Image.Resampling.BICUBIC)
        for c in range(x.shape[-1])
    ]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), -1, 1)


def _drawable(text: str) -> str:
    """Spells in ASCII what Pillow's built-in font lacks."""
    text = unicodedata.normalize("NFKD", text.translate(_SPELLINGS))
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    return text.encode("ascii", "replace").decode("ascii")


def _fitted_font(lines: Sequence[str], width: int) -> _Font:
    """Pillow's built-in font, as large as lets every line fit `width`, between 13 and 20."""
    for size in range(20, 13, -1):
        font = ImageFont.load_default(size)
        if all(font.getlength(line) <= width for line in lines):
            return font
    return ImageFont.load_default(13)


def _shortened(line: str, font: _Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def comparison(
    panels: Sequence[tuple[str, Any]],
    *,
    captions: Sequence[str] | None = None,
    min_height: int = 256,
) -> np.ndarray:
    """Sets labelled images side by side on white.

    Small images are enlarged pixel by pixel (nearest neighbour) to at least `min_height`, and all
    to one common height, so a low-resolution measurement shows its true pixels.

    Args:
      panels: (label, image [H, W, 1 or 3]) from left to right; labels go above.
      captions: one line under each panel, for instance "24.1 dB"; "" for none.
      min_height: least height of a panel on the canvas, in pixels.

    Returns:
      uint8 canvas [H', W', 3], which `save_image` takes as it is.

    Raises:
      ValueError: if there are no panels or the captions do not match them.
    """
    if not panels:
        raise ValueError("comparison needs at least one panel")
    captions = [""] * len(panels) if captions is None else list(captions)
    if len(captions) != len(panels):
        raise ValueError(f"{len(captions)} captions for {len(panels)} panels")
    pixels = [_as_pixels(x) for _, x in panels]
    pixels = [np.repeat(p, 3, axis=-1) if p.shape[-1] == 1 else p for p in pixels]
    tallest = max(p.shape[0] for p in pixels)
    height = tallest * math.ceil(min_height / tallest)
    widths = [max(1, round(p.shape[1] * height / p.shape[0])) for p in pixels]
    gap, line = 8, 28
    labels = [_drawable(label) for label, _ in panels]
    captions = [_drawable(caption) for caption in captions]
    font = _fitted_font(labels + captions, min(widths))
    bottom = line if any(captions) else gap
    canvas = Image.new(
        "RGB", (sum(widths) + gap * (len(panels) + 1), line + height + bottom), "white"
    )
    draw = ImageDraw.Draw(canvas)
    left = gap
    for label, caption, panel, width in zip(labels, captions, pixels, widths, strict=True):
        picture = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, line))
        for text, y in ((label, line // 2), (caption, line + height + line // 2)):
            position = (left + width // 2, y)
            draw.text(position, _shortened(text, font, width), "black", font, anchor="mm")
        left += width + gap
    return np.asarray(canvas)


def sample_photo(name: str = "photo") -> np.ndarray:
    """A picture that ships with the package; its origin is in `data/README.md`.

    Args:
      name: "photo", a cat [128, 128, 3]; "face", aligned for `face64` [64, 64, 3]; or "portrait",
        the photo [256, 256, 3] that the face is from, for `aps-jax align`.

    Raises:
      ValueError: for another name.
    """
    resource = importlib.resources.files("aps_jax") / "data" / choose("sample", name, SAMPLES)
    with importlib.resources.as_file(resource) as path:
        return load_image(path)
