"""`python -m experiments.convert_scale`: converts and loads a checkpoint of gigabytes."""

import sys

import tyro

from experiments.speed.convert_scale import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
