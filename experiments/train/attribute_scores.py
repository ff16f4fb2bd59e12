"""How well the reward and the judge tell the attributes of held-out faces, and how far they agree.

    python -m experiments.train.attribute_scores --attributes celeba_attributes.csv \
        --eval-data HELD_OUT --out experiments/results/judges

Also of the faces as the codec of `face64` shows them, which is what an edit is made of.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import tyro

import aps_jax
from aps_jax.cli.errors import guarded
from aps_jax.images import from_uint8, to_uint8
from aps_jax.io.files import write_atomically, write_json
from experiments import judge, photos
from experiments.tables import markdown
from experiments.train.attributes import ATTRIBUTES, decoded, read_labels, scores_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Command line.

    Attributes:
      attributes: CSV file with a column `file` and one per attribute of CelebA.
      eval_data: folder of held-out aligned faces.
      out: folder of the table and the scores.
      count: faces; all if left out.
    """

    attributes: Path
    eval_data: Path
    out: Path
    count: int | None = None


_logits = jax.jit(lambda net, x: net(x))


def table(scores: dict[str, dict[str, list[float]]], shares: list[float], count: int) -> str:
    """Markdown: a line per attribute."""
    columns = ("accuracy", "balanced_accuracy", "auc")
    values = np.array([[part[name] for name in columns] for part in scores.values()])
    values = np.concatenate([values, np.nanmean(values, axis=-1, keepdims=True)], axis=-1)
    frame = pd.DataFrame({"attribute": [*ATTRIBUTES, "mean"]})
    frame["faces with it, %"] = [*(f"{100 * share:.1f}" for share in shares), None]
    for name, part in zip(scores, 100 * values, strict=True):
        cells = [" / ".join(f"{value:.1f}" for value in line) for line in part.T]
        frame[f"{name}: accuracy / balanced / AUC"] = cells
    return f"{count} held-out faces, all in %.\n\n{markdown(frame)}\n"


def run(config: Config) -> None:
    """Scores both networks and writes what they are worth."""
    names, faces = photos.center_crops(config.eval_data, size=64, shrink=1, count=config.count)
    labels = read_labels(config.attributes, names)
    shown = from_uint8(decoded(to_uint8(faces), seed=0, noise=0.0))
    scores, signs = {}, []
    reward = aps_jax.load_attributes()
    askable = {"reward": lambda x: np.asarray(_logits(reward, x)), "judge": judge.load_judge()}
    for name, ask in askable.items():
        for what, x in (("", faces), (", decoded", shown)):
            logits = ask(x)
            signs.append(logits > 0)
            found = scores_of(logits, labels)
            scores[name + what] = {key: value.tolist() for key, value in found.items()}
    agreement = (signs[0] == signs[2]).mean(axis=0)
    agreed = dict(zip(ATTRIBUTES, agreement.round(4).tolist(), strict=True))
    facts = {
        "faces": len(faces),
        "agreement_of_reward_and_judge": agreed,
        "scores": scores,
    }  # fmt: skip
    write_json(config.out / "scores.json", facts)
    text = table(scores, labels.mean(axis=0).tolist(), len(faces))
    write_atomically(config.out / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(tyro.cli(Config)), "attribute_scores"))
