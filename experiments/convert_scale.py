"""`python -m experiments.convert_scale`: converts and loads a large synthetic checkpoint."""

from experiments.command import start

start(__name__, "experiments.speed.convert_scale")
