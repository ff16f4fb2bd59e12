"""What the judge of edits says of pictures, and grids of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aps_jax.images import load_image
from aps_jax.io import checkpoint, rows
from aps_jax.io.files import write_json
from experiments import judge
from experiments.figures import save_grid
from experiments.studies.edit_methods import CASES, METHODS, UNTOUCHED, Case
from experiments.studies.edit_table import key_of

#: Faces in a grid.
_SHOWN = 4


def needing(case: Case, faces: np.ndarray, scores: np.ndarray) -> list[int]:
    """Places of the faces that do not fulfil a wish, by the judge and by other scores alike.

    Args:
      case: the wish.
      faces: [B, 64, 64, 3] in [-1, 1].
      scores: logits [B] of the attribute by the network that is the reward.

    Raises:
      ValueError: there is no such face.
    """
    asked = judge.load_judge()
    verdicts = asked(faces)[:, asked.index(case.attribute)]
    found = np.flatnonzero(~case.is_fulfilled(verdicts) & ~case.is_fulfilled(scores)).tolist()
    if not found:
        raise ValueError(f"no face of --data needs the edit: all are {case.prompt} already")
    return found


def picture_path(out: Path, row: rows.Row) -> Path:
    """Where the picture of a row is, for judges and for people."""
    name = f"{row['case']}-{row['method']}".replace(" ", "_").replace(",", "")
    return out / "pictures" / name / f"{Path(row['image']).stem}.png"


def ask_judge(out: Path, found: Sequence[rows.Row]) -> dict[str, float]:
    """The judge's scores by row, of all pictures that are here and were not judged yet.

    They are kept in `judged.json`, apart from the rows, so that another judge can be asked.
    """
    path = out / "judged.json"
    folder = judge.FOLDER
    weights = checkpoint.fingerprint(folder / judge.WEIGHTS)
    kept_before = json.loads(path.read_text()) if path.exists() else {}
    logits = kept_before.get("logits", {}) if kept_before.get("judge") == weights else {}
    waiting = [
        row for row in found if key_of(row) not in logits and picture_path(out, row).exists()
    ]
    if waiting:
        asked = judge.load_judge(folder)
        said = asked(np.stack([load_image(picture_path(out, row)) for row in waiting]))
        for row, scores in zip(waiting, said, strict=True):
            place = asked.index(CASES[row["case"]].attribute)
            logits[key_of(row)] = round(float(scores[place]), 5)
        write_json(path, {"judge": weights, "logits": logits})
    return logits


def draw_grids(out: Path, found: Sequence[rows.Row]) -> None:
    """A picture per case: the first faces from top to bottom, the methods in their order."""
    for case in CASES:
        mine = [row for row in found if row["case"] == case and picture_path(out, row).exists()]
        names = sorted({row["image"] for row in mine})[:_SHOWN]
        columns = [
            [row for name in names for row in mine if (row["method"], row["image"]) == (m, name)]
            for m in (*UNTOUCHED, *METHODS)
        ]
        columns = [column for column in columns if column and len(column) == len(names)]
        if columns:
            pictures = [[load_image(picture_path(out, row)) for row in col] for col in columns]
            grid = [np.stack(line) for line in zip(*pictures, strict=True)]
            save_grid(grid, out / f"{case.replace(' ', '_')}.png", zoom=2)
