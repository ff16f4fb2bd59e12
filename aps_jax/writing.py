"""Lines of text by a masked language model, steered by a reward: the target, and ids and words.

writer = load_writer("lines32")
target = writer.target("positive", prompt="the food", num_lines=8)
result = jax.jit(sample_target)(target, jax.random.key(0), config=text_config("aps"))
print(writer.lines(result.tokens))
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import energies, presets
from aps_jax.config import VARIANTS
from aps_jax.io import checkpoint
from aps_jax.pretrained import load_prior, model_folder
from aps_jax.sampling.target import Target, make_target
from aps_jax.text.classifier import ClassifierConfig, TextReward, init_classifier_params
from aps_jax.text.tokenizer import TextTokenizer, load_tokenizer, until
from aps_jax.types import Array, Prior

#: Options of samplers for lines instead of pictures, by sampler. Those of APS are judged right most
#: of a few that were tried on the prompts of tuning of `experiments.studies.text_rewards`, at twice
#: its budget. They have a prior term, since without one Adam does not see the reward's weight, and
#: random remasking, since with anchors the prior term writes one line again and again.
TEXT_OPTIONS: dict[str, dict[str, Any]] = {
    "aps": {
        "num_steps": 16, "num_inner_steps": 4, "learning_rate": 3.0, "draw": "categorical",
        "schedule": "linear", "prior_weight": 0.3, "remasking": "random",
    },
    "maskgit": {"num_steps": 32, "schedule": "linear", "reveal": "random"},
    "best_of_n": {
        "num_candidates": 16, "num_steps": 16, "schedule": "linear", "reveal": "random",
    },
    "smc": {
        "num_steps": 16, "num_fills": 1, "weights": "absolute", "schedule": "linear",
        "reveal": "random",
    },
    "svdd_pm": {
        "num_steps": 16, "num_candidates": 4, "schedule": "linear", "reveal": "random",
        "selection": "sample", "selection_temperature": 1.0,
    },
    "entrgi": {
        "num_steps": 16, "num_inner_steps": 4, "num_trajectories": 1, "learning_rate": 1.0,
        "measurement_term": "gaussian",
    },
    "straight_through": {"variables": "tokens"},
}  # fmt: skip


def text_config(sampler: str, **options: Any) -> Any:
    """Options of a sampler for lines of text: `TEXT_OPTIONS`, then `options`.

    Raises:
      ValueError: an unknown sampler, an option that it does not have, or one out of range.
    """
    kind = presets.config_class(sampler)
    given = TEXT_OPTIONS.get("aps" if sampler in VARIANTS else sampler, {})
    given = given | VARIANTS.get(sampler, {}) | options
    known = presets.option_types(kind)
    for name in options:
        if name not in known:
            raise ValueError(
                f"sampler {sampler!r} has no option {name!r}; options: {', '.join(known)}"
            )
    return kind(**given)


@dataclasses.dataclass(frozen=True)
class Writer:
    """A masked language model of short lines with its tokenizer and a reward.

    Attributes:
      prior: over the ids of a line; the mask is the one after the last.
      reward: classifier on the same vocabulary.
      tokenizer: text to ids and back.
      length: tokens of a line L, its end included.
      end_id: id that ends a line and fills it up.
    """

    prior: Prior
    reward: TextReward
    tokenizer: TextTokenizer
    length: int
    end_id: int

    def known_tokens(self, prompt: str, length: int | None = None) -> Array:
        """Ids int32 [L] that begin with the prompt, the mask after it.

        Args:
          prompt: first words.
          length: L, where it is to be less than the model's.

        Raises:
          ValueError: the prompt leaves no room for another word, or L is none of this model.
        """
        length = self.length if length is None else length
        if not 2 <= length <= self.length:
            raise ValueError(
                f"this model's lines have from 2 to {self.length} tokens, got {length}"
            )
        ids = self.tokenizer.encode(prompt)
        if len(ids) >= length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; lines have at most {length} here, their end "
                "included: shorten it"
            )
        line = np.full(length, self.prior.num_codes, np.int32)
        line[: len(ids)] = ids
        return jnp.asarray(line)

    def target(
        self,
        label: str | Sequence[str],
        *,
        prompt: str | Sequence[str] = "",
        num_lines: int = 1,
        weight: Any = 1.0,
        prior_temperature: float | None = None,
        length: int | None = None,
    ) -> Target:
        """Lines from p(line) p(label | line)^weight that begin with the prompt.

        Args:
          label: what the reward asks for, one of `reward.names`, or one for each prompt.
          prompt: first words, which stay; or several such, all of whose lines are drawn together.
          num_lines: lines per prompt; row p * N + n of the target is line n of prompt p.
          weight: of the reward; 1 is the posterior of the label.
          prior_temperature: divides the prior's logits.
          length: as for `known_tokens`; fewer tokens take less time.

        Raises:
          ValueError: an unknown label, not one for each prompt, no prompt or line, or a prompt that
            is too long.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_lines < 1:
            raise ValueError("there must be one prompt, which may be empty, and one line, at least")
        if not isinstance(label, str) and len(label) != len(prompts):
            raise ValueError(f"{len(label)} labels are given for {len(prompts)} prompts")
        known = jnp.stack([self.known_tokens(text, length) for text in prompts])
        if not isinstance(label, str):
            label = [name for name in label for _ in range(num_lines)]
        energy = energies.scaled(energies.text_reward(self.reward, label), weight)
        return make_target(
            self.prior,
            self.reward.codec,
            energy,
            grid=(1, known.shape[1]),
            batch=num_lines * len(prompts),
            known_tokens=jnp.repeat(known, num_lines, axis=0),
            prior_temperature=prior_temperature,
        )

    def settled(self, tokens: Array | np.ndarray) -> np.ndarray:
        """Ids int32 [N, L] with nothing but ends after the first end, as they are read."""
        ids = np.asarray(tokens, np.int32)
        is_over = np.cumsum(ids == self.end_id, axis=-1) > 0
        return np.where(is_over, self.end_id, ids)

    def lines(self, tokens: Array | np.ndarray) -> list[str]:
        """Texts of ids [N, L] up to their ends."""
        return [self.tokenizer.decode(until(row, [self.end_id])) for row in np.asarray(tokens)]

    def ids(self, line: str) -> np.ndarray:
        """Ids int32 [L] of a whole line with its end; ValueError if it is too long."""
        known = np.asarray(self.known_tokens(line))
        return np.where(known == self.prior.num_codes, self.end_id, known)


def load_classifier(folder: Path) -> TextReward:
    """The classifier of lines in a model folder.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no such weights.
    """
    card = checkpoint.read_card(folder)
    place = folder / checkpoint.CARD_NAME
    config = checkpoint.parse_config(ClassifierConfig, card.get("classifier"), place)
    abstract = jax.eval_shape(lambda key: init_classifier_params(key, config), jax.random.key(0))
    params = checkpoint.load_params(checkpoint.weights_path(folder, "classifier"), abstract)
    return TextReward(params=params, config=config)


def load_writer(
    name: str | os.PathLike[str] = "lines32", *, reward: str | os.PathLike[str] | None = None
) -> Writer:
    """A writer from an embedded model or a model folder.

    Args:
      name: "lines32", or a folder by `experiments.train_text`.
      reward: folder of another reward; that of the model if left out.

    Raises:
      ValueError: no such model, one that writes no lines, or a reward of another vocabulary.
      aps_jax.io.checkpoint.CheckpointError: a folder is damaged or lacks weights.
      aps_jax.text.tokenizer.TextError: no tokenizer.json, or the `text` extra is not installed.
    """
    folder = model_folder(name)
    card = checkpoint.read_card(folder)
    text = card.get("text")
    if not isinstance(text, dict) or not {"length", "end_id"} <= text.keys():
        raise ValueError(
            f"the model {name} writes no lines of text; use lines32, or a folder by "
            "experiments.train_text"
        )
    tokenizer = load_tokenizer(folder)
    judge = load_classifier(folder if reward is None else model_folder(reward))
    if judge.config.vocabulary != tokenizer.fingerprint():
        raise ValueError(
            f"the reward in {folder if reward is None else reward} reads another vocabulary than "
            f"{name} writes; train it on the tokenizer of that model"
        )
    return Writer(load_prior(folder, card), judge, tokenizer, text["length"], text["end_id"])
