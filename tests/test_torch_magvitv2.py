"""A converted MagVIT-v2 against PyTorch: same features, same tokens, same images."""

import jax
import numpy as np
import pytest
from hub import random_state
from test_convert_magvitv2 import TINY, buffers, run, tensor_shapes

from aps_jax.codec.magvit2 import decode_tokens, encode_tokens
from aps_jax.pretrained import load_codec

torch = pytest.importorskip("torch", reason="needs pip install 'aps_jax[torch]'")
import torch_magvitv2  # noqa: E402 (needs torch)

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def oracle():
    model = torch_magvitv2.MagVitV2(TINY)
    state = random_state(tensor_shapes(TINY), seed=3) | buffers(TINY.num_bits)
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return model.eval()


@pytest.fixture(scope="module")
def codec(oracle, tmp_path_factory):
    """Converted from the `.bin` that torch itself writes."""
    folder = tmp_path_factory.mktemp("magvitv2")
    torch.save(oracle.state_dict(), folder / "pytorch_model.bin")
    assert run(folder, folder / "model", "--verify") == 0
    return load_codec(folder / "model")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, 12, 20, 3)).astype(np.float32)


@torch.no_grad()
def channels_last(module, x):
    result = module(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2))
    return result.permute(0, 2, 3, 1).numpy()


def error(got, expected):
    """Largest difference relative to the largest value."""
    assert got.shape == expected.shape and expected.std() > 0.1 * np.abs(expected).max()
    return np.abs(got - expected).max() / np.abs(expected).max()


def test_names_are_those_of_the_oracle(oracle):
    state = {name: tuple(value.shape) for name, value in oracle.state_dict().items()}
    quantizer = {name: value.shape for name, value in buffers(TINY.num_bits).items()}
    assert state == tensor_shapes(TINY) | quantizer


def test_encoder(oracle, codec, images):
    got = jax.jit(codec.encode)(codec.params, images)
    assert error(got, channels_last(oracle.encoder, images)) < TOLERANCE


def test_symmetric_downsampling_would_show(oracle, codec, images):
    levels = [level.downsample for level in oracle.encoder.down[:-1]]
    right = channels_last(oracle.encoder, images)
    try:
        for resample in levels:
            resample.is_symmetric = True
        assert error(channels_last(oracle.encoder, images), right) > 0.05
    finally:
        for resample in levels:
            resample.is_symmetric = False


def test_decoder_at_codes_and_in_between(oracle, codec):
    rng = np.random.default_rng(1)
    soft = rng.uniform(-1, 1, (2, 3, 5, TINY.num_bits)).astype(np.float32)
    decode = jax.jit(codec.decode)
    for codes in (soft, np.sign(soft)):
        expected = channels_last(oracle.decoder, codes)
        assert error(decode(codec.params, codes), expected) < TOLERANCE


def test_tokens(oracle, codec, images):
    features = torch.tensor(channels_last(oracle.encoder, images)).permute(0, 3, 1, 2)
    _, expected = oracle.quantize(features)
    got = jax.jit(encode_tokens)(codec, images)
    assert len(np.unique(got)) > 5
    np.testing.assert_array_equal(got, expected)
    reversed_bits = (features.flip(1) > 0) * oracle.quantize.power_vals[None, :, None, None]
    assert (np.asarray(got) != reversed_bits.sum(1).numpy()).any()


def test_zero_is_bit_zero(oracle, codec):
    z = np.zeros((1, 1, 2, TINY.num_bits), np.float32)
    z[0, 0, 1, 0] = 1e-30
    codes, tokens = codec.quantize(codec.codebook, z)
    signs, expected = oracle.quantize(torch.tensor(z).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(codes, signs.permute(0, 2, 3, 1))
    assert tokens.ravel().tolist() == [0, 2 ** (TINY.num_bits - 1)]


def test_images_of_tokens(oracle, codec):
    tokens = np.random.default_rng(2).integers(0, 2**TINY.num_bits, (1, 3, 5))
    expected = channels_last(oracle.decoder, oracle.quantize.embedding[torch.tensor(tokens)])
    assert error(jax.jit(decode_tokens)(codec, tokens), expected) < TOLERANCE
