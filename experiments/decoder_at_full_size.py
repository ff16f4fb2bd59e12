"""`python -m experiments.decoder_at_full_size`: the full MagVIT-v2 decoder once."""

import sys

import tyro

from experiments.speed.decoder_at_full_size import Arguments, main

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
