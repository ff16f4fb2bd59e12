"""What trainings write: models beside their optimiser, averages of them, and wrapped names."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from hub import random_state
from test_convert_magvitv2 import TINY, run, tensor_shapes

from aps_jax.pretrained import load_codec
from convert.sources import ConversionError, unwrap

PATH = Path("last.pth")
WEIGHTS = {"encoder.conv.weight": np.ones((2, 3)), "encoder.conv.bias": np.zeros(2)}
AVERAGE = {name: value + 1 for name, value in WEIGHTS.items()}
#: What torch's Adam gives: state by number, and the same by name where training is sharded.
OPTIMIZER = {"state": {0: {"exp_avg": np.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
BY_NAME = {"state": {"encoder.conv.bias": {"exp_avg": np.ones(2)}}, "param_groups": []}
BESIDE = {
    "optimizer": OPTIMIZER,
    "scheduler": {"base_lrs": [0.1], "last_epoch": 3},
    "rng": {"cpu": np.zeros(8, np.uint8)},
    "step": np.array(7),
    "epoch": 3,
}


@pytest.mark.parametrize(
    "loaded",
    [
        WEIGHTS,
        {"model": WEIGHTS},
        {"state_dict": WEIGHTS, **BESIDE},
        {"model": WEIGHTS, **BESIDE, "optimizer": BY_NAME},
        {"module": {f"module.{name}": value for name, value in WEIGHTS.items()}, "epoch": 1},
        {f"_orig_mod.{name}": value for name, value in WEIGHTS.items()},
    ],
)
def test_the_one_set_of_weights_is_found(loaded):
    found = unwrap(PATH, loaded, np.ndarray)
    assert list(found) == list(WEIGHTS)
    assert all(found[name] is WEIGHTS[name] for name in WEIGHTS)


def test_only_a_prefix_of_every_name_is_a_wrapper():
    mixed = {"module.a": np.ones(2), "b.c": np.ones(2)}
    assert unwrap(PATH, mixed, np.ndarray) == mixed


def test_two_sets_of_weights_are_for_a_person_to_choose():
    with pytest.raises(ConversionError) as error:
        unwrap(PATH, {"model": WEIGHTS, "ema": AVERAGE, **BESIDE}, np.ndarray)
    assert "several sets of weights, 'model', 'ema'; save one of them alone" in str(error.value)
    assert "weights_only=True)['model'], OTHER" in str(error.value)


def test_nothing_named():
    with pytest.raises(ConversionError, match="holds a list, not named tensors"):
        unwrap(PATH, [WEIGHTS], np.ndarray)


# The same through torch, with a whole tokenizer.


@pytest.fixture(scope="module")
def state():
    return random_state(tensor_shapes(TINY), seed=5)


@pytest.mark.parametrize("name", ["magvitv2.pth", "last.ckpt", "pytorch_model.bin"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_magvitv2_from_a_training(tmp_path, state, name, is_zip):
    torch = pytest.importorskip("torch")
    weights = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in state.items()}
    optimizer = torch.optim.Adam(weights.values())
    sum(value.sum() for value in weights.values()).backward()
    optimizer.step()
    trained = {name: value.detach().numpy().copy() for name, value in weights.items()}
    content = {"model": weights, "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    source = tmp_path if name == "pytorch_model.bin" else tmp_path / name
    assert run(source, tmp_path / "model", "--verify") == 0
    params = load_codec(tmp_path / "model").params
    np.testing.assert_array_equal(
        params["encoder"]["conv_in"]["kernel"],
        trained["encoder.conv_in.weight"].transpose(2, 3, 1, 0),
    )
    assert np.any(trained["encoder.conv_in.weight"] != state["encoder.conv_in.weight"])


def test_what_could_run_code_is_named(tmp_path, state, capsys):
    torch = pytest.importorskip("torch")
    weights = {name: torch.tensor(value) for name, value in state.items()}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "last.pth")
    assert run(tmp_path / "last.pth", tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert "holds more than tensors (argparse.Namespace), which could run code" in error
    assert "save model.state_dict() alone" in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()
