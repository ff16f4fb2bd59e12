"""LPIPS from files of torchvision and lpips against a distance computed by PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.scores import lpips as perceptual
from convert import lpips as converter

torch = pytest.importorskip("torch")
for package in perceptual.PACKAGES:
    pytest.importorskip(package)

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def distance(vgg, lin, a, b):
    """LPIPS 0.1 of images [B, 3, H, W] in [-1, 1], from the state dicts."""

    def features(x):
        x = (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
        layer = 0
        for block, (count, _) in enumerate(perceptual.VGG_BLOCKS):
            if block:
                x = torch.nn.functional.max_pool2d(x, 2)
                layer += 1
            for _ in range(count):
                name = f"features.{layer}"
                x = torch.nn.functional.conv2d(
                    x, vgg[f"{name}.weight"], vgg[f"{name}.bias"], padding=1
                ).relu()
                layer += 2
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    total = 0
    for index, (u, v) in enumerate(zip(features(a), features(b), strict=True)):
        weighted = torch.nn.functional.conv2d((u - v) ** 2, lin[f"lin{index}.model.1.weight"])
        total = total + weighted.mean(dim=(1, 2, 3))
    return total.numpy()


@pytest.fixture(scope="module")
def states():
    generator = torch.Generator().manual_seed(0)
    vgg, layer = {}, 0
    for block, (count, _) in enumerate(perceptual.VGG_BLOCKS):
        layer += bool(block)
        for index in range(count):
            width = perceptual.vgg_layers()[
                sum(c for c, _ in perceptual.VGG_BLOCKS[:block]) + index
            ]
            shape = (width[2], width[1], 3, 3)
            weight = torch.randn(shape, generator=generator) * (2 / (9 * width[1])) ** 0.5
            vgg[f"features.{layer}.weight"] = weight
            vgg[f"features.{layer}.bias"] = 0.1 * torch.randn(width[2], generator=generator)
            layer += 2
    vgg["classifier.0.weight"] = torch.zeros(2, 2)  # Not read.
    lin = {
        f"lin{index}.model.1.weight": torch.rand((1, width, 1, 1), generator=generator)
        for index, (_, width) in enumerate(perceptual.VGG_BLOCKS)
    }
    return vgg, lin


@pytest.fixture
def files(states, tmp_path):
    paths = [tmp_path / "vgg16.pth", tmp_path / "vgg.pth"]
    for state, path in zip(states, paths, strict=True):
        torch.save(state, path)
    return [str(path) for path in paths]


def test_distance_is_that_of_torch(states, files, tmp_path):
    cache = tmp_path / "cache"
    assert converter.main([*files, "--cache", str(cache), "--allow-unknown"]) == 0
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 2, 32, 48, 3)).astype(np.float32)
    found = perceptual.load_lpips(cache)(jnp.asarray(a), jnp.asarray(b))
    expected = distance(*states, *(torch.tensor(x).permute(0, 3, 1, 2) for x in (a, b)))
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(np.ravel(found), expected, rtol=2e-5)


def test_wrong_files_are_one_line(files, tmp_path, capsys):
    cache = ["--cache", str(tmp_path / "cache")]
    for argv, message in (
        ([*files, *cache], "not the vgg16-397923af.pth of torchvision"),
        ([*files[::-1], *cache, "--allow-unknown"], "lack a tensor"),
        ([files[0], str(tmp_path / "none.pth"), *cache, "--allow-unknown"], "none.pth"),
    ):
        assert converter.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "cache").exists()
