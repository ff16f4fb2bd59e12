"""`python -m experiments.celeba_captions`: captions of words from attributes of CelebA."""

from experiments.command import start

start(__name__, "experiments.train.celeba_captions")
