"""`python -m experiments.train_prior`: trains a prior."""

from experiments.command import start

start(__name__, "experiments.train.prior")
