"""The blur network's published file, in names and shapes; the numbers are compared to PyTorch."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from hub import random_state
from safetensors.numpy import save_file

from aps_jax import cli, pretrained
from aps_jax.cli import inputs
from aps_jax.cli import options as cli_options
from aps_jax.operators import kernel_wizard, make_operator, nonlinear_blur
from convert import kernel_wizard as converter
from convert.rules import place_tensors

TINY = kernel_wizard.KernelWizardConfig(
    num_features=2, num_front_blocks=1, num_back_blocks=2, kernel_dim=4
)


def tensor_shapes(width=2, front=1, back=2, code=4):
    shapes = {"kernel_extractor.0.weight": (width, 6, 3, 3)}

    def conv(name, out, size, bias=True, kernel=3):
        shapes[f"{name}.weight"] = (out, size, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    conv("feature_extractor.0", width, 3)
    for index in (2, 4):
        conv(f"feature_extractor.{index}", width, width)
    for part, first, count in (("feature_extractor", 6, front), ("recon_trunk", 0, back)):
        for index in range(first, first + count):
            for number in (1, 2):
                conv(f"{part}.{index}.conv{number}", width, width)
    for index, out in ((0, 4 * width), (3, 4 * width), (6, width), (8, 3)):
        conv(f"recon_trunk.{back + index}", out, width)
    widths = [width, width, 2 * width, 4 * width, 8 * width, 8 * width]
    for level in range(5):
        name = "adapter.model." + "submodule." * level
        outer, inner = widths[level : level + 2]
        conv(f"{name}down.{0 if level == 0 else 1}", inner, outer, bias=False, kernel=4)
        below = code if level == 4 else inner
        shapes[f"{name}up.1.weight"] = (inner + below, outer, 4, 4)
        if level == 0:
            shapes[f"{name}up.1.bias"] = (outer,)
    return shapes


def run(source, target, *options):
    return converter.main(converter.FAMILY, "", [str(source), str(target), *options])


@pytest.fixture
def source(tmp_path):
    (tmp_path / "hub").mkdir()
    save_file(random_state(tensor_shapes()), tmp_path / "hub" / "model.safetensors")
    return tmp_path / "hub"


def test_published_names_fill_the_whole_network():
    config = kernel_wizard.KernelWizardConfig()
    targets = traverse_util.flatten_dict(kernel_wizard.param_shapes(config), sep="/")
    shapes = tensor_shapes(width=64, front=10, back=20, code=512)
    used = {k: v for k, v in shapes.items() if not k.startswith("kernel_extractor")}
    source = type("Headers", (), {"shapes": used})()
    places = place_tensors(source, converter.RULES, targets)
    assert {place.target for place in places.values()} == targets.keys()
    assert sum(int(np.prod(shape)) for shape in used.values()) == 23_662_531
    assert places["adapter.model.submodule.submodule.down.1.weight"].target == "down_2/kernel"


def test_weights_reach_the_operator(source, tmp_path, capsys):
    assert run(source, tmp_path / "blur", "--verify") == 0
    assert "verified, largest relative rounding 0.0e+00" in capsys.readouterr().out
    params = pretrained.load_kernel_wizard(tmp_path / "blur")
    assert kernel_wizard.config_of(params) == TINY
    state = random_state(tensor_shapes())
    weight = state["adapter.model.submodule.submodule.submodule.submodule.up.1.weight"]
    np.testing.assert_array_equal(
        params["up_4"]["kernel"], weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    )
    weight = state["recon_trunk.1.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["recon_trunk_1"]["conv2"]["kernel"], weight)
    operator = make_operator("nonlinear_blur", params=params)
    assert operator.apply == nonlinear_blur(params, config=TINY).apply
    assert cli.main(["models", str(tmp_path / "blur")]) == 0
    assert "network of --task nonlinear_blur" in capsys.readouterr().out


def test_the_command_line_takes_the_folder(source, tmp_path):
    assert run(source, tmp_path / "blur") == 0
    options = cli_options.Restore(task="nonlinear_blur", weights=tmp_path / "blur", size=8)
    problem = inputs.degrade_photo(options, *jax.random.split(jax.random.key(0)))
    assert problem.y.shape == problem.photo.shape == (1, 8, 8, 3)
    assert np.abs(problem.y - problem.photo).mean() > 0.05
    assert inputs.given_options(options) == {"weights": str(tmp_path / "blur")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recon_trunk.1.conv2.bias": None}, "'recon_trunk.1.conv2.bias', for 'recon_trunk_1"),
        ({"adapter.model.up.1.bias": None}, "'adapter.model.up.1.bias', for 'up_0/bias'"),
        ({"adapter.model.norm.weight": (4,)}, "has no place in this model"),
        ({"feature_extractor.0.weight": None}, "has no tensor 'feature_extractor.0.weight'"),
        ({"recon_trunk.2.weight": (9, 2, 3, 3)}, "needs (3, 3, 2, 8)"),
    ],
)
def test_files_that_do_not_fit(tmp_path, capsys, change, message):
    shapes = tensor_shapes() | change
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape}
    save_file(tensors, tmp_path / "model.safetensors")
    assert run(tmp_path / "model.safetensors", tmp_path / "blur") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "blur").exists()


def test_wrong_folders_are_one_line(tmp_path, capsys):
    argv = ["restore", "--task", "nonlinear_blur", "--out", str(tmp_path / "out")]
    for words, message in (
        ([], "needs --weights DIR, written by aps-jax convert kernel_wizard"),
        (["--weights", str(tmp_path)], "is not a model folder"),
        (["--weights", str(pretrained.model_folder("photo64"))], "lacks the configuration of a"),
    ):
        assert cli.main([*argv, *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert cli.main([*argv, "--task", "hdr", "--weights", "x"]) == 2
    assert "has no option 'weights'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no weights of the KernelWizard"):
        make_operator("nonlinear_blur", params={"up_0": {}})
