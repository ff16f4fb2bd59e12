"""What a batch is restored with, and what its rows say."""

import logging

import jax
import numpy as np
from conftest import mixing_prior, patch_codec

import aps_jax
from aps_jax.sampler import SampleResult, StepInfo
from bench.conftest import STUDY, fake_sample, read
from experiments.bench import identity, plan, session, study


def test_methods_get_their_prior_and_say_the_steps_they_made(monkeypatch):
    """`prior: none` puts a prior without an opinion in place of the model's."""

    def sample(params, y, keys, *, config):
        tokens = jax.numpy.full((len(y), 16), params.prior.num_codes)
        opinion = jax.numpy.std(params.prior.apply(params.prior.params, tokens))
        images = jax.numpy.broadcast_to(opinion, (len(y), 1, 8, 8, 3))
        rows = jax.numpy.ones((1, len(y), 1))
        info = StepInfo(rows, rows > 0, rows, 9 * rows.astype(int), None)
        first = images[:, 0]
        return SampleResult(first, keys, info, images, first, first, images)

    monkeypatch.setattr(session.restoring, "sample", sample)
    operator = aps_jax.operators.denoising()
    params = aps_jax.Params(mixing_prior(window=4), patch_codec(), operator)
    x = jax.numpy.zeros((2, 8, 8, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    config = aps_jax.APSConfig(num_steps=1, num_inner_steps=9)
    found = {}
    for prior in ("model", "none"):
        method = study.Method(label="m", prior=prior)
        run = session.restoring.compile_method(method, config, 0.1, params, x, x, keys)
        found[prior] = run(params, x, x, keys)
    assert float(found["model"].images.max()) > 0.01
    assert float(abs(found["none"].images).max()) == 0
    assert found["model"].cost["gradient_evaluations"].tolist() == [9, 9]
    assert found["model"].cost["decoder_evaluations"].tolist() == [9, 9]


def test_seconds_are_per_photo(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(session.restoring.time, "perf_counter", lambda: next(clock))
    x = np.zeros((3, 2, 2, 3))
    assert session.restoring.timed(lambda *args: x, None, x, None, None) == (x, 2.0)


def test_the_perceptual_term_needs_an_image():
    method = study.parse(
        STUDY | {"methods": {"no prior": {"config": {"perceptual_weight": 0.1}}}, "budgets": {}}
    ).methods["no prior"]
    task = study.Task(label="t", task="super_resolution", sigma=0.05)
    key = jax.random.key(0)
    for name, size, weight in (
        ("super_resolution", 64, 0.1), ("super_resolution", 60, 0.0), ("phase_retrieval", 64, 0.0)
    ):  # fmt: skip
        operator = plan.make_operator(name).init(key, (size, size))
        config = identity.config_of(method, task, None, operator, (size, size))
        assert config.perceptual_weight == weight


def test_the_best_sample_is_that_of_least_residual(rng):
    samples = jax.numpy.asarray(rng.uniform(-1, 1, (3, 4, 8, 8, 3)), "float32")
    operator = aps_jax.operators.denoising()
    y = samples[jax.numpy.arange(3), jax.numpy.array([2, 0, 3])] + 0.01
    is_finite = jax.numpy.ones((3, 4), bool)
    chosen, is_sound = session.restoring._best(operator, samples, samples, y, is_finite)
    np.testing.assert_allclose(chosen, y - 0.01, atol=1e-6)
    assert is_sound.all()
    # A sample that is not a number, or whose objective was none, is never the best ...
    broken, is_partly = samples.at[:, 1].set(np.nan), is_finite.at[:, 1].set(False)
    for other, those in ((broken, is_finite), (samples, is_partly), (broken, is_partly)):
        found, is_sound = session.restoring._best(operator, other, other, y, those)
        np.testing.assert_allclose(found, chosen, atol=1e-6)
        assert is_sound.all()
    first = session.restoring._best(operator, samples, samples, y, is_finite.at[0, 2].set(False))
    assert abs(first[0][0] - chosen[0]).max() > 0.1 and first[1].all()
    # ... but where all are so, and then it is said.
    assert not session.restoring._best(operator, samples, samples, y, ~is_finite)[1].any()
    one = session.restoring._best(operator, samples[:, :1], samples[:, :1], y, is_partly[:, 1:2])
    assert not one[1].any() and (one[0] == samples[:, 0]).all()


def test_a_mean_is_that_of_all_samples_and_another_computation(bench, tmp_path, monkeypatch):
    seen = []

    def sample(params, y, keys, *, config):
        """Samples of one brightness each: 0, 1/4, 1/2 ..."""
        result = fake_sample(params, y, keys, config=config)
        level = jax.numpy.arange(config.num_samples)[:, None, None, None] / 4
        return result._replace(samples=jax.numpy.broadcast_to(level, result.samples.shape))

    real = session.restoring.scored
    monkeypatch.setattr(session.restoring, "sample", sample)
    monkeypatch.setattr(
        session.restoring, "scored",
        lambda operator, perceptual, images, x, y: (
            seen.append(float(images.mean())) or real(operator, perceptual, images, x, y)
        ),
    )  # fmt: skip
    best = STUDY["methods"]["no prior"]
    several = {"num_samples": 4, "draw": "categorical"}
    mean = best | {"estimate": "mean", "config": best["config"] | several}
    raw = STUDY | {"seeds": [0], "tasks": {"super_resolution": {"scale": 2}}}
    raw |= {"methods": {"no prior": best, "mean": mean}}
    assert bench(raw)[0] == 0
    assert {round(level, 4) for level in seen} == {0.0, 0.375}
    by_method = {row["method"]: row for row in read(tmp_path)}
    assert by_method["mean"]["config"]["estimate"] == "mean"
    assert by_method["mean"]["decoder_evaluations"] == 16
    changed = raw | {"methods": raw["methods"] | {"mean": mean | {"estimate": "best"}}}
    assert "rows of another configuration" in bench(changed)[1]
    code, err = bench(raw | {"methods": {"no prior": best | {"estimate": "mean"}}}, out="none")
    assert code == 2 and "'no prior': a mean needs num_samples above 1" in err


def test_one_broken_sample_of_several_does_not_fail_the_photo(bench, tmp_path, monkeypatch):
    """Sample 1 of the first photo breaks in its first step; both of the second photo do."""

    def sample(params, y, keys, *, config):
        result = fake_sample(params, y, keys, config=config)
        if config.num_samples == 1:
            return result
        is_finite = jax.numpy.ones((3, len(keys), 2), bool)
        is_finite = is_finite.at[0, 0, 1].set(False).at[2, 1, :].set(False)
        return result._replace(info=result.info._replace(is_finite=is_finite))

    monkeypatch.setattr(session.restoring, "sample", sample)
    raw = STUDY | {"seeds": [0], "images": {"size": 16, "count": 2}}
    raw |= {"methods": {"no prior": STUDY["methods"]["no prior"]}}
    assert bench(raw)[0] == 1
    failed = [(row["task"], row["image"]) for row in read(tmp_path) if "error" in row]
    assert failed == [("twice", "5.png")]


def test_restorations_that_fail_are_recorded(bench, tmp_path, monkeypatch):
    compiled = session.restoring.compile_method

    def diverging(*args):
        def run(*batch):
            restored = compiled(*args)(*batch)
            return restored._replace(is_finite=np.array([True, False]))

        return run

    monkeypatch.setattr(session.restoring, "compile_method", diverging)
    raw = STUDY | {"methods": {"no prior": STUDY["methods"]["no prior"]}, "seeds": [0]}
    raw = raw | {"tasks": {"super_resolution": {"scale": 2}}}
    code, err = bench(raw)
    assert code == 1 and "1 restorations failed" in err
    assert ["error" in row for row in read(tmp_path)] == [False, True, False]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| no prior | 2 |" in text and "Failed restorations, left out: 1" in text


class CompiledPrograms(logging.Handler):
    """Collects what JAX compiles, while `jax.log_compiles` is on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Finished XLA compilation"):
            self.names.append(message)

    def __enter__(self):
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self)


def test_yardsticks_are_compiled_before_they_are_timed():
    """What runs on the first call alone is not in the seconds of a batch."""
    operator = aps_jax.operators.denoising()
    params = aps_jax.Params(mixing_prior(window=4), patch_codec(), operator)
    x = jax.numpy.zeros((2, 8, 8, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    for kind in ("codec", "estimate", "measurement"):
        method = study.Method(label="m", kind=kind)
        run = session.restoring.compile_method(method, None, 0.1, params, x, x, keys)
        with jax.log_compiles(), CompiledPrograms() as compiled:
            session.restoring.timed(run, params, x, x, keys)
        assert compiled.names == [], kind
