import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
import tracemalloc
from collections import namedtuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hub import save_index, save_sharded, save_single, split
from safetensors.numpy import load_file, save_file

from aps_jax.io import checkpoint
from aps_jax.io.tensors import create_tensors, open_tensors
from convert import command, copying, engine
from convert.rules import Rule, keep, place_tensors, transpose
from convert.sources import ConversionError, open_source


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int
    num_layers: int


def init(key, config):
    width = config.width
    return {
        "embed": {"embedding": jnp.zeros((7, width))},
        "blocks": {
            "q": {"kernel": jnp.zeros((config.num_layers, width, 2 * width))},
            "norm": {"scale": jnp.zeros((config.num_layers, width))},
        },
    }


def build(source, dtype):
    sizes = Sizes(source.size("embed.weight", 1), source.count("blocks."))
    return engine.Built(config=sizes, init=init, card={"built_with": dtype})


RULES = (
    Rule("embed.weight", "embed/embedding"),
    Rule("blocks.{layer}.q.weight", "blocks/q/kernel", transpose),
    Rule("blocks.{layer}.norm.weight", "blocks/norm/scale"),
)
FAMILY = engine.Family(
    name="toy",
    section="prior",
    rules=RULES,
    build=build,
    default_dtype="float32",
    checked=lambda config: {"buffer": np.arange(config.width)},
)
CODEC = dataclasses.replace(FAMILY, section="codec")


def tensors(width=6, num_layers=3, seed=0):
    rng = np.random.default_rng(seed)
    state = {"embed.weight": rng.normal(size=(7, width))}
    for layer in range(num_layers):
        state[f"blocks.{layer}.q.weight"] = rng.normal(size=(2 * width, width))
        state[f"blocks.{layer}.norm.weight"] = rng.normal(size=width)
    return {name: value.astype(np.float32) for name, value in state.items()}


def expected_from(state, num_layers=3):
    layers = range(num_layers)
    return {
        "embed/embedding": state["embed.weight"],
        "blocks/q/kernel": np.stack([state[f"blocks.{i}.q.weight"].T for i in layers]),
        "blocks/norm/scale": np.stack([state[f"blocks.{i}.norm.weight"] for i in layers]),
    }


def check(folder, expected, section="prior"):
    got = open_tensors(folder / f"{section}.safetensors")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value)


@pytest.fixture
def state():
    return tensors()


@pytest.fixture
def hub(tmp_path, state):
    return save_single(tmp_path / "hub", state)


@pytest.fixture
def refuse(tmp_path, capsys):
    """The one line that refuses a conversion which leaves nothing behind."""
    target = tmp_path / "out" / "model"

    def refuse(source, *options, target=target):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert command.main(FAMILY, "", [str(source), str(target), *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("convert.toy: ")
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        after.pop(tmp_path / "out", None)
        assert {path: before.get(path) for path in after if path.is_file()} == {
            path: time for path, time in before.items() if path.is_file()
        }
        return captured.err

    return refuse


# Every layout gives the same model.


def save_both(folder, state):
    """The wrong numbers in a single file, the right ones behind an index, which comes first."""
    save_single(folder, tensors(seed=1))
    return save_sharded(folder, state)


LAYOUTS = {
    "single": lambda folder, state: save_single(folder, state),
    "other stem": lambda folder, state: save_single(folder, state, stem="pytorch_model"),
    "file": lambda folder, state: save_single(folder, state) / "model.safetensors",
    "sharded": lambda folder, state: save_sharded(folder, state),
    "index": lambda folder, state: save_sharded(folder, state) / "model.safetensors.index.json",
    "one shard": lambda folder, state: save_sharded(folder, state, num_shards=1),
    "both": save_both,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, state, layout):
    source = LAYOUTS[layout](tmp_path / "hub", state)
    report = engine.convert(FAMILY, source, tmp_path / "model", verify=True)
    check(tmp_path / "model", expected_from(state))
    assert report.rounding == 0
    assert report.num_params == sum(value.size for value in state.values())
    assert report.num_bytes == 4 * report.num_params


def test_the_card_tells_the_origin(tmp_path, state):
    import hashlib

    source = save_sharded(tmp_path / "hub", state)
    engine.convert(FAMILY, source, tmp_path / "model", dtype="bfloat16")
    card = checkpoint.read_card(tmp_path / "model")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) == 3
    assert card["prior"] == {"width": 6, "num_layers": 3}
    assert card["built_with"] == card["prior_source"]["dtype"] == "bfloat16"
    assert card["prior_source"]["files_sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards
    }
    assert card["prior_source"]["converter"].startswith("convert.toy 0.")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(tmp_path, hub, state, dtype):
    report = engine.convert(FAMILY, hub, tmp_path / "model", dtype=dtype, verify=True)
    expected = {name: v.astype(dtype) for name, v in expected_from(state).items()}
    check(tmp_path / "model", expected)
    assert 0 < report.rounding <= float(jnp.finfo(dtype).eps) / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bfloat16_sources_pass_exactly(tmp_path, state, dtype):
    folder = tmp_path / "hub"
    folder.mkdir()
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in state.items()}
    parts = split(half, 2)
    for path, part in zip(save_index(folder, parts, "model", ".safetensors"), parts, strict=True):
        specs = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in part.items()}
        for name, array in create_tensors(path, specs).items():
            array[...] = part[name]
    report = engine.convert(FAMILY, folder, tmp_path / "model", dtype=dtype, verify=True)
    assert report.rounding == 0
    check(tmp_path / "model", {k: v.astype(dtype) for k, v in expected_from(half).items()})


def test_large_tensors_are_copied_whole(tmp_path):
    """More than one tile along both axes, neither a multiple of the tile."""
    state = tensors(width=300, num_layers=2)
    source = save_single(tmp_path / "hub", state)
    report = engine.convert(FAMILY, source, tmp_path / "model", verify=True)
    assert report.rounding == 0
    check(tmp_path / "model", expected_from(state, 2))


def test_memory_stays_below_the_size_of_the_model(tmp_path):
    """Memory maps do not count: their pages are the file's and are given back under pressure."""
    state = tensors(width=1024, num_layers=8)
    size = sum(value.nbytes for value in state.values())
    source = save_sharded(tmp_path / "hub", state, num_shards=4)
    del state
    tracemalloc.start()
    try:
        engine.convert(FAMILY, source, tmp_path / "model", dtype="bfloat16", verify=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 60e6 and peak < 0.2 * size


def test_buffers_are_checked_and_dropped(tmp_path, state, refuse):
    source = save_single(tmp_path / "hub", state | {"buffer": np.arange(6)})
    engine.convert(FAMILY, source, tmp_path / "model")
    check(tmp_path / "model", expected_from(state))
    save_single(source, state | {"buffer": np.arange(6)[::-1].copy()})
    assert "'buffer' has other values" in refuse(source)
    save_single(source, state | {"buffer": np.arange(5)})
    assert "'buffer' has shape (5,); this model needs (6,)" in refuse(source)


# Wrong tensors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.q.weight"), "'blocks.1.q.weight', for 'blocks/q/kernel' of sha"),
        (lambda t: t.pop("blocks.1.q.weight"), "(6, 12), is missing"),
        (lambda t: t.pop("embed.weight"), "no tensor 'embed.weight'"),
        (lambda t: t.update({"embed.weight": np.zeros(7, "f4")}), "vector (7,) for tensor 'emb"),
        (lambda t: t.update(extra=np.zeros(2, "f4")), "'extra' of shape (2,) has no place"),
        (lambda t: t.update({"blocks.9.norm.weight": np.zeros(6, "f4")}), "is missing"),
        (lambda t: t.update({"blocks.x.norm.weight": np.zeros(6, "f4")}), "has no place"),
        (
            lambda t: t.update({"blocks.1.q.weight": np.zeros((6, 12), "f4")}),
            "'blocks.1.q.weight' has shape (6, 12), which gives (12, 6); "
            "'blocks/q/kernel' needs (6, 12)",
        ),
        (
            lambda t: t.update({"blocks.01.norm.weight": np.zeros(6, "f4")}),
            "have the same place",
        ),
        (lambda t: t["blocks.2.norm.weight"].fill(np.inf), "not finite in float32"),
        (lambda t: t.update({"embed.weight": np.zeros((7, 6), "i4")}), "holds int32, not floating"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, state, refuse, change, message):
    change(state)
    assert message in refuse(save_single(tmp_path / "hub", state))


def test_numbers_too_large_for_the_dtype(tmp_path, state, refuse):
    state["embed.weight"][3, 2] = 1e5
    source = save_single(tmp_path / "hub", state)
    assert "not finite in float16" in refuse(source, "--dtype", "float16")


def test_a_table_with_a_hole_is_a_bug_of_ours(hub):
    source = open_source(hub)
    targets = {"other/kernel": jax.ShapeDtypeStruct((2,), "float32")}
    source = dataclasses.replace(source, shapes={})
    with pytest.raises(LookupError, match="no rule fills 'other/kernel'"):
        place_tensors(source, RULES, targets)


def test_placeholders_stand_for_one_piece():
    targets = {"a/down_2/kernel": jax.ShapeDtypeStruct((3,), "float32")}
    rules = (Rule("{half}.down.{level}.weight", "{half}/down_{level}/kernel", keep),)

    def place(*names):
        shapes = dict.fromkeys(names, (3,))
        return place_tensors(type("Headers", (), {"shapes": shapes})(), rules, targets)

    assert place("a.down.2.weight")["a.down.2.weight"].target == "a/down_2/kernel"
    for name in ("a.b.down.2.weight", "a.down.2.3.weight", "a.down.2xweight", "xa.down.2.weight"):
        with pytest.raises(ConversionError, match="has no place"):
            place(name)
    with pytest.raises(ConversionError, match=r"'a\.down\.2\.weight', for .*\(3,\), is missing"):
        place()


# Wrong files.


def test_no_source(tmp_path, refuse):
    assert "no such file or folder" in refuse(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    message = refuse(tmp_path / "empty")
    assert "has none of model.safetensors, pytorch_model.safetensors, model.bin" in message


@pytest.mark.parametrize("size", [0, 7, 100, -3])
def test_truncated_file(hub, refuse, size):
    path = hub / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors is damaged, truncated or no safetensors file" in refuse(hub)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def list_a_phantom(index):
    index["weight_map"]["phantom"] = "model-00001-of-00003.safetensors"


def leave_the_folder(index):
    index["weight_map"]["embed.weight"] = "../model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (lambda index: index.update(weight_map={"a": 3}), "has no weight_map of file names"),
        (list_a_phantom, "lacks tensor 'phantom', which the index lists"),
        (leave_the_folder, "points at '../model.safetensors', which is no weights file"),
        (
            lambda index: index["weight_map"].pop("embed.weight"),
            "'embed.weight', unlike the index says",
        ),
    ],
)
def test_wrong_index(tmp_path, state, refuse, change, message):
    source = save_sharded(tmp_path / "hub", state)
    change_index(source, change)
    assert message in refuse(source)


def test_shards_that_do_not_belong_together(tmp_path, state, refuse):
    source = save_sharded(tmp_path / "hub", state)
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "names model-00002-of-00003.safetensors, which is missing" in refuse(source)
    save_file(state, source / "model-00002-of-00003.safetensors")
    assert "model-00002-of-00003.safetensors has tensor" in refuse(source)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_unreadable_json(hub, refuse, content):
    (hub / "config.json").write_bytes(content)
    assert "config.json" in refuse(hub)


# The target.


def test_the_other_half_of_a_model_is_kept(tmp_path, hub, state, refuse, capsys):
    target = tmp_path / "model"
    engine.convert(CODEC, hub, target)
    before = (target / "codec.safetensors").read_bytes()
    engine.convert(FAMILY, hub, target)
    check(target, expected_from(state), "codec")
    check(target, expected_from(state), "prior")
    assert (target / "codec.safetensors").read_bytes() == before
    assert {"codec", "prior", "codec_source", "prior_source"} <= checkpoint.read_card(target).keys()
    assert {path.name for path in target.iterdir()} == {
        "card.json",
        "codec.safetensors",
        "prior.safetensors",
    }
    assert "already has a prior" in refuse(hub, target=target)


def test_targets_that_are_taken(tmp_path, hub, refuse):
    (tmp_path / "file").touch()
    assert "is a file" in refuse(hub, target=tmp_path / "file")
    assert "holds other files" in refuse(hub, target=hub)
    (tmp_path / "empty").mkdir()
    engine.convert(FAMILY, hub, tmp_path / "empty")
    assert (tmp_path / "empty" / "card.json").is_file()


def test_full_disk(hub, refuse, monkeypatch):
    usage = namedtuple("usage", "free")(100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refuse(hub)
    assert "needs 0.00 GB (1,104 bytes) and 0.00 GB (100 bytes) are free; make room" in message


def test_disk_that_fills_up_on_the_way(hub, refuse, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert "No space left" in refuse(hub)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_conversion_interrupted_at_once_leaves_nothing(tmp_path, hub, monkeypatch, capsys, number):
    def interrupted(*args):
        signal.raise_signal(number)

    monkeypatch.setattr(copying, "copy", interrupted)
    assert command.main(FAMILY, "", [str(hub), str(tmp_path / "model")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    assert "stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler


def test_verification_finds_a_wrong_number(hub, refuse, monkeypatch):
    copy = copying.copy

    def careless(name, array, slot, place):
        array = array.copy()
        if name == "blocks.1.norm.weight":
            array[4] += 1e-3
        copy(name, array, slot, place)

    monkeypatch.setattr(copying, "copy", careless)
    assert "'blocks.1.norm.weight' was written wrongly, off by 1.0e-03" in refuse(hub, "--verify")


# The command line.


def test_command_line_says_what_it_did(tmp_path, hub, capsys):
    argv = [str(hub), str(tmp_path / "model"), "--dtype", "bfloat16", "--verify"]
    assert command.main(FAMILY, "", argv) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    assert "prior of 276 weights" in captured.out
    assert "verified, largest relative rounding" in captured.out


@pytest.mark.parametrize(
    "argv", [[], ["a"], ["a", "b", "c"], ["a", "b", "--dtype", "int8"], ["a", "b", "--verif"]]
)
def test_wrong_arguments_are_one_line(argv, capsys):
    assert command.main(FAMILY, "", argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("convert.toy: ") and len(captured.err) > 25


def test_help(capsys):
    assert command.main(FAMILY, "Converts toys.", ["--help"]) == 0
    out = capsys.readouterr().out
    assert "Converts toys." in out and "--verify" in out and "python -m convert.toy" in out


# PyTorch's own format.


def test_bin_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.bin").write_bytes(b"anything")
    with pytest.raises(ConversionError, match=r"needs torch; pip install 'aps_jax\[torch\]'"):
        open_source(tmp_path)


@pytest.mark.parametrize("form", ["zip", "legacy", "bfloat16", "sharded"])
def test_bin_files(tmp_path, state, form):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "hub"
    folder.mkdir()
    dtype = ml_dtypes.bfloat16 if form == "bfloat16" else np.float32
    values = {name: torch.tensor(value) for name, value in state.items()}
    if form == "bfloat16":
        values = {name: value.bfloat16() for name, value in values.items()}
    parts = split(values, 2)
    if form == "sharded":
        for path, part in zip(
            save_index(folder, parts, "pytorch_model", ".bin"), parts, strict=True
        ):
            torch.save(part, path)
    else:
        path = folder / "pytorch_model.bin"
        torch.save(values, path, _use_new_zipfile_serialization=form != "legacy")
    engine.convert(FAMILY, folder, tmp_path / "model", dtype=np.dtype(dtype).name, verify=True)
    rounded = {name: value.astype(dtype) for name, value in state.items()}
    check(tmp_path / "model", expected_from(rounded))


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, state, refuse, is_zip):
    torch = pytest.importorskip("torch")
    marker = tmp_path / "marker"
    path = tmp_path / "model.bin"
    content = {name: torch.tensor(value) for name, value in state.items()}
    content["embed.weight"] = Evil(marker)
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert "holds more than tensors (posix.system), which could run code" in refuse(path)
    path.write_bytes(pickle.dumps(Evil(marker)))
    assert "could run code" in refuse(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # The same bytes do run under the ordinary unpickler.
    assert marker.exists()


def test_damaged_bin_files(tmp_path, state, refuse):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.bin"
    torch.save({name: torch.tensor(value) for name, value in state.items()}, path)
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        assert "model.bin" in refuse(path)
    torch.save([torch.zeros(2)], path)
    assert "holds a list, not named tensors" in refuse(path)
    torch.save({"epoch": 3}, path)
    assert "'epoch' is a int, not a dense tensor" in refuse(path)


def test_reading_again_gives_what_the_reference_library_gives(tmp_path, hub, state):
    engine.convert(FAMILY, hub, tmp_path / "model")
    reference = load_file(tmp_path / "model" / "prior.safetensors")
    for name, value in expected_from(state).items():
        np.testing.assert_array_equal(reference[name], value)
