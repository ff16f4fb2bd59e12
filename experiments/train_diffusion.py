"""`python -m experiments.train_diffusion`: trains a denoiser of pixels."""

from experiments.command import start

start(__name__, "experiments.train.diffusion")
