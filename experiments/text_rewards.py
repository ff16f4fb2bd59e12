"""`python -m experiments.text_rewards`: steering a text model by a reward, every sampler."""

from experiments.command import start

start(__name__, "experiments.studies.text_rewards")
