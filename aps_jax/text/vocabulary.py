"""What the ids of one language model are in another, where both have the same words."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from aps_jax.text.tokenizer import TextError, TextTokenizer
from aps_jax.types import Array, Prior, PyTree, bind

_CURE = "choose one of the prior's vocabulary (Dream and Qwen share one)"


def token_map(
    prior: TextTokenizer, reward: TextTokenizer, num_codes: int | None = None
) -> np.ndarray:
    """Ids in the vocabulary of a reward model of the ids of a prior, token by token.

    Two vocabularies agree if every ordinary token of the prior is one of the reward model's.
    Special tokens may differ, as between Dream and Qwen3, and a table may have more rows than there
    are tokens; those ids have no counterpart, and `only_mapped` keeps a prior from writing them.

    Args:
      prior: tokenizer of the model that writes.
      reward: tokenizer of the model that reads.
      num_codes: codes K of the prior; None means as many as its tokenizer has ids.

    Returns:
      Int32 [K], -1 for no counterpart; no two codes have the same.

    Raises:
      TextError: the vocabularies do not agree.
    """
    ours, theirs = prior.vocabulary(), reward.vocabulary()
    if prior.scheme() != reward.scheme():
        raise TextError(
            f"the reward model's tokens are written otherwise ({reward.scheme()}) than the "
            f"prior's ({prior.scheme()}), so they cannot be matched; {_CURE}"
        )
    added = prior.added_tokens()
    missing = [token for token in ours if token not in theirs and token not in added]
    if missing:
        raise TextError(
            f"{len(missing)} of the {len(ours)} tokens of the prior, such as {missing[0]!r}, are "
            f"no tokens of the reward model; {_CURE}"
        )
    size = max(ours.values()) + 1
    num_codes = size if num_codes is None else num_codes
    if num_codes < size:
        raise TextError(
            f"the prior's tokenizer has ids up to {size - 1}, but the prior only {num_codes} "
            "codes: it is of another model"
        )
    ids = np.full(num_codes, -1, np.int32)
    for token, index in ours.items():
        ids[index] = theirs.get(token, -1)
    return ids


def only_mapped(prior: Prior, ids: np.ndarray | Array) -> Prior:
    """The prior without the codes that `token_map` found no counterpart of."""
    is_mapped = jnp.asarray(ids) >= 0
    if is_mapped.shape != (prior.num_codes,):
        raise ValueError(
            f"the map is of {is_mapped.shape[0]} codes, the prior has {prior.num_codes}"
        )
    plain = prior.apply_unconditional
    return Prior(
        params=(prior.params, is_mapped),
        apply=bind(_masked, inner=prior.apply),
        num_codes=prior.num_codes,
        window=prior.window,
        apply_unconditional=None if plain is None else bind(_masked, inner=plain),
        overlap=prior.overlap,
    )


def _masked(params: tuple[PyTree, Array], tokens: Array, *, inner: Any) -> Array:
    logits = inner(params[0], tokens)
    shape = (1,) * (logits.ndim - 1) + params[1].shape
    return jnp.where(params[1].reshape(shape), logits, -jnp.inf)
