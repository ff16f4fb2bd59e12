"""The nonlinear-blur network against a NumPy forward pass in the layout of its checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.operators import kernel_wizard, nonlinear_blur

TINY = kernel_wizard.KernelWizardConfig(
    num_features=2, num_front_blocks=1, num_back_blocks=2, kernel_dim=4
)


@jax.jit
def forward(operator, x):
    return operator(x)


def conv(x, weight, bias=None, stride=1):
    """torch conv2d of [C, H, W] with OIHW weights and padding 1."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
    y = np.einsum("ihwkl,oikl->ohw", windows[:, ::stride, ::stride], weight)
    return y if bias is None else y + bias[:, None, None]


def conv_transpose(x, weight, bias=None):
    """torch conv_transpose2d, stride 2, padding 1, with weights [in, out, 4, 4]: a scatter."""
    _, height, width = x.shape
    y = np.zeros((weight.shape[1], 2 * height + 2, 2 * width + 2))
    for i in range(height):
        for j in range(width):
            patch = np.einsum("i,iokl->okl", x[:, i, j], weight)
            y[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch
    y = y[:, 1:-1, 1:-1]
    return y if bias is None else y + bias[:, None, None]


def leaky(x, slope):
    return np.where(x > 0, x, slope * x)


def block(x, weights):
    h = np.maximum(conv(x, *weights["conv1"]), 0)
    return x + conv(h, *weights["conv2"])


def shuffle(x):
    channels, height, width = x.shape
    x = x.reshape(channels // 4, 2, 2, height, width).transpose(0, 3, 1, 4, 2)
    return x.reshape(channels // 4, 2 * height, 2 * width)


def reference(weights, u, code):
    """`adaptKernel` for one image [3, H, W] and code [kernel_dim, H/128, W/128]."""
    h = leaky(conv(u, *weights["feature_extractor_0"]), 0.1)
    h = leaky(conv(h, *weights["feature_extractor_2"], stride=2), 0.1)
    h = leaky(conv(h, *weights["feature_extractor_4"], stride=2), 0.1)
    h = block(h, weights["feature_extractor_6"])
    d0 = conv(h, *weights["down_0"], stride=2)
    d1 = conv(leaky(d0, 0.2), *weights["down_1"], stride=2)
    d2 = conv(leaky(d1, 0.2), *weights["down_2"], stride=2)
    d3 = conv(leaky(d2, 0.2), *weights["down_3"], stride=2)
    d4 = conv(leaky(d3, 0.2), *weights["down_4"], stride=2)
    h = code
    for name, first, second in (("up_4", d4, None), ("up_3", None, d3), ("up_2", None, d2)):
        pair = [first, h] if second is None else [h, second]
        h = conv_transpose(np.maximum(np.concatenate(pair), 0), *weights[name])
    h = conv_transpose(np.maximum(np.concatenate([h, d1]), 0), *weights["up_1"])
    h = np.tanh(conv_transpose(np.maximum(np.concatenate([h, d0]), 0), *weights["up_0"]))
    h = block(block(h, weights["recon_trunk_0"]), weights["recon_trunk_1"])
    h = leaky(shuffle(conv(h, *weights["recon_trunk_2"])), 0.1)
    h = leaky(shuffle(conv(h, *weights["recon_trunk_5"])), 0.1)
    h = leaky(conv(h, *weights["recon_trunk_8"]), 0.1)
    return u + conv(h, *weights["recon_trunk_10"])


def torch_layout(tree, name=""):
    """Random parameters of ours as the checkpoint would hold them: (weight, bias) per layer."""
    if "kernel" not in tree:
        return {key: torch_layout(value, key) for key, value in tree.items()}
    kernel = np.asarray(tree["kernel"], np.float64)
    if name.startswith("up"):
        weight = kernel[::-1, ::-1].transpose(2, 3, 0, 1)
    else:
        weight = kernel.transpose(3, 2, 0, 1)
    return (weight, np.asarray(tree["bias"], np.float64)) if "bias" in tree else (weight,)


def random_params(config=TINY):
    params = kernel_wizard.init_params(jax.random.key(0), config=config)
    rng = np.random.default_rng(0)

    def stir(leaf):  # Livelier than the initialisation, which leaves biases at zero.
        return jnp.asarray(2 * leaf + rng.normal(0, 0.05, leaf.shape), "float32")

    return jax.tree.map(stir, params)


def test_network_matches_numpy():
    params = random_params()
    x = np.random.default_rng(1).uniform(-0.9, 0.9, (128, 256, 3))
    code = kernel_wizard.blur_code(128, 256, TINY.kernel_dim)
    expected = reference(
        torch_layout(params), (x.transpose(2, 0, 1) + 1) / 2, code[0].transpose(2, 0, 1)
    )
    expected = np.clip(2 * expected.transpose(1, 2, 0) - 1, -1, 1)
    got = forward(nonlinear_blur(params, config=TINY), jnp.asarray(x, "float32")[None])[0]
    assert np.abs(expected - x).mean() > 0.01  # The network does something.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_parameter_count_and_shapes():
    shapes = kernel_wizard.param_shapes(kernel_wizard.KernelWizardConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 23_662_531
    assert shapes["up_4"]["kernel"].shape == (4, 4, 1024, 512)
    assert shapes["feature_extractor_15"]["conv2"]["kernel"].shape == (3, 3, 64, 64)
    assert shapes["recon_trunk_28"]["kernel"].shape == (3, 3, 64, 3)
    with_bias = [level for level in range(5) if "bias" in shapes[f"up_{level}"]]
    assert with_bias == [0]


def test_blur_code_is_the_published_one():
    code = kernel_wizard.blur_code(256, 256)
    expected = np.random.RandomState(0).randn(1, 512, 2, 2).astype(np.float32) * np.float32(1.2)
    assert code.shape == (1, 2, 2, 512) and code.dtype == np.float32
    np.testing.assert_array_equal(code.transpose(0, 3, 1, 2), expected)


def test_other_sizes_are_padded_by_reflection_and_cropped():
    params = random_params()
    operator = nonlinear_blur(params, config=TINY)
    x = jax.random.uniform(jax.random.key(0), (1, 100, 60, 3), minval=-0.9, maxval=0.9)
    padded = jnp.pad(x, ((0, 0), (14, 14), (34, 34), (0, 0)), mode="reflect")
    expected = forward(operator, padded)[:, 14:114, 34:94]
    np.testing.assert_allclose(forward(operator, x), expected, atol=1e-6)


def test_weights_of_another_size_are_refused():
    params = random_params()
    del params["up_0"]["bias"]
    with pytest.raises(
        ValueError, match=r"\['up_0'\]\['bias'\] has shape missing, required \(2,\)"
    ):
        nonlinear_blur(params, config=TINY)
    with pytest.raises(ValueError, match=r"has shape \(4, 4, 2, 2\), required \(4, 4, 64, 64\)"):
        nonlinear_blur(random_params(), config=kernel_wizard.KernelWizardConfig())


@pytest.mark.slow
def test_full_network_at_full_size():
    operator = nonlinear_blur(kernel_wizard.init_params(jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(1), (1, 256, 256, 3), minval=-0.9, maxval=0.9)
    y = forward(operator, x)
    assert y.shape == x.shape
    assert jnp.isfinite(y).all() and jnp.abs(y).max() <= 1
