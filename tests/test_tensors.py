import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from aps_jax.io.tensors import TensorFileError, create_tensors, open_tensors


def values(rng):
    return {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "half": rng.normal(size=5).astype(np.float16),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "count": np.arange(4),
        "flags": np.array([True, False, True]),
        "scalar": np.array(3.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_reference_library_writes(tmp_path, rng):
    path, expected = tmp_path / "x.safetensors", values(rng)
    path.write_bytes(save(expected, metadata={"format": "pt"}))
    got = open_tensors(path)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        np.testing.assert_array_equal(got[name], array)
        assert not got[name].flags.writeable or got[name].size == 0


def test_the_reference_library_reads_what_is_written(tmp_path, rng):
    path, expected = tmp_path / "x.safetensors", values(rng)
    specs = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in expected.items()}
    written = create_tensors(path, specs)
    assert all((array == 0).all() for array in written.values())
    for name, array in expected.items():
        written[name][...] = array
    del written
    with safe_open(path, framework="flax") as file:
        assert set(file.keys()) == set(expected)
        brain = np.asarray(file.get_tensor("brain"))
    np.testing.assert_array_equal(brain, expected["brain"])
    again = open_tensors(path)
    for name, array in expected.items():
        np.testing.assert_array_equal(again[name], array)
    path.unlink()
    del specs["brain"]
    create_tensors(path, specs)
    assert load_file(path)["count"].dtype == np.int64  # numpy does not know bfloat16 there
    with pytest.raises(FileExistsError):
        create_tensors(path, specs)


def test_a_file_without_numbers(tmp_path):
    path = tmp_path / "x.safetensors"
    create_tensors(path, {"none": jax.ShapeDtypeStruct((0, 2), np.float32)})
    assert open_tensors(path)["none"].shape == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header does not fit its size"),
        (b"\x02", "header does not fit its size"),
        ((2**62).to_bytes(8, "little") + b"{}", "header does not fit its size"),
        (file_of(b"{]"), "header is not JSON"),
        (file_of(b"\xff\xff"), "header is not JSON"),
        (file_of(b"[1]"), "not a JSON object"),
        (file_of({"a": entry()}, bytes(7)), "ends before tensor 'a' does"),
        (file_of({"a": entry()}, bytes(9)), "1 bytes follow its last tensor"),
        (file_of({"a": entry(shape=(3,))}, bytes(8)), "bytes of tensor 'a' do not fit its shape"),
        (file_of({"a": entry(offsets=(4, 12))}, bytes(12)), "bytes of tensor 'a'"),
        (file_of({"a": entry(), "b": entry()}, bytes(16)), "bytes of tensor 'b'"),  # overlap
        (file_of({"a": entry(dtype="F8_E4M3")}, bytes(8)), "'a' has the unsupported dtype F8_E4M3"),
        (file_of({"a": entry(dtype=["F32"])}, bytes(8)), "'a' has the unsupported dtype"),
        (file_of({"a": entry(shape=(-2,))}, bytes(8)), "describes tensor 'a' wrongly"),
        (file_of({"a": entry(shape=(True,))}, bytes(8)), "describes tensor 'a' wrongly"),
        (file_of({"a": entry(offsets=(0,))}, bytes(8)), "describes tensor 'a' wrongly"),
        (file_of({"a": 3}, bytes(8)), "describes tensor 'a' wrongly"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(TensorFileError, match=message):
        open_tensors(path)
