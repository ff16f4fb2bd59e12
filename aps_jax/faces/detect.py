"""Finds faces and their eyes, by the Haar cascades that OpenCV ships (extra `faces`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aps_jax.faces.align import Point, align
from aps_jax.faces.framing import alignment_score

#: Longest side of what is searched: larger photos cost more and show no more faces.
_SEARCHED = 1024
#: Eyes in the box that the detector of faces draws, as shares (x, y), where none are seen.
_USUAL_EYES: tuple[Point, Point] = ((0.315, 0.385), (0.685, 0.385))
_CURE = "run: pip install 'aps_jax[faces]', or give --eyes x,y x,y"


class Face(NamedTuple):
    """A face in a photo.

    Attributes:
      box: left, top, right and bottom in pixels.
      eyes: centres (x, y) in pixels, left of the picture first.
      saw_eyes: False if no eyes were seen, and they were put where they are in most faces.
    """

    box: tuple[float, float, float, float]
    eyes: tuple[Point, Point]
    saw_eyes: bool


def find_faces(photo: np.ndarray) -> list[Face]:
    """Upright frontal faces of a photo, from left to right.

    Args:
      photo: float32 [H, W, 3] in [-1, 1].

    Raises:
      ValueError: if OpenCV is not installed, or has no Haar cascades (version 5).
    """
    cv2 = _opencv()
    height, width = photo.shape[:2]
    scale = min(1.0, _SEARCHED / max(height, width))
    pixels = Image.fromarray(np.rint((photo + 1) * 127.5).astype(np.uint8)).convert("L")
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = np.asarray(pixels.resize(size, Image.Resampling.LANCZOS))
    smallest = max(24, min(size) // 16)
    boxes = _cascade(cv2, "haarcascade_frontalface_alt2").detectMultiScale(
        cv2.equalizeHist(grey), scaleFactor=1.1, minNeighbors=4, minSize=(smallest, smallest)
    )
    found = [_face(cv2, grey, tuple(int(v) for v in box), scale) for box in boxes]
    return sorted((face for face in found if _is_likely(photo, face)), key=lambda face: face.box)


def _is_likely(photo: np.ndarray, face: Face) -> bool:
    """False for folds and patterns, which the detector of faces also finds: nothing else agrees."""
    try:
        return face.saw_eyes or alignment_score(align(photo, face.eyes)) > 0
    except ValueError:  # Eyes too near to each other.
        return False


def _face(cv2: Any, grey: np.ndarray, box: tuple[int, ...], scale: float) -> Face:
    left, top, width, height = box
    seen = _eyes(cv2, grey[top : top + height, left : left + width])
    shares = _USUAL_EYES if seen is None else seen
    first, second = (((left + x * width) / scale, (top + y * height) / scale) for x, y in shares)
    corners = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
    return Face(corners, (first, second), seen is not None)


def _eyes(cv2: Any, face: np.ndarray) -> tuple[Point, Point] | None:
    """Eyes as shares of the face's box; None unless there is one on each side, about level."""
    side = 200
    face = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)
    face = cv2.equalizeHist(face[: int(0.6 * side)])
    for name in ("haarcascade_eye_tree_eyeglasses", "haarcascade_eye"):
        boxes, _, weights = _cascade(cv2, name).detectMultiScale3(
            face, scaleFactor=1.05, minNeighbors=3, minSize=(24, 24), maxSize=(80, 80),
            outputRejectLevels=True,
        )  # fmt: skip
        spots = [
            (float(weight), float(x + w / 2) / side, float(y + h / 2) / side)
            for (x, y, w, h), weight in zip(boxes, np.ravel(weights), strict=True)
        ]
        halves = [[s for s in spots if (s[1] < 0.5) == is_left] for is_left in (True, False)]
        if not all(halves):
            continue
        (_, *left), (_, *right) = (max(half) for half in halves)
        if 0.25 < right[0] - left[0] < 0.55 and abs(right[1] - left[1]) < 0.12:
            return (left[0], left[1]), (right[0], right[1])
    return None


def _opencv() -> Any:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise ValueError(
            f"faces are found by OpenCV, which is not here ({error}); {_CURE}"
        ) from None
    if not hasattr(cv2, "CascadeClassifier"):
        raise ValueError(f"OpenCV {cv2.__version__} has no Haar cascades, 4 has them; {_CURE}")
    return cv2


def _cascade(cv2: Any, name: str) -> Any:
    return cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / f"{name}.xml"))
