"""DPS, DDRM and DiffPIR against those of the package deepinv, on one denoiser of two pixels.

Each draws its own noise, so what is compared is means and covariances, by standard errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import Denoiser, PixelParams, operators, samplers
from aps_jax.samplers import DDRMConfig, DiffPIRConfig, DPSConfig
from aps_jax.types import bind

torch = pytest.importorskip("torch")
deepinv = pytest.importorskip("deepinv", reason="deepinv is not installed: pip install deepinv")

pytestmark = pytest.mark.slow

SHAPE, SIGMA, COUNT = (1, 2), 0.3, 4000
WEIGHTS, STDS = np.array([0.4, 0.6]), np.array([0.3, 0.2])
MEANS = np.array([[-0.5, -0.1], [0.4, 0.3]])
#: The first pixel is measured.
MASK, Y = np.array([[1.0, 0.0]]), np.array([0.2, 0.0])
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def mixture_mean(array, softmax, log, x, sigma):
    """The mean of two clean pixels [n, 2] of a mixture of normal laws, in JAX or PyTorch."""
    weights, means, stds = map(array, (WEIGHTS, MEANS, STDS))
    noisy = stds**2 + sigma[:, None] ** 2
    square = ((x[:, None, :] - means) ** 2).sum(-1)
    share = softmax(array(np.log(WEIGHTS)) - square / (2 * noisy) - log(noisy))
    inner = means + (stds**2 / noisy)[..., None] * (x[:, None, :] - means)
    return (share[..., None] * inner).sum(1)


def ours(params, x, sigma):
    array = lambda values: jnp.asarray(values, jnp.float32)  # noqa: E731 - one conversion
    found = mixture_mean(array, jax.nn.softmax, jnp.log, x.reshape(-1, 2), sigma)
    return found.reshape(x.shape)


class Theirs(torch.nn.Module):
    """The same for images [n, 1, 1, 2] that are `scale` times ours plus an offset."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.offset = scale, 0.5 if scale == 0.5 else 0.0

    def forward(self, x, sigma, **_):
        def array(values):
            return torch.as_tensor(values, dtype=torch.float32)

        flat = (x.reshape(-1, 2) - self.offset) / self.scale
        sigma = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1) / self.scale
        found = mixture_mean(
            array, lambda v: torch.softmax(v, -1), torch.log, flat, sigma.expand(len(flat))
        )
        return (found * self.scale + self.offset).reshape(x.shape)


def draw(config):
    """Images [COUNT, 2], not clipped, after all steps."""
    params = PixelParams(
        denoiser=Denoiser(params=None, apply=bind(ours), num_channels=1),
        operator=operators.inpainting_mask(MASK),
    )
    y = jnp.asarray(Y, jnp.float32).reshape(1, *SHAPE, 1)
    target = samplers.target_of(params, y, config=config)
    keys = target.keys(jax.random.key(0))

    def run():
        start = config.init(target, keys)
        step = lambda state, _: (config.step(target, state, keys)[0], None)  # noqa: E731
        return jax.lax.scan(step, start, length=config.num_steps)[0].x

    return np.float64(jax.jit(run)()).reshape(COUNT, 2)


def problem(scale=1.0, offset=0.0):
    physics = deepinv.physics.Inpainting(
        (1, *SHAPE),
        mask=torch.tensor(MASK, dtype=torch.float32)[None],
        noise_model=deepinv.physics.GaussianNoise(SIGMA * scale),
    )
    y = torch.tensor(MASK[0] * (Y * scale + offset), dtype=torch.float32)
    return physics, y.expand(COUNT, 1, *SHAPE).clone()


def check(found, other):
    """Means and second moments agree to four standard errors."""
    other = np.float64(other.detach().numpy()).reshape(COUNT, 2)
    assert np.all(found.std(axis=0) > 0.02)
    centre = found.mean(axis=0)
    for f in (lambda x: x, lambda x: np.einsum("ni,nj->nij", x - centre, x - centre)):
        one, two = f(found), f(other)
        error = np.sqrt((one.var(axis=0) + two.var(axis=0)) / COUNT)
        assert np.all(np.abs(one.mean(axis=0) - two.mean(axis=0)) < 4 * error)


OPTIONS = {"sigma": SIGMA, "image_shape": SHAPE, "num_samples": COUNT}


def test_ddrm():
    times = np.round(999 * (1 - np.arange(20) / 19)).astype(int)
    levels = np.sqrt((1 - KEPT[times]) / KEPT[times])
    torch.manual_seed(0)
    physics, y = problem()
    other = deepinv.sampling.DDRM(Theirs(1.0), sigmas=levels, eta=0.85, etab=1.0)(y, physics)
    check(draw(DDRMConfig(**OPTIONS)), other)


def test_dps():
    """Its loss is ||y - A(x)|| / sqrt(2), whose gradient it takes a whole step along."""
    torch.manual_seed(0)
    physics, y = problem()
    sampler = deepinv.sampling.DPS(
        Theirs(0.5), deepinv.optim.data_fidelity.L2(), max_iter=1000, eta=1.0
    )
    check(draw(DPSConfig(step_size=2**-0.5, **OPTIONS)), sampler(y, physics))


def test_diffpir():
    """In units of [0, 1], and with half of what we call regularization."""
    torch.manual_seed(0)
    physics, y = problem(0.5, 0.5)
    sampler = deepinv.sampling.DiffPIR(
        Theirs(0.5), deepinv.optim.data_fidelity.L2(), sigma=SIGMA / 2, max_iter=100, zeta=0.3,
        lambda_=2.0,
    )  # fmt: skip
    found = draw(DiffPIRConfig(regularization=1.0, zeta=0.3, **OPTIONS))
    check(found, 2 * sampler(y, physics) - 1)
