"""`python -m experiments.exactness`: every sampler against enumerated posteriors."""

import sys

import tyro

from experiments.studies.exactness import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
