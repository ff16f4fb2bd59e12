"""The converted blur network against PyTorch, from the published form of its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert_kernel_wizard import TINY, run, tensor_shapes

from aps_jax import pretrained
from aps_jax.operators import kernel_wizard, make_operator

torch = pytest.importorskip("torch", reason="needs pip install 'aps_jax[torch]'")
import torch_kernel_wizard  # noqa: E402 (needs torch)
from hub import random_state  # noqa: E402


def test_blur(tmp_path):
    oracle = torch_kernel_wizard.KernelWizard(2, 1, 2, 4).eval()
    state = random_state(tensor_shapes(), seed=3)
    own = {name: tuple(value.shape) for name, value in oracle.state_dict().items()}
    own.pop("kernel_extractor.0.bias")
    assert own == tensor_shapes()
    weights = {name: torch.tensor(value) for name, value in state.items()}
    weights["kernel_extractor.0.bias"] = torch.zeros(2)
    oracle.load_state_dict(weights)
    torch.save(oracle.state_dict(), tmp_path / "GOPRO_wVAE.pth")
    assert run(tmp_path / "GOPRO_wVAE.pth", tmp_path / "blur", "--verify") == 0
    operator = make_operator(
        "nonlinear_blur", params=pretrained.load_kernel_wizard(tmp_path / "blur")
    )
    x = np.random.default_rng(1).uniform(-0.9, 0.9, (2, 128, 256, 3)).astype(np.float32)
    code = kernel_wizard.blur_code(128, 256, TINY.kernel_dim).transpose(0, 3, 1, 2)
    with torch.no_grad():
        u = (torch.tensor(x.transpose(0, 3, 1, 2)) + 1) / 2
        expected = (2 * oracle(u, torch.tensor(code)) - 1).clamp(-1, 1).numpy()
    expected = expected.transpose(0, 2, 3, 1)
    assert np.abs(expected - x).mean() > 0.02
    got = jax.jit(lambda operator, x: operator(x))(operator, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, atol=2e-5)
