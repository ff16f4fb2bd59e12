"""`python -m experiments.edits`: prompts and rewards for edits of faces."""

import sys

import tyro

from experiments.studies.edits import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
