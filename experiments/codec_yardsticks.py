"""`python -m experiments.codec_yardsticks`: the codec against JPEG and patch VQ."""

import sys

import tyro

from experiments.train.codec_yardsticks import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
