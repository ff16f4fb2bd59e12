"""`aps-jax tasks`, `models` and `doctor`: what there is, and whether it works."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import aps_jax
from aps_jax import pretrained
from aps_jax.config import APSConfig
from aps_jax.io import checkpoint
from aps_jax.io.files import disk_size
from aps_jax.presets import option_types
from aps_jax.restore import restore
from aps_jax.samplers import SAMPLERS
from aps_jax.scores.lpips import PerceptualUnavailable, load_lpips
from aps_jax.tasks import TASKS

#: Parts of model folders that score what others make.
_SCORES = {
    "clip": "CLIP",
    "dino": "DINO",
    "reward_model": "reward model of text",
    "classifier": "classifier of lines of text, for aps-jax write",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "safetensors")


def list_tasks() -> int:
    """Prints every task with its options."""
    for task in TASKS.values():
        print(f"{task.name:20}{task.summary}{' (random)' if task.is_random else ''}")
        for name, option in task.options.items():
            flag = "--" + (option.flag or name).replace("_", "-")
            default = "required" if option.is_required else option.default
            shown = "" if default is None else f" [{default}]"
            print(f"    {flag:20}{option.summary}{shown}")
    return 0


def list_samplers() -> int:
    """Prints every sampler with its paper, and its options' defaults by where they come from."""
    for name, sampler in SAMPLERS.items():
        config = sampler.config()
        print(f"{name:20}{sampler.summary}; {sampler.paper}")
        knob = sampler.config.KNOB
        if knob is not None:
            print(f"    --budget sets {knob.name}{' and num_steps' * knob.scales_steps}")
        shown = option_types(sampler.config)
        for source, options in sampler.defaults.items():
            values = [f"{option}={getattr(config, option)}" for option in options]
            values = [value for value in values if value.partition("=")[0] in shown]
            text = f"{source}: {', '.join(values)}"
            print(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="        "))
    return 0


def list_models(folders: Sequence[Path]) -> int:
    """Prints the embedded models and the given folders; exit code 2 if a folder is no model."""
    code = 0
    for name in (*pretrained.EMBEDDED_MODELS, *folders):
        try:
            folder = pretrained.model_folder(name)
            facts = _describe(folder, checkpoint.read_card(folder))
        except checkpoint.CheckpointError as error:
            facts = f"not usable: {error}"
            code = 2 if name in folders else code
        print(f"{name!s:20}{facts}")
    return code


def _describe(folder: Path, card: dict[str, Any]) -> str:
    parts = []
    if codec := card.get("codec"):
        stride = 2 ** (len(codec.get("encoder_channels", (0,))) - 1)
        parts.append(f"codec of {codec.get('num_bits', '?')} bits per {stride}x{stride} pixels")
        parts += _weights(folder, card, "codec")
    if prior := card.get("prior"):
        layers, width = prior.get("num_layers", "?"), prior.get("width", "?")
        parts.append(f"prior of {layers} layers, width {width}")
        parts += _weights(folder, card, "prior")
        if side := prior.get("absolute_side"):
            parts.append(f"whole pictures of {side}x{side} tokens")
        else:
            parts.append(f"window of {card.get('prior_window') or 'any number of'} tokens")
    for section, what in (("denoiser", "pixels"), ("latent_denoiser", "latents")):
        if denoiser := card.get(section):
            side = denoiser.get("side", "?")
            parts.append(f"denoiser of {side}x{side} {what}, for samplers on {what}")
            parts += _weights(folder, card, section)
    if "prompt" in card:
        parts.append("takes prompts")
    if "kernel_wizard" in card:
        parts.append("network of --task nonlinear_blur")
    for section, what in _SCORES.items():
        if section in card:
            parts += [what, *_weights(folder, card, section)]
    for section in (
        "codec_training", "prior_training", "denoiser_training", "latent_denoiser_training"
    ):  # fmt: skip
        scores = {k: v for k, v in (card.get(section) or {}).items() if k.startswith("eval_")}
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in scores.items()]
    if not parts:
        raise checkpoint.CheckpointError("its card describes no part of a model")
    return "; ".join(parts)


def _weights(folder: Path, card: dict[str, Any], section: str) -> list[str]:
    """Number, dtype, format and size of the weights of one half, and where they are from."""
    parts = []
    path = checkpoint.weights_path(folder, section)
    try:
        count, dtype = checkpoint.count_weights(path)
        kind = "orbax" if path.is_dir() else "safetensors"
        size = disk_size(path) / 1e6
        parts.append(f"{count:,} weights of {dtype} ({kind}, {size:,.1f} MB)")
    except checkpoint.CheckpointError:
        parts.append("its weights are missing or damaged")
    source = card.get(f"{section}_source") or {}
    if where := source.get("repository", source.get("folder")):
        revision = source.get("revision")
        parts.append(f"from {where}" + (f" at {revision}" if revision else ""))
    if "converter" in source:
        parts.append(f"by {source['converter']}")
    return parts


def diagnose(model: str) -> int:
    """Prints versions, devices and the outcome of a tiny run; 1 if photos cannot be restored."""
    print(
        f"aps_jax {aps_jax.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES))
    print(f"{num_cpus()} CPU cores; devices: {', '.join(map(str, jax.devices()))}")
    try:
        load_lpips()
        print("LPIPS: available")
    except PerceptualUnavailable as error:
        print(f"LPIPS: not available, all else works; {error}")
    try:
        loaded = pretrained.load_pretrained(model)
        print(f"model {model}: {_describe(pretrained.model_folder(model), loaded.card)}")
        print(f"self-test: {_self_test(loaded)}")
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"aps-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print("ready")
    return 0


def num_cpus() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _self_test(model: pretrained.Model) -> str:
    """Restores one small image; says how long it took."""
    # A prior of aligned pictures takes no others.
    side = (model.card["prior"].get("absolute_side") or 4) * model.codec.stride
    operator = aps_jax.operators.super_resolution(scale=4)
    x = jnp.zeros((1, side, side, 3), jnp.float32)
    y = aps_jax.measure(jax.random.key(0), x, operator=operator, sigma=0.05)
    params = aps_jax.Params(prior=model.prior, codec=model.codec, operator=operator)
    config = APSConfig(num_steps=3, num_inner_steps=4)
    began = time.perf_counter()
    restored = restore(params, y, jax.random.key(1), config=config)
    if not bool(jnp.all(jnp.isfinite(restored.result.images))):
        raise ArithmeticError("the self-test gave an image that is not finite; reinstall jax")
    rate = 1000 * restored.seconds["sample"] / (config.num_steps * config.num_inner_steps)
    return (
        f"{side}x{side} pixels in {time.perf_counter() - began:.1f} s, of which compiling "
        f"{restored.seconds['compile']:.1f} s; {rate:.1f} ms per inner step"
    )
