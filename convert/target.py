"""The model folder that a conversion fills: what may be there before, and how it appears."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aps_jax.io import checkpoint
from aps_jax.io.files import disk_size

from .sources import ConversionError
from .stores import remove_store


def check_target(target: Path, section: str) -> None:
    """A new folder, an empty one, or a model folder without this half."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConversionError(f"{target} is a file; name a folder that does not exist yet")
    if not any(target.iterdir()):
        return
    try:
        card = checkpoint.read_card(target)
    except checkpoint.FormatError:
        raise
    except checkpoint.CheckpointError:
        raise ConversionError(f"{target} holds other files; choose another folder") from None
    if section in card:
        raise ConversionError(f"{target} already has a {section}; delete it or choose another")


def check_space(target: Path, num_bytes: int, staging: Path) -> None:
    """ConversionError unless the disk has room for what is not in the staging folder yet."""
    folder = target.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    missing = num_bytes - disk_size(staging)
    if free < missing:
        raise ConversionError(
            f"{target} needs {missing / 1e9:.2f} GB ({missing:,} bytes) and {free / 1e9:.2f} GB "
            f"({free:,} bytes) are free; make room or choose another disk"
        )


def publish(model: Path, target: Path, names: Sequence[str], sections: dict[str, Any]) -> None:
    """Puts finished files in place: in one step, or weights first and then the card that counts."""
    if target.exists() and any(target.iterdir()):
        for name in names:
            remove_store(target / name)  # Left by a crash before the card was written.
            os.replace(model / name, target / name)
        checkpoint.update_card(target, **sections)
    else:
        checkpoint.update_card(model, **sections)
        os.replace(model, target)
