"""How often `aps-jax align` finds the one face of a photo, and puts it where it belongs.

    python -m experiments.train.detection --portraits PORTRAITS --others PHOTOS --out FILE

The photos show one face each, more or less from the front, the others none that matters. Whether a
face was put right is asked of the alignment score, whose own errors are in its card.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import tyro

from aps_jax.cli.errors import guarded
from aps_jax.faces.align import align
from aps_jax.faces.detect import find_faces
from aps_jax.faces.framing import alignment_score
from aps_jax.images import load_image
from aps_jax.io.files import write_json
from experiments import photos


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Command line.

    Attributes:
      portraits: folder of photos of one face.
      others: folder of photos in general.
      out: JSON file of the counts.
      count: photos of each, evenly spread.
      description: what they are.
    """

    portraits: Path
    others: Path
    out: Path
    count: int = 200
    description: str = ""


def run(config: Config) -> None:
    """Counts and writes."""
    found: dict[str, object] = {"photos": config.description}
    for name, folder in (("portraits", config.portraits), ("others", config.others)):
        numbers: Counter[str] = Counter()
        right = seen = 0
        for path in photos.spread(photos.list_images([folder]), config.count):
            photo = load_image(path)
            faces = find_faces(photo)
            numbers[str(len(faces))] += 1
            if len(faces) == 1:
                seen += faces[0].saw_eyes
                right += alignment_score(align(photo, faces[0].eyes)) > 0
        found[name] = {
            "photos_by_number_of_faces": dict(sorted(numbers.items())),
            "one_face_with_eyes_seen": seen,
            "one_face_that_looks_aligned": right,
        }
    write_json(config.out, found)
    print(found)


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(tyro.cli(Config)), "detection"))
