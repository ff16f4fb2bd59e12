"""The planning scripts count what there is to count."""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import PRIOR_CONFIG

from aps_jax.codec.convolution import conv_general_dilated
from aps_jax.flops import count_flops, flops_per_second
from aps_jax.prior.bundle import make_prior
from aps_jax.prior.transformer import init_transformer_params


def test_flops_of_products_and_loops():
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 7))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 5 * 7

    def loop(a, b):
        return jax.lax.fori_loop(0, 4, lambda _, x: jnp.tanh(x @ b @ b.T), a)

    assert count_flops(loop, a, b) == 4 * 2 * (2 * 3 * 5 * 7)
    # The gradient of a product is two products.
    gradient = jax.grad(lambda a, b: jnp.sum(jax.jit(jnp.matmul)(a, b) ** 2), (0, 1))
    assert count_flops(gradient, a, b) == 3 * 2 * 3 * 5 * 7
    with pytest.raises(ValueError, match="unknown number of rounds"):
        count_flops(
            lambda a: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, a), b @ b.T
        )


def test_flops_of_convolutions():
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    dims = ("NHWC", "HWIO", "NHWC")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    forward = 2 * (2 * 8 * 8 * 5) * 3 * 3 * 3
    assert count_flops(convolve, x, kernel) == forward

    def inner_loop(x, kernel):
        def loss(x):
            y = conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
            return jnp.sum(y**2)

        return jax.lax.fori_loop(0, 3, lambda _, x: x - jax.grad(loss)(x), x)

    # The kernel's gradient, which the library's convolution offers, is used by nobody here.
    assert count_flops(inner_loop, x, kernel) == 3 * 2 * forward


def test_the_rate_of_products_is_of_this_machine():
    product = jax.jit(jnp.matmul)
    matrix = jnp.ones((512, 512))
    times = []
    for _ in range(10):
        clock = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - clock)
    # Smaller products are slower, and so is a busy machine; a wrong unit is further off.
    assert 1 / 100 < flops_per_second() / (2 * 512**3 / min(times)) < 100


def test_flops_of_a_transformer_have_their_closed_form():
    config = PRIOR_CONFIG
    params = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    batch, length, width, mlp = 2, 16, config.width, config.mlp_width
    apply = make_prior(config, params, window=4).apply
    tokens = jax.ShapeDtypeStruct((batch, 4, 4), jnp.int32)
    per_token = 4 * width * width + 3 * width * mlp + 2 * length * width
    expected = 2 * batch * length * (config.num_layers * per_token + width * config.num_outputs)
    assert count_flops(apply, params, tokens) == expected


@pytest.mark.slow
def test_memory_plan_in_small(tmp_path):
    """The script itself compares the argument bytes of XLA with those of the shapes."""
    command = [sys.executable, "-m", "experiments.memory_plan", "--smoke", "--out", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    for _ in range(2):  # The second run finds everything done.
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [row["mesh"] for row in plan["rows"]] == ["1x1", "2x2"]
    for row in plan["rows"]:
        assert row["temporary_bytes"] > 0 and row["flops"] > 0 and row["fits"]
        parts = ("argument", "temporary", "output")
        assert row["total_bytes"] == sum(row[f"{part}_bytes"] for part in parts)
    alone, shared = plan["rows"]
    assert shared["argument_bytes"] < alone["argument_bytes"]
    # Each of four devices has one of four images, not two of its pair.
    assert shared["output_bytes"] < 1.2 * alone["output_bytes"]
    assert (tmp_path / "plan.md").read_text().count("\n") == 6
    # Really run; a tiny model is lost in what the process holds anyway. Other cases are kept.
    other = {"image_size": 16, "batch": 1, "mesh": "1x1", "prior_params": 1, "is_finite": True}
    (tmp_path / "confirmed.json").write_text(json.dumps([other]))
    done = subprocess.run(
        [*command, "--confirm"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    kept, *confirmed = json.loads((tmp_path / "confirmed.json").read_text())
    assert kept == other
    assert [row["mesh"] for row in confirmed] == ["1x1", "2x2"]
    assert all(row["is_finite"] for row in confirmed)
    for row, planned in zip(confirmed, plan["rows"], strict=True):
        devices = 1 if row["mesh"] == "1x1" else 4
        assert row["planned_argument_bytes"] == devices * planned["compiled_argument_bytes"]
