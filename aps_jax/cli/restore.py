"""`aps-jax restore`: from files to files around `aps_jax.restore.restore`."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp

from aps_jax import pretrained
from aps_jax.cli import facts, memory, outputs, perceptual
from aps_jax.cli.folder import ResultFolder
from aps_jax.cli.inputs import degrade_photo, framing_notes, load_measured
from aps_jax.cli.options import Restore, command_of, config_of
from aps_jax.cli.progress import watched
from aps_jax.config import SharedConfig
from aps_jax.denoiser import Denoiser, PixelParams
from aps_jax.io.checkpoint import read_card
from aps_jax.restore import restore
from aps_jax.scores import report
from aps_jax.text.tokenizer import load_tokenizer
from aps_jax.types import Params


def run(options: Restore) -> int:
    """Restores one image as the options say; returns the exit code."""
    began = time.perf_counter()
    config_of(options)
    folder = ResultFolder(
        options.out, outputs.FILES, outputs.PATTERNS,
        is_resuming=options.resume, is_overwriting=options.overwrite,
    )  # fmt: skip
    folder.check()
    check_prompt(options)
    with folder.taken(again=command_of(options, resume=True, overwrite=False)):
        return _run(options, folder, began)


def _run(options: Restore, folder: ResultFolder, began: float) -> int:
    """Restores into a folder that this process has for itself."""
    config = config_of(options)
    key_operator, key_noise, key_sample = jax.random.split(jax.random.key(options.seed), 3)
    if options.measured:
        problem = load_measured(options)
    else:
        problem = degrade_photo(options, key_operator, key_noise)
    if options.paste_known:
        report.paste_known(
            problem.operator, jnp.zeros((*problem.image_shape, 3), jnp.float32), problem.y
        )
    config = dataclasses.replace(config, image_shape=problem.image_shape)
    model = load_model(options, config)
    notes = framing_notes(options.model, problem.photo)
    distance = perceptual.load(problem, config, notes)
    config = perceptual.settle(config, problem, distance, notes)
    if isinstance(model, Denoiser):
        params, codec = PixelParams(denoiser=model, operator=problem.operator), None
    else:
        codec = model.codec
        params = Params(
            prior=model.prior,
            codec=codec,
            operator=problem.operator,
            perceptual=distance if perceptual.weight(config) > 0 else None,
        )
    record = facts.problem_facts(options, config, problem)
    snapshot = folder.snapshot(facts.identity(record))
    folder.try_files(record | {"command": command_of(options)})
    restored = watched(
        lambda on_step: restore(
            params, problem.y, key_sample,
            config=config, sampler=options.sampler, on_step=on_step, snapshot=snapshot,
        ),
        work=outputs.work_of(config),
        snapshot=snapshot,
        memory_advice=lambda: memory.advice(config, model),
    )  # fmt: skip
    results = outputs.Outputs(options, config, problem, restored, codec, distance)
    notes += results.residual_notes()
    folder.publish(results.write_pictures, lambda: results.record(record | {"notes": notes}, began))
    snapshot.remove()
    results.summarise(notes, time.perf_counter() - began)
    return 0


def load_model(options: Restore, config: SharedConfig) -> pretrained.Model | Denoiser:
    """What the sampler draws from; ValueError if one call of it surely needs too much memory."""
    if config.NEEDS != "prior":
        is_latent = config.NEEDS == "latent denoiser"
        return pretrained.load_denoiser(options.model, is_latent=is_latent, dtype=options.dtype)
    model = pretrained.load_pretrained(options.model, prompt=options.prompt, dtype=options.dtype)
    memory.check(config, model)
    return model


def check_prompt(options: Restore) -> None:
    """Finds out from the card alone whether the model takes what is asked of it."""
    folder = pretrained.model_folder(options.model)
    if "prompt" in read_card(folder):
        if options.prompt is not None:
            load_tokenizer(folder).encode(options.prompt)
    elif options.prompt is not None:
        raise ValueError(f"--model {options.model} reads no text; leave out --prompt")
    elif options.guidance_scale:
        raise ValueError(f"--model {options.model} reads no text; leave out --guidance-scale")
