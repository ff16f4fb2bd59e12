"""Containers that the rest of the library passes around.

Every bundle keeps its arrays as pytree leaves and its functions as static metadata. A jitted
function that takes a bundle therefore compiles once per *shape*: new weights, masks or kernels of
the same shape reuse the compiled code, and no array is baked into it as a constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from numbers import Integral
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
#: A number, or an array of no axes that JAX may have traced.
Scalar = float | Array
#: A typed PRNG key made by `jax.random.key`.
Key = jax.Array
#: (height, width) of an image, in pixels.
ImageShape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function with fixed keyword settings that compares and hashes by value.

    `functools.partial` compares by identity, so two equal operators would compile twice.
    """

    fn: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Calls the function with `args` and the fixed settings."""
        return self.fn(*args, **dict(self.settings))


def bind(fn: Callable[..., Any], **settings: Any) -> Bound:
    """Fixes keyword `settings` of `fn`; every setting must be hashable."""
    return Bound(fn, tuple(sorted(settings.items())))


def image_keys(key: Key, batch: int) -> Key:
    """One key per image [B]: `key` folded with the image index, or itself if it already is [B].

    Raises:
      ValueError: if `key` is not one typed key or one per image.
    """
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape not in ((), (batch,)):
        raise ValueError(
            f"key must be one typed key (jax.random.key) or one per image [{batch}], got "
            f"{jnp.shape(key)} of {getattr(key, 'dtype', type(key))}{_old_key_hint(key)}"
        )
    return (
        key
        if key.ndim
        else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.int32))
    )


def _old_key_hint(key: Any) -> str:
    if getattr(key, "dtype", None) != jnp.uint32:
        return ""
    return "; make a typed key of one from jax.random.PRNGKey by jax.random.wrap_key_data(key)"


def _image_shape(shape: Any) -> ImageShape:
    """(H, W) as ints, of itself or of images [B, H, W, C]."""
    sides = shape.shape[1:3] if getattr(shape, "ndim", None) == 4 else shape
    is_pair = isinstance(sides, tuple | list) and len(sides) == 2
    if not is_pair or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise ValueError(
            "the size of the images must be (height, width) in pixels, or images [B, H, W, C]; "
            f"got {getattr(shape, 'shape', shape)!r}"
        )
    return (int(sides[0]), int(sides[1]))


def same_shape(y_shape: tuple[int, ...]) -> ImageShape:
    """Image shape of a measurement [B, H, W, C] that has the image's own height and width."""
    return (y_shape[1], y_shape[2])


def _static(default: Any = dataclasses.MISSING) -> Any:
    if default is dataclasses.MISSING:
        return flax.struct.field(pytree_node=False)
    return flax.struct.field(pytree_node=False, default=default)


@flax.struct.dataclass
class Operator:
    """A deterministic, differentiable measurement operator A: image -> measurement.

    Attributes:
      params: array leaves of the operator (mask, kernel, matrix ...), or None.
      apply: pure function `(params, x) -> y`; `x` is float32 [B, H, W, C] in [-1, 1]. `y` is an
        array, or a tuple of arrays for stacked operators. It must not mix images of the batch.
      name: short name used in messages and result files.
      sample_params: `(key, image_shape) -> params` for operators with random state, else None.
      image_shape: `(y_shape) -> (H, W)`, the size of the image behind a measurement of that shape.
      observed: `(params, y_shape) -> mask` broadcastable to `y`, 1 where `y` was measured and 0
        where it carries nothing (missing pixels), or None if all of `y` was measured.
      is_linear: True if A(ax + bz) = aA(x) + bA(z).
      is_image: True if `y` is an image on the [-1, 1] scale of `x` (so LPIPS and display apply).
      draw: `(operator, key, image_shape) -> operator`, used by `init` instead of `sample_params`
        where drawing changes more than `params` (combined operators, stored image sizes).
      svd: `(params, x_shape) -> aps_jax.operators.svd.SVD`, or None if it has no closed form.
      has_true_gradient: False if the gradient is a stand-in, such as one straight through rounding:
        it leads to a measurement, but does not vanish where the measurement is met.
    """

    apply: Callable[[PyTree, Array], PyTree] = _static()
    name: str = _static()
    params: PyTree = None
    sample_params: Callable[[Key, ImageShape], PyTree] | None = _static(None)
    image_shape: Callable[[Any], ImageShape] = _static(same_shape)
    observed: Callable[[PyTree, tuple[int, ...]], Array] | None = _static(None)
    is_linear: bool = _static(False)
    is_image: bool = _static(True)
    draw: Callable[[Operator, Key, ImageShape], Operator] | None = _static(None)
    svd: Callable[[PyTree, tuple[int, ...]], Any] | None = _static(None)
    has_true_gradient: bool = _static(True)

    def __call__(self, x: Array) -> PyTree:
        """Applies A to `x` [B, H, W, C]; raises ValueError if random state was not drawn yet."""
        if self.sample_params is not None and self.params is None:
            raise ValueError(
                f"operator {self.name!r} has random state that was not drawn yet; draw it once, "
                "operator = operator.init(jax.random.key(0), x), and give that operator to all "
                "that follows"
            )
        return self.apply(self.params, x)

    def init(self, key: Key, image_shape: ImageShape | Array) -> Operator:
        """Draws the random state for images of one size; nothing changes if there is none.

        Args:
          key: one typed key.
          image_shape: (H, W), or the images [B, H, W, C] themselves.

        Raises:
          ValueError: if `image_shape` is neither, or the state does not fit such images.
        """
        image_shape = _image_shape(image_shape)
        if self.draw is not None:
            return self.draw(self, key, image_shape)
        if self.sample_params is None:
            return self
        return dataclasses.replace(self, params=self.sample_params(key, image_shape))

    def output_shape(self, x_shape: tuple[int, ...]) -> PyTree:
        """Shape of the measurement of images [B, H, W, C]; a tuple of shapes if stacked."""
        y = jax.eval_shape(self, jax.ShapeDtypeStruct(x_shape, "float32"))
        return jax.tree.map(lambda leaf: leaf.shape, y)


class Quantizer(Protocol):
    """A codebook: tokens <-> codes, one code per cell of a token grid; a pytree of its tables.

    Tokens are int32 [B, *grid] in [0, K), codes float32 [B, *grid, d]. The grid may have any number
    of axes; a codebook that differs from cell to cell (`residual.Residual`) has an axis for it.
    """

    @property
    def num_codes(self) -> int:
        """K, codes per cell."""
        ...

    @property
    def num_features(self) -> int:
        """d, numbers per code."""
        ...

    @property
    def axes(self) -> tuple[int, ...]:
        """Sizes of the grid's axes after those of space; () for one code per place."""
        ...

    def lookup(self, tokens: Array) -> Array:
        """Codes [B, *grid, d] of tokens."""
        ...

    def nearest(self, features: Array) -> Array:
        """Tokens [B, *grid] whose codes are nearest to `features` [B, *grid, d]."""
        ...

    def expect(self, logits: Array) -> Array:
        """Mean codes [B, *grid, d] under softmax(logits) [B, *grid, K], differentiable."""
        ...

    def similarity(self, tokens: Array) -> Array:
        """Minus half the squared distance of every code to those of tokens, [B, *grid, K]."""
        ...


@flax.struct.dataclass
class Codec:
    """A frozen tokenizer: a network around a codebook.

    Attributes:
      params: weights.
      quantizer: the codebook.
      decode: `(params, codes [B, *grid, d]) -> x`, images [B, H, W, 3] for a grid over pixels;
        accepts vectors that are no codes, too.
      encode: `(params, x) -> features [B, *grid, d]`, before quantisation; None if it only decodes.
      stride: pixels per token along each axis; H = stride * h.
    """

    params: PyTree
    quantizer: Quantizer
    decode: Callable[[PyTree, Array], Array] = _static()
    encode: Callable[[PyTree, Array], Array] | None = _static(None)
    stride: int = _static(1)

    @property
    def num_codes(self) -> int:
        """Codebook size K."""
        return self.quantizer.num_codes

    @property
    def codebook(self) -> Array:
        """All codes [K, d], of codecs whose cells share one codebook."""
        return self.quantizer.lookup(jnp.arange(self.num_codes, dtype=jnp.int32))

    def grid(self, image_shape: ImageShape) -> tuple[int, ...]:
        """The smallest token grid that covers images of (H, W); ValueError if there are none."""
        if self.stride < 1 or min(image_shape) < 1:
            raise ValueError(
                f"need positive sizes, got image {image_shape} and stride {self.stride}"
            )
        height, width = (-(-side // self.stride) for side in image_shape)
        return (height, width, *self.quantizer.axes)


@flax.struct.dataclass
class Energy:
    """What a sample is wanted to make small: -log p(y | x) up to a constant, or minus a reward.

    Attributes:
      apply: pure function `(params, data, x) -> [B]`, differentiable in `x`, which is what the
        codec decodes: images float32 [B, H, W, 3] for image codecs. It must not mix rows.
      params: what all rows share, such as weights; arrays are leaves.
      data: what each row has of its own, such as its measurement; leaves have the leading axis B.
      name: short name used in messages.
    """

    apply: Callable[[PyTree, PyTree, Array], Array] = _static()
    params: PyTree = None
    data: PyTree = None
    name: str = _static("energy")

    def __call__(self, x: Array) -> Array:
        """Energy per row [B] of `x`."""
        return self.apply(self.params, self.data, x)


@flax.struct.dataclass
class Prior:
    """A frozen masked transformer over grids of image tokens.

    Attributes:
      params: weights (and prompt ids, where the model is conditional).
      apply: `(params, tokens int32 [B, h, w]) -> logits [B, h, w, K]`. Tokens are in [0, K); the
        value K is the mask. Vocabulary offsets, prompts and padding stay inside.
      num_codes: K, also the mask token.
      window: largest grid side the model was trained on; larger fields are covered by overlapping
        windows (`aps_jax.prior.windows`). None if the model takes any size by itself.
      apply_unconditional: like `apply` without the condition, for classifier-free guidance.
      overlap: least share, in [0, 1), of a window that its neighbours cover too.
    """

    params: PyTree
    apply: Callable[[PyTree, Array], Array] = _static()
    num_codes: int = _static()
    window: int | None = _static(None)
    apply_unconditional: Callable[[PyTree, Array], Array] | None = _static(None)
    overlap: float = _static(0.25)


@flax.struct.dataclass
class Perceptual:
    """A perceptual distance between images [B, H, W, 3] in [-1, 1].

    Attributes:
      params: weights.
      apply: `(params, a, b) -> [B]`.
      describe: `(params, b) -> features`, what the distance needs of one side, so that a constant
        side is computed once; None where the distance has no such form.
      compare: `(params, a, features) -> [B]`, equal to `apply(params, a, b)`; with `describe`.
    """

    params: PyTree
    apply: Callable[[PyTree, Array, Array], Array] = _static()
    describe: Callable[[PyTree, Array], PyTree] | None = _static(None)
    compare: Callable[[PyTree, Array, PyTree], Array] | None = _static(None)

    def __call__(self, a: Array, b: Array) -> Array:
        """Distance per image, float32 [B]."""
        return self.apply(self.params, a, b)

    def reference(self, b: Array) -> PyTree:
        """What `distance_to` takes in place of `b`."""
        return b if self.describe is None else self.describe(self.params, b)

    def distance_to(self, a: Array, reference: PyTree) -> Array:
        """Distance per image, float32 [B], of `a` to the image behind a `reference`."""
        compare = self.apply if self.compare is None else self.compare
        return compare(self.params, a, reference)


@flax.struct.dataclass
class Features:
    """What a network makes of images at several depths.

    Attributes:
      params: weights.
      apply: `(params, x) -> blocks`, a tuple of arrays [B, h, w, C] from the first block to the
        deepest, for images [B, H, W, 3] in [-1, 1].
    """

    params: PyTree
    apply: Callable[[PyTree, Array], tuple[Array, ...]] = _static()

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """The blocks of `x`."""
        return self.apply(self.params, x)


@flax.struct.dataclass
class Params:
    """Everything `aps_sample` reads besides the measurement: all arrays are leaves.

    Attributes:
      prior: masked transformer.
      codec: image tokenizer with the same number of codes as the prior.
      operator: measurement operator, its random state already drawn.
      perceptual: LPIPS, needed only where the configuration gives it weight.
    """

    prior: Prior
    codec: Codec
    operator: Operator
    perceptual: Perceptual | None = None
