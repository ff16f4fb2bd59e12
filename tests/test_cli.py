"""The command line, on a model with random weights: files, errors, interruption."""

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PRIOR_CONFIG, mixing_prior, patch_codec, random_params
from contract import TOKENS
from hub import save_tokenizer
from PIL import Image

from aps_jax import cli, images, presets, pretrained
from aps_jax import restore as host_loop
from aps_jax.cli import errors as cli_errors
from aps_jax.cli import inputs, perceptual
from aps_jax.cli import options as cli_options
from aps_jax.cli import restore as command
from aps_jax.codec.magvit2 import CodecConfig, init_codec_params
from aps_jax.io import checkpoint
from aps_jax.prior.patch_denoiser import PatchDenoiserConfig, init_patch_denoiser_params
from aps_jax.prior.prompts import PromptConfig
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.restore import DivergedError
from aps_jax.samplers import SAMPLERS
from aps_jax.samplers.budget import decoder_evaluations
from aps_jax.scores.lpips import PerceptualUnavailable
from aps_jax.tasks import TASKS
from aps_jax.types import Perceptual, bind

ROOT = Path(__file__).parents[1]
STEPS = ["--num-steps", "3", "--num-inner-steps", "2"]


#: The real architecture, as small as it gets.
CODEC_CONFIG = CodecConfig(
    num_bits=4,
    encoder_channels=(4, 4),
    encoder_blocks=(0, 0),
    decoder_channels=(4, 4),
    decoder_blocks=(0, 0),
    num_groups=2,
)


@pytest.fixture(scope="session")
def real_model(tmp_path_factory):
    """A model folder with random weights."""
    folder = tmp_path_factory.mktemp("real")
    key = jax.random.key(0)
    codec = jax.jit(init_codec_params, static_argnums=1)(key, CODEC_CONFIG)
    prior = jax.jit(init_transformer_params, static_argnums=1)(key, PRIOR_CONFIG)
    checkpoint.save_params(folder / "codec.safetensors", codec)
    checkpoint.save_params(folder / "prior.safetensors", prior)
    checkpoint.update_card(
        folder,
        codec=dataclasses.asdict(CODEC_CONFIG),
        prior=dataclasses.asdict(PRIOR_CONFIG),
        prior_window=8,
        codec_training={"eval_psnr": 23.5},
    )
    return folder


@pytest.fixture
def model(real_model, tmp_path_factory, monkeypatch):
    """A folder that loads as a model without convolutions, which compiles at once."""
    folder = tmp_path_factory.getbasetemp() / "toy"
    if not folder.exists():
        shutil.copytree(real_model, folder)
    codec = patch_codec().replace(encode=bind(patch_encode, stride=4))
    toy = pretrained.Model(mixing_prior(window=4), codec, checkpoint.read_card(folder))
    load = pretrained.load_pretrained

    def load_pretrained(name, **options):
        return toy if str(name) == str(folder) else load(name, **options)

    monkeypatch.setattr(pretrained, "load_pretrained", load_pretrained)
    return folder


def patch_encode(params, x, *, stride):
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    patches = x.reshape(*x.shape[:3], -1)
    return (patches.reshape(-1, patches.shape[-1]) @ params.T).reshape(*x.shape[:3], -1)


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    images.save_image(path, images.resize_short_side(images.sample_photo(), 16))
    return path


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    """LPIPS would compile VGG16; its own tests do."""

    def load_lpips():
        raise PerceptualUnavailable("no weights; get them")

    monkeypatch.setattr(perceptual, "load_lpips", load_lpips)


@pytest.fixture
def restore(model, tmp_path, capsys):
    """Runs `aps-jax restore` in this process; gives exit code, output folder and stderr."""

    def run(*argv, out=tmp_path / "out", steps=STEPS):
        words = [str(word) for word in argv]
        chosen = [] if "--model" in words else ["--model", str(model)]
        capsys.readouterr()
        code = cli.main(["restore", *words, *chosen, *steps, "--out", str(out)])
        return code, out, capsys.readouterr().err

    return run


def assert_one_line(err, *parts):
    assert err.startswith("aps-jax: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def read(out):
    return json.loads((out / "result.json").read_text())


# Whole runs.


def test_degrades_restores_and_scores_a_photo(restore, photo, tmp_path, model):
    code, out, err = restore(photo, "--seed", "5")
    assert code == 0 and err == "sampling 3 timesteps of 2 inner steps\n"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert names == {
        "restored.png", "measurement.png", "measurement.npy", "comparison.png", "result.json"
    }  # fmt: skip
    result = read(out)
    assert set(result["files"]) == names
    assert set(result["metrics"]) == {"restored", "bicubic", "codec_reconstruction"}
    for row in result["metrics"].values():
        assert np.isfinite([row["psnr"], row["ssim"]]).all() and row["lpips"] is None
    assert result["notes"] == ["LPIPS was left out: no weights; get them"]
    assert result["config"]["num_steps"] == 3 and result["config"]["image_shape"] == [16, 16]
    assert result["model_calls"] == {"denoiser": 3, "decoder_gradient": 6, "decoder": 1}
    assert set(result["seconds"]) == {"compile", "sample", "decode", "total"}
    assert len(result["model"]["sha256"]["prior.safetensors"]) == 64 and result["dtype"] is None
    assert result["versions"]["jax"] == jax.__version__ and result["seed"] == 5
    assert result["history"]["num_masked"][-1] == [0]
    assert images.load_image(out / "restored.png").shape == (16, 16, 3)
    assert images.load_measurement(out / "measurement.npy").shape == (4, 4, 3)

    # The recorded command repeats the run bit for bit.
    words = shlex.split(result["command"])
    assert words[:2] == ["aps-jax", "restore"]
    assert cli.main([*words[1:], "--overwrite"]) == 0
    again = read(out)
    for name in ("config", "history", "metrics", "measurement_sha256", "residual"):
        assert again[name] == result[name]

    # The saved measurement gives the same samples without the photo.
    saved = out / "measurement.npy"
    code, other, _ = restore(saved, "--measured", "--seed", "5", out=tmp_path / "measured")
    assert code == 0
    assert (other / "restored.png").read_bytes() == (out / "restored.png").read_bytes()
    assert read(other)["metrics"] is None and read(other)["history"] == result["history"]


def test_samples_steps_and_pasted_pixels(restore, photo, tmp_path):
    options = ("--task", "inpainting_random", "--fraction", "0.5", "--num-samples", "2")
    code, out, _ = restore(photo, *options, "--save-steps", "--paste-known", "--sigma", "0")
    assert code == 0
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert names == {
        "restored.png", "measurement.png", "comparison.png", "mean.png", "std.png", "mask.png",
        "samples/sample_01.png", "samples/sample_02.png",
        "steps/step_01.png", "steps/step_02.png", "steps/step_03.png",
    }  # fmt: skip
    known = np.asarray(Image.open(out / "mask.png")) > 0
    assert known.sum() == 128
    pasted, original = (np.asarray(Image.open(path)) for path in (out / "restored.png", photo))
    np.testing.assert_array_equal(pasted[known], original[known])
    metrics = read(out)["metrics"]
    assert set(metrics) == {
        "restored", "restored_pasted", "mean_of_samples", "measurement", "smooth_estimate",
        "codec_reconstruction",
    }  # fmt: skip
    assert metrics["restored_pasted"]["psnr"] > metrics["restored"]["psnr"]
    assert read(out)["std_white"] > 1e-3

    # The mean in place of the first sample: the same samples, another choice.
    samples = [np.asarray(Image.open(out / f"samples/sample_0{i}.png"), float) for i in (1, 2)]
    # The draw of the first run, which a mean does not take by itself.
    mean = ("--estimate", "mean", "--draw", "categorical", "--save-steps", "--sigma", "0")
    mean = (*mean, "--overwrite")
    code, out, _ = restore(photo, *options, *mean)  # Compiled already.
    assert code == 0
    restored = np.asarray(Image.open(out / "restored.png"), float)
    np.testing.assert_allclose(restored, (samples[0] + samples[1]) / 2, atol=1.01)
    result = read(out)
    assert result["estimate"] == "mean" and "--estimate mean" in result["command"]
    for name, before in (("restored", "mean_of_samples"), ("first_sample", "restored")):
        assert result["metrics"][name]["psnr"] == pytest.approx(metrics[before]["psnr"], abs=1e-3)
    assert "mean_of_samples" not in result["metrics"]
    assert (out / "std.png").exists() and not (out / "mean.png").exists()

    # Overwriting leaves nothing of the earlier run behind.
    code, out, _ = restore(photo, "--overwrite")
    assert code == 0
    assert not list(out.glob("s*/*.png")) and not (out / "mask.png").exists()


def test_the_perceptual_term_is_used_or_its_loss_is_noted(restore, photo, monkeypatch):
    paper = (photo, "--task", "denoising", "--preset", "paper")
    code, out, _ = restore(*paper)
    assert code == 0 and read(out)["config"]["perceptual_weight"] == 0
    cure = "run: pip install 'aps_jax[lpips]' && aps-jax convert lpips"
    assert f"the perceptual term was left out: it needs LPIPS; {cure}" in read(out)["notes"]
    distance = Perceptual(params=None, apply=bind(mean_square))
    monkeypatch.setattr(perceptual, "load_lpips", lambda: distance)
    code, out, _ = restore(*paper, "--overwrite")
    assert code == 0 and read(out)["config"]["perceptual_weight"] == 1e-3
    assert not any("LPIPS" in note or "perceptual" in note for note in read(out)["notes"])
    assert read(out)["metrics"]["restored"]["lpips"] > 0


OTHER_SAMPLERS = {
    "maskgit": "--num-steps 2",
    "mmada": "--num-steps 2",
    "best_of_n": "--num-steps 2 --budget 3",
    "straight_through": "--budget 3 --option variables=tokens",
    "svdd_pm": "--num-steps 2 --budget 4",
    "g2d2": "--budget 4 --option transition=markov",
    "sgdd": "--num-steps 2 --budget 6 --option num_denoise_steps=2",
    "smc": "--budget 4 --option num_fills=1 --option fill=mode",
    "aps-smc": "--num-steps 2 --budget 4",
    "entrgi": "--budget 4 --option num_trajectories=1",
    "redge": "--num-steps 2 --num-inner-steps 1",
}


@pytest.mark.parametrize("name", OTHER_SAMPLERS)
def test_every_other_sampler_by_name(name, restore, photo):
    options = OTHER_SAMPLERS[name].split()
    code, out, err = restore(photo, "--sampler", name, *options, steps=[])
    assert code == 0, err
    result = read(out)
    kind = SAMPLERS[name].config
    config = kind(**result["config"])
    assert result["sampler"] == name and result["preset"] is None
    assert result["model_calls"] == config.evaluations()._asdict()
    if "--budget" in options:
        assert (
            decoder_evaluations(config)
            <= result["budget"]
            == int(options[1 + options.index("--budget")])
        )
    for pair in [word for word in options if "=" in word]:
        option, value = pair.split("=")
        assert str(result["config"][option]) == value and pair in result["command"]
    assert err.startswith("sampling ") and "evaluations per sample" in err
    assert not (out / ".state").exists()


def test_every_sampler_is_tried_here():
    assert {"aps", *OTHER_SAMPLERS} == set(TOKENS)


def test_samplers_on_pixels_are_refused(restore, photo):
    code, out, err = restore(photo, "--sampler", "dps", steps=[])
    assert code == 2 and not out.exists()
    assert_one_line(err, "sampler 'dps' needs a model with a denoiser of pixels")


@pytest.fixture(scope="session")
def denoiser_folder(tmp_path_factory):
    """A model folder with a denoiser of pictures of 16x16 pixels alone."""
    folder = tmp_path_factory.mktemp("denoiser")
    config = PatchDenoiserConfig(side=16, width=8, num_layers=1, num_heads=1, mlp_width=8)
    params = jax.jit(init_patch_denoiser_params, static_argnums=1)(jax.random.key(0), config)
    checkpoint.save_params(folder / "denoiser.safetensors", params, "float16")
    checkpoint.update_card(folder, denoiser=dataclasses.asdict(config))
    return folder


def test_a_denoiser_restores_a_photo(restore, photo, denoiser_folder):
    """The first weights are the denoiser of white noise, so the picture fits the measurement."""
    steps = ["--num-steps", "3", "--save-video", "gif", "--num-samples", "2"]
    words = ("--sampler", "diffpir", "--model", str(denoiser_folder))
    code, out, err = restore(photo, *words, steps=steps)
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert list(result["model"]["sha256"]) == ["card.json", "denoiser.safetensors"]
    assert "codec_reconstruction" not in result["metrics"]
    assert result["residual"]["root_mean_square"] < 0.3
    assert (out / "trajectory.gif").is_file() and (out / "samples/sample_02.png").is_file()
    # What it cannot do.
    for more, said in (
        (["--sampler", "aps"], "has a denoiser of pixels: choose --sampler dps"),
        (["--sampler", "psld"], "needs a model with a denoiser of latents"),
        (["--sampler", "dps", "--show-tokens", "--save-video", "gif"], "has no tokens"),
        (["--sampler", "dps", "--size", "8"], "16x16 pixels with 3 channels only"),
    ):
        code, _, err = restore(
            photo, "--model", str(denoiser_folder), "--overwrite", *more, steps=[]
        )
        assert code == 2
        assert_one_line(err.splitlines(keepends=True)[-1], said)


@pytest.mark.slow
def test_a_denoiser_of_latents_restores_a_photo(restore, photo, tmp_path):
    """The same of a folder with a codec, too."""
    config = PatchDenoiserConfig(
        side=8, patch=2, num_channels=4, width=8, num_layers=1, num_heads=1, mlp_width=8
    )
    folder = tmp_path / "latent"
    folder.mkdir()
    for name, init, sizes in (
        ("codec", init_codec_params, CODEC_CONFIG),
        ("latent_denoiser", init_patch_denoiser_params, config),
    ):
        params = jax.jit(init, static_argnums=1)(jax.random.key(0), sizes)
        checkpoint.save_params(folder / f"{name}.safetensors", params, "float16")
        checkpoint.update_card(folder, **{name: dataclasses.asdict(sizes)})
    words = ("--sampler", "psld", "--model", str(folder), "--overwrite")
    code, out, err = restore(photo, *words, steps=["--num-steps", "3"])
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert list(result["model"]["sha256"]) == [
        "card.json", "codec.safetensors", "latent_denoiser.safetensors"
    ]  # fmt: skip
    assert result["model_calls"] == {"denoiser": 3, "decoder_gradient": 3, "decoder": 1}
    for more, said in (
        (["--sampler", "dps"], "has a denoiser of latents: choose --sampler psld"),
        (["--size", "8"], "knows images of 16x16 pixels with 4 features per latent only"),
    ):
        code, _, err = restore(photo, *words, *more, steps=[])
        assert code == 2
        assert_one_line(err.splitlines(keepends=True)[-1], said)


def mean_square(params, a, b):
    del params
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


# A model that reads text.

FRAME = PromptConfig(
    num_codes=16, image_offset=256, mask_token_id=272, begin_id=273, pad_token_id=274, length=9
)
READER = TransformerConfig(vocab_size=275, width=8, num_layers=1, num_heads=1, mlp_width=8)


@pytest.fixture
def reader(tmp_path_factory, monkeypatch):
    """A folder with a prior that takes prompts, no tokenizer yet, and the toy codec."""
    folder = tmp_path_factory.mktemp("reader")
    params = random_params(init_transformer_params, READER)
    checkpoint.save_params(folder / "prior.safetensors", params)
    (folder / "codec.safetensors").write_bytes(b"")
    card = {"prior": dataclasses.asdict(READER), "prompt": dataclasses.asdict(FRAME)}
    checkpoint.update_card(folder, codec={}, **card)
    codec = patch_codec().replace(encode=bind(patch_encode, stride=4))
    monkeypatch.setattr(pretrained.models, "load_codec", lambda folder, card, **options: codec)
    return folder


def test_a_prompt_guides(restore, reader, photo):
    words = (photo, "--task", "denoising", "--model", reader, "--guidance-scale", "2")
    code, out, err = restore(*words, "--prompt", "face")
    assert code == 2 and not out.exists()
    assert_one_line(err, "has no tokenizer.json", "put the file of the published model there")
    save_tokenizer(reader)
    code, out, err = restore(*words, "--prompt", "far too long")
    assert code == 2 and not out.exists()
    assert_one_line(err, "has 12 text ids", "at most 9: shorten it")
    pictures = {}
    for prompt in ("face", "tree"):
        code, out, err = restore(*words, "--prompt", prompt, "--overwrite")
        assert code == 0, err
        assert read(out)["prompt"] == prompt and read(out)["config"]["guidance_scale"] == 2
        assert "tokenizer.json" in read(out)["model"]["sha256"]
        pictures[prompt] = (out / "restored.png").read_bytes()
    assert pictures["face"] != pictures["tree"]


# Inputs of every task, without sampling.

CLI_TASKS = [name for name in TASKS if name != "nonlinear_blur"]


def options_for(task, folder, shape=(16, 20)):
    if task == "blur":
        np.save(folder / "kernel.npy", np.full((3, 3), 1 / 9))
        return {"kernel": folder / "kernel.npy"}
    if task == "inpainting_mask":
        Image.fromarray(np.tile(np.uint8([0, 255]), (shape[0], shape[1] // 2))).save(
            folder / "mask.png"
        )
        return {"mask": folder / "mask.png"}
    return {}


@pytest.mark.parametrize("task", CLI_TASKS)
def test_a_saved_measurement_is_understood(task, tmp_path):
    path = tmp_path / "photo.npy"
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (16, 20, 3)).astype("float32"))
    options = cli_options.Restore(image=path, task=task, **options_for(task, tmp_path))
    problem = inputs.degrade_photo(options, jax.random.key(0), jax.random.key(1))
    assert problem.photo.shape == (1, 16, 20, 3) and problem.image_shape == (16, 20)
    saved = tmp_path / "y.npy"
    images.save_array(saved, problem.y[0])
    measured = dataclasses.replace(options, image=saved, measured=True)
    if TASKS[task].is_random:
        with pytest.raises(ValueError, match="at random; "):
            inputs.load_measured(measured)
        return
    understood = inputs.load_measured(measured)
    assert understood.photo is None and understood.image_shape == (16, 20)
    np.testing.assert_array_equal(understood.y, problem.y)


def test_transparent_pixels_are_missing(tmp_path):
    pixels = np.full((16, 16, 4), 200, np.uint8)
    pixels[..., 3] = 255
    pixels[4:8, 4:8, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "y.png")
    options = cli_options.Restore(image=tmp_path / "y.png", task="inpainting_mask", measured=True)
    problem = inputs.load_measured(options)
    assert problem.operator.params.sum() == 240
    assert not problem.y[0, 4:8, 4:8].any() and problem.y[0, :4].all()


def test_grey_pictures_serve_one_channel(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "grey.png")
    options = cli_options.Restore(image=tmp_path / "grey.png", task="colorization", measured=True)
    assert inputs.load_measured(options).y.shape == (1, 16, 16, 1)
    options = dataclasses.replace(options, task="denoising")
    assert inputs.load_measured(options).y.shape == (1, 16, 16, 3)


def test_kernel_pictures_are_normalised(tmp_path, photo):
    kernel = np.zeros((5, 5), np.uint8)
    kernel[2, 1:4] = 200
    Image.fromarray(kernel).save(tmp_path / "kernel.png")
    options = cli_options.Restore(image=photo, task="blur", kernel=tmp_path / "kernel.png")
    problem = inputs.degrade_photo(options, jax.random.key(0), jax.random.key(1))
    np.testing.assert_allclose(problem.operator.params.sum(), 1, rtol=1e-6)


def test_size_crops_and_resizes(tmp_path):
    images.save_image(tmp_path / "large.png", np.zeros((40, 60, 3)))
    options = cli_options.Restore(image=tmp_path / "large.png", size=24)
    problem = inputs.degrade_photo(options, jax.random.key(0), jax.random.key(1))
    assert problem.image_shape == (24, 24)


# Errors: one line, exit code 2, nothing written.


def bad_files(folder, model):
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (16, 16)).save(folder / "black.png")
    images.save_image(folder / "cut.png", np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)))
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    np.save(folder / "nan.npy", np.full((16, 16, 3), np.nan))
    np.save(folder / "two.npy", np.zeros((16, 16, 2), "float32"))
    np.save(folder / "mask.npy", np.eye(8))
    np.save(folder / "half.npy", np.full((16, 16), 0.5))
    (folder / "file").write_text("in the way")
    shutil.copytree(model, folder / "cut")
    path = folder / "cut" / "prior.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    shutil.copytree(model, folder / "other")
    checkpoint.update_card(
        folder / "other", codec=dataclasses.asdict(CODEC_CONFIG) | {"num_bits": 5}
    )
    (folder / "nocard").mkdir()


@pytest.fixture(scope="session")
def bad(real_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    bad_files(folder, real_model)
    return folder


ERRORS = {
    "missing file": ("{bad}/none.png", "does not exist"),
    "not an image": ("{bad}/text.png", "is not an image"),
    "empty file": ("{bad}/empty.png", "is empty"),
    "truncated image": ("{bad}/cut.png", "damaged or cut short"),
    "one pixel": ("{bad}/one.png", "at least 8"),
    "a folder": ("{bad}", "is a folder"),
    "NaN": ("{bad}/nan.npy", "NaN"),
    "task": ("{photo} --task super_resolutoin", "did you mean 'super_resolution'?"),
    "sampler": ("{photo} --sampler asp", "unknown sampler 'asp', did you mean 'aps'?"),
    "preset of another sampler": ("{photo} --sampler g2d2 --preset draft", "presets are of aps"),
    "foreign sampler option": (
        "{photo} --sampler maskgit --num-inner-steps 2",
        "sampler 'maskgit' has no option 'num_inner_steps'",
    ),
    "unknown sampler option": ("{photo} --option num_fils=2", "unknown option of sampler 'aps'"),
    "sampler option's value": ("{photo} --option prior_weight=big", "it is a number"),
    "sampler option's form": ("{photo} --option prior_weight", "NAME=VALUE"),
    "sampler option with a flag": ("{photo} --option sigma=2", "use --sigma"),
    "sampler option twice": (
        "{photo} --option prior_weight=1 --option prior_weight=2",
        "given twice",
    ),
    "budget": ("{photo} --budget 0", "--budget must be at least 1"),
    "small budget": ("{photo} --num-steps 15 --budget 3", "too small"),
    "budget without use": ("{photo} --sampler maskgit --budget 3", "has no budget"),
    "preset": ("{photo} --preset drat", "did you mean 'draft'?"),
    "model": ("{photo} --model photo46", "did you mean 'photo64'?"),
    "model without card": ("{photo} --model {bad}/nocard", "no card.json"),
    "truncated weights": ("{photo} --model {bad}/cut", "truncated"),
    "weights of another config": ("{photo} --model {bad}/other", "configuration needs"),
    "negative sigma": ("{photo} --sigma -0.1", "--sigma must be"),
    "NaN sigma": ("{photo} --sigma nan", "--sigma must be"),
    "no steps": ("{photo} --num-steps 0", "num_steps must be"),
    "negative steps": ("{photo} --num-inner-steps -1", "num_inner_steps must be"),
    "no samples": ("{photo} --num-samples 0", "num_samples must be"),
    "mean of one": ("{photo} --estimate mean", "that of several samples; add --num-samples 8"),
    "estimate": ("{photo} --estimate median", "must be sample or mean, got 'median'"),
    "seed": ("{photo} --seed -1", "--seed must be"),
    "size": ("{photo} --size 4", "--size must be"),
    "size of a small photo": ("{photo} --size 500", "--size must be"),
    "scale": ("{photo} --scale 0", "scale must be"),
    "foreign option": ("{photo} --bits 3", "has no option 'bits'"),
    "fraction": ("{photo} --task inpainting_random --fraction 2", "fraction must be"),
    "box": ("{photo} --task inpainting_box --box-size 15", "does not fit"),
    "no kernel": ("{photo} --task blur", "needs the option 'kernel'"),
    "missing kernel": ("{photo} --task blur --kernel {bad}/none.npy", "does not exist"),
    "black kernel": ("{photo} --task blur --kernel {bad}/black.png", "is black"),
    "mask of another size": (
        "{photo} --task inpainting_mask --mask {bad}/mask.npy",
        "has a mask of",
    ),
    "mask values": ("{photo} --task inpainting_mask --mask {bad}/half.npy", "only 0"),
    "network weights": ("{photo} --task nonlinear_blur", "needs --weights DIR"),
    "dtype": (
        "{photo} --model photo64 --dtype float16",
        "dtype must be float32 or bfloat16, got 'float16'",
    ),
    "text for a model without": ("{photo} --prompt face", "reads no text; leave out --prompt"),
    "guidance without text": ("{photo} --guidance-scale 1", "leave out --guidance-scale"),
    "guidance": ("{photo} --guidance-scale -1", "--guidance-scale must be"),
    "nothing measured": ("--measured", "needs an IMAGE"),
    "measured size": ("{photo} --measured --size 8", "--size is for clean photos"),
    "measured shape": ("{bad}/two.npy --measured", "task 'super_resolution' gives"),
    "measured NaN": ("{bad}/nan.npy --measured", "NaN"),
    "measured colours": ("{photo} --measured --task colorization", "grey"),
    "measured amplitudes": ("{photo} --measured --task phase_retrieval", ".npy"),
    "measured mask": ("{photo} --measured --task inpainting_mask", "transparent"),
    "measured at random": ("{photo} --measured --task inpainting_box", "--mask FILE"),
    "measured motion": ("{photo} --measured --task motion_blur", "--kernel FILE"),
    "measured one pixel": ("{bad}/one.png --measured", "at least 8"),
    "nothing to paste": ("{photo} --paste-known", "none to paste"),
    "nothing to resume": ("{photo} --resume", "no interrupted run"),
    "resume and overwrite": ("{photo} --resume --overwrite", "exclude each other"),
    "flag": ("{photo} --sigm 3", "Unrecognized options: --sigm"),
    "word": ("{photo} {photo}", "Unrecognized options"),
    "number": ("{photo} --num-samples many", "--num-samples cannot be 'many'; see"),
    "optional number": ("{photo} --scale many", "--scale cannot be 'many'; see"),
}


@pytest.mark.parametrize("rule", ["─", "-"])
def test_tyro_boxes_become_one_line(rule):
    rule = 20 * rule
    box = f"Oops\n{rule}\nUnrecognized options: --a,\n--b.\n{rule}\nPerhaps you meant:\n  --abc X\n"
    expected = "Unrecognized options: --a, --b, did you mean --abc?"
    assert cli_errors.message_of(box) == expected
    lines = [f"│ {line:40} │" for line in box.splitlines()[2:]]
    assert cli_errors.message_of("\n".join([f"╭─ Oops {rule}╮", *lines, f"╰{rule}╯"])) == expected


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, restore, photo, bad, tmp_path):
    argv, *parts = ERRORS[case]
    words = argv.format(bad=bad, photo=photo).split()
    has_own = any(word in argv for word in ("steps", "--budget", "--sampler "))
    code, out, err = restore(*words, steps=[] if has_own else STEPS)
    assert code == 2
    assert_one_line(err, *parts)
    assert not out.exists() and not list(tmp_path.iterdir())


def test_folder_errors(restore, photo, bad, tmp_path):
    for out in (bad / "file", bad / "file" / "deeper"):
        code, _, err = restore(photo, out=out)
        assert code == 2
        assert_one_line(err, "--out", "choose")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "restored.png").write_text("precious")
    code, out, err = restore(photo)
    assert code == 2 and (out / "restored.png").read_text() == "precious"
    assert_one_line(err, "already holds restored.png", "--overwrite")


def test_too_large_for_memory(restore, photo, monkeypatch):
    monkeypatch.setattr(inputs, "free_memory", lambda: 1000)
    code, out, err = restore(photo)
    assert code == 2 and not out.exists()
    assert_one_line(err, "GiB of memory", "--size")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), "--size"),
        (MemoryError(), "out of memory"),
        (DivergedError("the objective is not finite"), "not finite"),
    ],
)
def test_failures_while_sampling(restore, photo, monkeypatch, error, part):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(command, "restore", fail)
    code, out, err = restore(photo)
    assert code == 2 and not out.exists()
    lines = err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("aps-jax: error: ") and part in lines[1]


def test_full_disk_leaves_no_partial_files(restore, photo, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "restored.png").write_bytes(b"old")
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".npy"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    code, out, err = restore(photo, "--overwrite")
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    assert sorted(os.listdir(out)) == [".state", "restored.png"]
    assert (out / "restored.png").read_bytes() == b"old"

    # With space again, the samples are not lost.
    monkeypatch.setattr(os, "replace", replace)
    code, out, _ = restore(photo, "--resume")
    assert code == 0 and (out / "result.json").exists() and not (out / ".state").exists()


def test_full_disk_at_the_first_snapshot(restore, photo, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    code, out, err = restore(photo)
    assert code == 2 and not out.exists()
    assert "No space left on device; free some space" in err.splitlines()[-1]


# Interruption.


def test_interrupted_run_goes_on(restore, photo, tmp_path, monkeypatch):
    _, whole, _ = restore(photo, out=tmp_path / "whole")
    monkeypatch.setattr(host_loop, "SNAPSHOT_SECONDS", 0.0)
    save = host_loop.Snapshot.save

    def save_and_stop(self, state, infos, seconds):
        save(self, state, infos, seconds)
        if len(infos) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(host_loop.Snapshot, "save", save_and_stop)
    code, out, err = restore(photo)
    assert code == 130 and os.listdir(out) == [".state"]
    last = err.splitlines()[-1]
    assert last.startswith("aps-jax: interrupted; continue with: aps-jax restore")
    monkeypatch.setattr(host_loop.Snapshot, "save", save)

    code, _, err = restore(photo)
    assert code == 2
    assert_one_line(err, "interrupted run", "--resume", "--overwrite")
    code, _, err = restore(photo, "--resume", "--seed", "1")
    assert code == 2 and "measurement_sha256 was" in err.splitlines()[-1]
    assert os.listdir(out) == [".state"]

    assert cli.main(shlex.split(last.split("with: aps-jax ")[1])) == 0
    assert (out / "restored.png").read_bytes() == (whole / "restored.png").read_bytes()
    assert read(out)["history"] == read(whole)["history"]
    assert not (out / ".state").exists()


def test_interrupted_before_the_first_timestep(restore, photo, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "restore", stop)
    code, out, err = restore(photo)
    assert code == 130 and not out.exists()
    assert err.splitlines()[-1] == (
        "aps-jax: interrupted; nothing was written; run the same command again"
    )


@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_control_c(restore, photo, real_model, tmp_path, goes_on):
    """A real signal to a real process, between two timesteps or in one."""
    steps = ["--num-steps", "8", "--num-inner-steps", "200"]
    out = tmp_path / "out"
    argv = [str(photo), "--model", str(real_model)]
    # Background jobs of a shell, and so their children, ignore the signal.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from aps_jax.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "restore", *argv, *steps, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (out / ".state").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert printed == "" and "Traceback" not in err, err
    assert "continue with" in err.splitlines()[-1] and os.listdir(out) == [".state"]
    if not goes_on:
        return

    code, _, _ = restore(*argv, "--resume", steps=steps)
    assert code == 0
    _, whole, _ = restore(*argv, steps=steps, out=tmp_path / "whole")
    assert (out / "restored.png").read_bytes() == (whole / "restored.png").read_bytes()
    assert read(out)["history"] == read(whole)["history"]


def test_scripts_share_the_ends_of_a_command(capsys):
    def ends(error):
        def work():
            raise error

        options = {"after_interrupt": "rows are kept", "memory_cure": "lower --count"}
        return cli_errors.guarded(work, "study", **options), capsys.readouterr().err

    assert (
        cli_errors.guarded(lambda: None, "study") == 0
        and cli_errors.guarded(lambda: 1, "study") == 1
    )
    assert ends(KeyboardInterrupt()) == (130, "study: interrupted; rows are kept\n")
    assert ends(KeyboardInterrupt("go on")) == (130, "study: interrupted; go on\n")
    assert ends(MemoryError()) == (2, "study: error: out of memory; lower --count\n")
    assert ends(PerceptualUnavailable("no\nweights")) == (2, "study: error: no weights\n")
    with pytest.raises(RuntimeError, match="a bug"):
        ends(RuntimeError("a bug"))


# The other commands.


def test_help_is_light():
    code = (
        "import sys; from aps_jax.cli import main; code = main(['restore', '--help']);"
        "print(sorted({'jax', 'flax', 'PIL'} & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[] 0\n") and "--num-samples" in done.stdout
    assert done.stderr == ""


def test_help_names_every_choice(capsys):
    assert cli.main(["restore", "--help-all"]) == 0
    text = capsys.readouterr().out
    for name in (*presets.PRESETS, *presets.VARIANTS, "photo64"):
        assert name in text
    text = re.sub(r"[\s│]+", " ", text)
    for task in TASKS.values():
        for name, option in task.options.items():
            flag = "--" + (option.flag or name).replace("_", "-")
            assert f"{flag} {option.metavar} " in text
            assert option.summary.partition(",")[0] in text and f"{task.name}: " in text


def test_version_and_unknown_commands(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("aps-jax ")
    assert cli.main([]) == 0
    assert "restore" in capsys.readouterr().out
    assert cli.main(["restor"]) == 2
    assert_one_line(capsys.readouterr().err, "did you mean 'restore'?")
    assert cli.main(["restore", "--task"]) == 2
    assert_one_line(capsys.readouterr().err, "Missing value", "see aps-jax restore --help")


def test_lists(capsys, model, tmp_path):
    assert cli.main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in TASKS)
    assert cli.main(["samplers"]) == 0
    text = capsys.readouterr().out
    for name, sampler in SAMPLERS.items():
        assert name in text and sampler.paper in text and all(s in text for s in sampler.defaults)
    assert cli.main(["models", str(model)]) == 0
    assert "4 bits per 2x2 pixels" in capsys.readouterr().out
    assert cli.main(["models", str(tmp_path)]) == 2


def test_doctor(capsys, model, tmp_path):
    assert cli.main(["doctor", "--model", str(model)]) == 0
    text = capsys.readouterr().out
    assert "self-test: 16x16 pixels" in text and "LPIPS" in text and text.endswith("ready\n")
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 1
    assert_one_line(capsys.readouterr().err, "not a model folder")


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("sampler", presets.VARIANTS)
def test_presets_and_samplers_combine(preset, sampler):
    config = presets.make_config(preset=preset, sampler=sampler, num_steps=2, sigma=None)
    for name, value in presets.VARIANTS[sampler].items():
        assert getattr(config, name) == value
    assert config.num_steps == 2 and config.sigma == 0.05


def test_models_describes_what_a_folder_has(tmp_path, capsys):
    halves = {
        "codec": {"codec": {"num_bits": 13, "encoder_channels": [8] * 5}},
        "prior": {"prior": {"num_layers": 32, "width": 4096}, "prior_window": 32},
    }
    for name, card in halves.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "card.json").write_text(json.dumps(card))
        assert cli.main(["models", str(tmp_path / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    codec, prior = lines[len(pretrained.EMBEDDED_MODELS) :: len(pretrained.EMBEDDED_MODELS) + 1]
    missing = "its weights are missing or damaged"
    assert codec.endswith(f"codec of 13 bits per 16x16 pixels; {missing}")
    assert prior.endswith(f"prior of 32 layers, width 4096; {missing}; window of 32 tokens")
    (tmp_path / "card.json").write_text("{}")
    assert cli.main(["models", str(tmp_path)]) == 2
    assert "not usable: its card describes no part of a model" in capsys.readouterr().out


def test_results_that_could_not_be_written_are_refused_before_the_first_timestep(
    restore, photo, tmp_path, monkeypatch
):
    def never(*args, **kwargs):
        raise AssertionError("it has begun to sample")

    monkeypatch.setattr(command, "restore", never)
    for name, words in (("comparison.png", "is a folder"), ("result.json", "is a folder")):
        out = tmp_path / name.split(".")[0]
        (out / name).mkdir(parents=True)
        code, _, err = restore(photo, "--overwrite", out=out)
        assert code == 2
        assert_one_line(err, name, words, "move or delete it")
