"""`python -m experiments.text_rewards`: steering a text model by a reward, every sampler."""

import sys

import tyro

from experiments.studies.text_rewards import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
