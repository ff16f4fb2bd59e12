"""What `aps-jax restore` says of memory: an estimate near XLA's plan, and sizes that do fit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import mixing_prior

from aps_jax import Params, energies, operators, presets, pretrained
from aps_jax.cli import inputs, memory, stylize
from aps_jax.samplers import sample, sample_target
from aps_jax.sampling.edits import whole_target
from aps_jax.scores import lpips
from aps_jax.types import Features, bind


def config_of(sampler="aps", *, image_shape=(64, 96), num_samples=1):
    config = presets.make_config(preset=None, sampler=sampler, budget=None, num_samples=num_samples)
    return dataclasses.replace(config, image_shape=image_shape)


@pytest.fixture
def model(tiny_codec):
    return pretrained.Model(mixing_prior(window=4), tiny_codec, {})


def advice(model, monkeypatch, free, **options):
    monkeypatch.setattr(inputs, "free_memory", lambda: int(free))
    return memory.advice(config_of(**options), model)


def estimate(model, **options):
    return memory.estimate(config_of(**options), model)


def test_the_decoder_counts_and_grows_with_samples_and_area(model):
    one = estimate(model)
    assert estimate(model, num_samples=4) == pytest.approx(4 * one, rel=0.05)
    assert 1.9 * one < estimate(model, image_shape=(128, 96))
    logits = memory._LOGIT_COPIES * 4 * (64 // 4) * (96 // 4) * 16
    assert one > 2 * logits > 2 * estimate(model, sampler="maskgit")


@pytest.mark.parametrize("num_samples", [1, 5])
def test_the_proposed_size_fits(model, monkeypatch, num_samples):
    """A size is for one sample of a square."""
    free = estimate(model) / 3
    text = advice(model, monkeypatch, free, num_samples=num_samples)
    assert ("set --num-samples 1 and --size" in text) == (num_samples > 1)
    side = int(re.search(r"--size (\d+)", text)[1])
    assert 0.5 * free < estimate(model, image_shape=(side, side)) < free
    memory.check(config_of(image_shape=(side, side)), model)
    with pytest.raises(ValueError, match="set .*--size"):
        memory.check(config_of(num_samples=num_samples), model)


def test_fewer_samples_come_before_a_smaller_image(model, monkeypatch):
    one = estimate(model)
    assert "set --num-samples 3 or" in advice(model, monkeypatch, 3.5 * one, num_samples=10)
    # What ran out although there seemed to be room takes half of it first.
    assert "set --num-samples 5 or" in advice(model, monkeypatch, 100 * one, num_samples=10)
    assert "not even the smallest image" in advice(model, monkeypatch, one / 1000)
    text = advice(model, monkeypatch, 2**30, image_shape=(640, 960))
    assert re.search(r"960x640 pixels need about \d+\.\d\d GiB of memory, 1\.00 GiB are free", text)
    monkeypatch.setattr(inputs, "free_memory", lambda: None)
    assert "or fewer --num-samples" in memory.advice(config_of(), model)
    memory.check(config_of(), model)


def _planned(draw, given, config):
    """Bytes that XLA plans for the optimised program of `draw(given, key, config)`."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        run = jax.jit(lambda given, key: draw(given, key, config=config))
        compiled = run.lower(given, jax.random.key(0)).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["aps", "maskgit", "straight_through"])
def test_the_estimate_is_near_the_plan_of_xla(sampler, monkeypatch):
    """Of the optimised program, for photo64; no sampler is refused what it would not need."""
    model = pretrained.load_pretrained("photo64")
    config = config_of(sampler, image_shape=(64, 64))
    if sampler == "aps":
        config = dataclasses.replace(config, perceptual_weight=0.0)
    params = Params(model.prior, model.codec, operators.super_resolution(scale=4))
    y = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    planned = _planned(
        lambda given, key, config: sample(*given, key, config=config), (params, y), config
    )
    monkeypatch.setattr(inputs, "free_memory", lambda: planned)
    memory.check(config, model)
    if sampler == "aps":
        assert memory.estimate(config, model) == pytest.approx(planned, rel=0.15)


@pytest.mark.slow
def test_the_networks_of_an_energy_count():
    """Style and content by VGG16 with random weights, as `aps-jax stylize` plans them."""
    model = pretrained.load_pretrained("photo64")
    kernels = {name: (3, 3, width, out) for name, width, out in lpips.vgg_layers()}
    weights = {
        name: {"kernel": jnp.full(shape, 0.01), "bias": jnp.zeros(shape[-1])}
        for name, shape in kernels.items()
    }
    features = Features(params={"vgg": weights}, apply=bind(lpips._blocks))
    x = jnp.zeros((1, 64, 64, 3))
    pair = energies.style(features, x), energies.content(features, x)
    target = whole_target(model.prior, model.codec, x, stylize.painting(*pair, 1.0))
    config = config_of(image_shape=(64, 64))
    planned = _planned(sample_target, target, config)
    assert memory.estimate(config, model, target) == pytest.approx(planned, rel=0.2)
    assert memory.estimate(config, model) < 0.7 * planned
