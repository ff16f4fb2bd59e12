"""`python -m experiments.exactness`: samplers against posteriors that can be enumerated."""

from experiments.command import start

start(__name__, "experiments.studies.exactness")
