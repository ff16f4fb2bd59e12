"""`python -m experiments.speed`: how fast the sampler is, and where its time goes."""

from experiments.command import start

start(__name__, "experiments.speed.command")
