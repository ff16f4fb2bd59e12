"""Masked cross-entropy of a prior, and the yardsticks to hold it against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax.codec import lfq
from aps_jax.codec.lfq import LFQ
from aps_jax.types import Array, Prior, Quantizer
from experiments.train.codec_loss import codes_used

EVAL_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Cross-entropy in nats and whether the label is the most likely id, both [...].

    Comparisons take the place of gather and argmax, which are several times slower on CPU.
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(columns == labels[..., None], logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return losses, picked >= jnp.max(logits, axis=-1)


@jax.jit
def _masked_scores(prior: Prior, tokens: Array, is_masked: Array) -> Array:
    logits = prior.apply(prior.params, jnp.where(is_masked, prior.num_codes, tokens))
    losses, _ = cross_entropy(logits, tokens)
    return jnp.sum(losses * is_masked)


def evaluate(
    prior: Prior, tokens: np.ndarray, window: int, prompt_ids: np.ndarray | None = None
) -> dict[str, float]:
    """Cross-entropy in nats at the masked positions of held-out grids, per mask ratio.

    With a framed prompt per grid, `prompt_ids` [N, P], of a prior that takes prompts.
    """
    tokens = tokens[:, :window, :window].astype(np.int32)
    length = math.prod(tokens.shape[1:])
    rank = np.argsort(np.random.default_rng(0).random((len(tokens), length)), axis=-1)
    rank = rank.reshape(tokens.shape)
    scores = {}

    def given(start: int) -> Prior:
        if prompt_ids is None:
            return prior
        return prior.replace(params=prior.params | {"prompt": prompt_ids[start : start + 16]})

    for ratio in EVAL_RATIOS:
        is_masked = rank < max(1, round(ratio * length))
        total = sum(
            float(_masked_scores(given(i), tokens[i : i + 16], is_masked[i : i + 16]))
            for i in range(0, len(tokens), 16)
        )
        scores[f"eval_ce_{ratio:g}"] = total / int(is_masked.sum())
    scores["eval_ce"] = float(np.mean(list(scores.values())))
    return scores


def yardsticks(tokens: dict[str, np.ndarray], quantizer: Quantizer) -> dict[str, float]:
    """What simpler models reach on the held-out tokens, in nats per token, and the codes in use.

    Args:
      tokens: "train" and "eval", integers [crops, h, w], or [crops, h, w, n].
      quantizer: their codebook; only LFQ's bits are predicted from those of neighbours.
    """
    num_codes = quantizer.num_codes
    scores = {
        "uniform_ce": float(np.log(num_codes)),
        "unigram_ce": unigram_cross_entropy(tokens["train"], tokens["eval"], num_codes),
        "codes_used": codes_used(tokens["train"]),
    }
    if isinstance(quantizer, LFQ):
        codebook = lfq.codebook(quantizer.num_bits)
        neighbour = neighbour_cross_entropy(tokens["train"], tokens["eval"], codebook)
        scores["neighbour_ce"] = neighbour
    return scores


def unigram_cross_entropy(train: np.ndarray, held_out: np.ndarray, num_codes: int) -> float:
    """Cross-entropy in nats of a token by how often it occurs, in its group if there are groups."""
    losses = []
    groups = train.shape[3] if train.ndim == 4 else 1
    for seen, asked in zip(
        train.reshape(-1, groups).T, held_out.reshape(-1, groups).T, strict=True
    ):
        counts = np.bincount(seen, minlength=num_codes) + 0.5
        losses.append(-np.log(counts / counts.sum())[asked].mean())
    return float(np.mean(losses))


def neighbour_cross_entropy(
    train: np.ndarray, held_out: np.ndarray, codebook: Array, *, steps: int = 400
) -> float:
    """Cross-entropy in nats of a token given its four neighbours, by logistic regression.

    Every bit of a code is predicted on its own from all bits of the neighbours, so this is what
    linear context is worth: a prior with few tokens masked should do better.
    """
    codebook = np.asarray(codebook)

    def examples(grids: np.ndarray) -> tuple[Array, Array]:
        bits = codebook[grids]
        sides = (bits[:, 1:-1, :-2], bits[:, 1:-1, 2:], bits[:, :-2, 1:-1], bits[:, 2:, 1:-1])
        inputs = np.concatenate(sides, axis=-1)
        inputs = inputs.reshape(-1, inputs.shape[-1])
        targets = bits[:, 1:-1, 1:-1].reshape(-1, bits.shape[-1]) > 0
        return jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32)

    def loss(weights, inputs, targets):
        logits = inputs @ weights["kernel"] + weights["bias"]
        return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1))

    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    @jax.jit
    def update(weights, state, inputs, targets):
        updates, state = optimizer.update(jax.grad(loss)(weights, inputs, targets), state)
        return optax.apply_updates(weights, updates), state

    num_bits = codebook.shape[1]
    weights = {"kernel": jnp.zeros((4 * num_bits, num_bits)), "bias": jnp.zeros(num_bits)}
    state = optimizer.init(weights)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = train[rng.integers(len(train), size=min(128, len(train)))]
        weights, state = update(weights, state, *examples(chosen))
    return float(loss(weights, *examples(held_out)))
