"""Writes captions of plain words from the 0/1 attributes of CelebA, for `train_prior --captions`.

    python -m experiments.celeba_captions celeba_attributes.csv captions.csv

Only attributes that a picture shows plainly; subjective and unkind ones are left out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import tyro

from experiments.command import command

#: Phrases of an attribute that is there, and of one that is not.
PHRASES = {
    "Male": ("man", "woman"),
    "Young": ("young", "old"),
    "Smiling": ("smiling", "unsmiling"),
    "Mouth_Slightly_Open": ("open mouth", "closed mouth"),
    "Eyeglasses": ("eyeglasses", None),
    "Wearing_Hat": ("hat", None),
    "Bangs": ("bangs", None),
    "No_Beard": (None, "beard"),
    "Mustache": ("mustache", None),
    "Bald": ("bald", None),
    "Black_Hair": ("black hair", None),
    "Blond_Hair": ("blond hair", None),
    "Brown_Hair": ("brown hair", None),
    "Gray_Hair": ("gray hair", None),
    "Wearing_Lipstick": ("lipstick", None),
    "Wearing_Necktie": ("necktie", None),
    "Wearing_Earrings": ("earrings", None),
}


def caption(attributes: dict[str, str]) -> str:
    """Caption of one row of the attribute file, whose values are 1 and 0 (or -1)."""
    phrases = (PHRASES[name][int(attributes[name]) != 1] for name in PHRASES)
    return ", ".join(phrase for phrase in phrases if phrase)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      attributes: CSV file with a column `file` and one per attribute.
      out: CSV file to write, with the columns `file` and `caption`.
    """

    attributes: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]


@command("celeba_captions")
def main(arguments: Arguments) -> None:
    """Writes the captions."""
    found = pd.read_csv(arguments.attributes, dtype=str)
    texts = [caption(attributes) for attributes in found.to_dict("records")]
    pd.DataFrame({"file": found["file"], "caption": texts}).to_csv(arguments.out, index=False)
