"""What converters do with the tokenizer that lies beside a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aps_jax.text.tokenizer import TOKENIZER_NAME

from .sources import ConversionError, Source, read_json


def tokenizer_files(
    source: Source,
    num_ids: int | None = None,
    *,
    added: Mapping[str, int] | None = None,
    name: str = TOKENIZER_NAME,
) -> dict[str, Path]:
    """The tokenizer's file by its name in the model folder; nothing if there is none.

    Args:
      source: checkpoint.
      num_ids: distinct ids that it must have, added ones included; None for any number.
      added: ids by token that the original's own code adds to those; a tokenizer that was saved
        afterwards has all of them.
      name: of the file in the model folder, which may hold another part's tokenizer, too.

    Raises:
      ConversionError: a damaged file, another number of ids, or other added tokens.
    """
    path = source.folder / TOKENIZER_NAME
    if not path.is_file():
        return {}
    added = added or {}
    ids, tokens = _read_ids(path)
    if num_ids is None or len(ids) == num_ids:
        return {name: path}
    if not added or len(ids) != num_ids + len(added):
        or_more = f" or, with the special tokens, {num_ids + len(added)}" if added else ""
        raise ConversionError(
            f"{TOKENIZER_NAME} has {len(ids)} ids; the models that can be converted have "
            f"{num_ids}{or_more}"
        )
    for token, index in added.items():
        if tokens.get(token) != index:
            raise ConversionError(
                f"{TOKENIZER_NAME} gives {token!r} the id {tokens.get(token)}; this model needs "
                f"{index}: take the tokenizer without added tokens"
            )
    return {name: path}


def _read_ids(path: Path) -> tuple[set[int], dict[str, int]]:
    """All ids, and those of the added tokens by name."""
    tokenizer = read_json(path)
    try:
        tokens = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        ids = {*tokenizer["model"]["vocab"].values(), *tokens.values()}
    except (KeyError, TypeError, AttributeError):
        raise ConversionError(f"{path} is no tokenizer with a vocabulary; fetch it again") from None
    return ids, tokens
