"""What converted weights become on disk, how conversions resume, and where sources come from."""

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hub import save_sharded, save_single
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from test_convert_engine import FAMILY, Sizes, check, expected_from, init, tensors

from aps_jax import cli
from aps_jax.io import checkpoint
from aps_jax.io.checkpoint import CheckpointError
from convert import command, copying, engine, staging, stores
from convert.stores import chunk_shape
from experiments.speed import convert_scale


@pytest.fixture
def state():
    return tensors()


@pytest.fixture
def hub(tmp_path, state):
    return save_sharded(tmp_path / "hub", state)


@pytest.fixture
def orbax(tmp_path, hub):
    engine.convert(FAMILY, hub, tmp_path / "model", kind="orbax", verify=True)
    return tmp_path / "model" / "prior"


def abstract(dtype="float32"):
    tree = jax.eval_shape(lambda: init(None, Sizes(width=6, num_layers=3)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}


# Orbax checkpoints.


def test_an_orbax_checkpoint_holds_the_weights(orbax, state):
    loaded = flat(checkpoint.load_params(orbax, abstract()))
    for name, value in expected_from(state).items():
        assert isinstance(loaded[name], jax.Array) and loaded[name].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[name], value)
    assert checkpoint.count_weights(orbax) == (276, "float32")


def test_orbax_itself_reads_it(orbax, state):
    """With the calls of Orbax's own manual, as arrays and laid out over devices."""
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), abstract()
    )
    with ocp.StandardCheckpointer() as checkpointer:
        for restored in (checkpointer.restore(orbax, wanted), checkpointer.restore(orbax)):
            for name, value in expected_from(state).items():
                np.testing.assert_array_equal(flat(restored)[name], value)


def test_zeros_are_stored_too(tmp_path, state):
    """TensorStore leaves out chunks of zeros by default, and Orbax takes them for lost."""
    zeros = {name: np.zeros_like(value) for name, value in state.items()}
    source = save_single(tmp_path / "hub", zeros)
    engine.convert(FAMILY, source, tmp_path / "model", kind="orbax", dtype="bfloat16", verify=True)
    loaded = checkpoint.load_params(tmp_path / "model" / "prior", abstract("bfloat16"))
    assert all(not leaf.any() for leaf in jax.tree.leaves(loaded))


def test_damaged_orbax_checkpoints(orbax, tmp_path):
    chunk = next((orbax / "blocks.q.kernel" / "c").rglob("*/*"))
    chunk = next(path for path in [chunk, *chunk.rglob("*")] if path.is_file())
    whole = chunk.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for content in (None, whole[:-3], flipped):
        chunk.unlink() if content is None else chunk.write_bytes(content)
        with pytest.raises(CheckpointError, match="prior is damaged or incomplete"):
            checkpoint.load_params(orbax, abstract())
    chunk.write_bytes(whole)
    checkpoint.load_params(orbax, abstract())
    wanted = abstract()
    wanted["blocks"]["norm"]["scale"] = jax.ShapeDtypeStruct((3, 7), "float32")
    with pytest.raises(CheckpointError, match=r"'blocks/norm/scale'.* shape \(3, 6\).* \(3, 7\)"):
        checkpoint.load_params(orbax, wanted)
    del wanted["embed"]
    with pytest.raises(CheckpointError, match="has tensor 'embed/embedding', unknown"):
        checkpoint.load_params(orbax, wanted)
    wanted = abstract() | {"head": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(CheckpointError, match="weights folder .* lacks tensor 'head'"):
        checkpoint.load_params(orbax, wanted)
    (orbax / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="prior is damaged or incomplete"):
        checkpoint.load_params(orbax, abstract())


def test_the_fingerprint_of_a_folder_is_that_of_its_shape(orbax, tmp_path):
    before = checkpoint.fingerprint(orbax)
    assert checkpoint.fingerprint(shutil.copytree(orbax, tmp_path / "copy")) == before
    header = orbax / "embed.embedding" / "zarr.json"
    header.write_text(header.read_text().replace("float32", "float16"))
    assert checkpoint.fingerprint(orbax) != before


def test_large_weights_become_orbax(tmp_path, hub, monkeypatch):
    assert engine.convert(FAMILY, hub, tmp_path / "small").kind == "safetensors"
    monkeypatch.setattr(engine, "ORBAX_BYTES", 276 * 4)
    report = engine.convert(FAMILY, hub, tmp_path / "large")
    assert report.kind == "orbax" and (tmp_path / "large" / "prior" / "_METADATA").is_file()


@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("axis", [-1, -2, None])
def test_chunks_fit_the_mesh_and_the_memory(axis, is_stacked):
    shape = (32, 4096, 12288)[0 if is_stacked else 1 :]
    sides = chunk_shape(shape, 2, is_stacked=is_stacked, axis=axis)
    assert np.prod(sides) * 2 <= stores.CHUNK_BYTES
    assert not is_stacked or sides[0] == 1
    if axis is not None:
        assert shape[axis] % (8 * sides[axis]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_loading_never_holds_a_checkpoint_twice(tmp_path, kind):
    """Measured memory of processes that load one, beside what the devices end up with.

    The chunks that are being read at once, up to 32 of 16 MB, are half of a checkpoint of 0.7 GB
    and little of this one.
    """
    result = convert_scale.run(
        convert_scale.Arguments(
            work=tmp_path, width=512, layers=240, formats=(kind,), devices=(1, 4)
        )
    )
    whole = result["checkpoint_bytes"]
    for load in (result[kind]["load_to_1"], result[kind]["load_to_4"]):
        beside = load["peak_anonymous_bytes"] - load["bytes_on_all_devices"]
        assert load["idle_anonymous_bytes"] < beside < load["idle_anonymous_bytes"] + 0.5 * whole
    shared = result[kind]["load_to_4"]
    assert shared["param_bytes"] == result[kind]["load_to_1"]["param_bytes"]
    # The embedding alone has a copy per device.
    assert shared["bytes_on_fullest_device"] < 0.6 * whole


def test_models_lists_both_formats(tmp_path, hub, capsys, monkeypatch):
    for kind in ("safetensors", "orbax"):
        engine.convert(FAMILY, hub, tmp_path / kind, kind=kind, dtype="bfloat16")
        assert cli.main(["models", str(tmp_path / kind)]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert f"276 weights of bfloat16 ({kind}, 0.0 MB)" in line
        assert "from hub; by convert.toy 0." in line
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 0)
    assert cli.main(["models", str(tmp_path / "orbax")]) == 2
    assert "has format version 1; this aps_jax reads up to 0, so update" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="format version 1"):
        engine.convert(FAMILY, hub, tmp_path / "orbax")


# Interrupted conversions.


def interrupt_at(monkeypatch, name, number=signal.SIGINT):
    """Stops the conversion when it comes to tensor `name`; gives the names copied until then."""
    copy, copied = copying.copy, []

    def interrupted(tensor, *args):
        if tensor == name:
            signal.raise_signal(number)
        copy(tensor, *args)
        copied.append(tensor)

    monkeypatch.setattr(copying, "copy", interrupted)
    return copied


def run(source, target, *options):
    return command.main(FAMILY, "", [str(source), str(target), *options])


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_an_interrupted_conversion_goes_on(tmp_path, hub, state, monkeypatch, capsys, kind):
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        first = interrupt_at(patch, "blocks.2.q.weight")
        assert run(hub, target, "--format", kind) == 130
    kept = tmp_path / ".model.prior.partial"
    assert f"the same command goes on from {kept}" in capsys.readouterr().err
    assert kept.is_dir() and not target.exists()
    with monkeypatch.context() as patch:
        second = interrupt_at(patch, None)
        assert run(hub, target, "--format", kind, "--verify") == 0
    captured = capsys.readouterr()
    assert f"going on with {kept}: {len(first)} of 7 tensors done" in captured.err
    assert 0 < len(first) < 7 and sorted(first + second) == sorted(state)
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "model"}
    assert len(checkpoint.read_card(target)["prior_source"]["files_sha256"]) == 3
    if kind == "safetensors":
        check(target, expected_from(state))


def test_a_source_that_changed_is_converted_again(tmp_path, hub, monkeypatch, capsys):
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "blocks.2.q.weight")
        assert run(hub, target) == 130
    other = tensors(seed=5)
    save_sharded(hub, other)  # Of the same sizes.
    assert run(hub, target, "--verify") == 0
    check(target, expected_from(other))


def test_another_conversion_starts_again(tmp_path, hub, monkeypatch, capsys):
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "blocks.2.q.weight")
        assert run(hub, target) == 130
    assert run(hub, target, "--dtype", "bfloat16", "--verify") == 0
    err = capsys.readouterr().err
    assert "is of another checkpoint, format or version; starting again" in err
    assert "going on" not in err


def test_damaged_leftovers_start_again(tmp_path, hub, state, monkeypatch, capsys):
    target, kept = tmp_path / "model", tmp_path / ".model.prior.partial"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "blocks.2.q.weight")
        assert run(hub, target) == 130
    weights = kept / "model" / "prior.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with open(kept / "journal.jsonl", "a") as file:
        file.write('{"tensor": "cut o')
    assert run(hub, target, "--verify") == 0
    assert "starting again" in capsys.readouterr().err
    check(target, expected_from(state))


def test_folders_of_others_are_left_alone(tmp_path, hub, capsys):
    kept = tmp_path / ".model.prior.partial"
    kept.mkdir()
    (kept / "thesis.tex").write_text("years of work")
    assert run(hub, tmp_path / "model") == 2
    assert "is in the way and no unfinished conversion" in capsys.readouterr().err
    assert [path.name for path in kept.iterdir()] == ["thesis.tex"]


def test_two_conversions_at_once(tmp_path, hub, monkeypatch, capsys):
    copy, codes = copying.copy, []

    def copy_and_start_another(*args):
        monkeypatch.setattr(copying, "copy", copy)
        codes.append(run(hub, tmp_path / "model"))
        copy(*args)

    monkeypatch.setattr(copying, "copy", copy_and_start_another)
    assert run(hub, tmp_path / "model", "--verify") == 0
    assert codes == [2]
    assert "another process is writing" in capsys.readouterr().err


def test_a_full_disk_keeps_what_is_done(tmp_path, hub, monkeypatch, capsys):
    copy = copying.copy

    def full(name, *args):
        if name == "blocks.2.q.weight":
            raise OSError(28, "No space left on device")
        copy(name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(copying, "copy", full)
        assert run(hub, tmp_path / "model") == 2
    assert "No space left on device; the same command goes on" in capsys.readouterr().err
    assert run(hub, tmp_path / "model", "--verify") == 0


def test_a_crash_just_before_the_end(tmp_path, hub, state, monkeypatch):
    """All is in place but the hidden folder is still there; later the model is deleted."""
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "remove", lambda self: None)
        assert run(hub, target) == 0
    check(target, expected_from(state))
    assert (tmp_path / ".model.prior.partial" / "journal.jsonl").is_file()
    shutil.rmtree(target)
    assert run(hub, target, "--verify") == 0
    check(target, expected_from(state))
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "model"}


def test_a_crash_between_weights_and_card(tmp_path, hub, state):
    """The card counts: weights that it does not know are replaced."""
    target = tmp_path / "model"
    engine.convert(dataclasses.replace(FAMILY, section="codec"), hub, target)
    for name in ("prior", "prior.safetensors"):
        (target / name).mkdir()
        (target / name / "half").touch()
    (target / "prior.safetensors" / "half").unlink()
    engine.convert(FAMILY, hub, target, kind="orbax", verify=True)
    assert not (target / "prior" / "half").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_convert_engine import FAMILY
from convert import command, copying, job
job.COMMIT_BYTES = 1
copy = copying.copy
def kill(name, *args):
    if name == "blocks.2.q.weight":
        os.kill(os.getpid(), signal.SIGKILL)
    copy(name, *args)
copying.copy = kill
command.main(FAMILY, "", sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_killed_conversion_goes_on(tmp_path, hub, state, capsys, kind):
    script = KILLED.format(tests=str(Path(__file__).parent))
    argv = [str(hub), str(tmp_path / "model"), "--format", kind]
    done = subprocess.run([sys.executable, "-c", script, *argv], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    assert run(*argv, "--verify") == 0
    assert "tensors done" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "model"}


# The hub.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fake_hub(tmp_path, state, monkeypatch):
    """Stands for the network: "fetches" the files that the patterns ask for."""
    folder = save_sharded(tmp_path / "remote", state, {"model_type": "toy"})
    for name in (
        "modeling.py",
        "training_args.bin",
        "README.md",
        "optimizer.safetensors",
        "chat_template.jinja",
    ):
        (folder / name).write_bytes(b"junk")
    calls = []

    def snapshot_download(name, *, revision=None, allow_patterns):
        calls.append((name, revision))
        cache = tmp_path / "cache" / "models--toys--toy" / "snapshots" / COMMIT
        cache.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in folder.iterdir()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copyfile(folder / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_repository(tmp_path, fake_hub, state, capsys):
    assert run("toys/toy", tmp_path / "model", "--revision", "main") == 0
    assert fake_hub == [("toys/toy", "main")]
    check(tmp_path / "model", expected_from(state))
    source = checkpoint.read_card(tmp_path / "model")["prior_source"]
    assert source["repository"] == "toys/toy" and source["revision"] == COMMIT
    cache = tmp_path / "cache" / "models--toys--toy" / "snapshots" / COMMIT
    fetched = {path.name for path in cache.iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert fetched == shards | {
        "model.safetensors.index.json", "config.json", "chat_template.jinja",
    }  # fmt: skip
    capsys.readouterr()
    assert cli.main(["models", str(tmp_path / "model")]) == 0
    assert f"from toys/toy at {COMMIT}; by convert.toy" in capsys.readouterr().out
    # The folder of the hub's own cache says the same by itself.
    engine.convert(FAMILY, cache, tmp_path / "again")
    again = checkpoint.read_card(tmp_path / "again")["prior_source"]
    assert again == source


def test_a_repository_without_weights(tmp_path, fake_hub, capsys):
    for path in (tmp_path / "remote").glob("model*"):
        path.unlink()
    assert run("toys/toy", tmp_path / "model") == 2
    assert "toys/toy has no weights named model* at its top" in capsys.readouterr().err
    assert len(fake_hub) == 2


def raising(error):
    def snapshot_download(*args, **options):
        raise error

    return snapshot_download


class Missing(RepositoryNotFoundError):
    def __init__(self):
        pass


class Gated(GatedRepoError):
    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("ConnectError:\nno such host"),
            "(ConnectError: no such host); do",
        ),
        (OSError(28, "No space left on device"), "No space left on device); download it"),
        (Missing(), "nor such a repository on the hub"),
        (Gated(), "for those who have accepted its terms"),
    ],
)
def test_an_unreachable_hub(tmp_path, monkeypatch, capsys, error, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    assert run("toys/toy", tmp_path / "model") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert isinstance(error, Missing | Gated) or "hf download toys/toy --local-dir DIR" in err
    assert list(tmp_path.iterdir()) == []


def test_the_hub_needs_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run("toys/toy", tmp_path / "model") == 2
    assert "pip install 'aps_jax[hub]'" in capsys.readouterr().err


def test_what_is_no_repository(tmp_path, hub, capsys):
    for name in ("toy", "./toys/toy", "a/b/c", "/toys/toy"):
        assert run(name, tmp_path / "model") == 2
        assert "no such file or folder" in capsys.readouterr().err
    assert run(hub, tmp_path / "model", "--revision", "main") == 2
    assert "--revision is for the hub" in capsys.readouterr().err
