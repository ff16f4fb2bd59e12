"""`python -m experiments.memory_plan`: what a call of the sampler needs at the size of MMaDA-8B."""

from experiments.command import start

start(__name__, "experiments.speed.memory_plan")
