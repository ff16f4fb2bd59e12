"""Profiles name the parts of the sampler."""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import mixing_prior, patch_codec

import aps_jax
from aps_jax import APSConfig, Params, operators
from aps_jax.types import Perceptual

SCOPES = ("denoiser", "expectation", "decoder", "operator", "perceptual", "adam", "remasking")


def mean_square(params, a, b):
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


@pytest.fixture(scope="module")
def scopes():
    """Names of all scopes in the compiled sampler."""
    perceptual = Perceptual(params=None, apply=mean_square)
    params = Params(
        mixing_prior(window=4), patch_codec(), operators.super_resolution(scale=2), perceptual
    )
    y = jnp.zeros((1, 8, 8, 3))
    config = APSConfig(num_steps=2, num_inner_steps=2, perceptual_weight=0.1)
    sample = jax.jit(aps_jax.aps_sample, static_argnames="config")
    text = sample.lower(params, y, jax.random.key(0), config=config).compile().as_text()
    return [set(re.split(r"[/()]", name)) for name in re.findall(r'op_name="([^"]*)"', text)]


@pytest.mark.parametrize("scope", SCOPES)
def test_scope_names_reach_the_compiled_code(scopes, scope):
    assert any(scope in names for names in scopes)


def test_the_gradient_of_the_decoder_carries_its_name(scopes):
    assert any({"decoder", "transpose"} <= names for names in scopes)
