from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from aps_jax.codec import lfq
from aps_jax.codec.convolution import conv_general_dilated, upsampled_conv

LAYOUT = ("NHWC", "HWIO", "NHWC")
ours = partial(conv_general_dilated, dimension_numbers=LAYOUT)
lax_conv = partial(jax.lax.conv_general_dilated, dimension_numbers=LAYOUT)


def draw(seed, x_shape, kernel_shape):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=x_shape), jnp.float32),
        jnp.asarray(rng.normal(size=kernel_shape), jnp.float32),
    )


@partial(jax.jit, static_argnums=(2, 3))
def value_and_gradients(x, kernel, conv, padding):
    y, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, (1, 1), padding), x, kernel)
    # A cotangent that no symmetry hides behind.
    cotangent = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, *vjp(cotangent)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    image_size=st.tuples(st.integers(4, 6), st.integers(4, 6)),
    padding=st.one_of(
        st.sampled_from(["SAME", "VALID"]),
        st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    ),
)
def test_value_and_gradients_are_those_of_lax(kernel_size, image_size, padding):
    x, kernel = draw(0, (2, *image_size, 2), (*kernel_size, 2, 3))
    got = value_and_gradients(x, kernel, ours, padding)
    expected = value_and_gradients(x, kernel, lax_conv, padding)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "padding"),
    [
        (1, "SAME"),
        (3, "SAME"),
        (3, "VALID"),
        (2, "SAME"),
        (3, ((2, 0), (0, 3))),
        (2, ((3, 1), (0, 2))),
    ],
)
def test_paddings_that_the_decoder_may_meet(size, padding):
    x, kernel = draw(1, (1, 5, 4, 2), (size, size, 2, 3))
    got = value_and_gradients(x, kernel, ours, padding)
    expected = value_and_gradients(x, kernel, lax_conv, padding)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image_size", [(1, 1), (2, 2), (1, 4), (4, 4), (5, 4)])
def test_images_of_a_few_pixels(image_size):
    x, kernel = draw(3, (3, *image_size, 5), (3, 3, 5, 4))
    got = value_and_gradients(x, kernel, ours, "SAME")
    expected = value_and_gradients(x, kernel, lax_conv, "SAME")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def uses_own_gradient(**settings):
    x, kernel = draw(2, (1, 6, 6, 4), (3, 3, settings.pop("inputs", 4), 4))
    strides = settings.pop("strides", (1, 1))
    jaxpr = jax.make_jaxpr(lambda x, k: ours(x, k, strides, "SAME", **settings))(x, kernel)
    return "custom_vjp" in str(jaxpr)


def test_only_plain_convolutions_take_the_own_gradient():
    assert uses_own_gradient()
    assert uses_own_gradient(lhs_dilation=(1, 1), rhs_dilation=(1, 1))
    assert not uses_own_gradient(strides=(2, 2))
    assert not uses_own_gradient(rhs_dilation=(2, 2))
    assert not uses_own_gradient(feature_group_count=2, inputs=2)
    assert uses_own_gradient(precision="highest")
    assert not uses_own_gradient(preferred_element_type=jnp.float32)


def test_strided_convolution_is_passed_on():
    x, kernel = draw(3, (1, 6, 6, 2), (3, 3, 2, 3))
    padding = ((0, 1), (0, 1))
    np.testing.assert_array_equal(
        ours(x, kernel, (2, 2), padding), lax_conv(x, kernel, (2, 2), padding)
    )


def test_gradient_inside_a_loop_is_the_same():
    x, kernel = draw(4, (1, 6, 6, 4), (3, 3, 4, 4))

    def descend(conv):
        def loss(x):
            return jnp.mean(conv(x, kernel, (1, 1), "SAME") ** 2)

        return jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x - jax.grad(loss)(x), x))(x)

    moved = descend(ours)
    np.testing.assert_allclose(moved, descend(lax_conv), rtol=1e-4, atol=1e-5)
    assert np.abs(moved - x).max() > 0.1


def doubled_first(x, kernel, strides, padding):
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return lax_conv(x, kernel, strides, padding)


@pytest.mark.parametrize("size", [(4, 5), (1, 3)])
def test_upsampled_convolution_is_doubling_and_a_convolution(size):
    """The sums of kernel taps round differently: a few units of the last place."""
    x, kernel = draw(5, (2, *size, 2), (3, 3, 2, 3))
    got = value_and_gradients(x, kernel, upsampled_conv, "SAME")
    expected = value_and_gradients(x, kernel, doubled_first, "SAME")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_upsampled_convolution_is_for_one_kernel_size():
    x, kernel = draw(6, (1, 4, 4, 2), (5, 5, 2, 2))
    with pytest.raises(ValueError, match=r"3x3 convolution.*\(5, 5\)"):
        upsampled_conv(x, kernel, (1, 1), "SAME")


def precisions(function, *args):
    """Of every product and convolution in the jaxpr of a function."""

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                yield equation.params["precision"]
            for inner in core.jaxprs_in_params(equation.params):
                yield from collect(inner)

    return list(collect(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("size", [3, 8])
def test_gradients_have_the_precision_of_the_forward_pass(size):
    """A written-out gradient is traced after the context is left, where it would fall to TF32."""
    x, kernel = draw(0, (1, size, size, 2), (3, 3, 2, 3))
    highest = (jax.lax.Precision.HIGHEST,) * 2

    def loss(x, kernel, conv):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(conv(x, kernel, (1, 1), "SAME") ** 2)

    for conv in (ours, upsampled_conv):
        gradients = jax.grad(partial(loss, conv=conv), argnums=(0, 1))
        found = precisions(gradients, x, kernel)
        assert len(found) >= 3 and set(found) == {highest}
        told = jax.grad(lambda x, c=conv: c(x, kernel, (1, 1), "SAME", precision=highest[0]).sum())
        assert set(precisions(told, x)) == {highest}
        assert set(
            precisions(jax.grad(lambda x, c=conv: c(x, kernel, (1, 1), "SAME").sum()), x)
        ) == {None}


def test_mean_codes_are_exact_products_both_ways():
    logits = draw(0, (2, 16), (1,))[0]
    found = precisions(jax.grad(lambda logits: jnp.sum(lfq.mean_code(logits) ** 2)), logits)
    assert len(found) == 4 and set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_other_layouts_are_those_of_lax():
    x, kernel = draw(0, (2, 5, 5, 3), (3, 3, 3, 4))
    x, kernel = jnp.transpose(x, (0, 3, 1, 2)), jnp.transpose(kernel, (3, 2, 0, 1))
    got = conv_general_dilated(x, kernel, (1, 1), "SAME")
    np.testing.assert_allclose(got, jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME"))
    assert got.shape == (2, 4, 5, 5)
    wide = ours(*draw(0, (1, 5, 5, 3), (3, 3, 3, 4)), (1, 1), "SAME",
                preferred_element_type=jnp.float32)  # fmt: skip
    assert wide.dtype == jnp.float32
