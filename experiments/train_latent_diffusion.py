"""`python -m experiments.train_latent_diffusion`: trains a denoiser of a codec's latents."""

from experiments.command import start

start(__name__, "experiments.train.latent_diffusion")
