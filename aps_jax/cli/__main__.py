"""`python -m aps_jax.cli` is `aps-jax`."""

import sys

from aps_jax.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
