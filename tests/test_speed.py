"""The speed study runs through on a tiny model; its arithmetic is checked on known times."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import CODEC_CONFIG, PRIOR_CONFIG, mixing_prior, patch_codec, random_params

import aps_jax
from aps_jax import pretrained
from aps_jax.codec import convolution
from aps_jax.codec import magvit2 as tokenizer
from aps_jax.codec.magvit2 import init_codec_params
from aps_jax.io import checkpoint
from aps_jax.prior.transformer import init_transformer_params
from experiments.speed import command as speed
from experiments.speed import parts as speed_parts
from experiments.speed import timing


@pytest.fixture
def small_model():
    """In place of the embedded one, where nothing is measured of it."""
    model = pretrained.Model(mixing_prior(), patch_codec(), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aps_jax, "load_pretrained", lambda *_, **__: model)
        yield


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


def test_rates_are_over_those_of_matrix_products():
    """Ten products of side 10 in half a second are 40 kFLOP/s; 10 kFLOP in 0.5 s half of that."""
    products = np.full((3, 2), 0.5)
    assert timing.matmul_rate(products, 10)["median"] == 40000
    found = timing.over_matmul(10000, np.full((3, 2), 0.5), products, 10)
    assert found["median"] == found["cpu"] == 0.5
    assert len(timing.matmuls(10)()) == 10


def test_table_has_a_line_per_figure():
    result = {
        "device": "cpu", "cpus": 2, "jax": "1", "aps_jax": "2", "source": "abc",
        "load average": {"loop": (0.25, 1.5)},
        "loop": {"x": {"median": 2.0, "low": 1.0, "high": 3.0, "cpu": 4.0, "over": {"median": 1.5,
              "low": 1.0, "high": 2.0}}, "skipped": "why"},
    }  # fmt: skip
    lines = speed.table(result).splitlines()
    assert "### loop" in lines and "### torch" not in lines
    assert "Load average 0.2 before the run, 1.5 after this section." in lines
    assert "| x | 2 | 1 – 3 | 4 |" in lines
    assert "| x: over | 1.5 | 1 – 2 |  |" in lines
    assert "| skipped | why |  |  |" in lines


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


def test_interrupted_study_keeps_what_it_measured(small_model, tmp_path, monkeypatch):
    def growth(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed_parts, "loop_section", lambda *_: {"x": 2.0})
    monkeypatch.setattr(speed, "growth_section", growth)
    assert speed.main(speed.Arguments(sections=("loop", "growth"), out=tmp_path)) == 130
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["loop"] == {"x": 2.0} and "growth" not in result
    assert "| x | 2 |" in (tmp_path / "speed.md").read_text()


def test_sections_are_measured_anew_beside_others(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_parts, "loop_section", lambda *_: {"x": 2.0})
    monkeypatch.setattr(speed, "growth_section", lambda *_: {"y": 3.0})
    path = tmp_path / "speed.json"

    def run(*sections, code=0, **changes):
        arguments = speed.Arguments(sections=sections, out=tmp_path, **changes)
        assert speed.main(arguments) == code
        return json.loads(path.read_text())

    run("loop")
    loads = iter([7.0, 8.0])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    both = run("growth")
    assert (both["loop"], both["growth"]) == ({"x": 2.0}, {"y": 3.0})
    assert both["load average"]["growth"] == [7.0, 8.0] != both["load average"]["loop"]
    monkeypatch.undo()
    monkeypatch.setattr(speed_parts, "loop_section", lambda *_: {"x": 4.0})
    monkeypatch.setattr(speed, "growth_section", lambda *_: {"y": 5.0})
    # Sections of another machine or library stay apart, unless all are measured anew.
    for name in ("device", "cpus", "python", "jax", "aps_jax", "source", "arguments"):
        path.write_text(json.dumps(both | {name: "other"}))
        before = path.read_bytes()
        run("loop", code=2)
        assert f"sections growth with another {name}; choose" in capsys.readouterr().err
        assert path.read_bytes() == before
    assert "x" in run("loop", "growth")["loop"]
    run("loop", code=2, batch_size=3)
    assert "sections growth with another arguments" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_new_process_is_its_own():
    """Linux hands the peak of the process that starts another one on to it."""
    held = np.ones(60_000_000)
    code = speed._START[speed._START.index("if sys.platform") : speed._START.index("print(")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}print(peak)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert held.nbytes > 4e8 and 1 < float(done.stdout) < 200


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
    replaced = ((convolution, "_unit_stride"), (tokenizer, "upsampled_conv"))
    replaced += ((tokenizer, "GroupNorm"), (tokenizer, "ResidualBlock"))
    ours = [getattr(module, name) for module, name in replaced]
    speed.main(speed.Arguments(model=str(folder), out=tmp_path / "out", smoke=True))
    assert [getattr(module, name) for module, name in replaced] == ours
    result = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert set(speed.SECTIONS) <= set(result)
    for kind in ("library gradient", "stock gradient", "preset balanced"):
        assert result["loop"][kind]["alone"]["median"] > 0
        assert "inside: FLOP/s over matmul" in result["loop"][kind]
    assert set(result["levers"]) >= {"library", "mean code by product", "group norm of Flax"}
    assert "over balanced" in result["levers"]["balanced, half of the tokens"]
    rows = result["parts"]["seconds"]
    flop = result["loop"]["library gradient"]["FLOP"]
    assert flop >= rows["decoder forward and backward"]["FLOP"]
    assert rows["decoder forward and backward"]["FLOP"] > 1.5 * rows["decoder forward"]["FLOP"] > 0
    cores = result["cores"]
    if "skipped" not in cores:
        spread = cores["seconds"][f"decoder, {cores['devices']} devices"]
        assert spread["over one device"]["median"] > 0
        assert spread["FLOP/s over matmul"]["median"] > 0
    assert result["start"]["cold"]["import"]["median"] > 0
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
