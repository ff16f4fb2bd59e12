"""Restores a folder of images on as many devices and hosts as there are.

    aps-jax sweep PHOTOS --size 64 --task super_resolution --out runs/sweep
    aps-jax sweep SWEEP.json --out runs/sweep

In a clone, `python -m experiments.sweep` is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from aps_jax.cli import errors, facts, inputs
from aps_jax.cli import options as cli_options
from aps_jax.cli.restore import check_prompt
from aps_jax.cli.sweep import hosts, sources
from aps_jax.cli.sweep.options import PROGRAM, Sweep, read_options
from aps_jax.cli.sweep.share import Host, say
from aps_jax.config import SharedConfig
from aps_jax.io import checkpoint, rows
from aps_jax.operators import make_operator

MANIFEST = "sweep.json"
MEMORY_CURE = (
    "set a smaller --batch-size, restore smaller images (--size) or share the prior with a larger "
    "--num-model"
)


def _check_task(options: Sweep) -> None:
    """ValueError if the task or its options are wrong whatever the image."""
    given = inputs.task_options(options)
    # Measurements with transparent pixels have their own masks.
    if options.task != "inpainting_mask" or not options.measured or "mask" in given:
        make_operator(options.task, **given)


def run(options: Sweep) -> int:
    """Does this host's share; 0 if every image of it has a result, 1 if some could not be used."""
    if options.image is None:
        raise ValueError(
            "name a folder of images, a list of paths, MODULE:NAME or a JSON file of options"
        )
    cli_options.check(options)
    check_prompt(options)
    _check_task(options)
    if options.num_samples != 1:
        raise ValueError(
            "--num-samples must be 1 here; for more samples of an image, sweep again with another "
            "--seed and --out"
        )
    place = hosts.join(
        options.coordinator,
        options.num_processes,
        options.process_id,
        seconds=options.join_seconds,
        is_cluster=options.cluster,
        fail=hosts.give_up(PROGRAM),
    )
    found = sources.named_images(options.image)
    host = Host(options, place)
    rows.claim(options.out / MANIFEST, _identity(options, host.config))
    try:
        with rows.alone(host.log):
            failed = host.run(found)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command does what is missing") from None
    if failed:
        say(f"{failed} images have no result; {host.log} says why")
    return 1 if failed else 0


def _identity(options: Sweep, config: SharedConfig) -> dict[str, Any]:
    """What every result of one folder has in common."""
    shared = facts.run_facts(options, config)
    for name in ("kernel", "mask"):
        path = cli_options.task_file(options, name)
        if path is not None:
            shared["task"]["options"][name] = checkpoint.fingerprint(path)
    folder = cli_options.task_file(options, "weights")
    if folder is not None:  # Of which the values count.
        card = folder / checkpoint.CARD_NAME
        weights = checkpoint.weights_path(folder, "kernel_wizard")
        shared["task"]["options"]["weights"] = {
            path.name: checkpoint.fingerprint(path) for path in (card, weights)
        }
    return shared | {"model": shared["model"]["sha256"], "size": options.size}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return errors.guarded(lambda: run(read_options(argv)), PROGRAM, memory_cure=MEMORY_CURE)
