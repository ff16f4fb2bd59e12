"""DPS, DDRM and DiffPIR against deepinv's, step by step: one denoiser, operator, noise for both.

Images are [-1, 1] here and [0, 1] there, so a level of noise is half as large there. What else
differs is in the comments. deepinv's steps are taken as they are: only its random numbers, its
levels of noise and, for DPS, its step sizes are set to ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import Denoiser, PixelParams, operators
from aps_jax.operators.svd import circular_svd
from aps_jax.samplers import DDRMConfig, DiffPIRConfig, DPSConfig, target_of
from aps_jax.samplers.continuous import ddpm_levels
from aps_jax.sampling.target import fold
from aps_jax.types import Operator, bind

deepinv = pytest.importorskip("deepinv", reason="needs pip install 'aps_jax[deepinv]'")
import torch  # noqa: E402 (comes with deepinv)
from deepinv.sampling.sde_solver import DDPMSolver  # noqa: E402

pytestmark = pytest.mark.slow

SIDE, SIGMA = 8, 0.1
X = np.tanh(np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3))).astype(np.float32)
MASK = (np.random.default_rng(1).random((SIDE, SIDE, 1)) < 0.6).astype(np.float32)
#: Singular values between 0.3 and 1: in DDRM levels are above and below what each is worth.
KERNEL = np.float32([[0.0, 0.1, 0.0], [0.05, 0.65, 0.05], [0.0, 0.15, 0.0]])
WEIGHTS = np.random.default_rng(2).normal(size=(3, 3, 3, 3)).astype(np.float32) / 5  # HWIO


def denoise(weights, x, sigma):
    """A mean of x and of a convolution, whose share is that of the noise."""
    own = 1 / (1 + sigma**2).reshape(-1, 1, 1, 1)
    found = jax.lax.conv_general_dilated(
        x * jnp.sqrt(own), weights, (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return own * x + own * sigma.reshape(-1, 1, 1, 1) ** 2 * jnp.tanh(found)


class Denoise(torch.nn.Module):
    """`denoise` in PyTorch, of images from `low` to 1."""

    def __init__(self, low):
        super().__init__()
        self.low, self.weights = low, torch.tensor(WEIGHTS).permute(3, 2, 0, 1)

    def forward(self, x, sigma, **kwargs):
        scale = (1 - self.low) / 2
        x, sigma = (x - self.low) / scale - 1, torch.as_tensor(sigma, dtype=x.dtype) / scale
        own = 1 / (1 + sigma**2)
        found = torch.nn.functional.conv2d(x * own**0.5, self.weights.to(x.dtype), padding=1)
        return (own * x + own * sigma**2 * torch.tanh(found) + 1) * scale + self.low


def blur(kernel, x):
    """Circular, as `circular_svd` has it."""
    moved = [kernel[a, b] * jnp.roll(x, (a - 1, b - 1), (1, 2)) for a in range(3) for b in range(3)]
    return sum(moved)


def theirs(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def ours(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


OPERATORS = {
    "mask": operators.inpainting_mask(MASK).init(jax.random.key(0), (SIDE, SIDE)),
    "blur": Operator(
        apply=bind(blur), name="blur", params=jnp.asarray(KERNEL), is_linear=True,
        svd=bind(circular_svd),
    ),
    "downsampling": operators.super_resolution(scale=2),
}  # fmt: skip
PHYSICS = {
    "mask": lambda: deepinv.physics.Inpainting(
        (3, SIDE, SIDE), mask=theirs(np.broadcast_to(MASK, (1, SIDE, SIDE, 3)))
    ),
    "blur": lambda: deepinv.physics.BlurFFT(
        (3, SIDE, SIDE), filter=torch.tensor(KERNEL)[None, None]
    ),
    "downsampling": lambda: deepinv.physics.DownsamplingMatlab(
        factor=2, img_size=(3, SIDE, SIDE), max_iter=100, tol=1e-13
    ),
}


def problem(name):
    """Our parameters and measurement, and their operator, which has no noise of its own."""
    params = PixelParams(Denoiser(jnp.asarray(WEIGHTS), bind(denoise)), OPERATORS[name])
    clean, physics = np.asarray(params.operator(X)), PHYSICS[name]()
    np.testing.assert_allclose(ours(physics.A(theirs(X))), clean, atol=2e-6)
    noise = SIGMA * np.random.default_rng(3).normal(size=clean.shape).astype(np.float32)
    # None where nothing is measured, which is no part of the residual here.
    return params, clean + (noise * MASK if name == "mask" else noise), physics


def sample(config, params, y, num_steps):
    """The images after some steps of ours, and all noise: that of the start, then of every step."""

    @jax.jit
    def run(key):
        target = target_of(params, y, config=config)
        keys = target.keys(key)
        state = config.init(target, keys)
        noise = [target.noise(fold(keys, i)) for i in (config.num_steps, *range(num_steps))]
        for _ in range(num_steps):
            state, _ = config.step(target, state, keys)
        return state.x, noise

    return jax.device_get(run(jax.random.key(1)))


def check(found, expected):
    assert np.std(expected) > 0.1 and np.max(np.abs(found - X)) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def time_of(kept):
    """When deepinv's continuous schedule keeps as much, from beta t + (beta' - beta) t^2 / 2."""
    first, more = 0.1, 19.9
    return (-first + np.sqrt(first**2 - 2 * more * np.log(kept))) / more


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("low", [-1, 0])
def test_dps(name, low):
    """deepinv adds weight times the gradient to the score, so its steps shrink with the noise.

    DPS has one length for all steps, which `weight` is set to here. By default deepinv has images
    of [0, 1] denoised and clips them to [-1, 1]; both ours and theirs do without that then.
    """
    config = DPSConfig(
        num_steps=7, step_size=0.3, clip_denoised=low == -1, sigma=SIGMA, image_shape=(SIDE, SIDE)
    )
    params, y, physics = problem(name)
    found, noise = sample(config, params, y, 7)
    left = iter(noise)
    levels = np.float64(ddpm_levels(7))

    class Solver(DDPMSolver):
        def step(self, sde, t0, t1, x0, *args, **kwargs):
            before, after = sde.scale_t(t0), sde.scale_t(t1)
            ratio = sde.sigma_t(t1) / sde.sigma_t(t0)
            length = before * after * sde.sigma_t(t0) ** 2 * (1 - ratio**2)
            # Half the residual, in images of half the range.
            model.data_fidelity.weight = 0.3 * (1 if low == -1 else 2) / float(length)
            return super().step(sde, t0, t1, x0, *args, **kwargs)

        def randn_like(self, x, seed=None):
            return theirs(next(left)).to(x.dtype)

    model = deepinv.sampling.DPS(
        Denoise(low), solver=Solver(torch.tensor(time_of(levels))), minus_one_one=low == 0
    )
    if low == 0:
        model.data_fidelity.clip = None
    middle = (1 + low) / 2
    given = theirs(y) * (1 - middle) + middle * physics.A(torch.ones(2, 3, SIDE, SIDE))
    expected = model(given, physics, x_init=theirs(next(left)).double())
    check(found, (ours(expected) - middle) / (1 - middle))


@pytest.mark.parametrize("name", ["mask", "blur"])
def test_ddrm(name, monkeypatch):
    """deepinv halves the variance of all noise, which suits its complex coefficients of a blur.

    It takes a singular value below sigma as 0; here there is none.
    """
    config = DDRMConfig(num_steps=9, eta=0.7, eta_b=0.9, sigma=SIGMA, image_shape=(SIDE, SIDE))
    params, y, physics = problem(name)
    found, noise = sample(config, params, y, 9)
    left = iter(noise)
    physics.noise_model = deepinv.physics.GaussianNoise(SIGMA)
    monkeypatch.setattr(
        torch, "randn_like", lambda _: np.sqrt(2) * physics.V_adjoint(theirs(next(left)))
    )
    kept = np.float64(ddpm_levels(9)[:-1])
    levels = np.sqrt((1 - kept) / kept)
    values = physics.mask[physics.mask > 0]
    assert levels[-1] < SIGMA < values.min() and levels[0] > SIGMA / values.min()
    # It starts from the whole measurement, with eta_b = 1, whatever eta_b is.
    model = deepinv.sampling.DDRM(Denoise(-1), sigmas=levels, eta=0.7, etab=0.9, eps=0.0)
    check(found, ours(model(theirs(y), physics)))


@pytest.mark.parametrize("name", OPERATORS)
def test_diffpir(name, monkeypatch):
    """lambda is 2 of ours there: images are half as large, and its proximal step has 2 rho for rho.

    deepinv returns the noisy image of the last level but one, and it begins from the measurement,
    which is as good as nothing under the noise of the first level.
    """
    config = DiffPIRConfig(
        num_steps=7, num_inner_steps=40, regularization=1.5, zeta=0.3, sigma=SIGMA,
        image_shape=(SIDE, SIDE),
    )  # fmt: skip
    params, y, physics = problem(name)
    found, noise = sample(config, params, y, 6)
    left = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: theirs(next(left)).to(x.dtype))
    model = deepinv.sampling.DiffPIR(
        Denoise(0), deepinv.optim.L2(), sigma=SIGMA / 2, max_iter=7, zeta=0.3, lambda_=3.0
    )
    # Whole timesteps, cut there and rounded here.
    times = np.round(999 * (1 - np.sqrt(np.linspace(0, 1, 7)))).astype(int)
    model.seq = torch.tensor(999 - times)
    physics.noise_model = deepinv.physics.ZeroNoise()  # Else levels are computed anew.
    given = (theirs(y) + physics.A(torch.ones(2, 3, SIDE, SIDE))) / 2
    # Conjugate gradients from 0, for which float32 is too coarse where nothing is measured.
    start = torch.full((2, 3, SIDE, SIDE), 0.5, dtype=torch.float64)
    expected = model(given.double(), physics, x_init=start)
    check(found, 2 * ours(expected) - 1)
