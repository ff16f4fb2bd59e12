"""Colours of a picture file to sRGB, the space of every image in this library.

What a file says of its colours is followed as browsers do: an ICC profile (converted by LittleCMS,
perceptual intent), else a PNG's sRGB chunk, else its gAMA chunk; without any of them the numbers
are sRGB. A profile that moves no colour by more than one level of 255 is sRGB itself, and so is a
gamma within 5 % of 1/2.2: then the numbers stay exactly as they are.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

from aps_jax.io.pictures import Picture

#: White point and primaries of sRGB as a PNG's cHRM chunk gives them, and what rounding may change.
_SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_PRIMARIES_TOLERANCE = 0.01
#: Gammas that libpng, too, takes for that of sRGB, 1 / 2.2; and those that a file can mean.
_GAMMA_TOLERANCE, _GAMMAS = 0.05, (0.1, 10.0)
#: Colour spaces of profiles by number of channels; grey pictures may have a profile for RGB.
_SPACES = {1: ("GRAY", "RGB"), 3: ("RGB",), 4: ("CMYK",)}
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}


def srgb_image(path: Path, picture: Picture) -> np.ndarray:
    """Converts a picture to sRGB on white.

    Args:
      path: its file, for messages and for what Pillow skips in it.
      picture: as `read_picture` returns it.

    Returns:
      float32 [H, W, 3] in [-1, 1].

    Raises:
      ValueError: if its numbers have no white, or its colours are not known.
    """
    if picture.white is None:
        raise ValueError(
            f"{path} holds {picture.stored.dtype} numbers whose black and white are not defined; "
            "save it as 8- or 16-bit PNG, or as .npy in [-1, 1]"
        )
    if picture.profile is not None:
        x = _through_profile(path, picture, picture.profile, picture.white)
    else:
        x = _without_profile(path, picture, picture.white)
    if picture.alpha is not None:
        alpha = picture.alpha[..., None]
        x = x * alpha + (1 - alpha)
    return x if x.shape[-1] == 3 else np.repeat(x, 3, axis=-1)


def _signed(values: np.ndarray, white: int) -> np.ndarray:
    """Numbers 0..white to float32 in [-1, 1]."""
    return values.astype(np.float32) / np.float32(white / 2) - np.float32(1)


def _through_profile(path: Path, picture: Picture, icc: bytes, white: int) -> np.ndarray:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = cast(Any, profile.profile).xcolor_space.strip()  # A class of Pillow's C module.
        if space not in _SPACES[picture.stored.shape[-1]]:
            raise ValueError(f"it is for {space} and the file is not")
        if space != "CMYK" and _is_srgb(profile, space):
            return _signed(picture.stored, white)
        values = picture.stored
        if white != 255:  # LittleCMS through Pillow knows 8 bits only.
            values = np.rint(values * (255 / white)).astype(np.uint8)
        if space == "RGB" and values.shape[-1] == 1:
            values = np.repeat(values, 3, axis=-1)
        return _signed(_converted(profile, values, space), 255)
    except Exception as error:  # LittleCMS gives each damage another type.
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path} has a colour profile that cannot be used ({reason}); save it as sRGB"
        ) from error


def _converted(profile: ImageCms.ImageCmsProfile, values: np.ndarray, space: str) -> np.ndarray:
    """uint8 [H, W, C] in the colours of a profile to uint8 sRGB [H, W, 3]."""
    values = np.ascontiguousarray(values[..., 0] if space == "GRAY" else values)
    height, width = values.shape[:2]
    image = Image.frombytes(_MODES[space], (width, height), values.tobytes())
    srgb = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB"))


def _is_srgb(profile: ImageCms.ImageCmsProfile, space: str) -> bool:
    if space == "GRAY":
        probe = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    else:
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    moved = np.abs(_converted(profile, probe, space).astype(int) - probe)
    return int(moved.max()) <= 1


def _without_profile(path: Path, picture: Picture, white: int) -> np.ndarray:
    if picture.stored.shape[-1] == 4:
        ink = np.float32(1) - picture.stored.astype(np.float32) / np.float32(white)
        return 2 * ink[..., :3] * ink[..., 3:] - 1
    x = _signed(picture.stored, white)
    if picture.format != "PNG":
        return x
    tag = _cicp(path)
    if tag is not None:
        # Primaries BT.709, curve sRGB, full range: sRGB in the numbers of ITU-T H.273.
        if tag != (1, 13, 0, 1):
            raise ValueError(f"{path} has colours of type {tag} (cICP); save it as sRGB")
        return x
    return x if "srgb" in picture.info else _without_gamma(path, x, picture.info)


def _without_gamma(path: Path, x: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """Undoes the power curve of a PNG's gAMA chunk, and checks the primaries of cHRM."""
    primaries = info.get("chromaticity", _SRGB_PRIMARIES)
    if x.shape[-1] == 3 and not np.allclose(
        primaries, _SRGB_PRIMARIES, rtol=0, atol=_PRIMARIES_TOLERANCE
    ):
        raise ValueError(f"{path} has other primaries than sRGB (cHRM); save it as sRGB")
    gamma = info.get("gamma")
    if gamma is None or abs(2.2 * gamma - 1) <= _GAMMA_TOLERANCE:
        return x
    if not _GAMMAS[0] <= gamma <= _GAMMAS[1]:
        raise ValueError(f"{path} has a gamma of {gamma:g} (gAMA); save it as sRGB")
    linear = ((x + 1) / 2) ** np.float32(1 / gamma)
    # The curve of IEC 61966-2-1.
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (2 * curved - 1).astype(np.float32)


def _cicp(path: Path) -> tuple[int, ...] | None:
    """The four numbers of a PNG's cICP chunk, which Pillow skips; None without one."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"IDAT", b"IEND"):
                break
            if kind == b"cICP":
                return tuple(file.read(4))
            file.seek(length + 4, io.SEEK_CUR)
    return None
