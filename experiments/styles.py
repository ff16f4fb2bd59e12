"""`python -m experiments.styles`: what a prior is worth for photos painted in a style."""

from experiments.command import start

start(__name__, "experiments.studies.styles")
