"""The loss of a masked prior, and the weights that are trained by it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from aps_jax.codec.config import every_code
from aps_jax.prior.bundle import grid_hidden, prompted_hidden
from aps_jax.prior.prompts import PromptConfig
from aps_jax.prior.transformer import Transformer, TransformerConfig
from aps_jax.types import Array, Key, PyTree, Quantizer
from experiments.train.prior_scores import cross_entropy


def draw_masks(key: Key, batch: int, length: int) -> tuple[Array, Array]:
    """Random masks with mask ratio cos(pi u / 2), u uniform and stratified over the batch.

    Returns:
      order: int32 [batch, length], a random order of the positions of each grid.
      counts: int32 [batch], at least 1: the first `counts` positions of the order are masked.
    """
    key_ratio, key_order = jax.random.split(key)
    strata = (jnp.arange(batch) + jax.random.uniform(key_ratio, (batch,))) / batch
    counts = jnp.ceil(length * jnp.cos(jnp.pi / 2 * strata)).astype(jnp.int32)
    order = jnp.argsort(jax.random.uniform(key_order, (batch, length)), axis=-1)
    return order.astype(jnp.int32), jnp.clip(counts, 1, length)


def code_numbers(quantizer: Quantizer) -> Array:
    """What every output of the head stands for [n K, n d]: its code, of mean 0 and variance 1.

    Codes of n tokens per place have numbers of their own each.
    """
    codes = every_code(quantizer).reshape(quantizer.num_codes, -1)
    codes = (codes - jnp.mean(codes, axis=0)) / jnp.std(codes, axis=0)
    parts = jnp.split(codes, math.prod(quantizer.axes), axis=1)
    return jax.scipy.linalg.block_diag(*parts)


def merge(params: PyTree, numbers: Array) -> PyTree:
    """Model weights of the trained ones.

    The head is trained as a free matrix plus a linear map of the numbers of every code
    (`code_numbers`), so that codes share what they learn; the sum is an ordinary head. Embeddings
    of other codes than those of LFQ, whose bits `CodeEmbedding` reads, are trained likewise.
    """
    model = params["model"]
    kernel = model["head"]["kernel"] + params["head_bits"] @ numbers.T
    merged = model | {"head": {"kernel": kernel}}
    if "embed_numbers" in params:
        table = model["embed"]["embedding"]
        table = table.at[: len(numbers)].add(numbers @ params["embed_numbers"])
        merged["embed"] = {"embedding": table}
    return merged


def masked_loss(
    params: PyTree,
    tokens: Array,
    prompt_ids: Array | None,
    key: Key,
    model: TransformerConfig,
    numbers: Array,
    num_targets: int,
    prompt: PromptConfig | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy over at most `num_targets` masked tokens of every grid [B, h, w[, n]].

    `prompt_ids` are framed prompts [B, P], for a model with `prompt`; `numbers` are those of
    `code_numbers`.
    """
    weights = merge(params, numbers)
    groups = model.token_groups
    batch, length = tokens.shape[0], math.prod(tokens.shape[1:])
    order, counts = draw_masks(key, batch, length)
    is_masked = jnp.argsort(order, axis=-1) < counts[:, None]
    noisy = jnp.where(is_masked.reshape(tokens.shape), model.output_size // groups, tokens)
    if prompt is None:
        hidden = grid_hidden(weights, noisy, config=model)
    else:
        hidden = prompted_hidden(weights, prompt_ids, noisy, config=model, prompt=prompt)

    # The masked positions come first in a random order: its beginning is a random subset of them.
    targets = order[:, :num_targets]
    counted = (jnp.arange(targets.shape[1])[None] < counts[:, None]).astype(jnp.float32)
    hidden = jnp.take_along_axis(hidden, targets[:, :, None] // groups, axis=1)
    labels = jnp.take_along_axis(tokens.reshape(batch, length), targets, axis=1)
    logits = Transformer(model).apply({"params": weights}, hidden, method="logits")
    if groups > 1:
        logits = logits.reshape(*targets.shape, groups, -1)
        group = (targets % groups)[:, :, None, None]
        logits = jnp.take_along_axis(logits, group, axis=2)[:, :, 0]
    losses, hits = cross_entropy(logits, labels)
    loss = jnp.sum(losses * counted) / jnp.sum(counted)
    return loss, {"loss": loss, "accuracy": jnp.sum(hits * counted) / jnp.sum(counted)}
