"""`python -m experiments.benchmark`: many samplers on held-out photos, at equal cost."""

from experiments.command import start

start(__name__, "experiments.bench.command")
