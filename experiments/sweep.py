"""`python -m experiments.sweep` is `aps-jax sweep`, which restores a folder of images."""

import sys

from aps_jax.cli.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
