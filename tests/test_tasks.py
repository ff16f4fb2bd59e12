"""Named tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_operators import FACTORIES, REQUIRED

from aps_jax.operators import kernel_wizard, tasks
from aps_jax.operators.tasks import TASKS, make_operator

SHAPE = (16, 24)


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
def test_defaults_make_the_operator(name):
    operator = make_operator(name, SHAPE, **required_options(name))
    assert operator.name == name
    assert TASKS[name].is_random == (operator.sample_params is not None)
    operator = operator.init(jax.random.key(0), SHAPE)
    y_shape = jax.eval_shape(
        lambda operator, x: operator(x), operator, jax.ShapeDtypeStruct((2, *SHAPE, 3), "float32")
    ).shape
    assert operator.image_shape(y_shape) == SHAPE


@pytest.mark.parametrize("name", FACTORIES)
def test_options_state_their_type(name):
    for option in TASKS[name].options.values():
        assert option.summary
        assert option.kind in (int, float, str, dict, np.ndarray)
        assert option.default is None or type(option.default) is option.kind
        assert not (option.is_required and option.default is not None)


@pytest.mark.parametrize(
    "name, options, setting",
    [
        ("super_resolution", {"scale": 2}, ("scale", 2)),
        ("gaussian_blur", {"std": 2.0, "kernel_size": 9}, ("kernel_size", 9)),
        ("hdr", {"gain": 3.0}, ("gain", 3.0)),
        ("jpeg", {"quality": 80}, ("quality", 80)),
        ("quantization", {"bits": 3}, ("num_levels", 8)),
    ],
)
def test_options_reach_the_operator(name, options, setting):
    assert setting in make_operator(name, SHAPE, **options).apply.settings


def test_options_reach_the_random_state():
    key = jax.random.key(0)
    mask = make_operator("inpainting_random", SHAPE, fraction=0.5).init(key, SHAPE).params
    assert int(mask.sum()) == 16 * 24 // 2
    box = make_operator("inpainting_box", SHAPE, box_size=4, margin=0).init(key, SHAPE).params
    assert int((1 - box).sum()) == 16
    kernel = make_operator("motion_blur", SHAPE, kernel_size=7).init(key, SHAPE).params
    assert kernel.shape == (7, 7)


def test_blurs_shrink_with_small_images():
    assert tasks.blur_sizes((256, 256)) == (61, 3.0)
    assert tasks.blur_sizes((512, 300)) == (61, 3.0)
    assert tasks.blur_sizes((128, 256)) == (31, 1.5)
    assert tasks.blur_sizes((64, 64)) == (15, 1.0)
    assert tasks.blur_sizes((8, 8)) == (5, 1.0)
    large = dict(make_operator("gaussian_blur", (256, 256)).apply.settings)
    assert large == {"kernel_size": 61, "std": 3.0}
    # An explicit std keeps its full support.
    wide = dict(make_operator("gaussian_blur", (64, 64), std=3.0).apply.settings)
    assert wide == {"kernel_size": 25, "std": 3.0}


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("super_resolutoin", SHAPE), {}, "unknown task .* did you mean 'super_resolution'"),
        (("xyz", SHAPE), {}, "unknown task 'xyz'; choose from super_resolution, gaussian_blur"),
        (("hdr", SHAPE), {"gian": 2.0}, "no option 'gian', did you mean 'gain'.*options: gain"),
        (("denoising", SHAPE), {"std": 2.0}, "no option 'std'; options: none"),
        (("blur", SHAPE), {}, "task 'blur' needs the option 'kernel'"),
        (("inpainting_mask", SHAPE), {}, "needs the option 'mask'"),
        (("nonlinear_blur", SHAPE), {}, "needs the option 'params'.*GOPRO_wVAE"),
        (("jpeg", SHAPE), {"quality": 0}, "quality must be .* got 0"),
        (("gaussian_blur", SHAPE), {"std": -1.0}, "std must be .* got -1.0"),
        (("hdr", (16,)), {}, "image_shape must be"),
        (("inpainting_mask", SHAPE), {"mask": jnp.ones((4, 4))}, r"images of \(4, 4\), required"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make_operator(*arguments, **options)


def test_tasks_cannot_be_changed():
    with pytest.raises(TypeError):
        TASKS["new"] = TASKS["hdr"]
