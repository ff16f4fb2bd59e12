"""The sampler on eight forced host devices equals the sampler on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aps_jax import checkpoint, pretrained, sharding
from aps_jax.transformer import TransformerConfig, init_transformer_params


@pytest.fixture(scope="module")
def facts():
    """Device counts are fixed when JAX starts, so the run has a process of its own."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded_run.py")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "1x8"])
def test_results_do_not_depend_on_the_mesh(facts, mesh):
    found = facts["meshes"][mesh]
    assert facts["devices"] == 8
    assert found["same_tokens"]
    assert found["image_error"] < 1e-4
    assert found["loss_error"] < 1e-4


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "1x8"])
def test_the_work_is_really_spread(facts, mesh):
    """Images come back in one shard per data group; the prior's matrices are split by model."""
    num_data, num_model = map(int, mesh.split("x"))
    found = facts["meshes"][mesh]
    assert found["image_shards"] == num_data
    assert found["kernel_columns"] * num_model == found["columns"]


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "1x8"])
def test_model_folders_load_straight_to_the_mesh(facts, mesh):
    """As `shard_params` would lay them out, in both formats."""
    assert facts["meshes"][mesh]["loads_as_placed"] == [True, True]
    assert facts["meshes"][mesh]["loaded_samples_same"]


def test_a_mesh_needs_its_devices():
    count = len(jax.devices())
    assert dict(sharding.make_mesh().shape) == {"data": count, "model": 1}
    with pytest.raises(ValueError, match=f"{count + 1} x 1 devices does not fit the {count}"):
        sharding.make_mesh(count + 1)
    with pytest.raises(ValueError, match="at least 1"):
        sharding.make_mesh(num_model=0)


def test_what_cannot_be_divided_is_an_error():
    mesh = jax.sharding.AbstractMesh((4, 3), ("data", "model"))
    with pytest.raises(ValueError, match="a batch of 6 cannot be spread over 4 devices; fill.* 8"):
        sharding.shard_batch(jnp.zeros((6, 2)), mesh)
    weights = {"blocks": {"q": {"kernel": jnp.zeros((2, 8, 8))}}}
    with pytest.raises(ValueError, match=r"blocks/q/kernel of shape \(2, 8, 8\) cannot be split"):
        sharding.prior_shardings(weights, mesh)


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
    # Told before anything is read.
    monkeypatch.setattr(checkpoint, "load_params", None)
    with pytest.raises(ValueError, match="4 devices cannot share the prior's num_heads = 2"):
        pretrained.load_pretrained(tiny_model, mesh=mesh(4))
