"""Files that arrays come from: found, whole and not too large, before a value is read."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np

from aps_jax.io.files import PathLike

#: Default limit on height * width: far above what a sampler can hold, below what can hang a host.
MAX_PIXELS = 50_000_000


def existing_file(path: PathLike) -> Path:
    """Returns `path` as a Path.

    Raises:
      FileNotFoundError: if there is nothing.
      ValueError: if it is a folder or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name one image file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); get the file again")
    return path


def check_size(path: Path, num_pixels: int, max_pixels: int) -> None:
    """Raises ValueError if there are more pixels than allowed."""
    if num_pixels > max_pixels:
        raise ValueError(
            f"{path} has {num_pixels} pixels, more than the limit of {max_pixels}; "
            "make it smaller or raise max_pixels"
        )


def open_array(path: Path, max_pixels: int) -> np.ndarray:
    """Opens a .npy file of real numbers without reading its values.

    Args:
      path: file to open.
      max_pixels: refuse arrays of more than three times as many numbers.

    Returns:
      Array of any shape, mapped from the file: bool, integers or floats of either byte order.

    Raises:
      ValueError: if the file is not one whole array of real numbers, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd letters in a damaged header.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # A wrong magic, header or length, each with its own type.
        # The reason may quote the file, line breaks and all.
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is not a whole .npy array of numbers ({reason})") from None
    if not isinstance(array, np.ndarray) or array.size == 0:
        raise ValueError(f"{path} holds no numbers; save one array with numpy.save")
    check_size(path, math.ceil(array.size / 3), max_pixels)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} has dtype {array.dtype}; save bool, integers or floats")
    return array
