"""Energies of features and rewards against float64 NumPy and finite differences."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import f32

from aps_jax import energies
from aps_jax.types import Energy, Features, bind

SHAPE = (2, 8, 8, 3)


@flax.struct.dataclass
class Net:
    """Linear logits, or embeddings, of images of one size; names of the logits."""

    matrix: jax.Array
    text: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("smiling", "hat", "old"))

    def __call__(self, x):
        return x.reshape(x.shape[0], -1) @ self.matrix

    embed_image = __call__

    def embed_text(self, ids):
        return self.text[ids].sum(axis=1)


@pytest.fixture
def net(rng):
    return Net(f32(rng.normal(size=(192, 3)) / 10), f32(rng.normal(size=(5, 3))))


@pytest.fixture
def x(rng):
    return rng.uniform(-1, 1, size=SHAPE)


def two_scales(params, x):
    """Five nonlinear blocks at falling resolution, of which the energies read four."""
    blocks = []
    for matrix in params:
        x = jnp.tanh(x @ matrix)
        blocks.append(x)
        x = x[:, ::2, ::2] if x.shape[1] > 2 else x
    return tuple(blocks)


@pytest.fixture
def features(rng):
    widths = (3, 4, 5, 6, 5, 4)
    matrices = [rng.normal(size=pair) for pair in zip(widths, widths[1:], strict=False)]
    return Features(params=[f32(matrix) for matrix in matrices], apply=bind(two_scales))


def blocks_of(features, x):
    """The same in float64."""
    blocks = []
    for matrix in features.params:
        x = np.tanh(x @ np.float64(matrix))
        blocks.append(x)
        x = x[:, ::2, ::2] if x.shape[1] > 2 else x
    return blocks


@jax.jit
def _value_and_slope(energy, x):
    def total(x):
        values = energy(x)
        return jnp.sum(values), values

    slope, values = jax.grad(total, has_aux=True)(x)
    return values, slope


def assert_value_and_slope(energy, expected, x):
    """Values, and derivatives along a random direction by central differences of `expected`."""
    values, slope = _value_and_slope(energy, f32(x))
    np.testing.assert_allclose(values, expected(x), rtol=2e-5, atol=1e-6)
    direction = np.random.default_rng(8).normal(size=x.shape)
    found = np.sum(np.float64(slope) * direction, axis=(1, 2, 3))
    step = 1e-5
    wanted = (expected(x + step * direction) - expected(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_style(features, x, rng):
    """Of one reference of another size for all rows; `test_content` has one per row."""
    reference = rng.uniform(-1, 1, size=(1, 6, 10, 3))

    def grams(x):
        flat = [b.reshape(len(b), -1, b.shape[-1]) for b in blocks_of(features, x)[:4]]
        return [np.swapaxes(b, 1, 2) @ b / b.shape[1] for b in flat]

    def expected(x):
        errors = [
            np.sum((mine - theirs) ** 2, axis=(1, 2)) / np.sum(theirs**2, axis=(1, 2))
            for mine, theirs in zip(grams(x), grams(reference), strict=True)
        ]
        return np.mean(errors, axis=0)

    energy = energies.style(features, f32(reference))
    assert_value_and_slope(energy, expected, x)
    np.testing.assert_allclose(energy(f32(reference)), 0, atol=1e-9)


def test_style_forgets_places(x):
    """Blocks that look at single pixels do not see where they are."""
    per_pixel = Features(params=f32(1.0), apply=bind(lambda _, x: (x, x**2, jnp.tanh(x), x**3)))
    order = np.random.default_rng(1).permutation(64)
    shuffled = f32(x.reshape(2, 64, 3)[:, order].reshape(SHAPE))
    np.testing.assert_allclose(energies.style(per_pixel, f32(x))(shuffled), 0, atol=1e-9)
    assert np.all(energies.content(per_pixel, f32(x))(shuffled) > 0.1)


def test_content(features, x, rng):
    reference = rng.uniform(-1, 1, size=SHAPE)
    wanted = blocks_of(features, reference)[2]

    def expected(x):
        square = (blocks_of(features, x)[2] - wanted) ** 2
        return np.sum(square, axis=(1, 2, 3)) / np.sum(wanted**2, axis=(1, 2, 3))

    assert_value_and_slope(energies.content(features, f32(reference)), expected, x)


def test_known_pixels(x, rng):
    image, mask = rng.uniform(-1, 1, size=SHAPE), np.zeros((8, 8))
    mask[2:, :5] = 1

    def expected(x):
        return np.sum(((x - image) * mask[..., None]) ** 2, axis=(1, 2, 3)) / (2 * 0.2**2)

    assert_value_and_slope(energies.known(f32(image), mask, 0.2), expected, x)


def logits_of(net, x):
    return x.reshape(2, -1) @ np.float64(net.matrix)


@pytest.mark.parametrize("is_function", [False, True])
def test_classes(net, x, is_function):
    def expected(x):
        logits = logits_of(net, x)
        return np.log(np.sum(np.exp(logits), axis=1)) - logits[:, 2]

    def log_probs(x):
        return jax.nn.log_softmax(net(x), axis=-1)

    assert_value_and_slope(energies.classifier(log_probs if is_function else net, 2), expected, x)


def test_attributes(net, x):
    def expected(x):
        p = 1 / (1 + np.exp(-logits_of(net, x)))
        return -np.log(1 - p[:, 1]) - 0.25 * np.log(p[:, 0]) - 0.75 * np.log(1 - p[:, 0])

    assert_value_and_slope(energies.classifier(net, {"hat": 0, "smiling": 0.25}), expected, x)


def test_unknown_attributes_and_values(net):
    with pytest.raises(ValueError, match="'hats'.*hat"):
        energies.classifier(net, {"hats": 1})
    with pytest.raises(ValueError, match="hat must be from 0"):
        energies.classifier(net, {"hat": 2})


@pytest.mark.parametrize("label", [40, -1])
def test_a_class_that_the_network_has_not(net, x, label):
    with pytest.raises(ValueError, match=f"no column {label}; it gives"):
        energies.classifier(net, label)(x)
    many = [str(index) for index in range(41)]
    with pytest.raises(ValueError, match="no column 40; it gives"):
        energies.classifier(net, {"40": 1.0}, names=many)(x)


def test_embeddings(net, x, rng):
    """Of one text for all rows, and of one picture per row."""
    ids = rng.integers(0, 5, size=(1, 4))
    reference = rng.uniform(-1, 1, size=SHAPE)

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    for energy, wanted in [
        (energies.clip_text(net, ids), np.float64(net.text)[ids].sum(axis=1)),
        (
            energies.clip_image(net, f32(reference)),
            reference.reshape(2, -1) @ np.float64(net.matrix),
        ),
    ]:
        assert_value_and_slope(
            energy, lambda x, w=wanted: 1 - np.sum(unit(logits_of(net, x)) * unit(w), axis=-1), x
        )


def test_a_region_brought_to_another_size(x):
    """Halving by triangles: weights 1, 3, 3, 1 of eight along either axis."""
    energy = energies.on_region(
        Energy(apply=bind(lambda p, d, x: jnp.sum(x**2, axis=(1, 2, 3)))),
        rows=(0, 8), columns=(2, 6), size=(4, 2),
    )  # fmt: skip

    def halved(side):
        weights = np.zeros((side // 2, side))
        for row in range(side // 2):
            for offset, weight in zip(range(-1, 3), (1, 3, 3, 1), strict=True):
                if 0 <= 2 * row + offset < side:
                    weights[row, 2 * row + offset] = weight
        return weights / weights.sum(axis=1, keepdims=True)

    def expected(x):
        small = np.einsum("ih,jw,bhwc->bijc", halved(8), halved(4), x[:, :, 2:6])
        return np.sum(small**2, axis=(1, 2, 3))

    assert_value_and_slope(energy, expected, x)


def test_other_weights_need_no_other_compilation(net, features, x):
    energy_of = jax.jit(lambda energy, x: energy(x))
    values = [
        energy_of(
            energies.total(
                energies.scaled(energies.classifier(net, {"hat": wanted}), 2.0),
                energies.style(features, f32(shift + x[:1])),
                energies.clip_image(net, f32(shift + x[:1])),
            ),
            f32(x),
        )
        for wanted, shift in [(1, 0.0), (0, 0.5)]
    ]
    assert energy_of._cache_size() == 1 and np.all(values[0] != values[1])
