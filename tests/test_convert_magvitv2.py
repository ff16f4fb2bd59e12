import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hub import file_size, random_state, save_single

from aps_jax.codec.magvit2 import CodecConfig, init_codec_params
from aps_jax.io.checkpoint import read_card
from aps_jax.pretrained import load_codec
from convert import magvitv2
from convert.rules import place_tensors

# Halves that do not mirror each other, levels with and without a change of channels.
TINY = CodecConfig(
    num_bits=6,
    encoder_channels=(32, 64, 64),
    encoder_blocks=(1, 2, 1),
    decoder_channels=(32, 32, 64),
    decoder_blocks=(2, 1, 1),
)


def conv(name, inputs, outputs, size=3):
    return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def block(name, inputs, outputs):
    shapes = norm(f"{name}.norm1", inputs) | conv(f"{name}.conv1", inputs, outputs)
    shapes |= norm(f"{name}.norm2", outputs) | conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        shapes |= conv(f"{name}.nin_shortcut", inputs, outputs, 1)
    return shapes


def middle(half, channels):
    shapes = norm(f"{half}.mid.attn_1.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{half}.mid.attn_1.{part}", channels, channels, 1)
    for name in ("block_1", "block_2"):
        shapes |= block(f"{half}.mid.{name}", channels, channels)
    return shapes


def tensor_shapes(config):
    """Names and shapes of the published checkpoint, from its description alone."""
    bits, last = config.num_bits, len(config.encoder_channels) - 1
    width = config.encoder_channels[0]
    shapes = conv("encoder.conv_in", 3, width)
    for level, channels in enumerate(config.encoder_channels):
        for index in range(config.encoder_blocks[level]):
            shapes |= block(f"encoder.down.{level}.block.{index}", width, channels)
            width = channels
        if level < last:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= middle("encoder", width) | norm("encoder.norm_out", width)
    shapes |= conv("encoder.conv_out", width, bits)
    shapes |= conv("encoder.quant_conv", bits, bits, 1)

    width = config.decoder_channels[-1]
    shapes |= conv("decoder.conv_in", bits, width) | middle("decoder", width)
    for level in range(last, -1, -1):
        for index in range(config.decoder_blocks[level]):
            channels = config.decoder_channels[level]
            shapes |= block(f"decoder.up.{level}.block.{index}", width, channels)
            width = channels
        if level > 0:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", width, width)
    shapes |= norm("decoder.norm_out", width) | conv("decoder.conv_out", width, 3)
    return shapes | conv("decoder.post_quant_conv", bits, bits, 1)


def buffers(num_bits):
    tokens = np.arange(2**num_bits)
    bits = [(tokens >> (num_bits - 1 - channel)) & 1 for channel in range(num_bits)]
    return {
        "quantize.embedding": np.stack(bits, axis=1).astype(np.float32) * 2 - 1,
        "quantize.power_vals": np.array([2**k for k in reversed(range(num_bits))]),
    }


def run(source, target, *options):
    return magvitv2.main(magvitv2.FAMILY, "", [str(source), str(target), *options])


@pytest.fixture(scope="module")
def state():
    return random_state(tensor_shapes(TINY))


@pytest.fixture
def refuse(tmp_path, capsys):
    """Converts changed tensors and gives the one line that refuses them."""

    def refuse(state):
        source = save_single(tmp_path / "changed", state)
        assert run(source, tmp_path / "out") == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == {"changed"}
        return captured.err

    return refuse


def test_published_size_follows_from_names_and_shapes():
    """The whole table against one number of the hub: 382,013,656 bytes, or 381.6 MB bare."""
    shapes = tensor_shapes(CodecConfig())
    assert len(shapes) == 380
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 95_387_004
    full = shapes | {"quantize.embedding": (8192, 13), "quantize.power_vals": (13,)}
    integers = {"quantize.power_vals": "I64"}
    assert file_size(full, lambda name: integers.get(name, "F32")) == 382_013_656


def test_published_names_fill_the_default_config():
    source = type("Headers", (), {"shapes": tensor_shapes(CodecConfig())})()
    abstract = jax.eval_shape(lambda key: init_codec_params(key, CodecConfig()), jax.random.key(0))
    targets = traverse_util.flatten_dict(abstract, sep="/")
    places = place_tensors(source, magvitv2.RULES, targets)
    assert {place.target for place in places.values()} == targets.keys()


@pytest.mark.parametrize("with_buffers", [False, True])
def test_converted_codec_has_the_same_numbers(tmp_path, state, with_buffers, capsys):
    tensors = state | (buffers(TINY.num_bits) if with_buffers else {})
    source = save_single(tmp_path / "hub", tensors, {"_class_name": "MAGVITv2"}, "pytorch_model")
    assert run(source, tmp_path / "model", "--verify") == 0
    assert "verified, largest relative rounding 0.0e+00" in capsys.readouterr().out
    codec = load_codec(tmp_path / "model")
    assert dataclasses.asdict(TINY) == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in read_card(tmp_path / "model")["codec"].items()
    }
    params = traverse_util.flatten_dict(codec.params, sep="/")
    assert len(params) == len(state)
    kernel = params["encoder/down_1/block_0/conv1/kernel"]
    original = state["encoder.down.1.block.0.conv1.weight"]
    assert kernel.shape == (3, 3, 32, 64)
    assert kernel[0, 2, 5, 60] == original[60, 5, 0, 2]
    np.testing.assert_array_equal(
        params["decoder/mid/attn_1/norm/scale"], state["decoder.mid.attn_1.norm.weight"]
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("quantize.embedding", lambda x: -x, "'quantize.embedding' has other values"),
        ("quantize.power_vals", lambda x: x[::-1].copy(), "'quantize.power_vals' has other values"),
        (
            "quantize.embedding",
            lambda x: x[:-1],
            r"shape \(63, 6\); this model needs \(64, 6\)",
        ),
        ("encoder.conv_in.bias", lambda x: x[1:], r"\(31,\), which gives \(31,\).*needs \(32,\)"),
        ("encoder.conv_in.bias", lambda x: x * np.nan, "not finite in float32"),
        ("encoder.conv_in.bias", lambda x: x.astype(int), "holds int64, not floating-point"),
    ],
)
def test_changed_tensors(state, refuse, name, change, message):
    tensors = state | buffers(TINY.num_bits)
    tensors[name] = change(tensors[name])
    assert re.search(message, refuse(tensors))


def test_another_kind_of_model(refuse):
    error = refuse({"model.embed_tokens.weight": np.zeros((3, 2), np.float32)})
    assert "no tensor 'encoder.down.0.block.0.conv1.weight': it is another kind" in error


def test_bit_order_matters(tmp_path, state):
    """Tokens read with the least significant bit first would be other tokens."""
    source = save_single(tmp_path / "hub", state)
    assert run(source, tmp_path / "model") == 0
    codec = load_codec(tmp_path / "model")
    features = jnp.array([[[[0.3, -0.1, 0.0, 1e-9, -2.0, 0.5]]]])
    tokens = codec.quantizer.nearest(features)
    bits = [1, 0, 0, 1, 0, 1]  # zero counts as -1
    np.testing.assert_array_equal(codec.quantizer.lookup(tokens).ravel(), 2 * np.array(bits) - 1)
    assert tokens.item() == 0b100101
    assert tokens.item() != int("".join(map(str, reversed(bits))), 2)
    np.testing.assert_array_equal(codec.codebook, buffers(6)["quantize.embedding"])
