"""`python -m experiments.train_text_reward`: trains a classifier of lines, a reward."""

from experiments.command import start

start(__name__, "experiments.train.text_reward")
