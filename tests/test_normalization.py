import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.codec.group_norm import GroupNorm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_flax(rng, dtype):
    """With a mean 20 times the deviation, which a variance of squares would lose digits to."""
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 6)) + 20, jnp.float32).astype(dtype)
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32).astype(dtype)
    params = {
        "scale": jnp.asarray(rng.normal(size=6), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=6), jnp.float32),
    }
    ours = GroupNorm(num_groups=3, epsilon=1e-6, dtype=dtype)
    theirs = nn.GroupNorm(num_groups=3, epsilon=1e-6, use_fast_variance=False, dtype=dtype)

    def evaluate(module):
        @jax.jit
        def run(params, x):
            y, vjp = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
            return y, *vjp(cotangent)

        return run(params, x)

    tolerance = 1e-4 if dtype == "float32" else 4e-2
    got, expected = evaluate(ours), evaluate(theirs)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_images_of_a_batch_are_normalised_apart(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.float32)
    module = GroupNorm(num_groups=2, epsilon=1e-6, dtype="float32")
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    both = module.apply({"params": params}, x)
    alone = module.apply({"params": params}, x[1:])
    np.testing.assert_allclose(both[1:], alone, atol=1e-6)
    grouped = np.asarray(both).reshape(2, 9, 2, 2)
    np.testing.assert_allclose(grouped.mean(axis=(1, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(grouped.std(axis=(1, 3)), 1, atol=1e-5)
