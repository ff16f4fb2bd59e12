import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from flax import traverse_util

from aps_jax.codec.magvit2 import (
    CodecConfig,
    decode_tokens,
    depth_to_space,
    encode_tokens,
    init_codec_params,
    make_codec,
    reconstruct,
    space_to_depth,
)

# Levels with and without a change of channels, halves that do not mirror each other.
SMALL = CodecConfig(
    num_bits=5,
    encoder_channels=(8, 12, 12),
    encoder_blocks=(1, 1, 0),
    decoder_channels=(8, 8, 12),
    decoder_blocks=(1, 2, 0),
    num_groups=4,
)
SHAPE = (2, 12, 20, 3)  # neither square nor a power of two: a grid of 3 x 5 tokens


@pytest.fixture(scope="module")
def codec():
    return make_codec(SMALL, random_params(init_codec_params, SMALL, seed=1))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, SHAPE), jnp.float32)


@pytest.fixture(scope="module")
def features(images):
    shape = (SHAPE[0], SHAPE[1] // 4, SHAPE[2] // 4, SMALL.num_bits)
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, shape), jnp.float32)


@pytest.fixture(scope="module")
def decode():
    return jax.jit(lambda codec, codes: codec.decode(codec.params, codes))


@pytest.fixture(scope="module")
def encode():
    return jax.jit(lambda codec, x: codec.encode(codec.params, x))


# The architecture, in float64 NumPy, from the released checkpoint's description alone.


class Reference:
    """One image at a time; weights by their path in the checkpoint."""

    def __init__(self, params, num_groups, symmetric_downsampling=False):
        flat = traverse_util.flatten_dict(params, sep="/")
        self.weights = {name: np.asarray(value, np.float64) for name, value in flat.items()}
        self.num_groups = num_groups
        self.down_padding = ((1, 1), (1, 1)) if symmetric_downsampling else ((0, 1), (0, 1))

    def conv(self, x, name, stride=1, padding=None):
        kernel, bias = self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"]
        size = kernel.shape[0]
        padding = padding or ((size // 2, size // 2),) * 2
        x = np.pad(x, (*padding, (0, 0)))
        rows, columns = (x.shape[axis] - size + 1 for axis in (0, 1))
        y = sum(
            x[i : i + rows, j : j + columns] @ kernel[i, j]
            for i in range(size)
            for j in range(size)
        )
        return y[::stride, ::stride] + bias

    def norm(self, x, name):
        height, width, channels = x.shape
        size = channels // self.num_groups  # groups of neighbouring channels
        grouped = x.reshape(height * width, self.num_groups, size)
        mean = grouped.mean(axis=(0, 2), keepdims=True)
        variance = ((grouped - mean) ** 2).mean(axis=(0, 2), keepdims=True)
        normed = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
        return normed * self.weights[f"{name}/scale"] + self.weights[f"{name}/bias"]

    @staticmethod
    def swish(x):
        return x / (1 + np.exp(-x))

    def block(self, x, name):
        h = self.conv(self.swish(self.norm(x, f"{name}/norm1")), f"{name}/conv1")
        h = self.conv(self.swish(self.norm(h, f"{name}/norm2")), f"{name}/conv2")
        if f"{name}/nin_shortcut/kernel" in self.weights:
            x = self.conv(x, f"{name}/nin_shortcut")
        return x + h

    def attention(self, x, name):
        normed = self.norm(x, f"{name}/norm")
        query, key, value = (
            self.conv(normed, f"{name}/{part}").reshape(-1, x.shape[-1]) for part in "qkv"
        )
        scores = np.exp(query @ key.T / np.sqrt(x.shape[-1]))
        mixed = (scores / scores.sum(axis=1, keepdims=True)) @ value
        return x + self.conv(mixed.reshape(x.shape), f"{name}/proj_out")

    def middle(self, x, name):
        x = self.block(x, f"{name}/block_1")
        x = self.attention(x, f"{name}/attn_1")
        return self.block(x, f"{name}/block_2")

    def tail(self, x, name):
        return self.conv(self.swish(self.norm(x, f"{name}/norm_out")), f"{name}/conv_out")

    def encode(self, x, blocks):
        x = self.conv(x, "encoder/conv_in")
        for level, count in enumerate(blocks):
            for index in range(count):
                x = self.block(x, f"encoder/down_{level}/block_{index}")
            if level < len(blocks) - 1:
                name = f"encoder/down_{level}/downsample/conv"
                x = self.conv(x, name, stride=2, padding=self.down_padding)
        return self.conv(self.tail(self.middle(x, "encoder/mid"), "encoder"), "encoder/quant_conv")

    def decode(self, codes, blocks):
        x = self.conv(codes, "decoder/post_quant_conv")
        x = self.middle(self.conv(x, "decoder/conv_in"), "decoder/mid")
        for level in reversed(range(len(blocks))):
            for index in range(blocks[level]):
                x = self.block(x, f"decoder/up_{level}/block_{index}")
            if level > 0:
                x = self.conv(np.kron(x, np.ones((2, 2, 1))), f"decoder/up_{level}/upsample/conv")
        return self.tail(x, "decoder")


@pytest.fixture(scope="module")
def reference(codec):
    return Reference(codec.params, SMALL.num_groups)


def test_encoder_equals_the_float64_reference(codec, reference, encode, images):
    expected = np.stack([reference.encode(x, SMALL.encoder_blocks) for x in np.float64(images)])
    got = encode(codec, images)
    chex.assert_type(got, jnp.float32)
    scale = np.abs(expected).max()
    assert expected.std() > 0.1 * scale  # not a constant
    np.testing.assert_allclose(got, expected, atol=2e-5 * max(scale, 1), rtol=0)


def test_symmetric_downsampling_would_be_another_encoder(codec, reference, images):
    wrong = Reference(codec.params, SMALL.num_groups, symmetric_downsampling=True)
    x = np.float64(images[0])
    right = reference.encode(x, SMALL.encoder_blocks)
    difference = np.abs(wrong.encode(x, SMALL.encoder_blocks) - right).max()
    assert difference > 0.1 * np.abs(right).max()


def test_decoder_equals_the_float64_reference(codec, reference, decode, features):
    expected = np.stack([reference.decode(c, SMALL.decoder_blocks) for c in np.float64(features)])
    got = decode(codec, features)
    assert got.shape == SHAPE
    chex.assert_type(got, jnp.float32)
    scale = np.abs(expected).max()
    assert expected.std() > 0.1 * scale
    np.testing.assert_allclose(got, expected, atol=2e-5 * max(scale, 1), rtol=0)


def test_images_of_a_batch_do_not_meet(codec, decode, encode, images, features):
    # Same shapes as the parity tests, so nothing compiles here.
    changed = images.at[1].set(0.5)
    np.testing.assert_array_equal(encode(codec, changed)[0], encode(codec, images)[0])
    changed = features.at[1].set(-1.0)
    np.testing.assert_array_equal(decode(codec, changed)[0], decode(codec, features)[0])


def test_gradient_of_the_decoder_equals_finite_differences(codec, reference, features, rng):
    weights = rng.normal(size=SHAPE[1:])
    loss = jax.jit(
        jax.grad(
            lambda codes: jnp.sum(
                codec.decode(codec.params, codes[None])[0] * jnp.asarray(weights, jnp.float32)
            )
        )
    )
    grad = np.float64(loss(features[0]))

    def value(codes):
        return np.sum(reference.decode(codes, SMALL.decoder_blocks) * weights)

    codes, step = np.float64(features[0]), 1e-5
    for _ in range(3):
        direction = rng.normal(size=codes.shape)
        slope = (value(codes + step * direction) - value(codes - step * direction)) / (2 * step)
        expected_size = np.linalg.norm(grad) * np.linalg.norm(direction)
        assert abs(np.sum(grad * direction) - slope) < 1e-4 * expected_size


def test_bfloat16_activations_give_float32_images(codec, decode, features):
    config = CodecConfig(**{**vars(SMALL), "dtype": "bfloat16"})
    rough = decode(make_codec(config, codec.params), features)
    exact = decode(codec, features)
    chex.assert_type(rough, jnp.float32)
    error = np.abs(rough - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < 0.05  # bfloat16 was used, and it is the same network


# Names and sizes of the released checkpoint.

ENCODER_LEVELS = [(128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3), (512, 512, 4)]
DECODER_LEVELS = [(128, 128, 4), (256, 128, 4), (256, 256, 3), (512, 256, 4), (512, 512, 3)]


def conv_shapes(name, inputs, outputs, size=3):
    return {f"{name}/kernel": (size, size, inputs, outputs), f"{name}/bias": (outputs,)}


def norm_shapes(name, channels):
    return {f"{name}/scale": (channels,), f"{name}/bias": (channels,)}


def block_shapes(name, inputs, outputs):
    shapes = norm_shapes(f"{name}/norm1", inputs) | norm_shapes(f"{name}/norm2", outputs)
    shapes |= conv_shapes(f"{name}/conv1", inputs, outputs)
    shapes |= conv_shapes(f"{name}/conv2", outputs, outputs)
    if inputs != outputs:
        shapes |= conv_shapes(f"{name}/nin_shortcut", inputs, outputs, size=1)
    return shapes


def half_shapes(levels, kind, resampled):
    shapes = {}
    for index, (inputs, outputs, blocks) in enumerate(levels):
        for block in range(blocks):
            name = f"{kind}_{index}/block_{block}"
            shapes |= block_shapes(name, outputs if block else inputs, outputs)
        if index in resampled:
            shapes |= conv_shapes(f"{kind}_{index}/{kind}sample/conv", outputs, outputs)
    for name in ("mid/block_1", "mid/block_2"):
        shapes |= block_shapes(name, 512, 512)
    shapes |= norm_shapes("mid/attn_1/norm", 512)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= conv_shapes(f"mid/attn_1/{name}", 512, 512, size=1)
    return shapes


def test_default_config_is_the_released_checkpoint():
    config = CodecConfig()
    assert config.stride == 16
    abstract = jax.eval_shape(lambda key: init_codec_params(key, config), jax.random.key(0))
    encoder = half_shapes(ENCODER_LEVELS, "down", resampled=(0, 1, 2, 3))
    encoder |= conv_shapes("conv_in", 3, 128) | conv_shapes("conv_out", 512, 13)
    encoder |= norm_shapes("norm_out", 512) | conv_shapes("quant_conv", 13, 13, size=1)
    decoder = half_shapes(DECODER_LEVELS, "up", resampled=(1, 2, 3, 4))
    decoder |= conv_shapes("conv_in", 13, 512) | conv_shapes("conv_out", 128, 3)
    decoder |= norm_shapes("norm_out", 128) | conv_shapes("post_quant_conv", 13, 13, size=1)
    for half, expected, count in [
        ("encoder", encoder, 55_439_171),
        ("decoder", decoder, 39_947_833),
    ]:
        flat = traverse_util.flatten_dict(abstract[half], sep="/")
        assert {name: leaf.shape for name, leaf in flat.items()} == expected
        assert len(flat) == 190
        assert sum(leaf.size for leaf in flat.values()) == count
    shortcuts = {name.rsplit("/", 2)[0] for name in encoder | decoder if "nin_shortcut/k" in name}
    assert shortcuts == {"down_1/block_0", "down_3/block_0", "up_3/block_0", "up_1/block_0"}


@pytest.mark.parametrize("grid", [(1, 1), (2, 7), (9, 4)])
def test_any_grid_is_decoded_and_encoded(codec, grid):
    height, width = 4 * grid[0], 4 * grid[1]
    codes = jax.ShapeDtypeStruct((1, *grid, 5), "float32")
    x = jax.ShapeDtypeStruct((1, height, width, 3), "float32")
    assert jax.eval_shape(codec.decode, codec.params, codes).shape == x.shape
    assert jax.eval_shape(codec.encode, codec.params, x).shape == codes.shape


def test_tokens_are_the_signs_of_the_features(codec, encode, images):
    tokens = jax.jit(encode_tokens)(codec, images)
    bits = np.asarray(encode(codec, images)) > 0
    np.testing.assert_array_equal(tokens, bits @ np.array([16, 8, 4, 2, 1]))
    chex.assert_type(tokens, jnp.int32)
    assert len(np.unique(tokens)) > 3


def test_tokens_are_decoded_through_their_codes(codec, decode, rng):
    tokens = jnp.asarray(rng.integers(0, 32, size=(2, 3, 5)))
    np.testing.assert_allclose(
        jax.jit(decode_tokens)(codec, tokens), decode(codec, codec.codebook[tokens]), atol=1e-6
    )


def test_reconstruct_pads_the_edge_and_crops_back(codec, images, encode, decode):
    x = images[:, :9, :18]
    padded = np.pad(x, ((0, 0), (0, 3), (0, 2), (0, 0)), mode="edge")
    assert padded.shape == SHAPE
    got = jax.jit(reconstruct)(codec, x)
    assert got.shape == x.shape
    whole = decode(codec, jnp.sign(encode(codec, jnp.asarray(padded))))
    np.testing.assert_allclose(got, whole[:, :9, :18], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 10, 12, 3), (1, 12, 10, 3), (12, 12, 3)])
def test_images_that_do_not_fit_the_stride(codec, shape):
    with pytest.raises(ValueError, match="H and W multiples of 4"):
        encode_tokens(codec, jnp.zeros(shape))


def test_bad_configs():
    with pytest.raises(ValueError, match="need 5 levels"):
        CodecConfig(decoder_blocks=(1, 1))
    with pytest.raises(ValueError, match="num_groups=24 does not divide 128 channels"):
        CodecConfig(num_groups=24)
    listed = CodecConfig(encoder_blocks=[4, 3, 4, 3, 4])  # as read from JSON
    assert hash(listed) == hash(CodecConfig()) and listed == CodecConfig()


def test_patches_and_back(rng):
    x = rng.normal(size=(2, 8, 12, 3))
    patches = space_to_depth(x, 4)
    assert patches.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(patches[0, 1, 1], x[0, 4:8, 4:8].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(patches, 4), x)


def test_patch_path_adds_what_one_patch_says(images, features, encode, decode):
    """Against the same weights without the path, plus the perceptron in float64 NumPy."""
    config = dataclasses.replace(SMALL, patch_width=6, patch_blocks=3)
    params = random_params(init_codec_params, config, seed=2)
    codec = make_codec(config, params)
    plain = make_codec(
        SMALL, {half: {k: v for k, v in params[half].items() if k != "patch"} for half in params}
    )

    def perceptron(half, x):
        weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[half]["patch"])

        def dense(x, layer):
            return x @ layer["kernel"] + layer["bias"]

        def norm(x, layer):
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]

        def swish(x):
            return x / (1 + np.exp(-x))

        x = dense(np.asarray(x, np.float64), weights["dense_in"])
        for index in range(3):
            block = jax.tree.map(lambda leaf, index=index: leaf[index], weights["blocks"])
            x = x + dense(swish(dense(norm(x, block["norm"]), block["dense1"])), block["dense2"])
        return dense(swish(norm(x, weights["norm_out"])), weights["dense_out"])

    extra = encode(codec, images) - encode(plain, images)
    expected = perceptron("encoder", space_to_depth(images, 4))
    np.testing.assert_allclose(extra, expected, atol=1e-4 * np.abs(expected).max())
    extra = decode(codec, features) - decode(plain, features)
    expected = depth_to_space(perceptron("decoder", features), 4)
    np.testing.assert_allclose(extra, expected, atol=1e-4 * np.abs(expected).max())
