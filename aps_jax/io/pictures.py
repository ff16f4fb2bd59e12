"""Picture files to the numbers that they store, without a colour changed.

Pillow decodes. What it leaves to its callers, or reads as something else, is settled here: 16-bit
colours at full depth, transparent colours at every depth, negatives, numbers without a white. What
cannot be read as its file says is refused.
"""

from __future__ import annotations

import struct
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from aps_jax.io.arrays import check_size

#: Formats that change values a little, so that a mask's two come back as two groups.
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
#: Formats in which Pillow's 16-bit integers are known to end at 65535.
_DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000")
#: Names of the bytes of 16-bit colours in Pillow: the high one of each number is kept.
_DEEP_COLOURS = ("RGB", "RGBX", "RGBA", "RGBa", "CMYK")
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
#: Negatives that Pillow turns around, and those that it leaves as they are.
_NEGATIVES = ("1;I", "L;I", "L;2I", "L;4I")
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16N")
#: SampleFormat of unsigned integers and of floats in TIFF files.
_UNSIGNED, _FLOAT = 1, 3


class Picture(NamedTuple):
    """What a picture file stores.

    Attributes:
      stored: [H, W, C] numbers, larger is brighter except in CMYK; C = 1 for grey, 3 for RGB
        (palettes looked up), 4 for CMYK.
      white: number that means white, or full ink in CMYK; None if the file does not define it.
      alpha: [H, W] opacity in [0, 1], float32; None if all is opaque.
      indices: [H, W] numbers of palette entries, or None.
      format: Pillow's name of the file format.
      profile: embedded ICC profile, or None.
      info: what else Pillow found in the header.
    """

    stored: np.ndarray
    white: int | None
    alpha: np.ndarray | None
    indices: np.ndarray | None
    format: str
    profile: bytes | None
    info: dict[str, Any]


def read_picture(path: Path, max_pixels: int) -> Picture:
    """Decodes the first frame of a picture file; a rotation in its EXIF data is applied.

    Args:
      path: an existing file.
      max_pixels: refuse larger pictures before decoding them.

    Raises:
      ValueError: if it is not a whole picture, or not one that Pillow reads as the file says.
    """
    with _opened(path, max_pixels) as image:
        info = {key: value for key, value in image.info.items() if isinstance(key, str)}
        name, raw = image.format or "", _raw_mode(image)
        if isinstance(image, TiffImageFile):
            _check_tiff(path, image, raw)
        elif name == "AVIF":
            _check_avif(path, image)
        base, _, order = raw.partition(";16")
        indices = None
        if name in ("PNG", "TIFF") and base in _DEEP_COLOURS and order in _SWAPPED:
            stored, alpha = _deep_colours(path, image, base, order, max_pixels)
            white = 65535
        elif raw == "LA;16B":  # Pillow would keep the high bytes; as RGBA it hands out all four.
            parts = np.asarray(_decoded(path, image, "RGBA"), np.uint16)
            stored, alpha = _split_alpha(256 * parts[..., ::2] + parts[..., 1::2], 65535)
            white = 65535
        else:
            white = _white(name, image.mode, raw)
            is_tiff = isinstance(image, TiffImageFile)
            is_negative = is_tiff and image.tag_v2.get(262, 0) == 0 and raw in _SIXTEEN_BIT
            stored, alpha, indices = _numbers(path, name, _decoded(path, image), white)
            if is_negative:  # Pillow turns those of 1 to 8 bits around itself.
                stored = white - stored
    transparent = info.get("transparency")
    if name == "PNG" and transparent is not None and indices is None and white is not None:
        alpha = _all_but(stored, transparent, white)
    return Picture(stored, white, alpha, indices, name, _profile(path, info), info)


def _opened(path: Path, max_pixels: int) -> ImageFile:
    try:
        with warnings.catch_warnings():
            # Pillow warns about large files, which `check_size` refuses, and about odd metadata.
            warnings.simplefilter("ignore")
            image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image Pillow can read; convert it to PNG") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has too many pixels; make it smaller") from None
    except PermissionError:
        raise ValueError(f"{path} cannot be read: permission denied") from None
    except Exception as error:  # Damaged headers make decoders raise almost anything.
        raise ValueError(f"{path} is damaged ({_line(error)}); get the file again") from error
    try:
        check_size(path, image.width * image.height, max_pixels)
    except ValueError:
        image.close()
        raise
    return image


def _decoded(path: Path, image: ImageFile, raw: str | None = None) -> Image.Image:
    """The pixels, their bytes read as Pillow's raw mode `raw` instead of the file's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if raw is not None:
                # Pillow's own tuples, which older versions have no class for.
                tiles: Any = [_retagged(tile, raw) for tile in image.tile]
                image.tile = tiles
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # As above: which one depends on the format and the damage.
        raise ValueError(
            f"{path} is damaged or cut short ({_line(error)}); get the file again"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _raw_mode(image: ImageFile) -> str:
    """Pillow's name of how the file's bytes become numbers; "" if it says nothing."""
    if not getattr(image, "tile", None):
        return ""
    arguments = image.tile[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _retagged(tile: tuple, raw: str) -> tuple:
    arguments = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
    return getattr(type(tile), "_make", tuple)((*tile[:3], arguments))


def _check_tiff(path: Path, image: TiffImageFile, raw: str) -> None:
    """Refuses what Pillow decodes into other numbers than the file holds."""
    tags = image.tag_v2
    formats, bits = set(tags.get(339, (_UNSIGNED,))), set(tags.get(258, (1,)))
    photometric, channels = tags.get(262, 0), tags.get(277, 1)
    problem = None
    if tags.get(284, 1) == 2 and (
        bits != {8} or tags.get(266, 1) == 2 or (channels > 1 and photometric in (0, 1, 3))
    ):
        problem = f"holds separate planes of {max(bits)} bits, which Pillow does not read right"
    elif formats - {_UNSIGNED, _FLOAT} and bits <= {8}:
        problem = "holds signed 8-bit numbers, which Pillow reads as unsigned"
    elif photometric == 0 and not (raw.startswith(_NEGATIVES) or raw in _SIXTEEN_BIT):
        problem = f"holds a negative (WhiteIsZero) of {max(bits)} bits, whose black is not defined"
    elif photometric == 6 and image.tile and image.tile[0][0] == "raw":
        problem = "holds uncompressed YCbCr, which Pillow does not read right"
    if problem:
        raise ValueError(f"{path} {problem}; save it as 8- or 16-bit PNG, or as .npy in [-1, 1]")


def _check_avif(path: Path, image: Image.Image) -> None:
    """Refuses colours that are neither sRGB nor described by a profile (HDR, for instance)."""
    with open(path, "rb") as file:
        head = file.read(2**16)
    start = head.find(b"colrnclx")
    if image.info.get("icc_profile") or not 0 <= start <= len(head) - 12:
        return
    primaries, transfer = struct.unpack_from(">HH", head, start + 8)
    # 1 is BT.709, 2 unspecified, 13 sRGB; 6, 14 and 15 are the curve of BT.709 under other names.
    if primaries not in (1, 2) or transfer not in (1, 2, 6, 13, 14, 15):
        raise ValueError(
            f"{path} has colours of primaries {primaries} and transfer curve {transfer}, which "
            "Pillow does not convert; save it as sRGB"
        )


def _deep_colours(
    path: Path, image: ImageFile, base: str, order: str, max_pixels: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours of 16 bits, of which Pillow decodes the high bytes: the low ones in a second pass."""
    straight = "RGBA" if base == "RGBa" else base  # Colours times alpha are divided in full depth.
    high = _decoded(path, image, f"{straight};16{order}")
    with _opened(path, max_pixels) as again:
        low = _decoded(path, again, f"{straight};16{_SWAPPED[order]}")
    values = 256 * np.asarray(high, np.uint16) + np.asarray(low, np.uint16)
    stored, alpha = _split_alpha(values, 65535) if "A" in straight else (values, None)
    if base == "RGBa" and alpha is not None:
        whole = np.maximum(alpha, 1 / 65535)[..., None]
        stored = np.minimum(np.rint(stored / whole), 65535).astype(np.uint16)
    return stored, alpha


def _white(name: str, mode: str, raw: str) -> int | None:
    """Number that means white, or None where the file does not say."""
    if mode == "1":
        return 1
    if raw.startswith(("L;2", "L;4")):
        return 2 ** int(raw[2]) - 1
    if raw.startswith("I;12"):
        return 4095
    if mode.startswith("I;16") or (mode == "I" and name != "TIFF"):
        return 65535 if name in _DEEP_FORMATS else None
    return None if mode in ("I", "F") else 255


def _numbers(
    path: Path, name: str, image: Image.Image, white: int | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Stored numbers, opacity and palette indices of what Pillow decodes as a whole."""
    if image.mode in ("P", "PA"):
        indices = np.asarray(image if image.mode == "P" else image.getchannel(0))
        return *_split_alpha(np.asarray(image.convert("RGBA")), 255), indices
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    elif "transparency" in image.info and name != "PNG":
        image = image.convert("RGBA")
    elif image.mode in ("YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    if image.mode in ("LA", "RGBA"):
        return *_split_alpha(np.asarray(image), 255), None
    if image.mode == "LAB":
        raise ValueError(f"{path} holds {image.mode} pixels; save it as sRGB")
    values = np.asarray(image)
    values = values.astype(values.dtype.newbyteorder("=") if values.dtype != bool else np.uint8)
    if white is not None and white < 255 and image.mode == "L":
        values = values // (255 // white)  # Pillow spreads 2 and 4 bits over 0..255.
    return values[..., None] if values.ndim == 2 else values, None, None


def _split_alpha(values: np.ndarray, white: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The last channel as opacity in [0, 1], None if all is opaque."""
    if (values[..., -1] == white).all():
        return values[..., :-1], None
    return values[..., :-1], values[..., -1].astype(np.float32) / np.float32(white)


def _all_but(stored: np.ndarray, transparent: Any, white: int) -> np.ndarray | None:
    """Opacity of a PNG file with one transparent colour, of whose numbers only low bits count."""
    colour = np.atleast_1d(np.asarray(transparent)) & white
    hidden = (stored == colour).all(axis=-1)
    return np.where(hidden, np.float32(0), np.float32(1)) if hidden.any() else None


def _profile(path: Path, info: dict[str, Any]) -> bytes | None:
    if "icc_profile" in info and not info["icc_profile"]:
        raise ValueError(f"{path} has a damaged colour profile; save it as sRGB without one")
    return info.get("icc_profile")
