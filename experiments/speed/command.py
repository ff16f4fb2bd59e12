"""How fast the sampler is, where its time goes and how that grows: a table and a JSON file.

    python -m experiments.speed [--out experiments/results/speed] [--smoke]

Files are written after every section; `--sections` measures some of them anew, the others stay.

All rivals of a ratio run in turns in this process, and a ratio is the median over rounds.
Wall-clock figures need a machine with nothing else to do; ratios of processor time (`cpu`) survive
company.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd

import aps_jax
from aps_jax.cli.doctor import num_cpus
from aps_jax.codec.magvit2 import CodecConfig
from aps_jax.io.files import write_atomically, write_json
from aps_jax.types import Params
from experiments.command import command
from experiments.speed import levers as speed_levers
from experiments.speed import parts as speed_parts
from experiments.speed import pytorch as speed_torch
from experiments.speed import timing
from experiments.tables import markdown

SECTIONS = ("loop", "levers", "parts", "cores", "torch", "decoder", "start", "growth")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      model: embedded model or folder.
      image_size: side of the images.
      batch_size: images at once.
      num_steps: timesteps of a whole run.
      inner_steps: iterations per timed loop.
      repeats: rounds.
      matmul_side: side of the matrices of the matmul rate; 1024 on a CPU and 8192 elsewhere if left
        out.
      dtype: of the networks' activations, and of those matrices; "torch" and "decoder" have both.
      decoder_size: side of the images of the section "decoder", the full MagVIT-v2.
      decoder_batch: its images at once.
      sections: what to measure; if left out, all but "cores" on an accelerator, and all but
        "decoder" on a CPU, where each of its gradients takes half a minute.
      out: folder of `speed.json` and `speed.md`; nothing is written if left out.
      smoke: tiny counts that prove that everything works; the numbers mean nothing.
    """

    model: str = "photo64"
    image_size: int = 64
    batch_size: int = 4
    num_steps: int = 4
    inner_steps: int = 10
    repeats: int = 9
    matmul_side: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    decoder_size: int = 256
    decoder_batch: int = 8
    sections: tuple[str, ...] = ()
    out: Path | None = None
    smoke: bool = False

    def resolved(self) -> Arguments:
        """With what fits the machine, or with the counts of a smoke run, if it is one."""
        is_cpu = jax.default_backend() == "cpu"
        left_out = "decoder" if is_cpu else "cores"
        sections = self.sections or tuple(s for s in SECTIONS if self.smoke or s != left_out)
        side = self.matmul_side or (1024 if is_cpu else 8192)
        if not self.smoke:
            return dataclasses.replace(self, sections=sections, matmul_side=side)
        small = {"image_size": 16, "batch_size": 1, "num_steps": 1, "inner_steps": 1, "repeats": 2}
        small |= {"matmul_side": 64, "decoder_size": 16, "decoder_batch": 1}
        return dataclasses.replace(self, **small, sections=sections)


def cores_section(params: Params, arguments: Arguments) -> dict[str, Any]:
    """A device per CPU core against one device with all cores, in a process that has them."""
    count = num_cpus()
    if jax.default_backend() != "cpu" or count == 1:
        return {"skipped": "needs a CPU with several cores"}
    if len(jax.devices()) > 1 or _DEVICES in os.environ:
        return speed_parts.core_section(params, arguments)
    return _in_a_process_of_its_own("cores", arguments, num_devices=count)


#: How many devices JAX makes of a CPU.
_DEVICES = "JAX_NUM_CPU_DEVICES"


def _in_a_process_of_its_own(section: str, arguments: Arguments, *, num_devices: int) -> Any:
    words = ["--model", arguments.model, "--sections", section]
    sizes = ("image_size", "batch_size", "num_steps", "inner_steps", "repeats", "matmul_side")
    for name in (*sizes, "dtype"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "experiments.speed", *words, "--out", folder],
            env=os.environ | {_DEVICES: str(num_devices)},
            stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        return json.loads((Path(folder) / "speed.json").read_text())[section]


_START = """
import json, sys, time
began = time.perf_counter()
import aps_jax
aps_jax.aps_sample, aps_jax.load_pretrained
imported = time.perf_counter()
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
model = aps_jax.load_pretrained(sys.argv[2])
operator = aps_jax.operators.super_resolution(scale=4)
params = aps_jax.Params(model.prior, model.codec, operator)
side, batch = int(sys.argv[3]), int(sys.argv[4])
y = jax.numpy.zeros((batch, side // 4, side // 4, 3))
loaded = time.perf_counter()
sample = jax.jit(aps_jax.aps_sample, static_argnames="config")
config = aps_jax.APSConfig(num_steps=1, num_inner_steps=1)
lowered = sample.lower(params, y, jax.random.key(0), config=config)
traced = time.perf_counter()
compiled = lowered.compile()
done = time.perf_counter()
jax.block_until_ready(compiled(params, y, jax.random.key(0)))
if sys.platform == "linux":  # There getrusage has the peak of the parent, if that is larger.
    held = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(held["VmHWM"].split()[0]) / 1024
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({
    "import": imported - began, "load": loaded - imported, "trace": traced - loaded,
    "compile": done - traced, "first call": time.perf_counter() - done,
    "peak memory, MiB": peak,
}))
"""


def start_section(arguments: Arguments) -> dict[str, Any]:
    """Import, compilation and memory in fresh processes, without and with a warm cache on disk."""
    rounds = 1 if arguments.smoke else 3
    values: dict[str, list[dict[str, float]]] = {"cold": [], "cached": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for found in values.values():
                words = [cache, arguments.model, arguments.image_size, arguments.batch_size]
                done = subprocess.run(
                    [sys.executable, "-c", _START, *map(str, words)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: timing.spread(np.array([row[key] for row in found])) for key in found[0]}
        for name, found in values.items()
    }


def growth_section(params: Params, arguments: Arguments) -> dict[str, Any]:
    """Seconds of a whole run as one size at a time doubles."""
    base = {
        "batch": arguments.batch_size,
        "side": arguments.image_size,
        "bits": params.codec.quantizer.num_features,
        "T": arguments.num_steps,
        "M": arguments.inner_steps,
    }
    doubled = {"batch": 2, "side": 2, "T": 2, "M": 2}
    cases = {"base": base} | {
        f"{name} x 2": base | {name: factor * base[name]} for name, factor in doubled.items()
    }
    cases["K / 2"] = base | {"bits": base["bits"] - 1}
    runs = {name: speed_parts.whole_run(params, **sizes) for name, sizes in cases.items()}
    seconds = timing.interleave(runs, min(3, arguments.repeats))
    rows = {name: timing.spread(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        rows[name]["over base"] = timing.ratio(values, seconds["base"])
    return {"sizes": base, "seconds": rows}


def measure(
    arguments: Arguments, previous: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """What was measured so far, after every section that was asked for.

    Args:
      arguments: what to measure.
      previous: an earlier result, whose other sections are kept.

    Raises:
      ValueError: for unknown sections, and if sections to keep are of another machine, version,
        source or size.
    """
    arguments = arguments.resolved()
    model = aps_jax.load_pretrained(arguments.model, dtype=arguments.dtype)
    # PyTorch takes many minutes to compile the full one.
    decoder = CodecConfig() if not arguments.smoke else CodecConfig(**model.card["codec"])
    operator = aps_jax.operators.super_resolution(scale=4)
    params = Params(prior=model.prior, codec=model.codec, operator=operator)
    sections: dict[str, Callable[[], Any]] = {
        "loop": lambda: speed_parts.loop_section(params, arguments),
        "levers": lambda: speed_levers.lever_section(params, arguments),
        "parts": lambda: speed_parts.part_section(params, arguments),
        "cores": lambda: cores_section(params, arguments),
        "torch": lambda: speed_torch.sampler_section(model, arguments),
        "decoder": lambda: speed_torch.decoder_section(decoder, arguments),
        "start": lambda: start_section(arguments),
        "growth": lambda: growth_section(params, arguments),
    }
    unknown = set(arguments.sections) - set(sections)
    if unknown:
        raise ValueError(f"unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    result = _kept(previous or {}, _facts(arguments), arguments.sections)
    before = os.getloadavg()[0]
    for name in arguments.sections:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        result[name] = sections[name]()
        result["load average"][name] = [before, os.getloadavg()[0]]
        on_device = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in on_device:
            result[name]["peak device memory so far, MiB"] = on_device["peak_bytes_in_use"] / 2**20
        yield result


def _facts(arguments: Arguments) -> dict[str, Any]:
    """What all sections of a result must have in common."""
    asked = dataclasses.asdict(arguments)
    return {
        "device": _processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "aps_jax": aps_jax.__version__,
        "source": _source(),
        "arguments": {k: v for k, v in asked.items() if k not in ("sections", "out")},
    }


def _processor() -> str:
    """Name of the CPU, and the widest of its instructions that JAX may use."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    found = dict(
        [word.strip() for word in line.split(":", 1)]
        for line in path.read_text().splitlines()
        if ":" in line
    )
    flags = found.get("flags", "").split()
    wide = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags][:1]
    return ", ".join([found.get("model name", platform.machine()), *wide])


def _source() -> str:
    """Stands for the source of the package: what is measured."""
    digest = hashlib.sha256()
    for path in sorted(Path(aps_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _kept(
    previous: dict[str, Any], facts: dict[str, Any], sections: tuple[str, ...]
) -> dict[str, Any]:
    """The sections of an earlier result that are not measured anew, with the facts of all."""
    kept = {name: previous[name] for name in SECTIONS if name in previous and name not in sections}
    differing = [name for name, value in facts.items() if previous.get(name) != value]
    if kept and differing:
        raise ValueError(
            f"the result that is there has the sections {', '.join(kept)} with another "
            f"{', '.join(differing)}; choose another --out, or measure all of them anew"
        )
    loads = {name: previous["load average"][name] for name in kept}
    return facts | {"load average": loads} | kept


#: Figures of one line.
_SPREAD = ("median", "low", "high", "cpu")


def table(result: dict[str, Any]) -> str:
    """Markdown: a table per section, one line per leaf; ratios and seconds with quartiles."""
    versions = f"JAX {result['jax']}, aps_jax {result['aps_jax']} (source {result['source']})"
    lines = [f"{result['device']}, {result['cpus']} cores, {versions}", ""]
    for section in [name for name in SECTIONS if name in result]:
        before, after = result["load average"][section]
        load = f"Load average {before:.1f} before the run, {after:.1f} after this section."
        leaves = pd.DataFrame(list(_leaves(result[section], ""))).fillna("")
        lines += [f"### {section}", "", load, "", markdown(leaves), ""]
    return "\n".join(lines)


def _leaves(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """Lines of a table: a number, or a spread of numbers, each."""
    columns = {"what": name, "median": "", "quartiles": "", "cpu": ""}
    if not isinstance(value, dict):
        yield columns | {"median": f"{value:.4g}" if isinstance(value, float) else value}
        return
    if "median" in value:
        shown = {
            key: f"{value[key]:.4g}" for key in ("median", "low", "high", "cpu") if key in value
        }
        quartiles = f"{shown.pop('low')} – {shown.pop('high')}"
        yield columns | shown | {"quartiles": quartiles}
    for key in [key for key in value if key not in _SPREAD]:
        yield from _leaves(value[key], f"{name}: {key}" if name else str(key))


@command("speed", memory_cure="lower --batch-size or --image-size")
def main(arguments: Arguments) -> None:
    """Measures and prints the table; both files hold every section that is done."""
    # Else JAX takes most of a GPU's memory at once, and PyTorch and new processes find none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    text = ""
    file = arguments.out and arguments.out / "speed.json"
    previous = json.loads(file.read_text()) if file and file.exists() else None
    for result in measure(arguments, previous):
        text = table(result)
        if arguments.out is not None:
            write_json(file, result)
            write_atomically(arguments.out / "speed.md", (text + "\n").encode())
    print(text)
