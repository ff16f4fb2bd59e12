"""Text to ids and back, by the `tokenizer.json` in a model folder.

Reads the file with the `tokenizers` library, which is an extra: `pip install 'aps_jax[text]'`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aps_jax.text.chat import ChatTemplate, Message, chat_pieces

TOKENIZER_NAME = "tokenizer.json"
#: Those of other parts, which may lie in one folder with a prior.
CLIP_TOKENIZER, REWARD_TOKENIZER = "clip_tokenizer.json", "reward_tokenizer.json"


class TextError(ValueError):
    """Text cannot be turned into ids here; the message says why and what to do."""


class TextTokenizer:
    """Tokenizer of a language model.

    What it encodes is ordinary text throughout: a special token's name in it, such as "<|mask|>",
    becomes the ids of its letters. Neither beginning nor end of text is added.
    """

    def __init__(self, tokenizer: Any):
        """Wraps a `tokenizers.Tokenizer`; `load_tokenizer` reads one from a model folder."""
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        return self._tokenizer.get_vocab_size()

    def fingerprint(self) -> str:
        """Short digest of which id means what, equal for tokenizers that share a vocabulary."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text.

        Raises:
          TextError: words that a tokenizer of whole words does not have.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        stand_in = getattr(self._tokenizer.model, "unk_token", None)
        if stand_in is not None and stand_in in encoding.tokens:
            pairs = zip(encoding.tokens, encoding.offsets, strict=True)
            unknown = [text[slice(*span)] for token, span in pairs if token == stand_in]
            known = self.words()
            listed = f"; it knows: {', '.join(known)}" if len(known) <= 200 else ""
            raise TextError(
                f"this model does not know {', '.join(map(repr, unknown))} in a prompt{listed}"
            )
        return encoding.ids

    def words(self) -> list[str]:
        """What a tokenizer of whole words knows, sorted; empty for one of parts of words."""
        stand_in = getattr(self._tokenizer.model, "unk_token", None)
        if stand_in is None:
            return []
        return sorted(self._tokenizer.get_vocab(with_added_tokens=False).keys() - {stand_in})

    def decode(self, ids: Sequence[int] | np.ndarray, *, keeps_special: bool = False) -> str:
        """Text of ids; special tokens are left out unless they are kept."""
        ids = [int(index) for index in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=not keeps_special)

    def special_id(self, name: str) -> int:
        """Id of a special token; TextError if there is none of that name."""
        index = self._tokenizer.token_to_id(name)
        if index is None:
            raise TextError(f"the tokenizer has no token {name!r}: it is of another model")
        return index

    def vocabulary(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        return self._tokenizer.get_vocab()

    def added_tokens(self) -> dict[str, int]:
        """Ids by name of the tokens that no word is split into, such as those that end a turn."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items()}

    def scheme(self) -> str:
        """How tokens spell what they stand for, such as "ByteLevel" for bytes as letters."""
        decoder = self._tokenizer.decoder
        return "plain" if decoder is None else type(decoder).__name__

    def chat(
        self, template: ChatTemplate, messages: Iterable[Message | tuple[str, str]]
    ) -> list[int]:
        """Ids of a conversation that ends where the assistant is to answer."""
        ids: list[int] = []
        for text, is_special in chat_pieces(template, messages):
            ids += [self.special_id(text)] if is_special else self.encode(text)
        return ids


def until(ids: Sequence[int] | np.ndarray, stop_ids: Iterable[int]) -> list[int]:
    """The ids before the first of `stop_ids`, such as those of end of text and end of turn."""
    stops = set(stop_ids)
    ids = [int(index) for index in ids]
    return ids[: next((at for at, index in enumerate(ids) if index in stops), len(ids))]


def load_tokenizer(folder: str | os.PathLike[str], name: str = TOKENIZER_NAME) -> TextTokenizer:
    """The tokenizer of a model folder, by the name of its file.

    Raises:
      TextError: no such file, a damaged one, or the extra is not installed.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise TextError(
            f"{folder} has no {name}, so prompts must be given as ids; put the file of "
            "the published model there"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TextError(
            "prompts as text need the tokenizers library; pip install 'aps_jax[text]'"
        ) from None
    try:
        return TextTokenizer(Tokenizer.from_file(os.fspath(path)))
    except Exception as error:  # The library raises bare exceptions.
        reason = " ".join(str(error).split())
        raise TextError(f"{path} is damaged or no tokenizer ({reason}); fetch it again") from None


def encode_prompt(
    folder: str | os.PathLike[str], prompt: str | Sequence[str]
) -> list[int] | list[list[int]]:
    """Ids of a prompt, or of each of several, by the tokenizer of a model folder."""
    tokenizer = load_tokenizer(folder)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return [tokenizer.encode(text) for text in prompt]
