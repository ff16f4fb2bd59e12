"""The command line `aps-jax`: one file per command, over the host loop of `aps_jax.restore`."""

from __future__ import annotations

from aps_jax.cli.program import main

__all__ = ["main"]
