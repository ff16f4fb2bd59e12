"""Masks and blur kernels from files: numbers with a meaning, never colours of a photo.

They are read as stored: no colour profile, no gamma, no white behind what is transparent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aps_jax.io.arrays import MAX_PIXELS, existing_file, open_array
from aps_jax.io.files import PathLike
from aps_jax.io.pictures import LOSSY_FORMATS, Picture, read_picture

#: What the two sides of a mask mean, for messages.
SIDES = "white, 1 or opaque means known; black, 0 or transparent means missing"
#: Lossy formats move a value by this much where nothing is near; more is no longer one of two.
_LOSSY_LEVELS = 8
#: A kernel's sum may leave 1 by this much: 0.11 in each of nine places, a cut Gaussian.
_SUM_TOLERANCE = 0.02


def load_mask(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Loads a mask of known pixels from a picture or a .npy array.

    A mask has two values. Pictures: black and white at any bit depth, 0 and 1, 0 and 255, a palette
    of black and white or one whose entries are numbered 0 (which is black) and 1, or transparent
    and opaque pixels, whatever their colours. JPEG and other lossy files may leave black and white
    by up to 8 of 255 levels. Arrays are [H, W], [H, W, 1] or [1, H, W, 1] of bool, integers or
    floats, with 0 and 1, 0 and 255, or (16-bit integers) 0 and 65535.

    Args:
      path: file to read.
      max_pixels: refuse larger files before decoding them.

    Returns:
      float32 [H, W], 1 where a pixel is known and 0 where it is missing; both occur.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it has other values, or misses no pixel or every pixel.
    """
    path = existing_file(path)
    if path.suffix.lower() == ".npy":
        mask = _matrix(path, max_pixels)
        whites = (
            (1, 255, 65535) if mask.dtype.kind in "iu" and mask.dtype.itemsize > 1 else (1, 255)
        )
        known = _two_values(path, mask, whites)
    else:
        picture = read_picture(path, max_pixels)
        known = _opaque(path, picture)
        if known is not None:
            _require_no_black(path, picture, known)
        else:
            known = _known_colours(path, picture)
    return _both_sides(path, known)


def opaque_pixels(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """Finds the pixels of a picture that are not transparent.

    Returns:
      float32 [H, W], 1 where a pixel is opaque and 0 where it is transparent; None if the file has
      no transparent pixels at all.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a whole picture, all of it is transparent, or pixels are neither.
    """
    path = existing_file(path)
    known = _opaque(path, read_picture(path, max_pixels))
    return None if known is None else _both_sides(path, known)


def _opaque(path: Path, picture: Picture) -> np.ndarray | None:
    if picture.alpha is None:
        return None
    values = np.unique(picture.alpha)
    if not np.isin(values, (0, 1)).all():
        found = ", ".join(f"{value:.3g}" for value in values[:5])
        more = ", ..." if len(values) > 5 else ""
        raise ValueError(
            f"{path} has half-transparent pixels (opacities {found}{more}); a mask has two values: "
            "make each pixel opaque (known) or transparent (missing)"
        )
    return picture.alpha > 0


def _require_no_black(path: Path, picture: Picture, known: np.ndarray) -> None:
    """Refuses a mask with black or 0 in what is opaque: is that known, as it is not transparent?"""
    shown = picture.stored[known]
    if shown.size and (shown == 0).all(axis=-1).any() and len(np.unique(shown)) <= 2:
        raise ValueError(
            f"{path} has black pixels and transparent ones, and both mean missing ({SIDES}); "
            "save it in black and white without transparency"
        )


def _known_colours(path: Path, picture: Picture) -> np.ndarray:
    """Mask [H, W] from the numbers of a picture without transparency."""
    stored, white = picture.stored, picture.white
    if stored.shape[-1] == 4:
        raise ValueError(f"{path} is a CMYK picture; save the mask in black and white as PNG")
    whites = {1, 255, 65535} if white is None else {1, white} | ({255} if white > 255 else set())
    if picture.format in LOSSY_FORMATS and white == 255:
        near_white = stored >= white - _LOSSY_LEVELS
        if not (near_white | (stored <= _LOSSY_LEVELS)).all():
            raise ValueError(
                f"{path} has values between black and white ({_listed(stored)}), as lossy "
                f"{picture.format} files have at borders; save the mask as PNG"
            )
        stored, whites = np.where(near_white, 255, 0), {255}
    grey = stored[..., 0]
    if (stored == stored[..., :1]).all() and (
        picture.indices is None or _is_two_valued(grey, whites)
    ):
        return _two_values(path, grey, whites)
    indices = picture.indices
    # Numbered areas, as in label maps; 0 must look like the background that it is.
    if (
        indices is not None
        and (stored[indices == 0] == 0).all()
        and _is_two_valued(indices, {1, 255})
    ):
        return indices > 0
    count = len(np.unique(stored.reshape(-1, stored.shape[-1]), axis=0))
    raise ValueError(
        f"{path} has {count} colours; a mask has two values, black and white or 0 and 1 ({SIDES})"
    )


def _is_two_valued(values: np.ndarray, whites: set[int]) -> bool:
    found = np.unique(values)
    return len(found) <= 2 and any(np.isin(found, (0, white)).all() for white in whites)


def _two_values(path: Path, values: np.ndarray, whites: set[int] | tuple[int, ...]) -> np.ndarray:
    if not _is_two_valued(values, set(whites)):
        pairs = ", or ".join(f"0 and {white}" for white in sorted(whites))
        raise ValueError(
            f"{path} has the values {_listed(values)}; a mask has two values, only {pairs} "
            f"({SIDES})"
        )
    return values > 0


def _listed(values: np.ndarray) -> str:
    found = np.unique(values)
    if len(found) <= 6:
        return ", ".join(f"{value:g}" for value in found.tolist())
    return f"{found[0]:g}, {found[1]:g}, ... {found[-1]:g}, {len(found)} in all"


def _both_sides(path: Path, known: np.ndarray) -> np.ndarray:
    if known.all() or not known.any():
        misses = "no pixel" if known.all() else "every pixel"
        raise ValueError(f"{path} misses {misses}: {SIDES}; check which side is which")
    return known.astype(np.float32)


def load_kernel(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Loads the weights of a blur from a grey picture or a .npy array.

    A picture's weights are its stored numbers, or its opacity where that alone varies, divided by
    their sum. An array [kh, kw] or [kh, kw, 1] is taken as it is, and must sum to 1.

    Args:
      path: file to read.
      max_pixels: refuse larger files before decoding them.

    Returns:
      float32 [kh, kw] with a sum of 1.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds no such weights.
    """
    path = existing_file(path)
    if path.suffix.lower() != ".npy":
        weights = _picture_weights(path, read_picture(path, max_pixels))
        return (weights / weights.sum()).astype(np.float32)
    weights = np.asarray(_matrix(path, max_pixels), np.float64)
    if not np.isfinite(weights).all():
        raise ValueError(f"{path} contains NaN or infinity; every weight must be a finite number")
    if not weights.any():
        raise ValueError(f"{path} holds only zeros; a kernel needs weights that sum to 1")
    total = weights.sum()
    if abs(total - 1) > _SUM_TOLERANCE:
        cure = "divide it by its sum" if total > 0 else "correct its weights"
        raise ValueError(
            f"{path} has weights that sum to {total:g}, which would change the brightness; {cure}, "
            "so that the sum is 1"
        )
    return weights.astype(np.float32)


def _picture_weights(path: Path, picture: Picture) -> np.ndarray:
    """Weights [H, W], float64, not all zero."""
    stored = picture.stored
    tolerance = _LOSSY_LEVELS if picture.format in LOSSY_FORMATS else 0
    spread = np.ptp(stored.astype(np.float64), axis=-1)
    if stored.shape[-1] == 4 or spread.max() > tolerance:
        raise ValueError(f"{path} is in colour; a kernel is a grey picture, brighter weighs more")
    weights = stored.astype(np.float64).mean(axis=-1)
    if picture.alpha is not None:
        shown = weights[picture.alpha > 0]
        if shown.size and np.ptp(shown) > 0:
            raise ValueError(
                f"{path} has grey levels and transparency, and either could be the weights; "
                "save it on black without transparency"
            )
        weights = picture.alpha.astype(np.float64)
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError(f"{path} has negative or infinite weights; save them as .npy")
    if weights.max() <= 0:
        kind = "transparent" if picture.alpha is not None else "black"
        raise ValueError(f"{path} is {kind}; a kernel needs bright pixels")
    return weights


def _matrix(path: Path, max_pixels: int) -> np.ndarray:
    """Numbers [H, W] of a .npy file; axes of length 1 around them are dropped."""
    array = open_array(path, max_pixels)
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2:
        raise ValueError(f"{path} has shape {shape} of {array.dtype}; need numbers [H, W]")
    return array
