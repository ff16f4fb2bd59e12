"""Shared tiny models. Nothing here is trained: tests check laws, not pictures.

Most of the tests' time would be compilation, so they and their child processes leave out most of
XLA's optimisations; `APS_JAX_TEST_OPTIMIZED=1` compiles as users do.
"""

import dataclasses
import os
import signal
from pathlib import Path

import jaxlib

# Converters and studies are not installed; child processes must find them as the tests do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
)

if not os.environ.get("APS_JAX_TEST_OPTIMIZED"):  # Read once, when JAX starts.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # XLA ends the process on a flag that it does not know: only where it was tried.
    if jaxlib.__version__.startswith("0.10."):
        _FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typecheck  # noqa: F401 - installs the check of shapes

from aps_jax.codec import lfq
from aps_jax.codec.magvit2 import CodecConfig, init_codec_params, make_codec, space_to_depth
from aps_jax.io import checkpoint
from aps_jax.prior.bundle import make_prior
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.types import Codec, Prior, bind

NUM_BITS = 4
NUM_CODES = 2**NUM_BITS

CODEC_CONFIG = CodecConfig(
    num_bits=NUM_BITS,
    encoder_channels=(8, 8, 16),
    encoder_blocks=(0, 0, 1),
    decoder_channels=(8, 8, 16),
    decoder_blocks=(0, 0, 1),
    num_groups=4,
)
PRIOR_CONFIG = TransformerConfig(
    vocab_size=NUM_CODES + 1,
    num_outputs=NUM_CODES,
    width=16,
    num_layers=1,
    num_heads=2,
    mlp_width=16,
    rope_axes=2,
)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive():
    """Shells start background jobs with SIGINT ignored; the tests of Ctrl-C need it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def random_params(init, config, seed=0):
    """Random weights in the shapes of `init(key, config)`, without compiling an initialiser.

    Norms and biases are random as well: scales of exactly 1 and biases of exactly 0 hide mistakes.
    """
    abstract = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        elif path[-1].key == "scale":
            noise = 1 + 0.3 * noise
        elif path[-1].key == "bias":
            noise = 0.3 * noise
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def patch_decode(params, codes, *, stride):
    """Each token paints its own patch: tanh(codes @ weights), no convolution to compile."""
    batch, height, width, bits = codes.shape
    patches = jnp.tanh(codes.reshape(-1, bits) @ params)
    x = patches.reshape(batch, height, width, stride, stride, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * stride, width * stride, 3)


def patch_encode(params, x, *, stride):
    """Features [B, h, w, bits]: each patch against the weights of each bit."""
    return space_to_depth(x, stride) @ params.T


def patch_codec(num_bits=NUM_BITS, stride=4, seed=0):
    """A codec that compiles at once; its encoder is the adjoint of its decoder's matrix."""
    weights = np.random.default_rng(seed).normal(size=(num_bits, stride * stride * 3))
    return Codec(
        params=jnp.asarray(0.5 * weights, jnp.float32),
        quantizer=lfq.LFQ(num_bits),
        encode=bind(patch_encode, stride=stride),
        decode=bind(patch_decode, stride=stride),
        stride=stride,
    )


def channel_matrix(operator, side):
    """A linear operator on one channel of side x side images, as a float64 matrix by columns."""
    basis = np.eye(side * side).reshape(-1, side, side, 1)
    columns = operator(jnp.asarray(np.repeat(basis, 3, axis=-1), jnp.float32))[..., 0]
    return np.asarray(columns, np.float64).reshape(side * side, -1).T


def _mixing_logits(params, tokens):
    hidden = params["embed"][tokens]
    hidden = jnp.tanh(hidden + jnp.mean(hidden, axis=(1, 2), keepdims=True))
    return (hidden.reshape(-1, hidden.shape[-1]) @ params["head"]).reshape(*tokens.shape, -1)


def _flipped_logits(params, tokens):
    return -0.5 * _mixing_logits(params, tokens)


def mixing_prior(num_codes=NUM_CODES, window=None, seed=0):
    """A prior whose logits depend on every token of the window, with an unconditional form."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(num_codes + 1, 8)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(8, num_codes)), jnp.float32),
    }
    return Prior(
        params=params,
        apply=bind(_mixing_logits),
        num_codes=num_codes,
        window=window,
        apply_unconditional=bind(_flipped_logits),
    )


def make_tiny_codec():
    """The real architecture, 4 bits and stride 4, all weights random."""
    return make_codec(CODEC_CONFIG, random_params(init_codec_params, CODEC_CONFIG))


def make_tiny_prior():
    """The real transformer over 4x4 windows, all weights random."""
    params = random_params(init_transformer_params, PRIOR_CONFIG, seed=1)
    return make_prior(PRIOR_CONFIG, params, window=4)


tiny_codec = pytest.fixture(scope="session")(make_tiny_codec)
tiny_prior = pytest.fixture(scope="session")(make_tiny_prior)


@pytest.fixture(scope="session")
def toy_codec():
    """`patch_codec` with the bits and the stride of `tiny_codec`."""
    return patch_codec()


@pytest.fixture(scope="session")
def toy_prior():
    """`mixing_prior` with the codes of `toy_codec`."""
    return mixing_prior(window=4)


@pytest.fixture
def rng():
    """A fresh NumPy generator of a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model folder with random weights."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save_params(
        folder / "codec.safetensors", random_params(init_codec_params, CODEC_CONFIG)
    )
    checkpoint.save_params(
        folder / "prior.safetensors", random_params(init_transformer_params, PRIOR_CONFIG)
    )
    checkpoint.update_card(
        folder,
        codec=dataclasses.asdict(CODEC_CONFIG),
        prior=dataclasses.asdict(PRIOR_CONFIG),
        prior_window=4,
    )
    return folder
