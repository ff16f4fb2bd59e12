"""Lines of text for trainings and studies: reading, disjoint parts, a tokenizer, padded ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aps_jax.io.files import write_atomically

#: Name of the token that ends a line and fills it up, as in LLaDA; id 0.
END = "<|endoftext|>"
#: Stands for characters that the tokenizer was not made of; never written.
UNKNOWN = "<unk>"
#: Consecutive lines, often of one author, that fall into one part together.
BLOCK = 50
#: Shares of the parts, in twentieths of the blocks. What judges a result has seen nothing of what
#: the prior and the reward were trained on.
PARTS = {"prior": 12, "reward": 3, "judge": 4, "held_out": 1}


class Line(NamedTuple):
    """A line and the label that the suffix of its file gives: `.0`, `.1`, or none (-1)."""

    text: str
    label: int


def read_lines(paths: Iterable[Path], part: str | None = None) -> list[Line]:
    """Lines of files, or of all files of folders, in sorted order.

    Args:
      paths: text files, or folders that are searched recursively.
      part: one of `PARTS`; None takes all.

    Raises:
      ValueError: no such file, or no line in it.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"no text at {path}: give files of lines, or folders of such files")
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    lines = []
    for file in files:
        label = {".0": 0, ".1": 1}.get(file.suffix, -1)
        texts = file.read_text(errors="replace").splitlines()
        lines += [
            Line(text.strip(), label)
            for number, text in enumerate(texts)
            if text.strip() and (part is None or part_of(number) == part)
        ]
    if not lines:
        raise ValueError(f"{', '.join(map(str, files)) or 'the data'} holds no lines of this part")
    return lines


def part_of(number: int) -> str:
    """The part of a line by its number in its file."""
    place = number // BLOCK % sum(PARTS.values())
    for name, share in PARTS.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares cover all places")


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """Writes a byte-pair tokenizer of lower-case text, `END` as id 0; needs the `text` extra."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_atomically(path, tokenizer.to_str().encode())


def padded(ids: Sequence[Sequence[int]], length: int, end_id: int = 0) -> np.ndarray:
    """Ids int32 [N, length], filled up with `end_id`; all must be shorter than `length`."""
    filled = np.full((len(ids), length), end_id, np.int32)
    for row, line in zip(filled, ids, strict=True):
        row[: len(line)] = line
    return filled
