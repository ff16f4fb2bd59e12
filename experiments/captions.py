"""Captions of training pictures: a CSV file, its words as a tokenizer, and prompts for a step.

A caption is a list of phrases, such as "woman, smiling, black hair". A training picks a random
subset of them in random order, so that the model takes any prompt made of such phrases.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aps_jax.prior.prompts import PromptConfig, frame_prompt

#: What a tokenizer gives for words that it does not have.
UNKNOWN = "<unknown>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Words of all captions, as ids behind the K image codes.

    Attributes:
      num_codes: K; id K is the mask, then come pad, begin of the image, unknown words and words.
      words: in the order of their ids.
      max_words: words that a prompt may have.
    """

    num_codes: int
    words: tuple[str, ...]
    max_words: int

    @property
    def size(self) -> int:
        """Number of ids, image codes included."""
        return self.num_codes + 4 + len(self.words)

    @property
    def prompt(self) -> PromptConfig:
        """What frames a prompt of these words."""
        return PromptConfig(
            num_codes=self.num_codes,
            mask_token_id=self.num_codes,
            pad_token_id=self.num_codes + 1,
            begin_id=self.num_codes + 2,
            length=self.max_words,
        )

    def ids(self, phrases: Sequence[str]) -> list[int]:
        """Ids of the words of phrases."""
        first = self.num_codes + 4
        return [first + self.words.index(word) for phrase in phrases for word in phrase.split()]

    def save_tokenizer(self, path: Path) -> None:
        """Writes the `tokenizer.json` of a model folder: lower case, split at spaces and commas."""
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        ids = {word: self.num_codes + 4 + index for index, word in enumerate(self.words)}
        model = models.WordLevel({UNKNOWN: self.num_codes + 3} | ids, unk_token=UNKNOWN)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s,;.]+"), behavior="removed")
        tokenizer.save(str(path))


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Phrases by file name from a CSV file with the columns `file` and `caption`.

    Raises:
      ValueError: the file has no such columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = {"file", "caption"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} lacks the columns {sorted(missing)}; needs file,caption with captions "
                'like "woman, smiling"'
            )
        return {
            row["file"]: tuple(
                " ".join(phrase.lower().split())
                for phrase in row["caption"].split(",")
                if phrase.strip()
            )
            for row in rows
        }


def phrases_of(captions: Mapping[str, tuple[str, ...]], path: Path) -> tuple[str, ...]:
    """Phrases of a picture, found by its name or by the end of its path; none if it has none."""
    names = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
    return next((captions[name] for name in names if name in captions), ())


def vocabulary(
    captions: Mapping[str, tuple[str, ...]], *, num_codes: int, max_words: int
) -> Vocabulary:
    """All words of captions, sorted."""
    words = {word for phrases in captions.values() for phrase in phrases for word in phrase.split()}
    return Vocabulary(num_codes=num_codes, words=tuple(sorted(words)), max_words=max_words)


def framed(vocabulary: Vocabulary, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Prompts int32 [B, max_words], filled up with pads; the phrases that fit, in their order."""
    rows = []
    for phrases in captions:
        ids: list[int] = []
        for phrase in phrases:
            words = vocabulary.ids([phrase])
            ids += words if len(ids) + len(words) <= vocabulary.max_words else []
        rows.append(ids)
    # Pads that are seen fill every prompt up to its full length, and so give one shape.
    return frame_prompt(vocabulary.prompt, rows, mask_padding=False)[0]


def random_phrases(
    rng: np.random.Generator, phrases: Sequence[str], *, drop: float
) -> tuple[str, ...]:
    """A random subset of phrases in random order, none with probability `drop`."""
    if not phrases or rng.random() < drop:
        return ()
    chosen = rng.permutation(len(phrases))[: rng.integers(1, len(phrases) + 1)]
    return tuple(phrases[index] for index in chosen)
