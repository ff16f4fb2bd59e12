"""`python -m experiments.approximation`: what the quantized expectation leaves of a posterior."""

from experiments.command import start

start(__name__, "experiments.studies.approximation")
