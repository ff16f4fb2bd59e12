"""`aps-jax align`: from a photo to a face that `face64` knows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from aps_jax import images
from aps_jax.cli.options import Align
from aps_jax.faces import align as geometry
from aps_jax.faces.align import Point
from aps_jax.faces.detect import Face, find_faces
from aps_jax.faces.framing import alignment_score

#: Share of the picture that may lie outside the photo before a note says so.
_OUTSIDE = 0.02


def run(options: Align) -> int:
    """Aligns one face as the options say; returns the exit code."""
    eyes = None if options.eyes is None else (point(options.eyes[0]), point(options.eyes[1]))
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"--out {options.out} exists; choose another file or add --overwrite")
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--out {options.out} must be a .png or .jpg file")
    photo = images.load_image(options.image)
    notes = []
    if eyes is None:
        face = chosen(find_faces(photo), options)
        eyes = face.eyes
        if not face.saw_eyes:
            notes.append("no eyes were seen, so they are where most faces have them")
    picture = geometry.align(photo, eyes, options.size)
    notes += remarks(photo, eyes, picture)
    images.save_image(options.out, picture)
    print(f"{options.out}: {options.size}x{options.size} pixels, eyes at {shown(eyes)}")
    for note in notes:
        print(f"note: {note}; give --eyes x,y x,y if it looks wrong")
    return 0


def point(text: str) -> Point:
    """The point (x, y) of a word "x,y"; ValueError if it is of another form."""
    try:
        x, y = (float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--eyes takes two points x,y such as 210,140, got {text!r}") from None
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"--eyes takes two points x,y in pixels, got {text!r}")
    return x, y


def shown(eyes: tuple[Point, Point]) -> str:
    """Two points as `--eyes` takes them."""
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in eyes)


def chosen(faces: Sequence[Face], options: Align) -> Face:
    """The face that is meant; ValueError if there is none, or no saying which."""
    if not faces:
        raise ValueError(
            f"no face was found in {options.image}; give the centres of its eyes, --eyes x,y x,y"
        )
    if options.face is None and len(faces) > 1:
        places = ", ".join(f"{n} at {shown(face.eyes)}" for n, face in enumerate(faces, start=1))
        raise ValueError(
            f"{options.image} shows {len(faces)} faces, their eyes from left to right {places}; "
            "choose one with --face N"
        )
    number = 1 if options.face is None else options.face
    if number > len(faces):
        raise ValueError(
            f"--face {number}: only {len(faces)} found in {options.image}; choose from 1 to "
            f"{len(faces)}, or give --eyes x,y x,y"
        )
    return faces[number - 1]


def remarks(photo: np.ndarray, eyes: tuple[Point, Point], picture: np.ndarray) -> list[str]:
    """What a user should know of an aligned picture before trusting it."""
    height, width = photo.shape[:2]
    framing = geometry.framing_of(eyes)
    notes = []
    outside = framing.share_outside(width, height)
    if outside > _OUTSIDE:
        notes.append(f"{outside:.0%} of the picture lies outside the photo and repeats its edge")
    if framing.side < 0.9 * len(picture):
        notes.append(f"the face was enlarged from {framing.side:.0f} pixels, so it is soft")
    if alignment_score(picture) < 0:
        notes.append("the picture does not look like an upright frontal face")
    return notes
