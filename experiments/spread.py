"""`python -m experiments.spread`: whether the spread of posterior samples tells their error."""

from experiments.command import start

start(__name__, "experiments.studies.spread")
