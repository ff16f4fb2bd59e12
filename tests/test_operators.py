"""Laws that every operator obeys; new factories in `operators.__all__` are found by themselves."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import operators
from aps_jax.operators import kernel_wizard, measure
from aps_jax.types import Operator

SHAPE = (16, 24)
BATCH = 2
NOT_FACTORIES = {"Operator", "compose", "stack", "make_operator", "measure"}
FACTORIES = sorted(set(operators.__all__) - NOT_FACTORIES)
TINY_WIZARD = kernel_wizard.KernelWizardConfig(
    num_features=2, num_front_blocks=1, num_back_blocks=1, kernel_dim=4
)

# What a factory cannot do without. A new factory with required arguments fails until it is here.
REQUIRED = {
    "blur": lambda: {"kernel": np.arange(20.0).reshape(4, 5) / 190},
    "compressed_sensing": lambda: {"fraction": 0.25},
    "inpainting_mask": lambda: {"mask": np.random.default_rng(0).random(SHAPE) > 0.5},
    "nonlinear_blur": lambda: {"params": wizard_weights(), "config": TINY_WIZARD},
}
# Operators whose gradient is that of the identity by design; all others must match differences.
STRAIGHT_THROUGH = {"jpeg", "quantization"}
# Operators whose `init` needs the host and so cannot be jitted.
HOST_INIT = {"motion_blur"}
COMBINED = {
    "compose": lambda: operators.compose(
        operators.inpainting_random(), operators.gaussian_blur(kernel_size=5, std=1.0)
    ),
    "compose_shrinking": lambda: operators.compose(
        operators.compressed_sensing(fraction=0.5), operators.super_resolution(scale=2)
    ),
    "compose_grey": lambda: operators.compose(operators.hdr(), operators.colorization()),
    "stack": lambda: operators.stack(
        [operators.blur(np.ones((3, 3)) / 9), operators.inpainting_box(), operators.hdr()]
    ),
    "stack_nested": lambda: operators.stack(
        [operators.inpainting_random(), operators.stack([operators.super_resolution()])]
    ),
}
CASES = FACTORIES + sorted(COMBINED)


def make(name) -> Operator:
    if name in COMBINED:
        return COMBINED[name]()
    arguments = REQUIRED.get(name, dict)()
    return getattr(operators, name)(**arguments)


@functools.cache
def wizard_weights():
    """Weights for a tiny network that is far enough from the identity to be seen as nonlinear."""
    weights = kernel_wizard.init_params(jax.random.key(3), config=TINY_WIZARD)
    return jax.tree.map(lambda leaf: 2 * leaf, weights)


@functools.cache
def drawn(name, seed=0) -> Operator:
    return make(name).init(jax.random.key(seed), SHAPE)


@jax.jit
def forward(operator, x):
    return operator(x)


@jax.jit
def pullback(operator, x, v):
    return jax.vjp(operator, x)[1](v)[0]


@jax.jit
def vmapped(stacked, x):
    return jax.vmap(lambda operator, image: operator(image))(stacked, x)


def images(seed=0, low=-0.95, high=0.95):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(low, high, (BATCH, *SHAPE, 3)), "float32")


def flat(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves or [np.zeros(0)])


def close(a, b, tolerance=2e-5):
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
    np.testing.assert_allclose(
        flat(a), flat(b), rtol=0, atol=tolerance * max(1, abs(flat(b)).max())
    )


def test_every_required_argument_is_listed():
    for name in FACTORIES:
        factory = getattr(operators, name)
        needed = [
            p.name
            for p in inspect.signature(factory).parameters.values()
            if p.default is inspect.Parameter.empty
        ]
        assert set(needed) <= set(REQUIRED.get(name, dict)()), f"add {name} to REQUIRED"


@pytest.mark.parametrize("name", CASES)
def test_shapes_dtype_and_flags(name):
    operator, x = drawn(name), images()
    y = forward(operator, x)
    shape = jax.tree.map(jnp.shape, y)
    assert operator.output_shape(x.shape) == shape
    assert operator.image_shape(shape) == SHAPE
    for leaf in jax.tree.leaves(y):
        assert leaf.dtype == jnp.float32
        assert leaf.shape[0] == BATCH
        assert np.isfinite(leaf).all()
        if operator.is_image:
            assert leaf.ndim == 4 and leaf.shape[-1] in (1, 3)
    if operator.observed is not None:
        mask = operator.observed(operator.params, shape)
        jax.tree.map(lambda m, leaf: np.broadcast_to(m, leaf.shape), mask, y)
        hidden = jax.tree.map(lambda m, leaf: leaf * (1 - m), mask, y)
        assert set(np.unique(flat(mask))) <= {0.0, 1.0}
        assert not flat(hidden).any()


@pytest.mark.parametrize("name", CASES)
def test_images_are_independent_under_vmap_over_params(name):
    """Image i alone, with its own state, equals image i in a batch with that state."""
    states, x = [drawn(name, seed) for seed in range(BATCH)], images()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    alone = vmapped(stacked, x[:, None])
    for i, operator in enumerate(states):
        in_batch = forward(operator, x)
        close(
            jax.tree.map(lambda leaf, i=i: leaf[i, 0], alone),
            jax.tree.map(lambda leaf, i=i: leaf[i], in_batch),
        )


@pytest.mark.parametrize("name", CASES)
def test_linearity_flag_and_adjoint(name):
    operator, x, z = drawn(name), images(1), images(2)
    mixed = flat(forward(operator, 0.3 * x - 0.6 * z))
    separate = 0.3 * flat(forward(operator, x)) - 0.6 * flat(forward(operator, z))
    assert operator.is_linear == np.allclose(mixed, separate, atol=1e-4)
    if operator.is_linear:
        y = forward(operator, x)
        v = jax.tree.map(lambda leaf: jnp.cos(leaf * 50), y)
        pulled = flat(pullback(operator, z, v))
        scale = np.linalg.norm(flat(y)) * np.linalg.norm(flat(v))
        assert abs(flat(y) @ flat(v) - flat(x) @ pulled) < 1e-5 * scale


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    operator, x = drawn(name), images(3)
    direction = jnp.sign(images(4))
    step = 5e-3
    if name in STRAIGHT_THROUGH:
        close(pullback(operator, x, direction), direction)
    else:
        above = forward(operator, x + step * direction)
        below = forward(operator, x - step * direction)
        slope = jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below)
        # Pulling back the slope itself leaves no cancellation: <J d, J d> = <d, J^T J d>.
        expected = flat(slope) @ flat(slope)
        assert expected > 0
        got = flat(direction) @ flat(pullback(operator, x, slope))
        assert abs(got - expected) < 2e-2 * expected
    for value in (-1.0, 0.0, 1.0):  # Kinks and zero amplitudes must not give NaN.
        constant = jnp.full_like(x, value)
        v = jax.tree.map(jnp.ones_like, forward(operator, x))
        assert np.isfinite(pullback(operator, constant, v)).all()


@pytest.mark.parametrize("name", CASES)
def test_jit_equals_eager(name):
    x = images()
    close(drawn(name)(x), forward(drawn(name), x))


@pytest.mark.parametrize("name", CASES)
def test_equal_operators_share_one_compilation(name):
    first, second = drawn(name), make(name).init(jax.random.key(7), SHAPE)
    structure = jax.tree.structure(first)
    assert structure == jax.tree.structure(second)
    assert hash(structure) == hash(jax.tree.structure(second))
    x = images()
    forward(first, x)
    compiled = forward._cache_size()
    forward(second, x + 0.01)
    assert forward._cache_size() == compiled


@pytest.mark.parametrize("name", CASES)
def test_random_state(name):
    fresh, operator = make(name), drawn(name)
    again = fresh.init(jax.random.key(0), SHAPE)
    other = fresh.init(jax.random.key(1), SHAPE)
    np.testing.assert_array_equal(flat_params(operator), flat_params(again))
    if fresh.sample_params is None and fresh.draw is None:
        assert fresh.init(jax.random.key(0), SHAPE) is fresh
        return
    assert (flat_params(operator) != flat_params(other)).any()
    undrawn = r"not drawn yet; .*operator = operator.init\(jax.random.key\(0\), x\)"
    with pytest.raises(ValueError, match=undrawn):
        fresh(images())
    with pytest.raises(ValueError, match=undrawn):
        measure(jax.random.key(0), images(), operator=fresh, sigma=0.1)
    if name in HOST_INIT:
        with pytest.raises(ValueError, match="outside of jit"):
            jax.jit(lambda key: fresh.init(key, SHAPE))(jax.random.key(0))
    else:
        jitted = jax.jit(lambda key: fresh.init(key, SHAPE))(jax.random.key(0))
        np.testing.assert_array_equal(flat_params(jitted), flat_params(operator))
        assert jax.tree.structure(jitted) == jax.tree.structure(operator)


def flat_params(operator):
    return flat(operator.params)


BAD_SETTINGS = [
    (lambda: operators.super_resolution(scale=0), r"scale must be a whole number >= 1, got 0"),
    (lambda: operators.super_resolution(scale=2.5), r"scale .* got 2.5"),
    (lambda: operators.gaussian_blur(kernel_size=4), r"kernel_size must be an odd .* got 4"),
    (lambda: operators.gaussian_blur(std=0.0), r"std must be a number in \(0, inf\), got 0.0"),
    (lambda: operators.gaussian_blur(std=float("nan")), r"std .* got nan"),
    (lambda: operators.motion_blur(kernel_size=60), r"kernel_size .* got 60"),
    (lambda: operators.motion_blur(intensity=1.5), r"intensity .* \[0, 1\], got 1.5"),
    (lambda: operators.blur(np.ones((3, 3, 3))), r"kernel must be .* got shape \(3, 3, 3\)"),
    (lambda: operators.blur(np.full((3, 3), np.inf)), r"kernel must be finite"),
    (lambda: operators.inpainting_random(fraction=1.0), r"fraction .* \[0, 1\), got 1.0"),
    (lambda: operators.inpainting_box(box_size=(4, 4, 4)), r"box_size must be .*\(4, 4, 4\)"),
    (lambda: operators.inpainting_box(box_size=0), r"box_size .* got 0"),
    (lambda: operators.inpainting_box(margin=-1), r"margin .* got -1"),
    (lambda: operators.inpainting_mask(np.ones(5)), r"mask must be \[H, W\].* got shape \(5,\)"),
    (lambda: operators.inpainting_mask(np.full((4, 4), 0.5)), r"mask must hold only 0"),
    (lambda: operators.hdr(gain=0), r"gain .* got 0"),
    (lambda: operators.phase_retrieval(oversample=-1), r"oversample .* got -1"),
    (lambda: operators.demosaicing(pattern="rgbg"), r"pattern must be one of .* got 'rgbg'"),
    (lambda: operators.jpeg(quality=101), r"quality .* \[1, 100\], got 101"),
    (lambda: operators.quantization(bits=True), r"bits .* got True"),
    (lambda: operators.compressed_sensing(num_measurements=3, fraction=0.1), r"got num_meas.*=3"),
    (lambda: operators.compressed_sensing(fraction=0.0), r"fraction .* \(0, 1\], got 0.0"),
    (lambda: operators.compressed_sensing(fraction=0.5, ensemble="x"), r"ensemble .* got 'x'"),
    (lambda: operators.nonlinear_blur(), r"needs the option 'params'.*GOPRO_wVAE.pth"),
    (lambda: operators.nonlinear_blur({}), "no weights of the KernelWizard network"),
    (lambda: operators.stack([]), r"stack needs at least one Operator"),
    (lambda: operators.compose(operators.hdr(), "hdr"), r"compose needs .* got .*'hdr'"),
]


@pytest.mark.parametrize("build, message", BAD_SETTINGS)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_images_that_do_not_fit():
    key, small = jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match="mask of shape"):
        drawn("inpainting_random")(small)
    with pytest.raises(ValueError, match="384 pixels, got images of shape"):
        drawn("compressed_sensing")(small)
    with pytest.raises(ValueError, match="does not fit an image of 8x8"):
        operators.inpainting_box(box_size=8, margin=1).init(key, (8, 8))
    with pytest.raises(ValueError, match=r"needs images \[B, H, W, 3\]"):
        operators.colorization()(small[..., :1])
    with pytest.raises(ValueError, match="only after operator.init"):
        operators.compressed_sensing(fraction=0.5).image_shape((1, 5, 3))
    with pytest.raises(ValueError, match="no image side gives 11"):
        operators.phase_retrieval(oversample=4.0).image_shape((1, 11, 11, 3))
    with pytest.raises(ValueError, match="needs images .*phase.*"):
        stacked = operators.stack([operators.phase_retrieval()])
        operators.compose(operators.hdr(), stacked)(small)
    both = operators.stack([operators.super_resolution(), operators.denoising()])
    with pytest.raises(ValueError, match="images of different sizes"):
        both.image_shape(both.output_shape((1, 6, 6, 3)))


def test_combined_operators_apply_their_members():
    x = images()
    blurred = operators.gaussian_blur(kernel_size=5, std=1.0)
    small = operators.super_resolution(scale=2)
    close(operators.compose(small, blurred)(x), small(blurred(x)))
    pair = operators.stack([blurred, small])(x)
    assert isinstance(pair, tuple)
    close(pair, (blurred(x), small(x)))


def test_init_keeps_given_arrays_in_a_stack():
    kernel, _, _ = drawn("stack").params
    np.testing.assert_allclose(kernel, np.full((3, 3), 1 / 9), rtol=1e-6)
    twice = drawn("stack").init(jax.random.key(5), SHAPE)
    np.testing.assert_array_equal(twice.params[0], kernel)
    assert (np.asarray(twice.params[1]) != np.asarray(drawn("stack").params[1])).any()


def test_a_mask_per_image():
    mask = np.zeros((BATCH, *SHAPE, 1))
    mask[0, :4] = 1
    operator, x = operators.inpainting_mask(mask), images()
    close(operator(x), mask * np.asarray(x))
    assert operator.observed(operator.params, x.shape).shape == mask.shape
    with pytest.raises(ValueError, match="mask of shape"):
        operator(jnp.concatenate([x, x]))


class TestMeasure:
    def test_noise_has_the_stated_deviation(self):
        x = jnp.zeros((4, 32, 32, 3))
        for sigma in (0.05, jnp.float32(0.7)):
            noise = measure(jax.random.key(0), x, operator=operators.denoising(), sigma=sigma)
            assert abs(float(noise.std()) / float(sigma) - 1) < 0.03
            assert abs(float(noise.mean())) < 0.03 * float(sigma)

    def test_no_noise(self):
        operator, x = drawn("stack"), images()
        close(measure(jax.random.key(0), x, operator=operator, sigma=0), operator(x), 0)

    def test_missing_pixels_stay_zero_unless_asked(self):
        operator, x = drawn("inpainting_random"), images()
        missing = np.broadcast_to(operator.params[None] == 0, x.shape)
        settings = {"operator": operator, "sigma": 0.1}
        clean = np.asarray(measure(jax.random.key(0), x, **settings))
        noisy = np.asarray(measure(jax.random.key(0), x, masked_noise=True, **settings))
        assert not clean[missing].any()
        assert (noisy[missing] != 0).all()
        np.testing.assert_array_equal(clean[~missing], noisy[~missing])

    def test_image_does_not_depend_on_its_batch(self):
        operator, x = drawn("stack"), images()
        keys = jax.random.split(jax.random.key(4), BATCH)
        y = measure(keys, x, operator=operator, sigma=0.1)
        alone = measure(keys[1:], x[1:], operator=operator, sigma=0.1)
        reversed_ = measure(keys[::-1], x[::-1], operator=operator, sigma=0.1)
        close(alone, jax.tree.map(lambda leaf: leaf[1:], y), 1e-6)
        close(jax.tree.map(lambda leaf: leaf[::-1], reversed_), y, 1e-6)

    def test_single_key_is_folded_with_the_position(self):
        operator, x, key = operators.denoising(), images(), jax.random.key(4)
        keys = jnp.stack([jax.random.fold_in(key, i) for i in range(BATCH)])
        settings = {"operator": operator, "sigma": 0.1}
        y = measure(key, x, **settings)
        np.testing.assert_array_equal(y, measure(keys, x, **settings))
        np.testing.assert_array_equal(y[:1], measure(key, x[:1], **settings))
        assert (np.asarray(y - x)[0] != np.asarray(y - x)[1]).any()

    def test_members_of_a_stack_get_their_own_noise(self):
        twice = operators.stack([operators.denoising(), operators.denoising()])
        first, second = measure(jax.random.key(0), images(), operator=twice, sigma=0.1)
        assert (np.asarray(first) != np.asarray(second)).all()

    def test_jit(self):
        operator, x, key = drawn("inpainting_random"), images(), jax.random.key(0)
        jitted = jax.jit(lambda k, o, x, s: measure(k, x, operator=o, sigma=s))
        close(jitted(key, operator, x, 0.1), measure(key, x, operator=operator, sigma=0.1), 1e-6)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"sigma": -0.1}, "sigma must be one finite number >= 0, got -0.1"),
            ({"sigma": float("nan")}, "sigma .* got nan"),
            ({"sigma": np.ones(2)}, "sigma must be one"),
            ({"x": np.zeros((16, 24, 3), np.float32)}, r"x must be .* got shape \(16, 24, 3\)"),
            ({"x": np.zeros((2, 16, 24, 3), np.uint8)}, "x must be floating-point .* uint8"),
            ({"key": np.zeros(2, np.uint32)}, "key must be one typed key .* uint32"),
            ({"key": jax.random.split(jax.random.key(0), 3)}, r"one per image \[2\], got \(3,\)"),
        ],
    )
    def test_bad_arguments(self, changes, message):
        arguments = {"key": jax.random.key(0), "x": images(), "sigma": 0.1} | changes
        key, x, sigma = (arguments[name] for name in ("key", "x", "sigma"))
        with pytest.raises(ValueError, match=message):
            measure(key, x, operator=operators.denoising(), sigma=sigma)
