"""Budgets in FLOPs, and samplers with a denoiser of their own."""

import functools

import jax
import jax.numpy as jnp
import pytest

from aps_jax import Denoiser
from aps_jax.samplers import DPSConfig
from bench.conftest import STUDY, fake_sample, read
from experiments.bench import identity, restoring, session, study

CALLS = {"denoiser": 2.0, "decoder": 1.0, "decoder_gradient": 3.0}
EQUAL = {"100 GFLOPs": {"gflops": 100, "calls": CALLS}}


def parsed(methods, budgets=EQUAL):
    first = next(iter(methods))
    return study.parse(STUDY | {"methods": methods, "budgets": budgets, "compare_to": first})


def config_of(methods, label):
    found = parsed(methods)
    task, budget = found.tasks["super_resolution"], found.budgets[0]
    work = budget.limit(found.methods[label])
    config = identity.config_of(found.methods[label], task, work)
    return config, work.cost(config)


def test_samplers_are_sized_to_flops():
    methods = {
        "aps": {"config": {"num_steps": 4}},
        "svdd": {"sampler": "svdd_pm"},
        "dps": {"sampler": "dps", "denoiser": "faces", "calls": {"denoiser": 7.0}},
        "as it is": {"config": {"num_steps": 4}, "budgeted": False},
    }
    methods["dps"]["calls"] |= {"decoder_gradient": 0.0}
    aps, cost = config_of(methods, "aps")
    # 4 calls of the prior, the last picture, and what is left for 30 gradients, 7 per step.
    assert (aps.num_inner_steps, cost) == (7, 4 * 2 + 1 + 28 * 3)
    svdd, cost = config_of(methods, "svdd")
    assert cost == 2 + 1 + 3 * svdd.num_steps * svdd.num_candidates and 90 < cost <= 100
    dps, cost = config_of(methods, "dps")
    assert (dps.num_steps, cost) == (14, 98)
    assert config_of(methods, "as it is")[0].num_inner_steps == 100


@pytest.mark.parametrize(
    ("methods", "budgets", "message"),
    [
        ({"a": {}}, {"b": {"gflops": 9}}, "gflops and calls belong together"),
        ({"a": {}}, {"b": {"gflops": 9, "calls": CALLS, "evaluations": 9}}, "needs evaluations"),
        ({"a": {}}, {"b": {"gflops": 1, "calls": CALLS}}, "a budget of 1 GFLOPs is too small"),
        ({"a": {"sampler": "dps"}}, EQUAL, "sampler 'dps' lacks a folder in `denoiser`"),
        ({"a": {"denoiser": "x"}}, EQUAL, "sampler 'aps' has no use for a folder"),
    ],
)
def test_what_cannot_be_sized_is_refused(methods, budgets, message):
    with pytest.raises(ValueError, match=message):
        parsed(methods, budgets)


def multiplied(params, y, keys, *, config):
    """`fake_sample` that multiplies matrices of side 8, one per photo."""
    result = fake_sample(params, y, keys, config=config)
    ones = jax.numpy.ones((len(y) * 8, 8)) * params.denoiser.params
    tiny = 1e-9 * jax.numpy.sum(ones @ jax.numpy.ones((8, 8)))
    return result._replace(samples=result.samples + tiny)


def test_rows_of_a_denoiser_know_its_weights(bench, tmp_path, model, monkeypatch):
    folder = tmp_path / "denoiser"
    folder.mkdir()
    weights = folder / "denoiser.safetensors"
    weights.write_bytes(b"some")
    toy = Denoiser(params=jax.numpy.ones(()), apply=lambda params, x, sigma: params * x)
    monkeypatch.setattr(session, "load_denoiser", lambda name, is_latent: toy)
    monkeypatch.setattr(session.restoring, "sample", multiplied)
    raw = STUDY | {
        "tasks": {"super_resolution": {"scale": 2}},
        "methods": {
            "dps": {"sampler": "dps", "denoiser": str(folder), "config": {"step_size": 1.0}},
        },
        "compare_to": "dps", "seeds": [0], "budgets": EQUAL,
    }  # fmt: skip
    assert bench(raw)[0] == 0
    rows = [row for row in read(tmp_path, "out/rows.jsonl") if row["method"] == "dps"]
    assert len(rows) == 3
    for row in rows:
        assert row["config"] == {"sampler": "dps", "num_steps": 20, "step_size": 1.0}
        costs = [row[f"{name}_evaluations"] for name in ("denoiser", "decoder", "gradient")]
        assert costs == [20, 0, 20] and row["flops"] == 2 * 8**3
    # Other weights make other rows.
    weights.write_bytes(b"other")
    code, err = bench(raw)
    assert code == 2 and "method 'dps'" in err and "other settings or model weights" in err


def test_what_is_counted_is_held_to_the_budget():
    matrix = jax.ShapeDtypeStruct((4096, 4096), "float32")
    traced = jax.jit(lambda x: x @ x).trace(matrix)
    found = parsed({"dps": {"sampler": "dps", "denoiser": "faces"}})
    (method,) = found.methods.values()
    work = found.budgets[0].limit(method)
    count = functools.partial(restoring._flops_per_photo, traced, method, DPSConfig())
    assert count(2, work) == 4096**3
    with pytest.raises(ValueError, match="'dps' makes 137 GFLOPs per photo, beyond the budget"):
        count(1, work)
    assert count(1, None) == 2 * 4096**3


def test_the_calls_are_what_counts_where_branches_differ():
    def step(x, i):
        return jax.lax.cond(i == 0, lambda: x @ x @ x, lambda: x), None

    matrix = jax.ShapeDtypeStruct((2048, 2048), "float32")
    traced = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(8))[0]).trace(matrix)
    found = parsed({"dps": {"sampler": "dps", "denoiser": "faces"}})
    (method,) = found.methods.values()
    work = found.budgets[0].limit(method)
    config = DPSConfig(num_steps=3)
    flops = restoring._flops_per_photo(traced, method, config, 1, work)
    assert flops == 1e9 * work.cost(config) < 1e11
    # Without known calls it is the most that the branches may make.
    assert restoring._flops_per_photo(traced, method, config, 1, None) == 8 * 4 * 2048**3
