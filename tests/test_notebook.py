"""`posterior` and `show`: one line each, as in a notebook."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import aps_jax
from aps_jax import operators
from aps_jax.pretrained import Model
from aps_jax.types import bind

SIDE = 16
QUICK = {"num_steps": 2, "num_inner_steps": 1}


@pytest.fixture(autouse=True)
def _no_windows():
    matplotlib.use("agg")


@pytest.fixture(scope="module")
def model(toy_prior, toy_codec):
    return Model(toy_prior, toy_codec, {"name": "toy", "sizes": [1, 2]})


@pytest.fixture(scope="module")
def photo():
    return jnp.asarray(aps_jax.sample_photo())[None, :SIDE, :SIDE]


def measured(photo, operator, seed=1):
    return aps_jax.measure(jax.random.key(seed), photo, operator=operator, sigma=0.1)


def counting(calls, apply, params, tokens):
    calls.append(tokens.shape)
    return apply(params, tokens)


def test_posterior_is_aps_sample_with_the_sigma_and_the_options_given(model, photo):
    operator = operators.super_resolution(scale=4)
    y, key = measured(photo, operator), jax.random.key(2)
    found = aps_jax.posterior(model, operator, y, key, "draft", sigma=0.1, **QUICK)
    config = aps_jax.make_config(preset="draft", sigma=0.1, **QUICK)
    params = aps_jax.Params(prior=model.prior, codec=model.codec, operator=operator)
    expected = jax.jit(aps_jax.aps_sample, static_argnames="config")(params, y, key, config=config)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    # Options are numbers in one program and constants in the other, which rounds otherwise.
    close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-5)
    jax.tree.map(close, found._replace(info=None), expected._replace(info=None))
    jax.tree.map(np.testing.assert_array_equal, found.info, expected.info)
    other = aps_jax.posterior(model, operator, y, key, "draft", sigma=0.5, **QUICK)
    assert (other.info.loss != found.info.loss).all()


def test_values_are_looked_at_before_anything_is_drawn(model, photo):
    operator, key = operators.denoising(), jax.random.key(0)
    y = measured(photo, operator)
    for wrong, message in (((y + 1) * 127.5, "not on the scale"), (y.at[0, 0].set(jnp.nan), "NaN")):
        with pytest.raises(ValueError, match=message):
            aps_jax.posterior(model, operator, wrong, key, "draft", sigma=0.1)
    with pytest.raises(ValueError, match="known_tokens go from -1"):
        aps_jax.posterior(model, operator, y, key, "draft", known_tokens=jnp.full((1, 64), -1))


def test_calls_of_the_same_shapes_compile_once(model, photo):
    calls = []
    apply = bind(functools.partial(counting, calls, model.prior.apply))
    model = model.replace(prior=model.prior.replace(apply=apply))
    for seed in range(3):
        # A new mask, measurement, key and set of weights every time, from newly made operators.
        operator = operators.inpainting_random(fraction=0.5).init(jax.random.key(seed), photo)
        weights = jax.tree.map(lambda leaf, seed=seed: leaf + 0.01 * seed, model)
        y = np.asarray(measured(photo, operator, seed))
        aps_jax.posterior(weights, operator, y, jax.random.key(seed), sigma=0.1, **QUICK)
        if seed == 0:
            first = len(calls)
    assert first > 0 and len(calls) == first
    aps_jax.posterior(weights, operator, y, jax.random.key(0), sigma=0.1, num_steps=1)
    assert len(calls) > first  # The count does see a compilation.


def test_known_tokens_and_other_samplers(model, photo):
    operator = operators.denoising()
    y = measured(photo, operator)
    known = np.full((1, 16), model.codec.num_codes)
    known[0, :5] = 3
    found = aps_jax.posterior(model, operator, y, jax.random.key(0), known_tokens=known, **QUICK)
    assert (found.tokens[0, :5] == 3).all()
    best = aps_jax.posterior(
        model, operator, y, jax.random.key(0), sampler="best_of_n", num_steps=2, num_candidates=2
    )
    assert best.images.shape == photo.shape
    with pytest.raises(ValueError, match="presets are of aps"):
        aps_jax.posterior(model, operator, y, jax.random.key(0), "draft", sampler="best_of_n")


@pytest.mark.parametrize("options", [{}, {"draw": "categorical"}, {"remasking": "random"}])
def test_several_samples_differ(model, photo, options):
    operator = operators.super_resolution(scale=4)
    found = aps_jax.posterior(
        model, operator, measured(photo, operator), jax.random.key(0), num_samples=3, **QUICK,
        **options,
    )  # fmt: skip
    samples = np.asarray(found.samples)
    assert samples.shape == (1, 3, SIDE, SIDE, 3)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (samples[:, one] != samples[:, other]).any()


@pytest.mark.parametrize("draw", ["quantized", "argmax"])
def test_samples_that_would_be_equal_are_refused(model, photo, draw):
    operator = operators.denoising()
    with pytest.raises(ValueError, match="would give equal samples.*set draw="):
        aps_jax.posterior(
            model, operator, photo, jax.random.key(0), num_samples=2, draw=draw, **QUICK
        )


RANDOM = {
    "inpainting_random": {"fraction": 0.7},
    "inpainting_box": {},
    "motion_blur": {"kernel_size": 5},
    "compressed_sensing": {"fraction": 0.25},
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_are_drawn_for_the_photo_or_say_how(model, photo, name):
    fresh = getattr(operators, name)(**RANDOM[name])
    with pytest.raises(ValueError, match="not drawn yet; .*operator.init") as refused:
        measured(photo, fresh)
    cure = re.search(r"operator\.init\(.*, x\)", str(refused.value))
    operator = eval(cure[0], {"operator": fresh, "jax": jax, "x": photo})  # It does help.
    same = fresh.init(jax.random.key(0), (SIDE, SIDE))
    np.testing.assert_array_equal(operator.params, same.params)
    y = measured(photo, operator)
    with pytest.raises(ValueError, match="operator.init"):
        aps_jax.posterior(model, fresh, y, jax.random.key(0), **QUICK)
    found = aps_jax.posterior(model, operator, y, jax.random.key(0), **QUICK)
    assert found.images.shape == photo.shape


@pytest.mark.parametrize("size", [16, (16,), (16, 0), (16.0, 16.0), np.zeros((16, 16, 3))])
def test_no_size_of_an_image(size):
    with pytest.raises(ValueError, match=r"must be \(height, width\) in pixels, or images"):
        operators.inpainting_random().init(jax.random.key(0), size)


def test_model_is_a_pytree(model):
    leaves = jax.tree.leaves(model)
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    traces = []

    @jax.jit
    def total(model):
        traces.append(model.card["sizes"])
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model))

    total(model)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    assert abs(total(doubled) - 2 * total(model)) < 1e-3
    assert traces == [[1, 2]] and doubled.card == model.card


def test_show_draws_what_it_is_given():
    x = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype="float32").reshape(2, 8, 8, 3)
    figure = aps_jax.show({"photo": x, "grey": x[..., :1], "one": x[0]})
    shown = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_title() for axis in shown[0]] == ["photo", "grey", "one"]
    for row in range(2):
        drawn = shown[row, 0].images[0].get_array()
        assert np.abs(drawn / 127.5 - 1 - x[row]).max() <= 1 / 255
        assert shown[row, 1].images[0].get_array().shape[:2] == (8, 8)
    assert shown[0, 2].images and not shown[1, 2].images
    figure = aps_jax.show({"y": jnp.array(3 * x[0] + 3 * x[1], jnp.bfloat16)})
    noisy = figure.axes[0].images[0].get_array()
    assert noisy.min() == 0 and noisy.max() == 255
    assert len(aps_jax.show({"x": np.zeros((9, 8, 8, 3))}, max_rows=3).axes) == 3


def test_show_of_a_result(model, photo):
    operator = operators.denoising()
    y = measured(photo, operator)
    one = aps_jax.posterior(model, operator, y, jax.random.key(0), **QUICK)
    titles = [axis.get_title() for axis in aps_jax.show(one).axes]
    assert titles == ["restored"]
    two = aps_jax.posterior(model, operator, y, jax.random.key(0), num_samples=2, **QUICK)
    figure = aps_jax.show({"photo": photo, "mine": two})
    names = [axis.get_title().partition(" (")[0] for axis in figure.axes]
    assert names == ["photo", "mine", "mine: mean", "mine: std"]
    spread = figure.axes[3].images[0].get_array()
    assert spread.max() == 255 and np.unravel_index(spread.argmax(), spread.shape)[:2] == (
        np.unravel_index(np.asarray(two.std[0]).mean(-1).argmax(), (SIDE, SIDE))
    )


@pytest.mark.parametrize(
    "value, message",
    [
        (np.zeros((1, 64, 2)), r"'y' has shape \(1, 64, 2\): not a picture"),
        (np.zeros((1, 40, 3)), "not a picture"),
        (np.zeros((8, 8)), "not a picture"),
        (np.full((8, 8, 3), 21.0), "values up to 21: not a picture in"),
        (np.zeros((8, 8, 3), np.int32), "is of int32; pictures are floats"),
        (np.full((8, 8, 3), np.nan), "NaN"),
        ((np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3))), "'y' is several measurements"),
    ],
)
def test_show_refuses_what_is_no_picture(value, message):
    with pytest.raises(ValueError, match=message):
        aps_jax.show({"y": value})


def test_show_refuses_measurements_that_are_no_pictures(photo):
    for operator in (
        operators.phase_retrieval(),
        operators.compressed_sensing(fraction=0.25).init(jax.random.key(0), photo),
    ):
        with pytest.raises(ValueError, match="not a picture"):
            aps_jax.show({"y": measured(jnp.ones_like(photo), operator)})
    with pytest.raises(ValueError, match="nothing to show"):
        aps_jax.show({})


def test_show_without_matplotlib_is_one_line():
    code = (
        "import sys, numpy; sys.modules['matplotlib'] = None; import aps_jax\n"
        "try: aps_jax.show({'x': numpy.zeros((8, 8, 3))})\n"
        "except ImportError as error: print(error, error.__suppress_context__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "show needs matplotlib: pip install 'aps_jax[notebook]' True\n"


def test_a_cell_of_a_notebook_shows_the_figure_once(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell("import aps_jax\nphoto = aps_jax.sample_photo()"),
        nbformat.v4.new_code_cell("aps_jax.show({'photo': photo})"),
        nbformat.v4.new_code_cell("figure = aps_jax.show({'photo': photo}); type(figure).__name__"),
    ]
    NotebookClient(book, timeout=300).execute()
    drawn = [[out.get("data", {}) for out in cell.outputs] for cell in book.cells]
    assert [sum("image/png" in data for data in outputs) for outputs in drawn] == [0, 1, 0]
    assert drawn[2][0]["text/plain"] == "'Figure'"
