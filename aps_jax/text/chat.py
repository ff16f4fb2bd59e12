"""Chat templates of the public masked language models, as pure functions on messages.

A conversation becomes pieces of text, some of which are special tokens; `chat_text` joins them, and
`TextTokenizer.chat` turns them into ids. What users write never becomes special.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Message(NamedTuple):
    """One turn: `role` is "system", "user" or "assistant"."""

    role: str
    text: str


class Piece(NamedTuple):
    """Part of a rendered conversation; a special one is a single token of that name."""

    text: str
    is_special: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How turns are written; specials are names of tokens, the rest is plain text.

    Attributes:
      start: special before the conversation, or "".
      role_open: special before a role.
      role_close: special after it, or "".
      gap: text between a role and what is said.
      turn_close: special after a turn.
      turn_gap: text after that.
      strips: what is said is stripped of white space at both ends.
    """

    start: str = ""
    role_open: str
    role_close: str = ""
    gap: str
    turn_close: str
    turn_gap: str = ""
    strips: bool = False


#: LLaDA-8B-Instruct, as in its tokenizer_config.json.
LLADA = ChatTemplate(
    start="<|startoftext|>",
    role_open="<|start_header_id|>",
    role_close="<|end_header_id|>",
    gap="\n\n",
    turn_close="<|eot_id|>",
    strips=True,
)
#: MMaDA-8B-MixCoT: the same with one newline.
MMADA = dataclasses.replace(LLADA, gap="\n")
#: Dream-v0-Instruct-7B: ChatML as in Qwen. No system turn is added here; give one to have one.
DREAM = ChatTemplate(
    role_open="<|im_start|>",
    gap="\n",
    turn_close="<|im_end|>",
    turn_gap="\n",
)
#: Templates by name.
TEMPLATES = {"llada": LLADA, "mmada": MMADA, "dream": DREAM}


def chat_pieces(
    template: ChatTemplate, messages: Iterable[Message | tuple[str, str]]
) -> tuple[Piece, ...]:
    """The conversation and the open turn of the assistant, who is to answer.

    Raises:
      ValueError: a role other than "system", "user" and "assistant", or no message at all.
    """
    messages = [Message(*message) for message in messages]
    if not messages:
        raise ValueError("a chat needs at least one message")
    pieces = [Piece(template.start, True)]
    for role, text in messages:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {role!r}; choose from system, user, assistant")
        said = text.strip() if template.strips else text
        pieces += _header(template, role)
        pieces += [Piece(said, False), Piece(template.turn_close, True)]
        pieces.append(Piece(template.turn_gap, False))
    return _merge([*pieces, *_header(template, "assistant")])


def _header(template: ChatTemplate, role: str) -> list[Piece]:
    return [
        Piece(template.role_open, True),
        Piece(role, False),
        Piece(template.role_close, True),
        Piece(template.gap, False),
    ]


def _merge(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Joins neighbouring plain pieces, which a tokenizer must see as one text."""
    merged: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        if merged and not piece.is_special and not merged[-1].is_special:
            merged[-1] = Piece(merged[-1].text + piece.text, False)
        else:
            merged.append(piece)
    return tuple(merged)


def chat_text(template: ChatTemplate, messages: Iterable[Message | tuple[str, str]]) -> str:
    """The conversation as one string, ending where the assistant is to answer."""
    return "".join(piece.text for piece in chat_pieces(template, messages))
