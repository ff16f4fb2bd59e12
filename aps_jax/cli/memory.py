"""What one call of a sampler needs of a device's memory, and what would fit."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax

from aps_jax import images, pretrained
from aps_jax.cli import inputs
from aps_jax.codec import expectation
from aps_jax.config import APSConfig, SharedConfig
from aps_jax.denoiser import Denoiser
from aps_jax.samplers import SVDDConfig
from aps_jax.sampling.target import Target
from aps_jax.types import Array, Codec, ImageShape

#: What a call of APS needs beside the weights, as XLA plans it on CPUs: copies of the logits, and a
#: share of what automatic differentiation keeps of the decoder. Within 10 % of the plan for photo64
#: at 64 to 256 pixels and for MagVIT-v2 at 256 and 512, and 3/4 of the estimate is less than it.
_LOGIT_COPIES, _KEPT_SHARE = 8, 0.7
#: Bytes per decoded pixel that are enough for any decoder, so that it need not be traced.
_AMPLE = 2**18


def check(config: SharedConfig, model: pretrained.Model, target: Target | None = None) -> None:
    """ValueError if one call surely needs more than the free memory.

    Args:
      config: options, with the size of the image.
      model: what is sampled with.
      target: what is sampled, if its energy reads images by a network that counts, too.
    """
    free = inputs.free_memory()
    if free is None:
        return
    if isinstance(config, APSConfig) and config.num_inner_steps:
        surely = 0.75 * _LOGIT_COPIES * _logit_bytes(config, model)
        pixels = config.num_samples * math.prod(_size(config)) * config.decode_scale**2
        # Elsewhere XLA fuses more, and says so itself when memory runs out; the system of a CPU
        # ends the process.
        if jax.local_devices()[0].platform == "cpu" and free < _AMPLE * pixels:
            surely += 0.75 * _gradient_bytes(config, model, target)
    else:
        surely = _logit_bytes(config, model)
    if surely > free:
        raise ValueError(advice(config, model, target))


def estimate(config: SharedConfig, model: pretrained.Model, target: Target | None = None) -> float:
    """Bytes that one call needs about, beside weights; rough for others than APS.

    Networks of an energy count if the target is given; without it LPIPS is left out.
    """
    logits = _logit_bytes(config, model)
    if not config.evaluations().decoder_gradient:
        return 2 * logits
    return _LOGIT_COPIES * logits + _gradient_bytes(config, model, target)


def advice(
    config: SharedConfig, model: pretrained.Model | Denoiser, target: Target | None = None
) -> str:
    """What a call needs, what there is, and what would fit; for the user to read."""
    if isinstance(model, Denoiser):
        return "the denoiser does not fit into memory; lower --num-samples"
    needed = estimate(config, model, target)
    (height, width), samples = _size(config), config.num_samples
    text = (
        f"{samples} sample(s) of {width}x{height} pixels need about {needed / 2**30:.2f} GiB of "
        "memory"
    )
    free = inputs.free_memory()
    if free is None:
        return f"{text}; restore a smaller image (--size) or fewer --num-samples"
    text += f", {free / 2**30:.2f} GiB are free"
    # What ran out in spite of the estimate needs more than it says.
    usable = min(0.9 * free, needed / 2) / (needed / samples)
    if usable >= 1:
        return f"{text}: set --num-samples {int(usable)} or restore a smaller image (--size)"
    # A bit less than would fit: attention shrinks faster than the area.
    side = int(math.sqrt(usable * height * width))
    alone = "--num-samples 1 and " if samples > 1 else ""
    if side >= images.MIN_SIDE:
        return f"{text}: set {alone}--size {min(side, height, width)}"
    return f"{text}: not even the smallest image (--size {images.MIN_SIDE}) fits; free some memory"


def _logit_bytes(config: SharedConfig, model: pretrained.Model) -> int:
    """Bytes of the logits of all samples, and of all candidates that are alive at once."""
    # Only these two samplers work on all their candidates at once.
    parallel = getattr(config, "num_particles", 1)
    parallel *= config.num_candidates if isinstance(config, SVDDConfig) else 1
    return (
        4 * parallel * config.num_samples * math.prod(_field(config, model)) * model.codec.num_codes
    )


def _gradient_bytes(config: SharedConfig, model: pretrained.Model, target: Target | None) -> float:
    """Bytes of one gradient through the decoder and, of a target, the networks of its energy."""
    decoder, _ = _kept_bytes(config, model, None)
    if target is None:
        return _KEPT_SHARE * decoder
    both, weights = _kept_bytes(config, model, target)
    # XLA plans nearly all that is kept of VGG16, and the kernels again, turned round.
    return _KEPT_SHARE * decoder + (both - decoder) + weights


def _kept_bytes(
    config: SharedConfig, model: pretrained.Model, target: Target | None
) -> tuple[int, int]:
    """Bytes that automatic differentiation keeps of what it computes, and those of weights."""
    grid = _field(config, model)
    shape = (config.num_samples, math.prod(grid), model.codec.quantizer.num_features)

    def backward(codec: Codec, target: Target | None, codes: Array) -> Any:
        def decode(codes: Array) -> Array:
            return expectation.decode(codec, codes, grid, config.image_shape, config.decode_scale)

        return jax.vjp(decode if target is None else target.objective_of, codes)[1]

    kept = jax.eval_shape(backward, model.codec, target, jax.ShapeDtypeStruct(shape, "float32"))
    given = model.codec.params if target is None else target
    leaves, weights = (
        Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
        for tree in (kept, given)
    )
    return _bytes(leaves - weights), _bytes(leaves & weights)


def _bytes(leaves: Counter[Any]) -> int:
    return sum(count * math.prod(shape) * kind.itemsize for (shape, kind), count in leaves.items())


def _field(config: SharedConfig, model: pretrained.Model) -> tuple[int, ...]:
    height, width = (side * config.decode_scale for side in _size(config))
    return model.codec.grid((height, width))


def _size(config: SharedConfig) -> ImageShape:
    assert config.image_shape is not None  # Settled when the problem was posed.
    return config.image_shape
