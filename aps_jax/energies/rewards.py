"""Energies of what a network says of an image: minus a reward.

A network is any function of images [B, H, W, 3], or any pytree that can be called like one; the
arrays of a pytree are leaves, so that other weights of the same shapes need no other compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from aps_jax.io.names import choose
from aps_jax.types import Array, Energy, PyTree, bind


def classifier(
    net: Callable[[Array], Array],
    label: int | Mapping[str, float],
    *,
    names: Sequence[str] | None = None,
) -> Energy:
    """-log p(label | image) of a classifier.

    Args:
      net: gives logits or log-probabilities of classes [B, A] for a label that is one of them; for
        wanted attributes the logits of each being there.
      label: index of a class; or wanted attributes by name, from 0 (absent) to 1 (there), whose
        log-probabilities are added: for values between, the cross-entropy.
      names: of the attributes, by default `net.names`.

    Raises:
      ValueError: an attribute that the network does not know, or a value that is no share; and,
        where the energy is first used, an index that the network does not have.
    """
    static, params = _split(net)
    if not isinstance(label, Mapping):
        return Energy(apply=bind(_class, net=static, label=int(label)), params=params, name="class")
    listed = tuple(getattr(net, "names", ()) if names is None else names)
    known = {name: column for column, name in enumerate(listed)}
    columns, values = [], []
    for name, value in label.items():
        columns.append(choose("attribute", name, known))
        if not 0 <= value <= 1:
            raise ValueError(f"attribute {name} must be from 0 (absent) to 1 (there), got {value}")
        values.append(value)
    wanted = jnp.asarray(values, jnp.float32)
    apply = bind(_attributes, net=static, columns=tuple(columns))
    return Energy(apply=apply, params=(params, wanted), name="attributes")


def text_reward(model: Any, label: str | Sequence[str]) -> Energy:
    """-log p(label | text), of a model that reads embeddings of tokens.

    Args:
      model: a pytree with `names`, the labels, that gives their logits [B, A] for embeddings
        [B, *grid, d], such as `aps_jax.text.classifier.TextReward`. The codes of the target's codec
        must be its embeddings.
      label: one of the names, or one for each of B rows.

    Raises:
      ValueError: a label that the model does not know.
    """
    known = {name: column for column, name in enumerate(model.names)}
    if isinstance(label, str):
        energy = classifier(model, choose("reward", label, known))
        return dataclasses.replace(energy, name=label)
    columns = jnp.asarray([choose("reward", name, known) for name in label], jnp.int32)
    return Energy(apply=bind(_own_class), params=model, data=columns, name="labels")


def clip_text(clip: Any, text: Any) -> Energy:
    """1 - cosine of the embeddings of image and text.

    Args:
      clip: a pytree with `embed_image(x)`, of images [B, H, W, 3] in [-1, 1], and
        `embed_text(text)`, which both give vectors [B, D] of any length, such as
        `aps_jax.scores.clip.ClipModel`.
      text: what `embed_text` takes: one text for all rows, or one per row; as ids, [1, T] or
        [B, T].
    """
    return _towards(clip, clip.embed_text(text), "clip_text")


def clip_image(clip: Any, reference: Float[Array, "B H W 3"]) -> Energy:
    """1 - cosine of the embeddings of image and reference.

    Args:
      clip: as for `clip_text`, `embed_image` alone.
      reference: one image [1, H, W, 3] in [-1, 1], or one per row.
    """
    return _towards(clip, clip.embed_image(jnp.asarray(reference)), "clip_image")


def _towards(clip: Any, wanted: Float[Array, "B D"], name: str) -> Energy:
    wanted = _unit(wanted)
    is_shared = wanted.shape[0] == 1
    params, data = ((clip, wanted), None) if is_shared else ((clip, None), wanted)
    return Energy(apply=bind(_angle), params=params, data=data, name=name)


def _angle(params: tuple[Any, Array | None], data: Array | None, x: Array) -> Float[Array, " B"]:
    clip, shared = params
    wanted = cast(Array, data if shared is None else shared)
    with jax.named_scope("reward"):
        return 1 - jnp.sum(_unit(clip.embed_image(x)) * wanted, axis=-1)


def _unit(vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
    vectors = vectors.astype(jnp.float32)
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    # The least normal number keeps the gradient of a vanishing vector finite.
    return vectors * jax.lax.rsqrt(square + jnp.finfo(jnp.float32).tiny)


def _split(net: Any) -> tuple[Callable[[Array], Array] | None, PyTree]:
    """A plain function, or None and the pytree."""
    is_function = any(leaf is net for leaf in jax.tree.leaves(net))
    return (net, None) if is_function else (None, net)


def _answers(net: Any, params: Any, x: Array) -> Float[Array, "B A"]:
    with jax.named_scope("reward"):
        return (params if net is None else net)(x).astype(jnp.float32)


def _class(params: PyTree, data: None, x: Array, *, net: Any, label: int) -> Float[Array, " B"]:
    # Log-probabilities stay as they are.
    log_probs = jax.nn.log_softmax(_answers(net, params, x), axis=-1)
    _require_column(label, log_probs)
    return -log_probs[:, label]


def _require_column(column: int, answers: Array) -> None:
    """ValueError for an index that JAX would take for another one."""
    if not 0 <= column < answers.shape[-1]:
        raise ValueError(
            f"the classifier has no column {column}; it gives {answers.shape[-1]} numbers, counted "
            "from 0"
        )


def _own_class(model: Any, columns: Array, x: Array) -> Float[Array, " B"]:
    log_probs = jax.nn.log_softmax(_answers(None, model, x), axis=-1)
    return -jnp.take_along_axis(log_probs, columns[:, None], axis=-1)[:, 0]


def _attributes(
    params: tuple[PyTree, Array], data: None, x: Array, *, net: Any, columns: tuple[int, ...]
) -> Float[Array, " B"]:
    inner, wanted = params
    answers = _answers(net, inner, x)
    for column in columns:
        _require_column(column, answers)
    logits = answers[:, list(columns)]
    return jnp.sum(jax.nn.softplus(logits) - wanted * logits, axis=-1)
