"""The benchmark on toy models without convolutions, which compile at once."""

import json
import zlib

import jax
import numpy as np
import pytest
from conftest import mixing_prior, patch_codec
from PIL import Image

import aps_jax
from aps_jax.pretrained import Model
from aps_jax.sampler import SampleResult, StepInfo
from experiments.bench import command as benchmark
from experiments.bench import plots, session
from experiments.bench import rows as rows_of

STUDY = {
    "images": {"size": 16, "count": 3},
    "lpips": False,
    "seeds": [0, 1],
    "batch_size": 2,
    "compare_to": "no prior",
    "tasks": {
        "super_resolution": {"scale": 2},
        "twice": {"task": "inpainting_random", "best_of": 2, "sigma": 0.1},
    },
    "methods": {
        "bicubic": {"kind": "measurement"},
        "no prior": {"prior": "none", "config": {"num_steps": 2, "warm_start": "logits"}},
        "best": {
            "sampler": "best_of_n",
            "config": {"num_steps": 2},
            "tasks": ["super_resolution"],
            "count": 2,
        },
    },
    "budgets": {"4 decodes": {"evaluations": 4}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 255, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 18), Image.Resampling.BICUBIC).save(
            folder / f"{index}.png"
        )
    return folder


@pytest.fixture(autouse=True)
def model(tmp_path_factory, monkeypatch):
    """Models without convolutions, which compile at once, behind a folder of any bytes."""
    folder = tmp_path_factory.getbasetemp() / "toy_weights"
    folder.mkdir(exist_ok=True)
    for name in ("codec.safetensors", "prior.safetensors"):
        (folder / name).write_bytes(name.encode())
    toy = Model(mixing_prior(window=4), patch_codec(), {})
    monkeypatch.setattr(aps_jax, "load_pretrained", lambda name: toy)
    monkeypatch.setattr(session.restoring, "sample", fake_sample)
    monkeypatch.setattr(plots, "plot", lambda *args: [])
    return folder


plot = plots.plot


def fake_sample(params, y, keys, *, config):
    """A sampler of noise, which keys and configuration decide, and which compiles at once."""
    shape = (config.num_samples, 16, 16, 3)
    noise = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
    # Not by `hash`, which differs from one process to the next.
    noise = noise * (zlib.crc32(repr(config).encode()) % 97 / 97)
    rows = (1, len(keys), config.num_samples)
    ones = jax.numpy.ones(rows)
    info = StepInfo(ones, ones > 0, ones, jax.numpy.full(rows, 4), None)
    first = noise[:, 0]
    return SampleResult(first, keys, info, noise, first, first, noise)


@pytest.fixture
def bench(tmp_path, folder, model, capsys):
    """Runs the benchmark in this process; gives exit code and stderr."""

    def run(raw=STUDY, *, out="out", data=folder, **options):
        path = tmp_path / "study.json"
        text = raw if isinstance(raw, str) else json.dumps({"model": str(model)} | raw)
        path.write_text(text)
        capsys.readouterr()
        arguments = benchmark.Arguments(config=path, out=tmp_path / out, data=data, **options)
        code = benchmark.main(arguments)
        return code, capsys.readouterr().err

    return run


def read(tmp_path, name="out/rows.jsonl"):
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def timeless(rows):
    """Rows by what they are of, without the seconds."""
    return {
        (*rows_of.cell_of(row), row["image"]): {k: v for k, v in row.items() if k != "seconds"}
        for row in rows
    }


def interrupt_after(monkeypatch, count):
    """Ctrl-C in place of the batch after the first `count`."""
    append, calls = session.append_rows, []

    def stop(path, rows):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(len(rows))
        append(path, rows)

    monkeypatch.setattr(session, "append_rows", stop)
    return lambda: monkeypatch.setattr(session, "append_rows", append)
