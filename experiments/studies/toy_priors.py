"""Models so small that their posterior can be enumerated, with perfect priors.

A prior is a table p(x_1 ... x_L) over K^L token fields; its masked conditionals are exact, so what
is left to be wrong is the sampler. Token grids may have any number of axes, of product L; fields
are numbered with the first token most significant.
"""

from __future__ import annotations

import functools
import itertools
from typing import ClassVar, NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np

from aps_jax.codec import lfq
from aps_jax.images import sample_photo
from aps_jax.types import Array, Codec, ImageShape, Operator, Params, Prior, Quantizer, bind

#: Logit of impossible codes, finite as any network's would be.
LEAST_LOGIT = -60.0


@functools.cache
def fields(num_codes: int, length: int) -> np.ndarray:
    """All token fields, int [K^L, L], in the order of their index."""
    return np.array(list(itertools.product(range(num_codes), repeat=length)))


def index_of(tokens: Array, num_codes: int) -> np.ndarray:
    """Index in `fields` of clean token fields [..., L]."""
    tokens = np.asarray(tokens)
    return tokens @ num_codes ** np.arange(tokens.shape[-1])[::-1]


def frequencies(tokens: Array, num_codes: int) -> np.ndarray:
    """Shares of each field [K^L] among drawn fields [n, L]."""
    num_fields = num_codes ** tokens.shape[-1]
    return np.bincount(index_of(tokens, num_codes), minlength=num_fields) / len(tokens)


def table_logits(joint: Array, tokens: Array, *, num_codes: int, length: int) -> Array:
    """Log p(x_l = k | the clean tokens), exact: [B, *grid, K] for tokens int [B, *grid]."""
    is_code = fields(num_codes, length)[:, :, None] == np.arange(num_codes)
    is_code = jnp.asarray(is_code.reshape(len(is_code), -1), jnp.float32)  # [K^L, L * K]
    flat = tokens.reshape(-1, length)
    given = (flat[..., None] == jnp.arange(num_codes)).astype(jnp.float32)
    num_given = jnp.sum(flat < num_codes, axis=1)
    agrees = given.reshape(len(flat), -1) @ is_code.T > num_given[:, None] - 0.5
    mass = (jnp.where(agrees, joint, 0.0) @ is_code).reshape(*tokens.shape, num_codes)
    return jnp.maximum(jnp.log(mass), LEAST_LOGIT)


def table_prior(joint: np.ndarray, num_codes: int, length: int) -> Prior:
    """The perfect masked prior of a law `joint` [K^L] over token fields, of any grid of L cells."""
    return Prior(
        params=jnp.asarray(joint, jnp.float32),
        apply=bind(table_logits, num_codes=num_codes, length=length),
        num_codes=num_codes,
    )


def mixing_decode(weights: Array, codes: Array, *, stride: int) -> Array:
    """Tanh of a linear map in which every token may touch every pixel: [B, H, W, 3].

    Args:
      weights: [L * d, pixels * 3].
      codes: [B, h, w, ..., d].
      stride: pixels per token along each axis; H = stride * h.
    """
    x = jnp.tanh(codes.reshape(codes.shape[0], -1) @ weights)
    return x.reshape(-1, stride * codes.shape[1], stride * codes.shape[2], 3)


def mixing_codec(weights: np.ndarray, quantizer: Quantizer, stride: int) -> Codec:
    """A codec of any codebook that only decodes, by `mixing_decode`."""
    return Codec(
        params=jnp.asarray(weights, jnp.float32),
        quantizer=quantizer,
        decode=bind(mixing_decode, stride=stride),
        stride=stride,
    )


def _project(params: dict[str, Array], x: Array) -> Array:
    y = x.reshape(x.shape[0], -1) @ params["matrix"]
    return y + params["fold"] * (jnp.abs(y) - y)


def _stored_shape(y_shape: tuple[int, ...], *, shape: ImageShape) -> ImageShape:
    return shape


def projection(matrix: np.ndarray, shape: ImageShape, *, fold: float) -> Operator:
    """(1 - fold) x M + fold |x M| [B, n]: linear at 0, a rectifier at 0.5, amplitudes at 1.

    One compilation serves all folds of the same linearity.
    """
    params = {"matrix": jnp.asarray(matrix, jnp.float32), "fold": jnp.float32(fold)}
    return Operator(
        apply=_project, name="projection", params=params, is_linear=fold == 0,
        image_shape=bind(_stored_shape, shape=shape), is_image=False,
    )  # fmt: skip


def energies(predicted: np.ndarray, y: np.ndarray, sigma: float) -> np.ndarray:
    """||A(D(x)) - y||^2 / (2 sigma^2) of every field, for what they predict [K^L, ...]."""
    axes = tuple(range(1, predicted.ndim))
    return np.sum((predicted - y) ** 2, axis=axes) / (2 * sigma**2)


def exact_posterior(
    joint: np.ndarray, predicted: np.ndarray, y: np.ndarray, sigma: float
) -> np.ndarray:
    """p(x | y) of every field [K^L], by Bayes' rule."""
    energy = energies(predicted, y, sigma)
    weights = joint * np.exp(energy.min() - energy)
    return weights / weights.sum()


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half of the absolute differences."""
    return float(0.5 * np.abs(p - q).sum())


def kl_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) in nats; infinite where q excludes what p has."""
    has = p > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(p[has] * (np.log(p[has]) - np.log(q[has]))))


class Toy(NamedTuple):
    """A problem with a known answer.

    Attributes:
      joint: prior law [K^L], float64.
      params: perfect prior, codec and operator.
      predicted: A(D(x)) of every field, float64 [K^L, n].
      length: L.
    """

    joint: np.ndarray
    params: Params
    predicted: np.ndarray
    length: int


def skewed_joint(num_fields: int = 64, seed: int = 11) -> np.ndarray:
    """Correlated: a few fields hold most of the mass, none is impossible."""
    rng = np.random.default_rng(seed)
    return 0.9 * rng.dirichlet(np.full(num_fields, 0.3)) + 0.1 / num_fields


def patch_joint(photo: np.ndarray) -> np.ndarray:
    """Law [512] of 3x3 patches of a photo [H, W, 3], each pixel above its patch's mean or not.

    Trained by counting, one added to every count; the first pixel is the most significant bit.
    """
    grey = np.asarray(photo, np.float64).mean(axis=-1)
    patches = np.lib.stride_tricks.sliding_window_view(grey, (3, 3)).reshape(-1, 9)
    bits = patches > patches.mean(axis=1, keepdims=True)
    counts = np.bincount(bits @ 2 ** np.arange(9)[::-1], minlength=512) + 1
    return counts / counts.sum()


def length_of(name: str) -> int:
    """Tokens of a toy by name."""
    return {"patches": 9, "reward": 3}.get(name) or int(name.split("x")[1])


def make_toy(name: str, *, is_amplitude: bool, num_measured: int = 4) -> Toy:
    """A toy by name: "KxL" with random correlations, or "patches" of the bundled photo.

    Args:
      name: "4x3", "8x2" or the like (K a power of two), or "patches" (K = 2, L = 9).
      is_amplitude: measure absolute values, which is nonlinear.
      num_measured: numbers in a measurement.
    """
    rng = np.random.default_rng(5)
    if name == "patches":
        num_codes, length, stride = 2, length_of(name), 1
        joint = patch_joint(sample_photo())
        weights = np.kron(2 * np.eye(9), np.ones((1, 3)))  # a token is a grey pixel
    else:
        num_codes, length = int(name.split("x")[0]), length_of(name)
        stride, num_bits = 2, num_codes.bit_length() - 1
        joint = skewed_joint(num_codes**length)
        weights = rng.normal(size=(length * num_bits, 3 * length * stride**2)) / 3
    num_bits = num_codes.bit_length() - 1
    shape = (stride, stride * length)
    codec = mixing_codec(weights, lfq.LFQ(num_bits), stride)
    size = 3 * shape[0] * shape[1]
    matrix = rng.normal(size=(size, num_measured)) * 1.5 / np.sqrt(size)
    operator = projection(matrix, shape, fold=float(is_amplitude))
    codes = codec.codebook[fields(num_codes, length)].reshape(-1, 1, length, num_bits)
    predicted = np.float64(operator(codec.decode(codec.params, codes)))
    params = Params(table_prior(joint, num_codes, length), codec, operator)
    return Toy(joint, params, predicted, length)


@flax.struct.dataclass
class LabelNet:
    """Logits of three labels of a picture: two layers of random weights.

    Attributes:
      hidden: [pixels * 3, n].
      out: [n, 3].
    """

    hidden: Array
    out: Array
    names: ClassVar = ("first", "second", "third")

    def __call__(self, x: Array) -> Array:
        """Logits [B, 3] of pictures [B, H, W, 3]."""
        return jnp.tanh(x.reshape(x.shape[0], -1) @ self.hidden) @ self.out


class RewardToy(NamedTuple):
    """A problem whose energy is a reward of the picture in place of a measurement.

    Attributes:
      joint: prior law [K^L], float64.
      prior: perfect.
      codec: its codec.
      net: gives the reward log p(label | picture).
      weight: of the reward.
      log_shares: log p(label | picture) of every field and label, float64 [K^L, 3].
      grid: sizes of the token grid.
    """

    joint: np.ndarray
    prior: Prior
    codec: Codec
    net: LabelNet
    weight: float
    log_shares: np.ndarray
    grid: tuple[int, int]

    def posterior(self, label: int) -> np.ndarray:
        """The law p(x) p(label | x)^weight of every field [K^L]."""
        weights = self.joint * np.exp(self.weight * self.log_shares[:, label])
        return weights / weights.sum()


def make_reward_toy(weight: float = 3.0) -> RewardToy:
    """Prior and codec of "4x3" with a network of random weights, whose reward is not linear."""
    toy = make_toy("4x3", is_amplitude=False)
    codec, rng = toy.params.codec, np.random.default_rng(6)
    codes = codec.codebook[fields(4, toy.length)].reshape(-1, 1, toy.length, 2)
    pictures = codec.decode(codec.params, codes)
    size = pictures[0].size
    net = LabelNet(
        jnp.asarray(rng.normal(size=(size, 16)) * 3 / np.sqrt(size), jnp.float32),
        jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
    )
    logits = np.asarray(net(pictures), np.float64)
    log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return RewardToy(toy.joint, toy.params.prior, codec, net, weight, log_shares, (1, toy.length))
