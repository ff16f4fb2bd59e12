"""`python -m experiments.window_placement`: how windows of the prior should overlap."""

import sys

import tyro

from experiments.train.window_placement import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
