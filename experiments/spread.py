"""`python -m experiments.spread`: whether the spread of samples tells their error."""

import sys

import tyro

from experiments.studies.spread import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
