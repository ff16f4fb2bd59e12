"""`python -m experiments.benchmark`: many samplers on held-out photos, at equal cost."""

import sys

import tyro

from experiments.bench.command import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
