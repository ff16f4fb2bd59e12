"""`aps-jax restore`: from files to files around `aps_jax.restore.restore`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax import images, pretrained
from aps_jax.cli import inputs
from aps_jax.cli.errors import is_out_of_memory
from aps_jax.cli.inputs import Problem, degrade_photo, given_options, load_measured
from aps_jax.cli.options import Restore, command_of, config_of
from aps_jax.cli.outputs import SINGLE_FILES, Outputs, try_outputs, work_of
from aps_jax.codec import expectation
from aps_jax.config import APSConfig
from aps_jax.io import locks
from aps_jax.io.checkpoint import CARD_NAME, fingerprint, read_card, weights_path
from aps_jax.restore import DivergedError, Restored, Snapshot, StepReport, restore
from aps_jax.samplers import SVDDConfig
from aps_jax.scores import report
from aps_jax.scores.lpips import MIN_SIDE as LPIPS_SIDE
from aps_jax.scores.lpips import PerceptualUnavailable, load_lpips
from aps_jax.text.tokenizer import TOKENIZER_NAME, load_tokenizer
from aps_jax.types import Array, Codec, Key, Params, Perceptual

STATE_NAME = ".state"
#: What a call of APS needs beside the weights, as XLA plans it on CPUs: copies of the logits, and a
#: share of what automatic differentiation keeps of the decoder. Within 10 % of the plan for photo64
#: at 64 to 256 pixels and for MagVIT-v2 at 256 and 512, and 3/4 of the estimate is less than it.
_LOGIT_COPIES, _KEPT_SHARE = 8, 0.7
#: Bytes per decoded pixel that are enough for any decoder, so that it need not be traced.
_AMPLE = 2**18


def run(options: Restore) -> int:
    """Restores one image as the options say; returns the exit code."""
    began = time.perf_counter()
    config_of(options)
    _check_folder(options)
    check_prompt(options)
    try:
        with _folder(options):
            return _run(options, began)
    except KeyboardInterrupt:
        if not (options.out / STATE_NAME).exists():
            raise KeyboardInterrupt("nothing was written; run the same command again") from None
        again = command_of(options, resume=True, overwrite=False)
        raise KeyboardInterrupt(f"continue with: {again}") from None


def _run(options: Restore, began: float) -> int:
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
    model = pretrained.load_pretrained(options.model, prompt=options.prompt, dtype=options.dtype)
    config = dataclasses.replace(config, image_shape=problem.image_shape)
    check_memory(config, model)

    notes: list[str] = []
    distance = load_distance(problem, config, notes)
    config = settle_perceptual(config, problem, distance, notes)
    params = Params(
        prior=model.prior,
        codec=model.codec,
        operator=problem.operator,
        perceptual=distance if perceptual_weight(config) > 0 else None,
    )
    facts = _facts(options, config, problem)
    snapshot = Snapshot(options.out / STATE_NAME, _identity(facts), options.resume)
    try_outputs(options.out, facts | {"command": command_of(options)})
    try:
        restored = _sample(params, problem, key_sample, config, options.sampler, snapshot)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"out of memory: {memory_advice(config, model)}") from error
    outputs = Outputs(options, config, problem, restored, model, distance)
    notes += outputs.residual_notes()
    outputs.write(facts | {"notes": notes}, began)
    snapshot.remove()
    outputs.summarise(notes, time.perf_counter() - began)
    return 0


def _sample(
    params: Params, problem: Problem, key: Key, config: Any, sampler: str, snapshot: Snapshot
) -> Restored:
    try:
        with _progress(config) as on_step:
            return restore(
                params, problem.y, key,
                config=config, sampler=sampler, on_step=on_step, snapshot=snapshot,
            )  # fmt: skip
    except DivergedError:
        snapshot.remove()  # Resuming would only fail again.
        raise


def _check_folder(options: Restore) -> None:
    out = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose a folder")
    has_state = (out / STATE_NAME).exists()
    if options.resume and not has_state:
        raise ValueError(f"--out {out} holds no interrupted run; leave out --resume")
    if options.resume or options.overwrite:
        return
    if has_state:
        raise ValueError(
            f"--out {out} holds an interrupted run; continue it with --resume or start again with "
            "--overwrite"
        )
    for name in SINGLE_FILES:
        if (out / name).exists():
            raise ValueError(
                f"--out {out} already holds {name}; choose another folder or add --overwrite"
            )


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


@contextlib.contextmanager
def _folder(options: Restore) -> Iterator[None]:
    """Makes the folder, for this process alone, and removes it again if nothing came of it."""
    out = options.out
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            raise OSError(
                f"cannot write to --out {out}: {error.strerror}; choose another folder"
            ) from None
        with locks.held(out):
            _check_folder(options)  # Another process may have finished in the meantime.
            yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # Only if it is empty.
        raise


def check_memory(config: Any, model: pretrained.Model) -> None:
    """ValueError if one call surely needs more than the free memory."""
    free = inputs.free_memory()
    if free is None:
        return
    if isinstance(config, APSConfig) and config.num_inner_steps:
        surely = 0.75 * _LOGIT_COPIES * _logit_bytes(config, model)
        assert config.image_shape is not None  # Settled when the problem was posed.
        pixels = config.num_samples * math.prod(config.image_shape) * config.decode_scale**2
        # Elsewhere XLA fuses more, and says so itself when memory runs out; the system of a CPU
        # ends the process.
        if jax.local_devices()[0].platform == "cpu" and free < _AMPLE * pixels:
            surely += 0.75 * _KEPT_SHARE * _kept_bytes(config, model)
    else:
        surely = _logit_bytes(config, model)
    if surely > free:
        raise ValueError(memory_advice(config, model))


def memory_estimate(config: Any, model: pretrained.Model) -> float:
    """Bytes that one call needs about, beside weights and LPIPS; rough for others than APS."""
    logits = _logit_bytes(config, model)
    if not config.evaluations().decoder_gradient:
        return 2 * logits
    return _LOGIT_COPIES * logits + _KEPT_SHARE * _kept_bytes(config, model)


def memory_advice(config: Any, model: pretrained.Model) -> str:
    """What a call needs, what there is, and what would fit; for the user to read."""
    needed = memory_estimate(config, model)
    (height, width), samples = config.image_shape, config.num_samples
    text = (
        f"{samples} sample(s) of {width}x{height} pixels need about {needed / 2**30:.2f} GiB of "
        "memory"
    )
    free = inputs.free_memory()
    if free is None:
        return f"{text}; restore a smaller image (--size) or fewer --num-samples"
    text += f", {free / 2**30:.2f} GiB are free"
    # What ran out in spite of the estimate needs more than it says.
    usable = min(0.9 * free, needed / 2) / (needed / samples)
    if usable >= 1:
        return f"{text}: set --num-samples {int(usable)} or restore a smaller image (--size)"
    # A bit less than would fit: attention shrinks faster than the area.
    side = int(math.sqrt(usable * height * width))
    alone = "--num-samples 1 and " if samples > 1 else ""
    if side >= images.MIN_SIDE:
        return f"{text}: set {alone}--size {min(side, height, width)}"
    return f"{text}: not even the smallest image (--size {images.MIN_SIDE}) fits; free some memory"


def _logit_bytes(config: Any, model: pretrained.Model) -> int:
    """Bytes of the logits of all samples, and of all candidates that are alive at once."""
    # Only these two samplers work on all their candidates at once.
    parallel = getattr(config, "num_particles", 1)
    parallel *= config.num_candidates if isinstance(config, SVDDConfig) else 1
    return (
        4 * parallel * config.num_samples * math.prod(_field(config, model)) * model.codec.num_codes
    )


def _kept_bytes(config: Any, model: pretrained.Model) -> int:
    """Bytes that automatic differentiation keeps of the decoder, weights left out."""
    grid = _field(config, model)
    shape = (config.num_samples, math.prod(grid), model.codec.quantizer.num_features)

    def backward(codec: Codec, codes: Array) -> Any:
        def decode(codes: Array) -> Array:
            return expectation.decode(codec, codes, grid, config.image_shape, config.decode_scale)

        return jax.vjp(decode, codes)[1]

    kept = jax.eval_shape(backward, model.codec, jax.ShapeDtypeStruct(shape, "float32"))
    total, weights = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (kept, model.codec.params)
    )
    return max(total - weights, 0)


def _field(config: Any, model: pretrained.Model) -> tuple[int, ...]:
    height, width = (side * config.decode_scale for side in config.image_shape)
    return model.codec.grid((height, width))


def perceptual_weight(config: Any) -> float:
    """Weight of LPIPS in the sampler's objective, 0 for those without it."""
    return getattr(config, "perceptual_weight", 0.0)


def load_distance(problem: Problem, config: Any, notes: list[str]) -> Perceptual | None:
    """LPIPS where something asks for it; a note says why not."""
    if problem.photo is None and perceptual_weight(config) == 0:
        return None
    if min(problem.image_shape) < LPIPS_SIDE:
        notes.append(f"LPIPS was left out: the image is smaller than {LPIPS_SIDE} pixels")
        return None
    try:
        return load_lpips()
    except PerceptualUnavailable as error:
        notes.append(f"LPIPS was left out: {error}")
        return None


def settle_perceptual(
    config: Any, problem: Problem, distance: Perceptual | None, notes: list[str]
) -> Any:
    """Drops the perceptual term where it cannot be computed, with a note."""
    if perceptual_weight(config) == 0:
        return config
    if not problem.operator.is_image:
        reason = "the measurement is not an image"
    elif min(problem.y.shape[1:3]) < LPIPS_SIDE:
        reason = f"the measurement is smaller than {LPIPS_SIDE} pixels"
    elif distance is None:
        reason = "it needs LPIPS"
    else:
        return config
    notes.append(f"the perceptual term was left out: {reason}")
    return dataclasses.replace(config, perceptual_weight=0.0)


def run_facts(options: Restore, config: Any) -> dict[str, Any]:
    """What the samples of every image depend on, as JSON values."""
    folder = pretrained.model_folder(options.model)
    paths = (folder / CARD_NAME, *(weights_path(folder, name) for name in ("codec", "prior")))
    weights = {path.name: fingerprint(path) for path in paths}
    if options.prompt is not None:
        tokenizer = (folder / TOKENIZER_NAME).read_bytes()
        weights[TOKENIZER_NAME] = hashlib.sha256(tokenizer).hexdigest()
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    image_shape = config.image_shape and list(config.image_shape)
    return {
        "task": {"name": options.task, "options": given_options(options)},
        "sigma": options.sigma,
        "seed": options.seed,
        "is_measured": options.measured,
        "model": {"name": options.model, "sha256": weights},
        "dtype": options.dtype,
        "prompt": options.prompt,
        "sampler": options.sampler,
        "config": dataclasses.asdict(config) | {"image_shape": image_shape},
        "versions": {
            "aps_jax": aps_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def _facts(options: Restore, config: Any, problem: Problem) -> dict[str, Any]:
    """Everything the samples depend on, as JSON values."""
    operator = hashlib.sha256()
    for leaf in jax.tree.leaves(problem.operator):
        operator.update(np.asarray(leaf).tobytes())
    device = jax.local_devices()[0]
    return run_facts(options, config) | {
        "image": problem.source | {"shape": list(problem.image_shape)},
        "measurement_sha256": hashlib.sha256(np.asarray(problem.y).tobytes()).hexdigest(),
        "operator_sha256": operator.hexdigest(),
        "device": {"platform": device.platform, "kind": device.device_kind, "cpus": os.cpu_count()},
    }


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without the places of files, whose contents count."""
    return facts | {
        "image": {name: value for name, value in facts["image"].items() if name != "path"},
        "task": {
            "name": facts["task"]["name"],
            # Static options, such as the width of a blur, leave no trace in the operator's arrays.
            "options": {
                name: value
                for name, value in facts["task"]["options"].items()
                if name not in ("kernel", "mask", "weights")
            },
        },
        "model": facts["model"]["sha256"],
    }


@contextlib.contextmanager
def _progress(config: Any) -> Iterator[Callable[[StepReport], None] | None]:
    """A bar on a terminal; elsewhere one plain line."""
    if not sys.stderr.isatty():
        print(f"sampling {work_of(config)}", file=sys.stderr)
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("compiling", total=None, figures="")

        def on_step(step: StepReport) -> None:
            figures = f"{step.num_masked:.0f} tokens masked"
            if step.num_done:
                figures = f"loss {step.loss:.4f}, {figures}"
            bar.update(
                job, description="sampling", completed=step.num_done, total=step.num_steps,
                figures=figures,
            )  # fmt: skip

        yield on_step
