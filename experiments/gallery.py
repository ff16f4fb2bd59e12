"""`python -m experiments.gallery`: the pictures of the README."""

from experiments.command import start

start(__name__, "experiments.studies.gallery")
