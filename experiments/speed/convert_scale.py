"""Converts a large synthetic checkpoint and loads it to a mesh: seconds, GB/s and memory.

    python -m experiments.convert_scale --work SCRATCH --out experiments/results/convert_scale.json

The checkpoint has the names, the vocabulary and the bfloat16 of LLaDA-8B, a smaller width and fewer
layers, and random numbers. Every stage is a process of its own; its *anonymous* memory is sampled
while it runs, which is what it really holds: mapped files are the page cache's, and go when memory
is needed. The folder needs about three times the size of the checkpoint and is emptied at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from aps_jax.io.files import disk_size, write_json
from aps_jax.io.tensors import create_tensors
from experiments.command import command

_ROWS = 126464
_LOAD = """
import json, sys, time
import jax
from pathlib import Path
from aps_jax import pretrained, sharding
from experiments.speed.convert_scale import anonymous_bytes
devices = int(sys.argv[2])
jax.block_until_ready([jax.device_put(0, device) for device in jax.devices()])
mesh = sharding.make_mesh(1, devices) if devices > 1 else None
idle = anonymous_bytes("self")
began = time.perf_counter()
prior = jax.block_until_ready(pretrained.load_prior(Path(sys.argv[1]), mesh=mesh))
leaves = jax.tree.leaves(prior.params)
print(json.dumps({
    "seconds": round(time.perf_counter() - began, 2),
    "idle_anonymous_bytes": idle,
    "param_bytes": sum(leaf.nbytes for leaf in leaves),
    "bytes_on_all_devices": sum(
        shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards
    ),
    "bytes_on_fullest_device": max(
        sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == d)
        for d in jax.devices()
    ),
}))
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      work: scratch folder, made if needed; what this script puts there is deleted again.
      out: JSON file for the result.
      width: residual width of the synthetic model.
      layers: its number of layers.
      shards: its number of files.
      formats: formats to convert to.
      devices: forced host devices of the loads; 1 loads without a mesh.
    """

    work: Path
    out: Path | None = None
    width: int = 2048
    layers: int = 11
    shards: int = 4
    formats: tuple[str, ...] = ("orbax", "safetensors")
    devices: tuple[int, ...] = (1, 4, 8)


def make_checkpoint(folder: Path, *, width: int, layers: int, shards: int) -> int:
    """Writes the synthetic checkpoint; returns its bytes."""
    hidden, root = 3 * width, "model.transformer"
    shapes = {f"{root}.wte.weight": (_ROWS, width), f"{root}.ff_out.weight": (_ROWS, width)}
    shapes[f"{root}.ln_f.weight"] = (width,)
    for layer in range(layers):
        block = {name: (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        block |= {"ff_proj": (hidden, width), "up_proj": (hidden, width), "ff_out": (width, hidden)}
        block |= {"attn_norm": (width,), "ff_norm": (width,)}
        shapes |= {f"{root}.blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(2**22, np.float32)).astype(ml_dtypes.bfloat16)
    files, names = {}, list(shapes)
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = names[index::shards]
        files |= dict.fromkeys(part, file)
        specs = {name: jax.ShapeDtypeStruct(shapes[name], ml_dtypes.bfloat16) for name in part}
        for array in create_tensors(folder / file, specs).values():
            values = array.reshape(-1)
            for start in range(0, values.size, pool.size // 2):
                stop = min(start + pool.size // 2, values.size)
                shift = rng.integers(pool.size // 2)  # No two pieces are the same.
                values[start:stop] = pool[shift : shift + stop - start]
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llada",
        "d_model": width,
        "n_layers": layers,
        "n_heads": width // 128,
        "n_kv_heads": width // 128,
        "mlp_hidden_size": hidden,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return disk_size(folder)


def measure(command: list[str], devices: int = 1) -> dict[str, Any]:
    """Runs a command; its wall-clock and CPU seconds, memory in bytes, and last line of output.

    Raises:
      RuntimeError: the command failed.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    began, cpu = time.perf_counter(), os.times()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    anonymous = 0
    while process.poll() is None:
        anonymous = max(anonymous, anonymous_bytes(process.pid))
        time.sleep(0.01)
    output = process.stdout.read().strip()
    if process.returncode:
        raise RuntimeError(output)
    after = os.times()
    used = after.children_user + after.children_system - cpu.children_user - cpu.children_system
    return {
        "wall_seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used, 1),
        "peak_anonymous_bytes": anonymous,
        "output": output.splitlines()[-1] if output else "",
    }


def anonymous_bytes(pid: int | str) -> int:
    """Bytes of a process that no file backs; 0 if it is gone. On Linux only."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
    return found[0] if found else 0


def run(arguments: Arguments) -> dict[str, Any]:
    """Makes the checkpoint, then converts and loads it in every format; what each stage took."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = arguments.work / "synthetic"
    try:
        size = make_checkpoint(
            source, width=arguments.width, layers=arguments.layers, shards=arguments.shards
        )
        idle = measure([sys.executable, "-c", "import convert.llada, aps_jax.pretrained"])
        result: dict[str, Any] = {
            "checkpoint_bytes": size,
            "shards": arguments.shards,
            "largest_shard_bytes": max(p.stat().st_size for p in source.glob("*.safetensors")),
            "anonymous_bytes_of_imports": idle["peak_anonymous_bytes"],
            "cpus": os.cpu_count(),
            "load_average_before": round(os.getloadavg()[0], 1),
        }
        for kind in arguments.formats:
            result[kind] = _measure_format(arguments, source, kind, size)
    finally:
        for name in ("synthetic", *arguments.formats):
            shutil.rmtree(arguments.work / name, ignore_errors=True)
    return result


def _measure_format(arguments: Arguments, source: Path, kind: str, size: int) -> dict[str, Any]:
    target = arguments.work / kind
    command = [sys.executable, "-m", "convert.llada", str(source), str(target), "--format", kind]
    stage = measure([*command, "--verify"])
    stage["gb_per_second"] = round(size / 1e9 / stage["wall_seconds"], 3)
    stage["gb_per_cpu_second"] = round(size / 1e9 / stage["cpu_seconds"], 3)
    stage.pop("output")  # It names the scratch folder.
    found: dict[str, Any] = {"convert_and_verify": stage}
    found["files"] = sum(path.is_file() for path in target.rglob("*"))
    found["bytes"] = disk_size(target)
    for devices in arguments.devices:
        run = measure([sys.executable, "-c", _LOAD, str(target), str(devices)], devices)
        found[f"load_to_{devices}"] = run | json.loads(run.pop("output"))
    return found


@command("convert_scale", memory_cure="lower --width")
def main(arguments: Arguments) -> None:
    """Prints and writes the result."""
    result = run(arguments)
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)
