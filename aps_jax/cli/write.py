"""`aps-jax write`: lines of text under a reward, into a file and a record beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.cli import facts
from aps_jax.cli.common import chosen_options, flag_of
from aps_jax.cli.folder import ResultFolder
from aps_jax.cli.options import command_of
from aps_jax.cli.outputs import work_of
from aps_jax.cli.progress import watched
from aps_jax.cli.written import Write
from aps_jax.config import VARIANTS
from aps_jax.io.checkpoint import fingerprint, weights_path
from aps_jax.io.files import write_atomically
from aps_jax.pretrained import model_folder
from aps_jax.restore import Restored, restore_target
from aps_jax.writing import Writer, load_writer, text_config

#: Options of samplers that say something of images or measurements, or of prompts as a condition,
#: which a line begins with here.
_OF_IMAGES = (
    "sigma", "measurement_term", "perceptual_weight", "data_consistency", "decode_scale",
    "image_shape", "guidance_scale",
)  # fmt: skip


def run(options: Write) -> int:
    """Writes lines as the options say; returns the exit code."""
    began = time.perf_counter()
    config = config_of(options)
    writer = load_writer(options.model, reward=options.reward_model)
    target = writer.target(
        options.reward, prompt=options.prompt, num_lines=options.num_samples,
        weight=options.weight, length=options.length,
        prior_temperature=None if options.temperature == 1 else options.temperature,
    )  # fmt: skip
    folder = ResultFolder(
        options.out.parent, (options.out.name,),
        is_resuming=options.resume, is_overwriting=options.overwrite,
    )  # fmt: skip
    folder.check()
    with folder.taken(again=command_of(options, resume=True, overwrite=False)):
        record = _facts(options, config)
        snapshot = folder.snapshot(record | {"model": record["model"]["sha256"]})
        folder.try_files(record)
        restored = watched(
            lambda on_step: restore_target(
                target, jax.random.key(options.seed), config=config, on_step=on_step,
                snapshot=snapshot,
            ),
            work=work_of(config),
            snapshot=snapshot,
            memory_advice=lambda: "write fewer lines (--num-samples)",
        )  # fmt: skip
        results = _results(options, writer, restored)
        text = "".join(f"{result['text']}\n" for result in results)
        folder.publish(
            lambda place: write_atomically(place / options.out.name, text.encode()),
            lambda: _record(options, record, restored, results, began),
        )
        snapshot.remove()
    print(text, end="")
    mean = float(np.mean([result["probability"] for result in results]))
    print(
        f"{options.out}: {len(results)} lines, mean probability of {options.reward} {mean:.3f} "
        f"by the reward itself, {options.sampler}, {work_of(config)}, seed {options.seed}, "
        f"after {time.perf_counter() - began:.1f} s"
    )
    return 0


def config_of(options: Write) -> Any:
    """Options of the sampler; ValueError if one is unknown, not its own or out of range."""
    flags = {"num_steps": options.num_steps, "num_inner_steps": options.num_inner_steps}
    flags = {name: value for name, value in flags.items() if value is not None}
    owned = {name: flag_of(name) for name in ("num_steps", "num_inner_steps", "num_samples")}
    owned["prior_temperature"] = "--temperature"
    chosen = chosen_options(options, options.sampler, owned)
    scale = VARIANTS.get(options.sampler, {}).get("decode_scale", 1)
    of_images = [name for name in _OF_IMAGES if name in chosen]
    if of_images or scale > 1:
        what = f"--option {of_images[0]}" if of_images else f"--sampler {options.sampler}"
        raise ValueError(f"{what} is of images and does nothing for a text; leave it out")
    return text_config(options.sampler, **flags, **chosen)


def _facts(options: Write, config: Any) -> dict[str, Any]:
    """Everything the lines depend on, as JSON values."""
    names = ("prompt", "reward", "weight", "temperature", "num_samples", "length", "sampler")
    reward = model_folder(options.model if options.reward_model is None else options.reward_model)
    return {
        "settings": {name: getattr(options, name) for name in names},
        "reward_sha256": fingerprint(weights_path(reward, "classifier")),
        **facts.model_facts(options, config, has_words=True, parts=("prior",)),
        "device": facts.device_facts(),
    }


def _results(options: Write, writer: Writer, restored: Restored) -> list[dict[str, Any]]:
    """Every line and the probability that the reward gives it."""
    found = restored.result.tokens
    assert found is not None  # Samplers of pixels are refused for a text.
    tokens = writer.settled(found)
    column = writer.reward.names.index(options.reward)
    chances = np.asarray(writer.reward.probabilities(jnp.asarray(tokens)))[:, column]
    return [
        {"text": line, "probability": round(float(chance), 6), "ids": ids.tolist()}
        for line, chance, ids in zip(writer.lines(tokens), chances, tokens, strict=True)
    ]


def _record(
    options: Write,
    record: Mapping[str, Any],
    restored: Restored,
    results: list[dict[str, Any]],
    began: float,
) -> dict[str, Any]:
    info = jax.device_get(restored.result.info)
    return {
        "command": command_of(options, resume=False, overwrite=False),
        **record,
        "lines": results,
        "history": {
            "loss": np.mean(info.loss, axis=(1, 2)),
            "num_masked": np.mean(info.num_masked, axis=(1, 2)),
        },
        "seconds": facts.seconds_of(restored, began),
        "model_calls": restored.calls,
    }
