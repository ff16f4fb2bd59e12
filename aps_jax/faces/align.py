"""Brings a face into the framing of `face64`: eyes at fixed places of a square."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

Point = tuple[float, float]

#: Where the eyes of an aligned face are, as shares (x, y) of its side, as in FFHQ.
EYES: tuple[Point, Point] = ((0.37, 0.45), (0.63, 0.45))
#: Least distance of the eyes in the photo, in pixels: nearer ones say nothing about a face.
MIN_DISTANCE = 4.0


class Framing(NamedTuple):
    """Where an aligned face comes from.

    Attributes:
      origin: its top left corner in the photo, (x, y) in pixels.
      across: pixels of the photo, (x, y), along the top side from left to right.
      down: likewise along the left side from top to bottom.
    """

    origin: np.ndarray
    across: np.ndarray
    down: np.ndarray

    @property
    def side(self) -> float:
        """Length of a side in pixels of the photo."""
        return float(np.hypot(*self.across))

    def share_outside(self, width: int, height: int) -> float:
        """Share of the square that lies outside a photo of this size, in [0, 1]."""
        at = (np.arange(32) + 0.5) / 32
        points = self.origin + at[:, None, None] * self.down + at[None, :, None] * self.across
        inside = ((points >= 0) & (points <= (width, height))).all(axis=-1)
        return float(1 - inside.mean())


def framing_of(eyes: tuple[Point, Point]) -> Framing:
    """The square whose eyes are in place: a similarity, which turns and scales but never shears.

    Args:
      eyes: their centres in the photo, (x, y) in pixels from the top left corner, in any order.

    Raises:
      ValueError: if they are less than `MIN_DISTANCE` pixels apart.
    """
    left, right = (np.array(eye, float) for eye in sorted(eyes))
    distance = float(np.hypot(*(right - left)))
    if not distance >= MIN_DISTANCE:
        raise ValueError(
            f"the eyes are {distance:.1f} pixels apart, less than {MIN_DISTANCE:g}; give the "
            "centres of both, or a larger photo"
        )
    across = (right - left) / (EYES[1][0] - EYES[0][0])
    down = np.array([-across[1], across[0]])
    return Framing(left - EYES[0][0] * across - EYES[0][1] * down, across, down)


def align(photo: np.ndarray, eyes: tuple[Point, Point], size: int = 64) -> np.ndarray:
    """Crops, turns and reduces a photo so that the eyes are at `EYES`.

    Pixels of the photo's edge are repeated where the square leaves it.

    Args:
      photo: float32 [H, W, 3] in [-1, 1].
      eyes: as for `framing_of`.
      size: side of the result in pixels.

    Returns:
      float32 [size, size, 3] in [-1, 1], antialiased.

    Raises:
      ValueError: if an eye is outside the photo, or they are too near to each other.
    """
    height, width = photo.shape[:2]
    for x, y in eyes:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(
                f"the eye at {x:g},{y:g} is outside the photo of {width}x{height} pixels; give "
                "x,y in pixels from the top left corner"
            )
    framing = framing_of(eyes)
    # Means of whole pixels first, so that a large photo costs no more than a small one.
    shrink = max(1, int(framing.side / size / 2))
    # The rest is sampled densely and then reduced by a filter that sees every sample.
    dense = size * max(1, math.ceil(framing.side / shrink / size))
    corner, across, down = (np.asarray(v) / shrink for v in framing)
    corners = np.array([corner, corner + across, corner + down, corner + across + down])
    low = np.floor(corners.min(axis=0)).astype(int) - 3
    high = np.ceil(corners.max(axis=0)).astype(int) + 3
    corner = corner - low
    step_x, step_y = across / dense, down / dense
    matrix = (step_x[0], step_y[0], corner[0], step_x[1], step_y[1], corner[1])
    channels = []
    for channel in np.moveaxis(np.asarray(photo, np.float32), -1, 0):
        small = np.asarray(Image.fromarray(np.ascontiguousarray(channel)).reduce(shrink))
        rows = np.clip(np.arange(low[1], high[1]), 0, small.shape[0] - 1)
        columns = np.clip(np.arange(low[0], high[0]), 0, small.shape[1] - 1)
        part = Image.fromarray(small[rows[:, None], columns])
        turned = part.transform(
            (dense, dense), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        )
        channels.append(np.asarray(turned.resize((size, size), Image.Resampling.LANCZOS)))
    return np.clip(np.stack(channels, axis=-1), -1, 1)
