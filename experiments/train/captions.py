"""Captions of training pictures: a CSV file, its words as a tokenizer, and prompts for a step.

A caption is a list of phrases, such as "woman, smiling, black hair". A training picks a random
subset of them in random order, so that the model takes any prompt made of such phrases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aps_jax.prior.prompts import PromptConfig, frame_prompt
from aps_jax.types import Quantizer

#: What a tokenizer gives for words that it does not have.
UNKNOWN = "<unknown>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Words of all captions, as ids behind the image codes.

    Attributes:
      num_codes: K, of each token of a place; behind all of them come mask, pad, begin of the image,
        unknown words and words.
      words: in the order of their ids.
      max_words: words that a prompt may have.
      groups: tokens of a place.
    """

    num_codes: int
    words: tuple[str, ...]
    max_words: int
    groups: int = 1

    @property
    def first(self) -> int:
        """Id of the mask, behind all image codes."""
        return self.groups * self.num_codes

    @property
    def size(self) -> int:
        """Number of ids, image codes included."""
        return self.first + 4 + len(self.words)

    @property
    def prompt(self) -> PromptConfig:
        """What frames a prompt of these words."""
        return PromptConfig(
            num_codes=self.num_codes,
            mask_token_id=self.first,
            pad_token_id=self.first + 1,
            begin_id=self.first + 2,
            length=self.max_words,
        )

    def ids(self, phrases: Sequence[str]) -> list[int]:
        """Ids of the words of phrases."""
        first = self.first + 4
        return [first + self.words.index(word) for phrase in phrases for word in phrase.split()]

    def save_tokenizer(self, path: Path) -> None:
        """Writes the `tokenizer.json` of a model folder: lower case, split at spaces and commas."""
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        ids = {word: self.first + 4 + index for index, word in enumerate(self.words)}
        model = models.WordLevel({UNKNOWN: self.first + 3} | ids, unk_token=UNKNOWN)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s,;.]+"), behavior="removed")
        tokenizer.save(str(path))


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Phrases by file name from a CSV file with the columns `file` and `caption`.

    Raises:
      ValueError: the file has no such columns.
    """
    found = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = {"file", "caption"} - set(found.columns)
    if missing:
        raise ValueError(
            f"{path} lacks the columns {sorted(missing)}; needs file,caption with captions "
            'like "woman, smiling"'
        )
    phrases = [caption.lower().split(",") for caption in found["caption"]]
    cleaned = [tuple(" ".join(one.split()) for one in some if one.strip()) for some in phrases]
    return dict(zip(found["file"], cleaned, strict=True))


def phrases_of(captions: Mapping[str, tuple[str, ...]], path: Path) -> tuple[str, ...]:
    """Phrases of a picture, found by its name or by the end of its path; none if it has none."""
    names = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
    return next((captions[name] for name in names if name in captions), ())


def vocabulary(captions: Mapping[str, tuple[str, ...]], **sizes: int) -> Vocabulary:
    """All words of captions, sorted; `sizes` are the numbers of a `Vocabulary`."""
    words = {word for phrases in captions.values() for phrase in phrases for word in phrase.split()}
    return Vocabulary(words=tuple(sorted(words)), **sizes)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of training and held-out pictures.

    Attributes:
      vocabulary: words of all captions.
      train: phrases of every crop; empty for pictures without a caption.
      held_out: likewise.
    """

    vocabulary: Vocabulary
    train: list[tuple[str, ...]]
    held_out: list[tuple[str, ...]]

    def draw(self, chosen: np.ndarray, config: Any, step: int) -> np.ndarray:
        """Random prompts int32 [B, max_words] of crops, a function of (seed, step)."""
        rng = np.random.default_rng((config.seed, 2, step))
        drop = config.drop_prompt
        drawn = [random_phrases(rng, self.train[i], drop=drop) for i in chosen]
        return framed(self.vocabulary, drawn)


def read_prompts(
    config: Any, tokens: dict[str, np.ndarray], quantizer: Quantizer
) -> Prompts | None:
    """Captions of all crops, None without `config.captions`; words come behind the codes.

    Raises:
      ValueError: no picture has a caption.
    """
    if config.captions is None:
        return None
    found = read_captions(config.captions)
    train, held_out = (
        [phrases_of(found, Path(file)) for file in tokens[f"{part}_files"]]
        for part in ("train", "eval")
    )
    if not any(train):
        raise ValueError(
            f"no training picture is named in {config.captions}; its column `file` must hold file "
            f"names such as {Path(tokens['train_files'][0]).name}"
        )
    print(f"{sum(map(bool, train))} of {len(train)} crops have captions", flush=True)
    words = vocabulary(
        found,
        num_codes=quantizer.num_codes,
        max_words=config.max_words,
        groups=math.prod(quantizer.axes),
    )
    return Prompts(vocabulary=words, train=train, held_out=held_out)
