"""What one call of the sampler needs at the size of MMaDA-8B with MagVIT-v2, without any weights.

    python -m experiments.memory_plan --out experiments/results/memory_plan

`aps_sample` is compiled ahead of time for shapes alone, on host devices that stand for the parts of
a mesh. Timesteps and inner steps are loop counts: they change the FLOPs and not the memory.

How to read the numbers:

- *arguments*: bytes of weights (prior in bfloat16, codec in float32), measurement and keys on the
  fullest device, from the partition rules of `aps_jax.sharding`. Exact: the same sum over the
  program that is compiled must equal what XLA reports, or the script fails.
- *temporaries*: what XLA's CPU backend reserves on one device for the same program with the prior
  in float32. It is compiled in float32 because this backend computes bfloat16 products in float32
  and keeps a converted copy of all weights for that (31 GB), which GPUs and TPUs do not. Prior
  activations therefore count twice what they take in bfloat16. The backend fuses less than those
  of GPUs and knows no flash attention, so the number tends to be too large; but a GPU's
  convolutions may ask for workspace of their own, which is not in it. Most of it is the decoder's
  and falls with "model" too where all devices divide the batch.
- *fits*: parts of which the total fills at most 90 %.
- `--confirm` runs a case instead, for one timestep and one inner step, with random float32 weights
  and a prior of `--num-layers`, so that it fits the machine, and puts what was held at the peak
  beside what XLA planned for the same program.
- *FLOPs*: products and convolutions of all devices together, counted in the trace with loops times
  their rounds. Windows, Adam and norms are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh, NamedSharding

import aps_jax
from aps_jax import APSConfig, Params, sharding
from aps_jax.codec.magvit2 import CodecConfig, init_codec_params, make_codec
from aps_jax.flops import count_flops
from aps_jax.io.files import write_atomically, write_json
from aps_jax.prior.bundle import make_prompted_prior
from aps_jax.prior.prompts import PromptConfig, frame_prompt
from aps_jax.prior.transformer import (
    TransformerConfig,
    init_transformer_params,
    num_params,
)
from aps_jax.types import PyTree, image_keys
from convert.llada import IMAGE_PROMPT, WINDOW
from experiments.command import command
from experiments.speed.memory_run import confirm
from experiments.tables import markdown

MMADA = TransformerConfig(
    vocab_size=134656,
    width=4096,
    num_layers=32,
    num_heads=32,
    mlp_width=12288,
    rope_theta=500000.0,
)
TINY = TransformerConfig(vocab_size=24, width=32, num_layers=2, num_heads=8, mlp_width=64)
TINY_CODEC = CodecConfig(
    num_bits=4,
    encoder_channels=(8, 8),
    encoder_blocks=(0, 1),
    decoder_channels=(8, 8),
    decoder_blocks=(0, 1),
    num_groups=4,
)
TINY_PROMPT = PromptConfig(num_codes=16, mask_token_id=16, begin_id=17, end_id=18, pad_token_id=19)
_KEYS = ("image_size", "batch", "mesh")
#: Bytes of a row, and what the table calls them.
_PARTS = {
    "argument": "arguments", "temporary": "temporaries", "output": "output", "total": "total",
}  # fmt: skip
#: Text ids of a prompt, about that of 25 words.
PROMPT_LENGTH = 25
#: Memory of the parts that a mesh may be made of, in bytes.
PARTS = {"16 GB": 16e9, "80 GB": 80e9}
#: Share of a part's memory that a plan may fill; drivers, XLA's workspace and holes take the rest.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder for `plan.json` and `plan.md`; a plan that was cut short there is continued.
      image_sizes: sides of the images in pixels.
      meshes: cases as BATCH:DATAxMODEL.
      steps: timesteps T.
      inner_steps: optimiser steps M per timestep.
      confirm: run the cases instead of planning them; writes OUT/confirmed.json.
      num_layers: of the prior that is run.
      smoke: a tiny model that compiles in seconds, for a test of this script.
    """

    out: Path = Path("runs/memory_plan")
    image_sizes: tuple[int, ...] = (256, 512)
    meshes: tuple[str, ...] = (
        "1:1x1", "1:1x4", "1:1x8", "8:1x1", "8:1x4", "8:4x1", "8:1x8", "8:2x4", "8:8x1",
    )  # fmt: skip
    steps: int = 15
    inner_steps: int = 100
    confirm: bool = False
    num_layers: int = 8
    smoke: bool = False


def cases(arguments: Arguments) -> Iterator[tuple[int, int, Mesh]]:
    """Side of the images, batch and mesh of every case."""
    for image_size, case in itertools.product(arguments.image_sizes, arguments.meshes):
        batch, shape = case.split(":")
        yield image_size, int(batch), sharding.make_mesh(*map(int, shape.split("x")))


def described(image_size: int, batch: int, mesh: Mesh) -> dict[str, Any]:
    """What a row says of its case."""
    shape = "x".join(str(size) for size in mesh.shape.values())
    return {"image_size": image_size, "batch": batch, "mesh": shape}


def abstract_params(
    prior: TransformerConfig, codec: CodecConfig, prompt: PromptConfig, num_text: int
) -> Params:
    """Shapes of everything that `aps_sample` reads, for super-resolution by 4."""
    framed, unconditional = frame_prompt(prompt, np.zeros(num_text, np.int32))

    def build(key: jax.Array) -> Params:
        bundle = make_prompted_prior(
            prior,
            init_transformer_params(key, prior),
            prompt=prompt,
            prompt_ids=framed,
            uncond_prompt_ids=unconditional,
            window=WINDOW,
        )
        operator = aps_jax.operators.super_resolution(scale=4)
        return Params(bundle, make_codec(codec, init_codec_params(key, codec)), operator)

    return jax.eval_shape(build, jax.random.key(0))


def place(params: Params, mesh: Mesh) -> Params:
    """The same shapes, laid out over a mesh by `shard_params`'s own plan."""
    return jax.tree.map(_lay_out, *sharding.plan_params(params, mesh))


def _lay_out(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def bytes_per_device(tree: PyTree) -> int:
    """Bytes of one device's part of sharded shapes; all devices have parts of one size."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return part * 8  # threefry
        return part * np.dtype(leaf.dtype).itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def compile_case(
    params: Params, image_size: int, batch: int, mesh: Mesh, config: APSConfig
) -> tuple[Any, tuple[PyTree, ...]]:
    """The compiled sampler, and the shapes that it takes: parameters, measurement, keys."""
    spread = sharding.batch_sharding((batch,), mesh)
    side = image_size // 4
    y = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32, sharding=spread)
    keys = _lay_out(jax.eval_shape(lambda: image_keys(jax.random.key(0), batch)), spread)
    inputs = place(params, mesh), y, keys
    sample = jax.jit(aps_jax.aps_sample, static_argnames="config", keep_unused=True)
    return sample.lower(*inputs, config=config).compile(), inputs


def plan(
    params: Params, half: Params, image_size: int, batch: int, mesh: Mesh, config: APSConfig
) -> dict[str, Any]:
    """Compiles one case.

    Args:
      params: shapes with the prior in float32, which is compiled.
      half: with the prior in bfloat16, which is counted.
      image_size: side in pixels.
      batch: images.
      mesh: devices.
      config: options of the sampler.

    Raises:
      ValueError: XLA counts other argument bytes than the shapes have.
    """
    began = time.perf_counter()
    compiled, inputs = compile_case(params, image_size, batch, mesh, config)
    memory = compiled.memory_analysis()
    expected = bytes_per_device(inputs)
    if memory.argument_size_in_bytes != expected:
        raise ValueError(
            f"XLA counts {memory.argument_size_in_bytes:,} bytes of arguments, the shapes have "
            f"{expected:,}; a parameter is laid out otherwise than planned"
        )
    arguments = bytes_per_device((place(half, mesh), *inputs[1:]))
    total = arguments + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return described(image_size, batch, mesh) | {
        "argument_bytes": arguments,
        "compiled_argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "total_bytes": total,
        "fits": [name for name, size in PARTS.items() if total <= USABLE * size],
        "seconds_to_compile": round(time.perf_counter() - began, 1),
    }


def flops(params: Params, image_size: int, batch: int, config: APSConfig) -> float:
    """FLOPs of one call of the sampler."""
    y = jax.ShapeDtypeStruct((batch, image_size // 4, image_size // 4, 3), jnp.float32)
    keys = jax.eval_shape(lambda: image_keys(jax.random.key(0), batch))

    def sample(params: Params, y: jax.Array, keys: jax.Array) -> Any:
        return aps_jax.aps_sample(params, y, keys, config=config)

    return count_flops(sample, params, y, keys)


def table(result: dict[str, Any]) -> str:
    """The plan as Markdown."""
    rows = pd.DataFrame(result["rows"])
    shown = pd.DataFrame(
        {"pixels": rows["image_size"], "batch": rows["batch"], "mesh (data x model)": rows["mesh"]}
        | {
            f"{title}, GB": rows[f"{name}_bytes"].map(lambda size: f"{size / 1e9:.2f}")
            for name, title in _PARTS.items()
        }
        | {
            "fits": rows["fits"].map(", ".join).replace("", None),
            "PFLOP per call": rows["flops"].map(lambda count: f"{count / 1e15:.3g}"),
        }
    )
    return (
        f"Prior {result['prior_params']:,} parameters (bfloat16), codec "
        f"{result['codec_params']:,} (float32); T = {result['steps']}, M = "
        f"{result['inner_steps']}; bytes are per device. What the columns are, and are not: "
        f"`experiments/speed/memory_plan.py`.\n\n{markdown(shown)}\n"
    )


def confirm_all(
    arguments: Arguments,
    prior: TransformerConfig,
    codec: CodecConfig,
    prompt: PromptConfig,
    num_text: int,
) -> None:
    """Runs every case once; each should have a process of its own, which has freed nothing yet.

    Cases that the file has already are replaced, others are kept.
    """
    prior = dataclasses.replace(prior, num_layers=min(arguments.num_layers, prior.num_layers))
    params = abstract_params(prior, codec, prompt, num_text)
    config = APSConfig(num_steps=1, num_inner_steps=1)
    path = arguments.out / "confirmed.json"
    rows = {_case(row): row for row in json.loads(path.read_text())} if path.exists() else {}
    for image_size, batch, mesh in cases(arguments):
        compiled, inputs = compile_case(params, image_size, batch, mesh, config)
        row = described(image_size, batch, mesh) | confirm(compiled, inputs, mesh.devices.size)
        print(json.dumps(row), flush=True)
        rows[_case(row)] = row
        write_json(path, [rows[case] for case in sorted(rows)])


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return *(row[key] for key in _KEYS), row["prior_params"]


@command("memory_plan", memory_cure="plan fewer cases at once (--image-sizes, --meshes)")
def main(arguments: Arguments) -> None:
    """Plans every case that the folder does not have yet."""
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)
    prior, codec, prompt = MMADA, CodecConfig(), IMAGE_PROMPT
    if arguments.smoke:
        prior, codec, prompt = TINY, TINY_CODEC, TINY_PROMPT
        arguments = dataclasses.replace(
            arguments, image_sizes=(16,), meshes=("1:1x1", "4:2x2"), steps=2, inner_steps=2
        )
    num_text = 2 if arguments.smoke else PROMPT_LENGTH
    if arguments.confirm:
        confirm_all(arguments, prior, codec, prompt, num_text)
        return
    half = dataclasses.replace(prior, dtype="bfloat16", param_dtype="bfloat16")
    params, half_params = (
        abstract_params(config, codec, prompt, num_text) for config in (prior, half)
    )
    config = APSConfig(num_steps=arguments.steps, num_inner_steps=arguments.inner_steps)
    facts = {
        "jax": jax.__version__,
        "prior_params": num_params(params.prior.params["model"]),
        "codec_params": num_params(params.codec.params),
        "steps": arguments.steps,
        "inner_steps": arguments.inner_steps,
        "prompt_length": num_text,
    }
    path = arguments.out / "plan.json"
    rows = []
    if path.exists():
        earlier = json.loads(path.read_text())
        rows = earlier.pop("rows") if facts.items() <= earlier.items() else []
    done = {tuple(row[key] for key in _KEYS) for row in rows}
    for image_size, batch, mesh in cases(arguments):
        if tuple(described(image_size, batch, mesh).values()) in done:
            continue
        row = plan(params, half_params, image_size, batch, mesh, config)
        row["flops"] = flops(half_params, image_size, batch, config)
        rows = sorted([*rows, row], key=lambda row: [row[k] for k in _KEYS])
        print(json.dumps(row), flush=True)
        write_json(path, {**facts, "rows": rows})
        write_atomically(arguments.out / "plan.md", table({**facts, "rows": rows}).encode())
