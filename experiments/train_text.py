"""`python -m experiments.train_text`: trains a language model of lines."""

from experiments.command import start

start(__name__, "experiments.train.text")
