"""Tasks are declared once: factories, `make_operator`, checks and documentation follow."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_operators import FACTORIES, REQUIRED

from aps_jax import operators
from aps_jax.operators import kernel_wizard, make_operator
from aps_jax.operators.blur import blur_sizes
from aps_jax.tasks import TASKS, declared

SHAPE = (16, 24)
#: Arguments of factories that are no options of a task.
EXTRA = {"nonlinear_blur": {"config"}}


def required_options(name):
    """What the task cannot do without, with values; a new required option fails until added."""
    if name == "nonlinear_blur":  # Always the full network, here without its memory.
        return {"params": kernel_wizard.param_shapes(kernel_wizard.KernelWizardConfig())}
    values = REQUIRED.get(name, dict)()
    return {key: values[key] for key, o in TASKS[name].options.items() if o.is_required}


def test_every_factory_is_a_task():
    assert sorted(TASKS) == FACTORIES
    for name, task in TASKS.items():
        assert task.name == name and task.summary


@pytest.mark.parametrize("name", FACTORIES)
def test_factory_is_what_is_declared(name):
    factory, options = getattr(operators, name), TASKS[name].options
    parameters = inspect.signature(factory).parameters
    assert set(parameters) == set(options) | EXTRA.get(name, set())
    for key, option in options.items():
        default = inspect.Parameter.empty if option.is_required else option.default
        assert parameters[key].default is default
        assert f"\n  {key}: {option.summary}." in factory.__doc__
    if options:
        assert factory.__doc__.index("Args:") < factory.__doc__.index("Returns:")


@pytest.mark.parametrize("name", FACTORIES)
def test_defaults_make_the_operator_for_images_of_any_size(name):
    options = required_options(name)
    operator = make_operator(name, **options)
    assert operator.name == name
    assert TASKS[name].is_random == (operator.sample_params is not None)
    assert jax.tree.structure(operator) == jax.tree.structure(getattr(operators, name)(**options))
    for shape in (SHAPE,) if name == "inpainting_mask" else (SHAPE, (32, 16)):
        drawn = operator.init(jax.random.key(0), shape)
        x = jax.ShapeDtypeStruct((2, *shape, 3), "float32")
        y = jax.eval_shape(lambda operator, x: operator(x), drawn, x)
        assert drawn.image_shape(y.shape) == shape


@pytest.mark.parametrize("name", FACTORIES)
def test_options_state_their_type(name):
    for key, option in TASKS[name].options.items():
        assert option.summary and option.metavar
        assert option.kind in (int, float, str, dict, np.ndarray)
        assert option.default is None or option.check(key, option.default) == option.default
        assert option.default is None or type(option.default) is option.kind
        assert not (option.is_required and option.default is not None)


RANGED = {
    (name, key): option
    for name, task in TASKS.items()
    for key, option in task.options.items()
    if option.kind in (int, float, str)
}


@pytest.mark.parametrize("name, key", RANGED)
def test_what_is_out_of_range_is_refused_everywhere(name, key):
    bad = {int: -1, float: -0.1, str: "nonsense"}[RANGED[name, key].kind]
    for build in (getattr(operators, name), lambda **options: make_operator(name, **options)):
        with pytest.raises(ValueError, match=f"^{key} must be .* got {bad!r}$"):
            build(**{key: bad})


def test_a_new_task_is_an_entry_and_a_factory(monkeypatch):
    from aps_jax import tasks

    entry = tasks.Task(
        name="fade",
        summary="less contrast",
        options={"gain": tasks.Option(kind=float, default=0.5, metavar="X", summary="factor")},
    )
    monkeypatch.setattr(tasks, "TASKS", {"fade": entry})

    @declared
    def fade(*, gain):
        """Fades.

        Returns:
          An operator.
        """
        return operators.Operator(apply=lambda params, x: gain * x, name="fade")

    assert str(inspect.signature(fade)) == "(*, gain=0.5)"
    assert fade.__doc__ == "Fades.\n\nArgs:\n  gain: factor.\n\nReturns:\n  An operator."
    assert fade()(jnp.ones(1)) == 0.5 and fade(gain=2.0)(jnp.ones(1)) == 2
    with pytest.raises(TypeError, match="gian"):
        fade(gian=2.0)


@pytest.mark.parametrize(
    "name, options, setting",
    [
        ("super_resolution", {"scale": 2}, ("scale", 2)),
        ("gaussian_blur", {"std": 2.0, "kernel_size": 9}, ("kernel_size", 9)),
        ("gaussian_blur", {"std": 2}, ("std", 2.0)),
        ("hdr", {"gain": 3.0}, ("gain", 3.0)),
        ("jpeg", {"quality": 80}, ("quality", 80)),
        ("quantization", {"bits": 3}, ("num_levels", 8)),
    ],
)
def test_options_reach_the_operator(name, options, setting):
    assert setting in make_operator(name, **options).apply.settings


def test_options_reach_the_random_state():
    key = jax.random.key(0)
    mask = make_operator("inpainting_random", fraction=0.5).init(key, SHAPE).params
    assert int(mask.sum()) == 16 * 24 // 2
    box = make_operator("inpainting_box", box_size=4, margin=0).init(key, SHAPE).params
    assert int((1 - box).sum()) == 16
    kernel = make_operator("motion_blur", kernel_size=7).init(key, SHAPE).params
    assert kernel.shape == (7, 7)


def test_blurs_shrink_with_small_images():
    assert blur_sizes((256, 256)) == (61, 3.0)
    assert blur_sizes((512, 300)) == (61, 3.0)
    assert blur_sizes((128, 256)) == (31, 1.5)
    assert blur_sizes((64, 64)) == (15, 1.0)
    assert blur_sizes((8, 8)) == (5, 1.0)
    plain = operators.gaussian_blur()
    x = jax.random.normal(jax.random.key(0), (1, 256, 256, 3))
    for side, options in {
        256: {"kernel_size": 61, "std": 3.0},
        128: {"kernel_size": 31, "std": 1.5},
        64: {"kernel_size": 15, "std": 1.0},
    }.items():
        small = x[:, :side, :side]
        np.testing.assert_array_equal(plain(small), operators.gaussian_blur(**options)(small))
    # An explicit std keeps its full support.
    small = x[:, :64, :64]
    wide, cut = (operators.gaussian_blur(std=3.0, kernel_size=size)(small) for size in (25, 15))
    np.testing.assert_array_equal(operators.gaussian_blur(std=3.0)(small), wide)
    assert (wide != cut).any()
    kernel = operators.motion_blur().init(jax.random.key(0), (64, 128)).params
    assert kernel.shape == (15, 15)


def test_number_of_random_projections():
    def rows(**options):
        return operators.compressed_sensing(**options).init(jax.random.key(0), SHAPE).params.shape

    assert rows() == (16 * 24 // 4, 16 * 24)
    assert rows(fraction=0.5)[0] == 16 * 24 // 2 and rows(num_measurements=7)[0] == 7


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("super_resolutoin", {}, "unknown task .* did you mean 'super_resolution'"),
        ("xyz", {}, "unknown task 'xyz'; choose from super_resolution, gaussian_blur"),
        ("hdr", {"gian": 2.0}, "no option 'gian', did you mean 'gain'.*options: gain"),
        ("denoising", {"std": 2.0}, "no option 'std'; options: none"),
        ("blur", {}, "task 'blur' needs the option 'kernel'"),
        ("inpainting_mask", {}, "needs the option 'mask'"),
        ("nonlinear_blur", {}, "needs the option 'params'.*GOPRO_wVAE"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_operator(name, **options)


def test_tasks_cannot_be_changed():
    with pytest.raises(TypeError):
        TASKS["new"] = TASKS["hdr"]
