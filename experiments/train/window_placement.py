"""How windows over a field larger than the prior's own are best laid: cross-entropy of photos.

    python -m experiments.window_placement --eval-data HELD_OUT \
        --out experiments/results/photo64/windows.json

Tokens of held-out photos are masked at random on fields twice as wide as the prior's window, and
scored with windows of several overlaps, and with the whole field in one call, which the prior has
never seen in training.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.io.files import write_json
from aps_jax.prior.windows import prior_logits, window_starts
from aps_jax.types import Array, Prior
from experiments import photos
from experiments.bench.summary import interval
from experiments.command import command
from experiments.train.prior_scores import cross_entropy


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      eval_data: folder of held-out photos.
      out: JSON file to write.
      model: name or folder of the model.
      count: photos, halved and cut to squares twice as wide as the window.
      overlaps: least shares of a window that its neighbours have too, beside the model's own.
      ratios: shares of masked tokens.
      seed: of the masks.
    """

    eval_data: Path
    out: Path
    model: str = "photo64"
    count: int = 32
    overlaps: tuple[float, ...] = (0.0, 0.75)
    ratios: tuple[float, ...] = (0.1, 0.5, 0.9)
    seed: int = 0


@jax.jit
def losses_of(prior: Prior, tokens: Array, is_masked: Array) -> Array:
    """Cross-entropy in nats of every token [B, h, w], given those that are not masked."""
    logits = prior_logits(prior, jnp.where(is_masked, prior.num_codes, tokens))
    return cross_entropy(logits, tokens)[0]


@command("window_placement", memory_cure="lower --count")
def main(arguments: Arguments) -> None:
    """Scores and writes the placements."""
    model = aps_jax.load_pretrained(arguments.model)
    prior, side = model.prior, 2 * model.prior.window
    crops = photos.evaluation_crops(
        arguments.eval_data, size=side * model.codec.stride, shrink=2, count=arguments.count
    )
    encode = jax.jit(encode_tokens)
    tokens = jnp.concatenate([encode(model.codec, image[None]) for image in crops.images])
    tokens = tokens.reshape(-1, side, side)
    rng = np.random.default_rng(arguments.seed)
    rank = np.argsort(rng.random((len(tokens), side * side)), axis=-1).reshape(tokens.shape)

    shares = sorted({*arguments.overlaps, prior.overlap})
    priors = {f"overlap {share:g}": prior.replace(overlap=share) for share in shares}
    priors["one call"] = prior.replace(window=None)
    placements = {}
    for name, placed in priors.items():
        starts = window_starts(side, placed.window or side, placed.overlap)
        scores = {}
        for ratio in arguments.ratios:
            is_masked = rank < round(ratio * side * side)
            pairs = zip(tokens[:, None], is_masked[:, None], strict=True)
            losses = np.stack([losses_of(placed, *pair)[0] for pair in pairs])
            means = np.array([a[b].mean() for a, b in zip(losses, is_masked, strict=True)])
            scores[f"{ratio:g}"] = means
        placements[name] = {"windows": len(starts) ** 2, "scores": scores}

    base = placements[f"overlap {prior.overlap:g}"]["scores"]
    for facts in placements.values():
        scores = facts.pop("scores")
        for ratio, values in scores.items():
            gain = values - base[ratio]
            facts[f"ce_{ratio}"] = round(float(values.mean()), 4)
            facts[f"ce_{ratio}_over_shipped"] = [round(value, 4) for value in interval(gain)]
    result = {"photos": len(tokens), "field": side, "window": prior.window} | placements
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))
