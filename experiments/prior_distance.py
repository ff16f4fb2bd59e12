"""`python -m experiments.prior_distance`: how far samples of priors are from held-out pictures."""

from experiments.command import start

start(__name__, "experiments.train.prior_distance")
