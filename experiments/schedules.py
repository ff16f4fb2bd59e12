"""`python -m experiments.schedules`: when which tokens are fixed, and whether they stay right."""

from experiments.command import start

start(__name__, "experiments.studies.schedules")
