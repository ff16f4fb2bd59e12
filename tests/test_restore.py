"""The host loop gives what the scan gives, and what it gives when it is interrupted."""

import dataclasses
import errno
import functools
import os

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixing_prior, patch_codec

import aps_jax
from aps_jax import APSConfig, Params, operators, presets, restore, samplers
from aps_jax.flops import count_flops
from aps_jax.samplers import sampler_of
from aps_jax.sampling.target import measurement_target

CONFIG = APSConfig(
    num_steps=4, num_inner_steps=3, learning_rate=0.5, warm_start=True, num_samples=2,
    draw="categorical",
)  # fmt: skip
KEY = jax.random.key(3)
sample = jax.jit(aps_jax.aps_sample, static_argnames="config")


@functools.cache
def problem():
    operator = operators.super_resolution(scale=4)
    x = jnp.asarray(np.tanh(np.random.default_rng(7).normal(size=(2, 16, 16, 3))), jnp.float32)
    return Params(prior=mixing_prior(window=4), codec=patch_codec(), operator=operator), operator(x)


def interrupt_after(num_done):
    def on_step(report):
        if report.num_done == num_done:
            raise KeyboardInterrupt

    return on_step


def assert_same(one, two):
    """Bit for bit, all leaves."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{}, {"trace": True, "warm_start": False, "num_samples": 1}])
def test_host_loop_gives_what_the_scan_gives(options):
    params, y = problem()
    config = dataclasses.replace(CONFIG, **options)
    expected = sample(params, y, KEY, config=config)
    result = restore.restore(params, y, KEY, config=config).result
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_reports_and_costs(monkeypatch):
    params, y = problem()
    reports = []
    monkeypatch.setattr(restore, "flops_per_second", lambda: 1e6)
    restored = restore.restore(params, y, KEY, config=CONFIG, on_step=reports.append)
    assert [report.num_done for report in reports] == [0, 1, 2, 3, 4]
    assert np.isnan(reports[0].loss) and np.isfinite([r.loss for r in reports[1:]]).all()
    masked = [report.num_masked for report in reports]
    assert masked[0] == 16 and masked[-1] == 0 and masked == sorted(masked, reverse=True)
    assert restored.calls == {"denoiser": 16, "decoder_gradient": 48, "decoder": 4}
    assert set(restored.seconds) == {"compile", "sample", "decode"}
    # The guess is that of all four timesteps, and made once.
    target, sampler = measurement_target(params, y, config=CONFIG), sampler_of(CONFIG)
    state, keys = sampler.init(target, target.keys(KEY)), target.keys(KEY)
    flops = count_flops(lambda state: sampler.step(target, state, keys), state)
    assert flops > 0
    assert reports[0].seconds == pytest.approx(4 * flops / (restore._RATE_SHARE * 1e6))
    assert [report.seconds for report in reports[1:]] == [None] * 4


def test_second_call_compiles_nothing():
    params, y = problem()
    other = params.replace(prior=mixing_prior(window=4, seed=5))
    half, key = np.asarray(y) * 0.5, jax.random.key(9)
    restore.restore(params, np.asarray(y), KEY, config=CONFIG)
    compiled = []

    def listen(event, duration, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # Nor do other numbers need a compilation.
        config = dataclasses.replace(CONFIG, sigma=0.2, learning_rate=0.3)
        restore.restore(other, half, key, config=config)
        assert compiled == []
        restore.restore(other, half, key, config=dataclasses.replace(CONFIG, num_steps=3))
        assert compiled  # It listens.
    finally:
        # The oldest JAX cannot; there it goes on listening, to nobody's harm.
        if hasattr(jax.monitoring, "unregister_event_duration_listener"):
            jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "options",
    [
        {"sensitivity_floor": 0.3, "encoder_start": 0.5},
        {"trace": True},
        {"warm_start": False, "sensitivity_floor": 0.3, "keep_best": True},
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    params, y = problem()
    config = dataclasses.replace(CONFIG, **options)
    expected = restore.restore(params, y, KEY, config=config)
    snapshot = restore.Snapshot(tmp_path / "state", {"seed": 3, "config": {"num_steps": 4}})
    with pytest.raises(KeyboardInterrupt):
        restore.restore(
            params, y, KEY, config=config, on_step=interrupt_after(2), snapshot=snapshot
        )
    reports = []
    again = dataclasses.replace(snapshot, is_resuming=True)
    restored = restore.restore(
        params, y, KEY, config=config, on_step=reports.append, snapshot=again
    )
    assert [report.num_done for report in reports] == [2, 3, 4]
    assert_same(restored.result, expected.result)
    assert restored.calls == expected.calls
    finished = restore.restore(params, y, KEY, config=config, snapshot=again)
    assert_same(finished.result, expected.result)
    again.remove()
    again.remove()
    assert os.listdir(tmp_path) == []


def test_wrong_snapshots_are_refused(tmp_path):
    params, y = problem()
    path = tmp_path / "state"
    snapshot = restore.Snapshot(path, {"seed": 3, "config": {"num_steps": 4}})
    with pytest.raises(KeyboardInterrupt):
        restore.restore(
            params, y, KEY, config=CONFIG, on_step=interrupt_after(1), snapshot=snapshot
        )

    def resume(identity=snapshot.identity, config=CONFIG):
        again = restore.Snapshot(path, identity, is_resuming=True)
        return restore.restore(params, y, KEY, config=config, snapshot=again)

    with pytest.raises(restore.SnapshotError, match="config.num_steps was 4, now 8"):
        resume({"seed": 3, "config": {"num_steps": 8}})
    with pytest.raises(restore.SnapshotError, match="model was None, now 'x'"):
        resume({"seed": 3, "config": {"num_steps": 4}, "model": "x"})
    with pytest.raises(restore.SnapshotError, match="does not fit this run"):
        resume(config=dataclasses.replace(CONFIG, num_samples=3))
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-10], b"\x00" * 100):
        path.write_bytes(damaged)
        with pytest.raises(restore.SnapshotError, match="damaged"):
            resume()
    path.unlink()
    with pytest.raises(restore.SnapshotError, match="no snapshot"):
        resume()


def test_full_disk_leaves_the_last_snapshot(tmp_path, monkeypatch):
    params, y = problem()
    path = tmp_path / "state"
    snapshot = restore.Snapshot(path, {})
    monkeypatch.setattr(restore, "SNAPSHOT_SECONDS", 0.0)
    replace = os.replace

    def full(report):
        if report.num_done == 2:
            monkeypatch.setattr(os, "replace", fail)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        restore.restore(params, y, KEY, config=CONFIG, on_step=full, snapshot=snapshot)
    monkeypatch.setattr(os, "replace", replace)
    assert os.listdir(tmp_path) == ["state"]
    again = dataclasses.replace(snapshot, is_resuming=True)
    expected = restore.restore(params, y, KEY, config=CONFIG).result
    assert_same(restore.restore(params, y, KEY, config=CONFIG, snapshot=again).result, expected)


def test_snapshots_wait_until_they_pay(tmp_path, monkeypatch):
    """One that is not due is left out, but for the last step's and that of an interruption."""
    params, y = problem()
    snapshot = restore.Snapshot(tmp_path / "state", {})

    def written_after(seconds):
        snapshot.remove()
        monkeypatch.setattr(restore, "SNAPSHOT_SECONDS", seconds)
        found = []

        def on_step(report):
            found.append(snapshot.path.exists())
            snapshot.remove()

        restore.restore(params, y, KEY, config=CONFIG, on_step=on_step, snapshot=snapshot)
        return found

    assert written_after(0.0) == [False, True, True, True, True]
    assert written_after(1e9) == [False, False, False, False, True]
    with pytest.raises(KeyboardInterrupt):
        restore.restore(
            params, y, KEY, config=CONFIG, on_step=interrupt_after(2), snapshot=snapshot
        )
    assert snapshot.path.exists()


def test_several_samples_differ():
    """By categorical draws, unless something else makes them."""
    make = functools.partial(presets.make_config, preset="draft")
    assert make().draw == make(num_samples=1).draw == "quantized"
    assert make(num_samples=2).draw == "categorical"
    assert make(num_samples=2, sampler="aps-i").draw == "categorical"
    assert make(num_samples=2, remasking="random").draw == "quantized"
    # Nor is there an order in one timestep.
    assert make(num_samples=2, num_steps=1, remasking="random").draw == "categorical"
    with pytest.raises(ValueError, match='equal samples.*set draw="categorical"'):
        make(num_samples=2, draw="argmax")


def test_several_samples_of_faces_are_remasked_at_random():
    """Unless the user or a variant with an order of its own says otherwise."""
    make = functools.partial(presets.make_config, preset="faces", num_samples=2)

    def differing(config):
        return config.remasking, config.draw

    assert differing(make()) == differing(make(sampler="aps-l")) == ("random", "quantized")
    assert differing(make(draw="argmax")) == ("random", "argmax")
    for kept in ({"sampler": "aps-i"}, {"sampler": "aps-ii"}, {"remasking": "anchored"}):
        assert make(**kept).draw == "categorical" and make(**kept).remasking != "random"
    assert differing(make(draw="categorical")) == ("anchored", "categorical")
    assert make(num_steps=1).draw == "categorical"
    assert make(num_samples=1) == presets.APSConfig(**presets.PRESETS["faces"])


@pytest.mark.parametrize(
    "name",
    [
        *contract.TOKENS,
        "dps",
        # Those with a denoiser differ only in their steps: one of them shows what the loop does.
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in samplers.SAMPLERS
            if name not in contract.TOKENS and name != "dps"
        ),
    ],
)
def test_every_sampler_resumes_and_gives_what_the_scan_gives(name, tmp_path):
    params, y = problem()
    params = params if name in contract.TOKENS else contract.params_of(name)
    config = contract.smallest(name)
    run = functools.partial(restore.restore, params, y, KEY, config=config, sampler=name)
    reports = []
    whole = run(on_step=reports.append)
    steps = sampler_of(config).num_iterations
    assert [report.num_done for report in reports] == list(range(steps + 1))
    assert reports[-1].num_masked == 0
    scanned = jax.jit(samplers.sample)(params, y, KEY, config=config)
    if name in contract.TOKENS:
        np.testing.assert_array_equal(whole.result.tokens, scanned.tokens)
    for a, b in zip(jax.tree.leaves(whole.result), jax.tree.leaves(scanned), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    rows = y.shape[0] * config.num_samples
    calls = config.evaluations()._asdict()
    assert whole.calls == {kind: rows * count for kind, count in calls.items()}

    snapshot = restore.Snapshot(tmp_path / "state", {"sampler": name})
    with pytest.raises(KeyboardInterrupt):
        run(on_step=interrupt_after(1), snapshot=snapshot)
    reports.clear()
    again = dataclasses.replace(snapshot, is_resuming=True)
    resumed = run(on_step=reports.append, snapshot=again)
    assert [report.num_done for report in reports] == list(range(1, steps + 1))
    assert_same(resumed.result, whole.result)


def test_options_of_another_sampler_are_refused():
    params, y = problem()
    config = presets.make_config(sampler="maskgit", num_steps=2)
    with pytest.raises(ValueError, match="takes a G2D2Config, got a MaskGITConfig"):
        restore.restore(params, y, KEY, config=config, sampler="g2d2")
    with pytest.raises(ValueError, match="did you mean 'svdd_pm'"):
        restore.restore(params, y, KEY, config=config, sampler="svdd-pm")


def test_divergence_is_an_error():
    params, y = problem()
    params = params.replace(codec=params.codec.replace(params=jnp.nan * params.codec.params))
    with pytest.raises(
        restore.DivergedError, match=r"of 4; check the measurement, or lower learning_rate or p"
    ):
        restore.restore(params, y, KEY, config=CONFIG)
    assert restore.lower(presets.make_config(sampler="dps")) == ["lower step_size"]
    assert restore.lower(presets.make_config(sampler="ddrm")) == []
    config = presets.make_config(sampler="straight_through", num_inner_steps=1)
    with pytest.raises(restore.DivergedError, match="not finite after step 1 of"):
        restore.restore(params, y, KEY, config=config, sampler="straight_through")
