"""`python -m experiments.train_codec`: trains a codec."""

from experiments.command import start

start(__name__, "experiments.train.codec")
