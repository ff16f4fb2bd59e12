"""The denoiser of patches: its scaling against closed forms, its loss, its training and files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import samplers
from aps_jax.denoiser import PixelParams
from aps_jax.images import load_image, save_image
from aps_jax.io.checkpoint import read_card
from aps_jax.operators import make_operator
from aps_jax.pretrained import load_codec, load_denoiser, model_folder
from aps_jax.prior.patch_denoiser import (
    PatchDenoiserConfig,
    PatchTransformer,
    denoise,
    denoising_loss,
    init_patch_denoiser_params,
    make_patch_denoiser,
)
from experiments import training
from experiments.train import diffusion, latent_diffusion

TINY = PatchDenoiserConfig(
    side=8, patch=4, sigma_data=0.6, width=16, num_layers=1, num_heads=2, mlp_width=24
)


@pytest.fixture(scope="module")
def params():
    """Random weights, those of the last layer too, which are zero at first."""
    weights = jax.jit(init_patch_denoiser_params, static_argnums=1)(jax.random.key(0), TINY)
    kernel = weights["pixels"]["kernel"]
    weights["pixels"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    return weights


def images(rows, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, 8, 8, 3))


def test_at_first_it_is_the_denoiser_of_white_noise():
    """The mean of x_0 given x_0 + sigma n is x S / (S + sigma^2) for independent pixels."""
    first = jax.jit(init_patch_denoiser_params, static_argnums=1)(jax.random.key(0), TINY)
    x, sigma = images(3), np.array([0.01, 0.7, 40.0])
    wanted = np.asarray(x) * (0.36 / (0.36 + sigma**2))[:, None, None, None]
    np.testing.assert_allclose(
        denoise(first, x, jnp.asarray(sigma), config=TINY), wanted, rtol=1e-5
    )


def test_scaling_is_that_of_edm(params):
    """c_skip, c_out, c_in and c_noise of table 1, in float64."""
    x, sigma = images(2), np.array([0.2, 3.0])
    wide = sigma[:, None, None, None]
    total = wide**2 + 0.6**2
    inner = PatchTransformer(TINY).apply(
        {"params": params}, x / np.sqrt(total), jnp.asarray(np.log(sigma) / 4)
    )
    wanted = 0.36 / total * np.asarray(x) + wide * 0.6 / np.sqrt(total) * np.asarray(inner)
    found = denoise(params, x, jnp.asarray(sigma), config=TINY)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_do_not_mix_and_the_level_counts(params):
    x = images(2)
    together = denoise(params, x, jnp.array([0.5, 2.0]), config=TINY)
    alone = denoise(params, x[1:], jnp.array([2.0]), config=TINY)
    np.testing.assert_allclose(together[1:], alone, atol=1e-6)
    features = [
        PatchTransformer(TINY).apply({"params": params}, x, jnp.full(2, level)) for level in (0, 1)
    ]
    assert float(jnp.max(jnp.abs(features[0] - features[1]))) > 1e-3


def test_a_patch_sees_the_others(params):
    """A change in one corner changes the opposite one."""
    x = images(1)
    moved = x.at[0, 0, 0].add(1.0)
    found = [denoise(params, one, jnp.array([1.0]), config=TINY)[0, -1, -1] for one in (x, moved)]
    assert float(jnp.max(jnp.abs(found[0] - found[1]))) > 1e-5


@pytest.mark.slow
def test_loss_of_the_right_answer_is_least():
    """For white pictures of the assumed variance the first weights are best: they give 1."""
    first = init_patch_denoiser_params(jax.random.key(0), TINY)
    x = 0.6 * jax.random.normal(jax.random.key(3), (256, 8, 8, 3))
    loss, terms = denoising_loss(first, x, jax.random.key(4), config=TINY)
    # The error's mean is S sigma^2 / (S + sigma^2), its weight the inverse.
    assert float(loss) == pytest.approx(1.0, abs=0.02)
    assert terms["loss"] == loss


def test_bad_sizes_are_refused(params):
    with pytest.raises(ValueError, match="patches of side 4 do not tile images of 10"):
        dataclasses.replace(TINY, side=10)
    with pytest.raises(ValueError, match="8x8 pixels with 3 channels only"):
        denoise(params, jnp.zeros((1, 12, 8, 3)), jnp.ones(1), config=TINY)


@pytest.mark.slow
def test_it_is_a_prior_of_the_samplers_on_pixels(params):
    operator = make_operator("super_resolution", scale=2)
    bundle = PixelParams(denoiser=make_patch_denoiser(TINY, params), operator=operator)
    y = operator(0.3 * images(1))
    result = samplers.sample(bundle, y, jax.random.key(0), config=samplers.DPSConfig(num_steps=3))
    assert result.images.shape == (1, 8, 8, 3)
    assert np.isfinite(np.asarray(result.images)).all()


@pytest.mark.slow
def test_a_training_goes_on_and_leaves_a_denoiser_that_loads(tmp_path):
    """A run stopped after its first step ends with the weights of one that was not."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for index in range(8):
        save_image(folder / f"{index}.png", rng.uniform(-1, 1, (16, 16, 3)))
    config = diffusion.Config(data=(folder,), eval_data=folder, out=tmp_path / "whole", smoke=True)
    diffusion.train(config)
    stopped = dataclasses.replace(
        config.resolved(), smoke=False, out=tmp_path / "stopped", minutes=1e-9, eval_every=1
    )
    diffusion.train(stopped)
    assert training.read_rows(stopped.out / "diffusion.jsonl")[-1]["step"] == 1
    diffusion.train(dataclasses.replace(config, out=stopped.out))
    name = "model/denoiser.safetensors"
    assert (stopped.out / name).read_bytes() == (config.out / name).read_bytes()
    assert "eval_psnr_0.5" in read_card(config.out / "model")["denoiser_training"]
    assert (config.out / "diffusion_samples.png").is_file()
    denoiser = load_denoiser(config.out / "model")
    x = jnp.ones((2, 16, 16, 3))
    assert denoiser.apply(denoiser.params, x, jnp.ones(2)).shape == x.shape


@pytest.mark.slow
def test_a_training_on_latents_likewise(tmp_path):
    """A resumed run repeats the batches, and the folder has the codec, too."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for index in range(5):
        save_image(folder / f"{index}.png", rng.uniform(-1, 1, (32, 32, 3)))
    config = latent_diffusion.Config(
        codec="photo64", data=(folder,), eval_data=folder, out=tmp_path / "whole", smoke=True
    )
    latent_diffusion.train(config)
    stopped = dataclasses.replace(
        config.resolved(), smoke=False, out=tmp_path / "stopped", minutes=1e-9, eval_every=1
    )
    latent_diffusion.train(stopped)
    assert training.read_rows(stopped.out / "diffusion.jsonl")[-1]["step"] == 1
    latent_diffusion.train(dataclasses.replace(config, out=stopped.out))
    name = "model/latent_denoiser.safetensors"
    assert (stopped.out / name).read_bytes() == (config.out / name).read_bytes()
    card = read_card(config.out / "model")
    assert "eval_picture_psnr_0.5" in card["latent_denoiser_training"]
    denoiser = load_denoiser(config.out / "model", is_latent=True)
    assert denoiser.codec is not None and denoiser.num_channels == card["codec"]["num_bits"]
    with np.load(config.out / "latents.npz") as cached:
        rows = cached["latents"]
    assert rows.shape == (5, 2, 8, 8, denoiser.num_channels)
    picture = load_image(folder / "0.png")[None]
    for x in (picture, picture[:, :, ::-1]):
        features = np.clip(denoiser.codec.encode(denoiser.codec.params, x), -1, 1)[0]
        assert min(np.abs(rows[0, side] - features).max() for side in (0, 1)) < 5e-3
    assert card["latent_denoiser"]["sigma_data"] == pytest.approx(rows.std(dtype=float), abs=1e-4)


def test_crops_are_parts_of_photos_and_whole_pictures_are_not(tmp_path):
    ramp = np.broadcast_to(np.linspace(-1, 1, 64)[None, :, None], (64, 64, 3))
    save_image(tmp_path / "pictures/ramp.png", ramp)
    config = diffusion.Config(
        data=(tmp_path / "pictures",), eval_data=tmp_path / "pictures", out=tmp_path / "out",
        denoiser=TINY, batch_size=16, num_eval=1,
    )  # fmt: skip

    def ranges(config):
        _, batch = next(diffusion.pixels_of(config).batches(range(1)))
        assert batch.shape == (16, TINY.side, TINY.side, 3)
        return batch.max((1, 2, 3)) - batch.min((1, 2, 3))

    assert (ranges(config) > 1.6).all()
    parts = ranges(dataclasses.replace(config, crops=True))
    assert parts.min() < 1.2 and len(np.unique(parts.round(3))) > 8


def test_latents_of_crops_are_those_of_parts_of_photos(tmp_path):
    """As many as asked for, photos in turn, and a photo's crops differ."""
    for index, low in enumerate((-1, 0)):
        ramp = np.broadcast_to(np.linspace(low, 1, 64)[None, :, None], (64, 64, 3))
        save_image(tmp_path / f"pictures/{index}.png", ramp)
    config = latent_diffusion.Config(
        codec="photo64", data=(tmp_path / "pictures",), eval_data=tmp_path, out=tmp_path,
        num_crops=5, denoiser=dataclasses.replace(TINY, side=8, patch=2),
    )  # fmt: skip
    codec = load_codec(model_folder("photo64"))
    rows = latent_diffusion.training_latents(config, codec)
    assert rows.shape[:4] == (5, 2, 8, 8)
    assert len(np.unique(rows[:, 0].reshape(5, -1), axis=0)) == 5
    again = latent_diffusion.training_latents(dataclasses.replace(config, num_crops=4), codec)
    np.testing.assert_array_equal(again, rows[:4])
    whole = latent_diffusion.training_latents(dataclasses.replace(config, num_crops=0), codec)
    assert whole.shape == (2, 2, *rows.shape[2:])
