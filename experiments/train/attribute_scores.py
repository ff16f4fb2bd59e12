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
import tyro

import aps_jax
from aps_jax.cli.errors import guarded
from aps_jax.images import from_uint8, to_uint8
from aps_jax.io.files import write_atomically, write_json
from experiments import judge, photos
from experiments.bench import summary
from experiments.train_attributes import ATTRIBUTES, decoded, read_labels, scores_of


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
    """Markdown: a line per attribute; balanced accuracy and area under the curve in percent."""
    heads = ["attribute", "faces with it, %"]
    heads += [f"{name}: accuracy / balanced / AUC" for name in scores]
    lines = [f"{count} held-out faces, all in %.", "", summary.line(heads)]
    lines.append("|" + "---|" * len(heads))
    columns = ("accuracy", "balanced_accuracy", "auc")

    def cell(values: list[float]) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in values)

    for place, name in enumerate(ATTRIBUTES):
        cells = [name, f"{100 * shares[place]:.1f}"]
        cells += [cell([part[c][place] for c in columns]) for part in scores.values()]
        lines.append(summary.line(cells))
    means = [cell([float(np.nanmean(part[c])) for c in columns]) for part in scores.values()]
    lines.append(summary.line(["mean", "", *means]))
    return "\n".join(lines) + "\n"


def run(config: Config) -> None:
    """Scores both networks and writes what they are worth."""
    names, faces = photos.center_crops(config.eval_data, size=64, shrink=1, count=config.count)
    labels = read_labels(config.attributes, names)
    shown = from_uint8(decoded(to_uint8(faces), seed=0, share=0.0))
    scores, signs = {}, []
    for name, net in (("reward", aps_jax.load_attributes()), ("judge", judge.load_judge())):
        for what, x in (("", faces), (", decoded", shown)):
            logits = np.asarray(_logits(net, x))
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
