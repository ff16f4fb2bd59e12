"""`python -m experiments.memory_plan`: what the sampler needs at the size of MMaDA-8B."""

import sys

import tyro

from experiments.speed.memory_plan import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
