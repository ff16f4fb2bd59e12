"""What converters do with the tokenizer that lies beside a language model."""

from __future__ import annotations

from pathlib import Path

from aps_jax.text.tokenizer import TOKENIZER_NAME

from .sources import ConversionError, Source, read_json


def tokenizer_files(source: Source, num_ids: int | None = None) -> tuple[Path, ...]:
    """The tokenizer's file, to be copied into the model folder; nothing if there is none.

    Args:
      source: checkpoint.
      num_ids: distinct ids that it must have, added ones included; None for any number.

    Raises:
      ConversionError: a damaged file, or another number of ids.
    """
    path = source.folder / TOKENIZER_NAME
    if not path.is_file():
        return ()
    count = _count_ids(path)
    if num_ids is not None and count != num_ids:
        raise ConversionError(
            f"{TOKENIZER_NAME} has {count} ids; the models that can be converted have {num_ids}"
        )
    return (path,)


def _count_ids(path: Path) -> int:
    tokenizer = read_json(path)
    try:
        ids = set(tokenizer["model"]["vocab"].values())
        ids |= {token["id"] for token in tokenizer["added_tokens"]}
    except (KeyError, TypeError, AttributeError):
        raise ConversionError(f"{path} is no tokenizer with a vocabulary; fetch it again") from None
    return len(ids)
