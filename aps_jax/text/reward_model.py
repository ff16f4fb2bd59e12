"""Reward models: language models of the Llama and Qwen families that score an answer to a prompt.

They read `before | answer | after`, where the frame is the conversation in the model's own chat
template, and say one number at the last token (Skywork-Reward-V2, arXiv:2507.01352). The answer may
be given as embeddings, such as means of the table under the distribution of a masked language
model, so that gradients of the reward reach the logits. Weights are not part of this package:
`aps-jax convert reward` converts published ones, and `aps_jax.pretrained.load_reward` loads them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import cast

import flax.struct
import jax.numpy as jnp
import numpy as np

from aps_jax.prior.transformer import Transformer, TransformerConfig
from aps_jax.text.tokenizer import TextTokenizer
from aps_jax.types import Array, Energy, PyTree, bind


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFrame:
    """A conversation of one prompt and one answer, as the chat template writes it; JSON values.

    Attributes:
      before: text before the prompt.
      between: text between prompt and answer.
      after: text after the answer.
      strips: what is said is stripped of white space at both ends.
      pad_token_id: id that counts as no last token; None for none.
    """

    before: str
    between: str
    after: str
    strips: bool = False
    pad_token_id: int | None = None


@flax.struct.dataclass
class RewardModel:
    """A reward model and the conversations that its answers belong to, a pytree.

    Attributes:
      params: `{"model": weights, "before": ids [B, P], "is_pad": bool [B, P], "after": ids [S]}`.
      apply: `(params, embeddings [R, L, d]) -> rewards float32 [R]`, R a multiple of B.
    """

    params: PyTree
    apply: Callable[[PyTree, Array], Array] = flax.struct.field(pytree_node=False)

    @property
    def table(self) -> Array:
        """Embeddings of all ids [V, d]."""
        return self.params["model"]["embed"]["embedding"]

    def __call__(self, embeddings: Array) -> Array:
        """Rewards float32 [R] of answers given as embeddings [R, L, d]."""
        return self.apply(self.params, embeddings)

    def score(self, ids: Array) -> Array:
        """Rewards float32 [R] of answers given as ids int [R, L]."""
        return self(self.table[ids])

    def rows(self, token_map: np.ndarray | Array) -> Array:
        """Table [K, d] for a prior of K codes, by `aps_jax.text.vocabulary.token_map`.

        A code without a counterpart has the row of the first code with one, which is preferred to
        it wherever the nearest row is searched.
        """
        ids = np.asarray(token_map)
        return self.table[np.where(ids < 0, ids[np.argmax(ids >= 0)], ids)]


def reward_energy(model: RewardModel) -> Energy:
    """Minus the reward of what a codec gives, embeddings [R, *grid, d] of the rows of `model`."""
    return Energy(apply=bind(_minus), params=model, name="reward")


def _minus(model: RewardModel, data: None, x: Array) -> Array:
    return -model(x.reshape(x.shape[0], -1, x.shape[-1]))


def frame_ids(
    frame: RewardFrame, tokenizer: TextTokenizer, prompt: str
) -> tuple[list[int], list[int]]:
    """Ids before and after the answer to a prompt; names of special tokens in it stay plain text.

    The frame's own special tokens are told by their names. A token never reaches across the border
    between frame and answer.
    """
    said = prompt.strip() if frame.strips else prompt
    before = _pieces(frame.before, tokenizer)
    between = _pieces(frame.between, tokenizer)
    # What a tokenizer sees at once: the prompt with the plain text at both of its sides.
    head, tail = before.pop() if before else "", between.pop(0) if between else ""
    ids = [*_ids(before, tokenizer, 0), *tokenizer.encode(head + said + tail)]
    ids += _ids(between, tokenizer, 1)
    return ids, _ids(_pieces(frame.after, tokenizer), tokenizer, 0)


def _pieces(text: str, tokenizer: TextTokenizer) -> list[str]:
    """Plain text and names of special tokens in turns, plain text first and last."""
    names = sorted(tokenizer.added_tokens(), key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]


def _ids(pieces: Sequence[str], tokenizer: TextTokenizer, first_special: int) -> list[int]:
    """Ids of pieces in turns; those at odd distance from the first plain one are special."""
    ids: list[int] = []
    for index, piece in enumerate(pieces, start=first_special):
        ids += [tokenizer.special_id(piece)] if index % 2 else tokenizer.encode(piece)
    return ids


def make_reward(
    config: TransformerConfig,
    params: PyTree,
    *,
    before_ids: Sequence[int] | Sequence[Sequence[int]],
    after_ids: Sequence[int],
    pad_token_id: int | None = None,
) -> RewardModel:
    """Bundles a language model with one output column as a reward of answers.

    Args:
      config: sizes; `num_outputs` is 1.
      params: weights as from `init_transformer_params`.
      before_ids: ids before the answer, of one prompt or of each of B; shorter ones are filled up
        on their left with ids that nothing sees, which changes nothing, as positions are relative.
      after_ids: ids after the answer.
      pad_token_id: id that counts as no last token, as in the published code.

    Raises:
      ValueError: ids that the model does not have, or a model that says more than one number.
    """
    if config.output_size != 1:
        raise ValueError(f"a reward is one number; this model says {config.output_size}")
    is_batch = len(before_ids) > 0 and np.ndim(before_ids[0]) == 1
    rows = [np.asarray(row, np.int32) for row in (before_ids if is_batch else [before_ids])]
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    before = np.stack([np.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    after = np.asarray(after_ids, np.int32)
    used = np.concatenate([before.ravel(), after])
    if used.size and not 0 <= used.min() <= used.max() < config.vocab_size:
        raise ValueError(
            f"ids of a conversation must be in [0, {config.vocab_size}), got {used.min()} to "
            f"{used.max()}; the tokenizer is of another model"
        )
    # The published code reads the score off at the last id that is no pad.
    words = np.flatnonzero(after != (-1 if pad_token_id is None else pad_token_id))
    last = len(after) - (words[-1] if words.size else -1)
    bundled = {
        "model": params,
        "before": jnp.asarray(before),
        "is_pad": jnp.asarray(np.arange(longest)[None] < np.asarray(pads)[:, None]),
        "after": jnp.asarray(after),
    }
    return RewardModel(params=bundled, apply=bind(_score, config=config, last=int(last)))


def _score(params: PyTree, embeddings: Array, *, config: TransformerConfig, last: int) -> Array:
    rows, weights = embeddings.shape[0], {"params": params["model"]}
    batch = params["before"].shape[0]
    if embeddings.ndim != 3 or rows % batch or embeddings.shape[-1] != config.width:
        raise ValueError(
            f"embeddings must be [R, L, {config.width}] with R a multiple of the {batch} prompts, "
            f"got {embeddings.shape}"
        )
    table = params["model"]["embed"]["embedding"]
    before, is_pad = (jnp.tile(params[name], (rows // batch, 1)) for name in ("before", "is_pad"))
    after = jnp.tile(params["after"][None], (rows, 1))
    parts = (table[before], embeddings, table[after])
    x = jnp.concatenate([part.astype(config.dtype) for part in parts], axis=1)
    length = x.shape[1]
    is_pad = jnp.pad(is_pad, ((0, 0), (0, length - is_pad.shape[1])))
    mask = jnp.tri(length, dtype=bool)[None] & ~is_pad[:, None]
    model = Transformer(config)
    hidden = cast(Array, model.apply(weights, x, None, mask, method="hidden_of"))
    at = length - last
    return cast(Array, model.apply(weights, hidden[:, at : at + 1], method="logits"))[:, 0, 0]
