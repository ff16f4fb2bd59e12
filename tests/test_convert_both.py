"""The model of the paper from two public checkpoints in one folder, all weights random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_convert_llada
import test_convert_magvitv2
import test_convert_showo
from hub import random_state, save_single

import aps_jax
from aps_jax.codec.magvit2 import CodecConfig
from aps_jax.io import checkpoint

CODEC = CodecConfig(
    encoder_channels=(32, 32),
    encoder_blocks=(1, 1),
    decoder_channels=(32, 32),
    decoder_blocks=(1, 1),
)


def write_mmada(folder, target):
    state = test_convert_llada.make_state(test_convert_llada.MMADA_ROWS)
    source = save_single(folder, state, test_convert_llada.MMADA_CONFIG)
    options = ("--dtype", "float32", "--format", "orbax", "--verify")
    assert test_convert_llada.run(source, target, *options) == 0
    assert {path.name for path in target.iterdir()} == {"card.json", "codec.safetensors", "prior"}


def write_showo(folder, target):
    state = random_state(test_convert_showo.tensor_shapes())
    source = save_single(folder, state, test_convert_showo.CONFIG)
    assert test_convert_showo.run(source, target) == 0


@pytest.mark.parametrize(
    "write_prior", [write_mmada, pytest.param(write_showo, marks=pytest.mark.slow)]
)
def test_both_halves_restore_an_image(write_prior, tmp_path, capsys):
    magvitv2 = random_state(test_convert_magvitv2.tensor_shapes(CODEC))
    codec = save_single(tmp_path / "magvitv2", magvitv2)
    folder = tmp_path / "model"
    assert test_convert_magvitv2.run(codec, folder) == 0
    with pytest.raises(
        checkpoint.CheckpointError, match="convert or train the prior into the same"
    ):
        aps_jax.load_pretrained(folder)
    assert test_convert_llada.run(codec, tmp_path / "wrong") == 2
    assert "it is another kind of model" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"magvitv2", "model"}
    write_prior(tmp_path / "hub", folder)

    model = aps_jax.load_pretrained(folder, prompt_ids=[17, 4])
    assert model.card["codec"] == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(CODEC).items()
    }
    operator = aps_jax.operators.denoising()
    y = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 4, 6, 3)), jnp.float32)
    params = aps_jax.Params(prior=model.prior, codec=model.codec, operator=operator)
    sample = jax.jit(aps_jax.aps_sample, static_argnames="config")
    config = aps_jax.APSConfig(num_steps=2, num_inner_steps=1, guidance_scale=1.0)
    result = sample(params, y, jax.random.key(0), config=config)
    assert result.images.shape == y.shape and jnp.isfinite(result.images).all()
    assert (result.tokens >= 0).all() and (result.tokens < 8192).all()
