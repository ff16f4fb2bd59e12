"""`python -m experiments.window_placement`: how windows of the prior are best laid."""

from experiments.command import start

start(__name__, "experiments.train.window_placement")
