"""`python -m experiments.prior_pictures`: samples and completions of a prior."""

from experiments.command import start

start(__name__, "experiments.train.prior_pictures")
