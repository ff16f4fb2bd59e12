"""The sampler on eight forced host devices equals the sampler on one."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import sharded_run
from conftest import PRIOR_CONFIG, random_params

from aps_jax import Params, pretrained, sharding
from aps_jax.io import checkpoint
from aps_jax.prior.bundle import make_prior
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params

#: Of both kinds of axes at once; only one, a special case, is a longer proof.
MESHES = pytest.mark.parametrize(
    "mesh",
    ["2x4", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8x1", "1x8"))],
)
BOTH_AXES = pytest.mark.parametrize("mesh", ["2x4"])


def start(num_devices, *arguments):
    """Device counts are fixed when JAX starts, so the run has a process of its own."""
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    )
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("sharded_run.py"), *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def facts_of(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])  # Gloo says things before.


@functools.cache
def facts_with(mesh):
    return facts_of(start(8, mesh))


@pytest.fixture
def facts(mesh):
    return facts_with(mesh)


def assert_equal(found):
    assert found["same_tokens"]
    assert found["image_error"] < 1e-4
    assert found["loss_error"] < 1e-4


@MESHES
def test_results_do_not_depend_on_the_mesh(facts, mesh):
    """Query heads share keys there, two by two."""
    assert facts["devices"] == 8
    assert_equal(facts["mesh"])


@MESHES
def test_the_work_is_really_spread(facts, mesh):
    """Each device decodes one image of its own and holds a part of the prior's matrices."""
    num_model = int(mesh.split("x")[1])
    found = facts["mesh"]
    assert facts["decoded_rows"] == [8]  # On one device.
    assert found["decoded_rows"] == [1]
    assert found["image_shards"] == 8
    assert found["kernel_columns"] * num_model == found["columns"]


@MESHES
def test_no_weights_are_gathered(facts, mesh):
    """Only tokens are, whereas a prior called with rows over both axes gathers its matrices."""
    if mesh == "2x4":
        assert facts["parts"]["naive_gathered"] >= facts["smallest_matrix"]
    assert facts["mesh"]["most_gathered"] < facts["smallest_matrix"]


@MESHES
def test_model_folders_load_straight_to_the_mesh(facts, mesh):
    """As `shard_params` would lay them out, in both formats."""
    assert facts["mesh"]["loads_as_placed"] == [True, True]
    assert facts["mesh"]["loaded_samples_same"]


@MESHES
def test_samples_of_one_measurement_are_spread(facts, mesh):
    found = facts["samples"]
    assert_equal(found)
    assert found["decoded_rows"] == [1]
    assert found["spread"] > 0.1  # They are different ones.


@BOTH_AXES
def test_results_do_not_depend_on_the_order_of_a_spread_batch(facts, mesh):
    assert facts["order"]["moved"] > 0.5
    assert_equal(facts["order"])


@BOTH_AXES
def test_a_mapped_decoder_is_spread(facts, mesh):
    """As particles and candidates are decoded: three for each of eight rows."""
    found = facts["parts"]
    assert found["vmapped_rows_alone"] == [24]
    assert found["vmapped_rows"] == [3]
    assert found["vmapped_error"] < 1e-4


@pytest.mark.slow
def test_one_mesh_over_two_processes():
    """As the hosts of a pod have it: each holds two of the four devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    params, *_ = sharded_run.problem(4)
    with sharded_run.saved(params.codec, params.prior) as folders:
        processes = [start(2, rank, port, *folders) for rank in range(2)]
        try:
            both = [facts_of(process) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for facts in both:
        assert (facts["devices"], facts["own"]) == (4, 2)
        for mesh, found in facts["meshes"].items():
            assert_equal(found)
            assert found["image_shards"] == 4
            assert found["decoded_rows"] == [1]
            assert found["kernel_columns"] * int(mesh[-1]) == found["columns"]
            assert found["loads_as_placed"] == [True, True]
            assert found["loaded_samples_same"]


def test_a_mesh_needs_its_devices():
    count = len(jax.devices())
    assert dict(sharding.make_mesh().shape) == {"data": count, "model": 1}
    with pytest.raises(ValueError, match=f"{count + 1} x 1 devices does not fit the {count}"):
        sharding.make_mesh(count + 1)
    with pytest.raises(ValueError, match="at least 1"):
        sharding.make_mesh(num_model=0)
    eight = list(range(8))
    for size in (3, 9):
        with pytest.raises(ValueError, match=f"8 devices .* num_model = {size}; choose a divisor"):
            sharding.make_mesh(num_model=size, devices=eight)


def test_what_cannot_be_divided_is_an_error():
    mesh = jax.sharding.AbstractMesh((4, 3), ("data", "model"))
    with pytest.raises(ValueError, match="a batch of 6 cannot be spread over 4 devices; fill.* 8"):
        sharding.shard_batch(jnp.zeros((6, 2)), mesh)
    with pytest.raises(ValueError, match="batch of 3 with 2 samples of each .* fill it up to 4 or"):
        sharding.shard_batch(jnp.zeros(3), mesh, num_samples=2)
    with pytest.raises(ValueError, match="a scalar has no batch .*image_keys"):
        sharding.shard_batch(jax.random.key(0), mesh)
    weights = {"blocks": {"q": {"kernel": jnp.zeros((2, 8, 8))}}}
    with pytest.raises(ValueError, match=r"blocks/q/kernel of shape \(2, 8, 8\) cannot be split"):
        sharding.prior_shardings(weights, mesh)
    # The head of a reward model has one number, of which every device has a copy.
    one = sharding.prior_shardings({"head": {"kernel": jnp.zeros((8, 1))}}, mesh)
    assert one["head"]["kernel"].spec == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("batch", "num_samples", "axes"),
    [
        (24, 1, ("data", "model")),
        (8, 1, ("data",)),  # Not by 12.
        (8, 3, ("data",)),
        (1, 12, ()),
        (6, 2, ()),
    ],
)
def test_a_batch_lies_where_it_can(batch, num_samples, axes):
    mesh = jax.sharding.AbstractMesh((4, 3), ("data", "model"))
    found = sharding.batch_sharding((batch, 5), mesh, num_samples)
    assert found.spec == jax.sharding.PartitionSpec(*([axes] if axes else []))


def test_a_bundle_can_be_laid_out_again(toy_prior, toy_codec):
    """Functions are equal, so nothing compiles twice; one device has those of the bundle."""
    params = Params(toy_prior, toy_codec, None)
    rules = ((".*", None),)

    def functions(params, shape):
        mesh = jax.sharding.AbstractMesh(shape, ("data", "model"))
        return jax.tree.structure(sharding.plan_params(params, mesh, rules=rules)[0])

    plain, wide = jax.tree.structure(params), functions(params, (2, 4))
    assert wide != plain and wide == functions(params, (2, 4)) != functions(params, (4, 2))
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    other, _ = sharding.plan_params(params, mesh, rules=rules)
    assert functions(other, (2, 4)) == wide
    assert functions(other, (1, 1)) == plain


def test_every_parameter_needs_a_rule(toy_prior):
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "model"))
    with pytest.raises(ValueError, match="no rule says how to lay parameter 'embed' out"):
        sharding.prior_shardings(toy_prior.params, mesh)
    rules = (("head", 1), (".*", None))
    shardings = sharding.prior_shardings(toy_prior.params, mesh, rules=rules)
    assert shardings["head"].spec == jax.sharding.PartitionSpec(None, "model")
    assert shardings["embed"].spec == jax.sharding.PartitionSpec()
    whole = sharding.prior_shardings(toy_prior.params, sharding.make_mesh(1))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize(
    "config",
    [
        {"qkv_bias": True},
        {"tie_embeddings": True},
        {"code_bits": 3, "code_rank": 2},
        {"block": "phi"},
    ],
)
def test_rules_cover_every_parameter_of_the_transformer(config):
    """No stacked matrix is copied whole: only embeddings, norms and biases are."""
    config = TransformerConfig(
        vocab_size=16, width=16, num_layers=2, num_heads=2, mlp_width=32, **config
    )
    weights = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "model"))
    shardings = sharding.prior_shardings({"model": weights, "prompt": jnp.zeros(3)}, mesh)
    for path, found in jax.tree_util.tree_leaves_with_path(shardings):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_matrix = name.endswith("kernel") and "project" not in name
        assert ("model" in found.spec) == is_matrix, name


def test_the_devices_of_a_prior_divide_its_heads(tiny_model, monkeypatch):
    def mesh(size):
        return jax.sharding.AbstractMesh((1, size), ("data", "model"))

    sharding.require_whole_heads(8, 4, mesh(4))
    sharding.require_whole_heads(8, None, mesh(8))
    with pytest.raises(ValueError, match="3 devices cannot share the prior's num_heads = 8"):
        sharding.require_whole_heads(8, None, mesh(3))
    with pytest.raises(ValueError, match="num_kv_heads = 2; choose a divisor of 2"):
        sharding.require_whole_heads(8, 2, mesh(4))
    config = dataclasses.replace(PRIOR_CONFIG, num_heads=4, num_kv_heads=2)
    weights = random_params(init_transformer_params, config)
    prior = make_prior(config, weights)
    sharding.spread_prior(prior, mesh(2))
    with pytest.raises(ValueError, match="num_kv_heads = 2; choose a divisor of 2"):
        sharding.shard_params(Params(prior, None, None), mesh(4))
    # Told before anything is read.
    monkeypatch.setattr(checkpoint, "load_params", None)
    with pytest.raises(ValueError, match="4 devices cannot share the prior's num_heads = 2"):
        pretrained.load_pretrained(tiny_model, mesh=mesh(4))
