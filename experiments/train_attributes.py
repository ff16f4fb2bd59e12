"""`python -m experiments.train_attributes`: trains the network of face attributes."""

from experiments.command import start

start(__name__, "experiments.train.attributes")
