"""The speed study runs through on a tiny model; its arithmetic is checked on known times."""

import dataclasses
import json
import os
import time

import jax
import numpy as np
import pytest
from conftest import CODEC_CONFIG, PRIOR_CONFIG, random_params

from aps_jax import checkpoint
from aps_jax.tokenizer import init_codec_params
from aps_jax.transformer import init_transformer_params
from experiments import speed, speed_parts, timing


def test_ratios_are_taken_round_by_round():
    """A machine that turns twice as slow in the middle changes neither ratio nor its quartiles."""
    slow = np.array([1.0, 1.0, 2.0, 2.0])
    a, b = np.stack([3 * slow, slow], axis=1), np.stack([2 * slow, slow], axis=1)
    assert timing.ratio(a, b) == {"median": 1.5, "low": 1.5, "high": 1.5, "cpu": 1.0}
    assert timing.spread(np.array([1.0, 2.0, 3.0, 4.0, 9.0]))["median"] == 3.0


def test_functions_are_timed_in_turns():
    order = []

    def run(name, seconds):
        order.append(name)
        time.sleep(seconds)

    found = timing.interleave({"a": lambda: run("a", 0.0), "b": lambda: run("b", 0.02)}, 3)
    assert order == ["a", "b"] * 4  # The first of each is not counted.
    assert found["b"].shape == (3, 2) and (found["b"][:, 0] >= 0.02).all()
    assert (found["b"][:, 1] < 0.02).all()  # Sleeping takes no processor time.


def test_matmul_rate_counts_multiplications_and_additions(monkeypatch):
    monkeypatch.setattr(
        timing, "interleave", lambda runs, repeats: {"matmul": np.full((repeats, 2), 0.5)}
    )
    assert timing.matmul_rate(10, 3)["median"] == 4000


def test_table_has_a_line_per_figure():
    result = {
        "device": "cpu", "cpus": 2, "jax": "1", "load average before": {"loop": 0.25},
        "loop": {"x": {"median": 2.0, "low": 1.0, "high": 3.0, "cpu": 4.0, "over": {"median": 1.5,
              "low": 1.0, "high": 2.0}}, "skipped": "why"},
    }  # fmt: skip
    lines = speed.table(result).splitlines()
    assert "### loop" in lines and "### torch" not in lines
    assert "Load average before the run: 0.2." in lines
    assert "| x | 2 | 1 – 3 | 4 |" in lines
    assert "| x: over | 1.5 | 1 – 2 |  |" in lines
    assert "| skipped | why | | |" in lines


def test_sections_and_matrices_fit_the_machine(monkeypatch):
    """A CPU has devices per core and no gradients of the full decoder, an accelerator both else."""
    on_cpu = speed.Arguments().resolved()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = speed.Arguments().resolved()
    assert set(on_cpu.sections) ^ set(on_gpu.sections) == {"cores", "decoder"}
    assert "cores" in on_cpu.sections and on_cpu.matmul_side < on_gpu.matmul_side
    assert speed.Arguments(sections=("loop",), matmul_side=7).resolved().matmul_side == 7
    assert speed.Arguments(sections=("loop",)).resolved().sections == ("loop",)
    with pytest.raises(ValueError, match="unknown sections .'lop'.; there are loop, levers"):
        next(speed.measure(speed.Arguments(sections=("lop",), smoke=True)))


def test_interrupted_study_keeps_what_it_measured(tmp_path, monkeypatch):
    def growth(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed_parts, "loop_section", lambda *_: {"x": 2.0})
    monkeypatch.setattr(speed, "growth_section", growth)
    with pytest.raises(KeyboardInterrupt):
        speed.main(speed.Arguments(sections=("loop", "growth"), out=tmp_path))
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["loop"] == {"x": 2.0} and "growth" not in result
    assert "| x | 2 |" in (tmp_path / "speed.md").read_text()


def test_sections_are_measured_anew_beside_others(tmp_path, monkeypatch):
    """They stay only where the machine and the sizes are the same."""
    monkeypatch.setattr(speed_parts, "loop_section", lambda *_: {"x": 2.0})
    monkeypatch.setattr(speed, "growth_section", lambda *_: {"y": 3.0})

    def run(*sections, **changes):
        speed.main(speed.Arguments(sections=sections, out=tmp_path, **changes))
        return json.loads((tmp_path / "speed.json").read_text())

    run("loop")
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 0.0, 0.0))
    result = run("growth")
    assert (result["loop"], result["growth"]) == ({"x": 2.0}, {"y": 3.0})
    assert result["load average before"]["growth"] == 7.0 != result["load average before"]["loop"]
    assert "loop" not in run("growth", batch_size=3)


@pytest.mark.slow
def test_smoke_run_measures_everything(tmp_path):
    folder = tmp_path / "model"
    codec = dataclasses.replace(CODEC_CONFIG, patch_width=6, patch_blocks=2)
    checkpoint.save_params(folder / "codec.safetensors", random_params(init_codec_params, codec))
    prior = dataclasses.replace(PRIOR_CONFIG, code_bits=4, code_rank=2)
    checkpoint.save_params(
        folder / "prior.safetensors", random_params(init_transformer_params, prior)
    )
    checkpoint.update_card(folder, codec=dataclasses.asdict(codec), prior=dataclasses.asdict(prior))
    speed.main(speed.Arguments(model=str(folder), out=tmp_path / "out", smoke=True))
    result = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert set(speed.SECTIONS) <= set(result)
    for kind in ("library gradient", "stock gradient", "preset balanced"):
        assert result["loop"][kind]["alone"]["median"] > 0
        assert "inside: FLOP/s over matmul" in result["loop"][kind]
    assert set(result["levers"]) >= {"library", "mean code by product", "group norm of Flax"}
    rows = result["parts"]["seconds"]
    flop = result["loop"]["library gradient"]["FLOP"]
    assert flop >= rows["decoder forward and backward"]["FLOP"]
    assert rows["decoder forward and backward"]["FLOP"] > 1.5 * rows["decoder forward"]["FLOP"] > 0
    cores = result["cores"]
    if "skipped" not in cores:
        spread = cores["seconds"][f"decoder, {cores['devices']} devices"]
        assert spread["over one device"]["median"] > 0
        assert ("FLOP/s over matmul" in spread) == (len(jax.devices()) == 1)
    assert result["start"]["cold"]["import"] > 0
    assert result["growth"]["seconds"]["base"]["over base"]["median"] == 1
    torch = result["torch"]
    if "skipped" not in torch:
        assert torch["torch float32 eager gradient error"] < 1e-4
        assert torch["share of equal pixels"] > 0.95
    decoder = result["decoder"]["seconds"]
    assert {"jax float32", "jax bfloat16"} <= set(decoder)
    assert decoder["jax bfloat16"]["over jax bfloat16"]["median"] == 1
    assert decoder["jax float32"]["FLOP/s over matmul"]["median"] > 0
    if "skipped" not in torch:
        assert {"jax float32", "jax bfloat16", "torch bfloat16 eager"} <= set(torch["seconds"])
        assert result["decoder"]["torch float32 eager gradient error"] < 1e-4
        assert result["decoder"]["torch bfloat16 eager gradient error"] < 0.1
    assert "### growth" in (tmp_path / "out" / "speed.md").read_text()
    assert jax.jit(lambda: 1)() == 1  # Nothing that was replaced for a measurement stays so.
