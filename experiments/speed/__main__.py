"""`python -m experiments.speed`: how fast the sampler is, and where its time goes."""

import sys

import tyro

from experiments.speed.command import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
