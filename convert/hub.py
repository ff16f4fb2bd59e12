"""Finds a checkpoint: a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from .sources import ConversionError

_NAME = r"[A-Za-z0-9][\w.-]*"
_SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: What is fetched: never the code of a repository, and pickles only if there is nothing else.
_PATTERNS = (
    (*_SMALL, *(f"{stem}*.safetensors*" for stem in ("model", "pytorch_model"))),
    (*_SMALL, *(f"{stem}*.bin*" for stem in ("model", "pytorch_model"))),
)


class Located(NamedTuple):
    """A checkpoint on disk, and where it came from in values of JSON."""

    path: Path
    origin: dict[str, Any]


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Located:
    """The path `source`, or the folder that the hub repository `source` was fetched to.

    Args:
      source: path that exists, or `owner/name`.
      revision: branch, tag or commit of the repository; its newest state if None.

    Returns:
      The path, and the repository with the commit, or the name of the local folder.

    Raises:
      ConversionError: neither a path nor a repository, or the repository cannot be fetched.
    """
    path, name = Path(source), os.fspath(source)
    if path.exists():
        if revision is not None:
            raise ConversionError(f"--revision is for the hub; {path} is on this disk")
        return Located(path, _origin(path))
    if not re.fullmatch(f"{_NAME}/{_NAME}", name):
        raise ConversionError(f"no such file or folder: {path}")
    folder = _fetch(name, revision)
    return Located(folder, {"repository": name, "revision": folder.name})


def _origin(path: Path) -> dict[str, Any]:
    """What a local path says about its origin; those of the hub's cache name the commit."""
    match = re.search(r"models--([^/]+)/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    if match:
        return {"repository": match[1].replace("--", "/", 1), "revision": match[2]}
    return {"folder": path.absolute().name}


def _fetch(name: str, revision: str | None) -> Path:
    by_hand = f"download it elsewhere (`hf download {name} --local-dir DIR`) and give DIR"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise ConversionError(
            f"there is no folder {name}, and fetching it from the hub needs huggingface_hub; "
            f"pip install 'aps_jax[hub]', or {by_hand}"
        ) from None
    try:
        for patterns in _PATTERNS:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
            if any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
                return folder
    except GatedRepoError:
        raise ConversionError(
            f"{name} is on the hub for those who have accepted its terms: do so on its page, then "
            "`hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ConversionError(
            f"there is no folder {name}, nor such a repository on the hub (a private one needs "
            "`hf auth login`); check the spelling"
        ) from None
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        reason = reason[:200] or type(error).__name__
        raise ConversionError(
            f"{name} cannot be fetched from the hub ({reason}); {by_hand}"
        ) from None
    raise ConversionError(f"the hub repository {name} has no weights named model* at its top")
