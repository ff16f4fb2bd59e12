"""`aps-jax convert NAME SRC DST`: published weights in the formats that this package loads."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from aps_jax.cli.help import spelled_out
from aps_jax.io import names


def main(argv: Sequence[str]) -> int:
    """Runs the converter that the first word names; without one, or for help, lists them."""
    # An installation has the converters inside this package, a clone on the path beside it.
    has_own = importlib.util.find_spec("aps_jax.convert") is not None
    package = importlib.import_module("aps_jax.convert" if has_own else "convert")
    argv = spelled_out(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: aps-jax convert NAME [-h] ...\n")
        for name, summary in package.CONVERTERS.items():
            print(f"    {name:16}{summary}")
        return 0
    name, *words = argv
    names.choose("converter", name, package.CONVERTERS)
    module = importlib.import_module(f"{package.__name__}.{name}")
    prog = f"aps-jax convert {name}"
    if not hasattr(module, "FAMILY"):
        return module.main(words, prog=prog)
    return module.main(module.FAMILY, module.__doc__, words, prog=prog)
