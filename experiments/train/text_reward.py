"""Trains a small classifier of lines, as a reward on the vocabulary of a language model.

    python -m experiments.train_text_reward --data TEXTS --model runs/lines/model --out runs/reward

Labels are the suffixes of the files, `.0` negative and `.1` positive. The classifier reads part
"reward" of the data (`experiments.lines`), which the language model has not seen. At every held-out
score its averaged weights go into the folder of the language model, `classifier.safetensors`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.io import checkpoint
from aps_jax.prior.transformer import num_params
from aps_jax.text.classifier import (
    ClassifierConfig,
    TextReward,
    classifier_logits,
    classifier_table,
    init_classifier_params,
)
from aps_jax.text.tokenizer import TextTokenizer, load_tokenizer
from experiments import lines, training
from experiments.train.prior_scores import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      model: folder of the language model.
      eval_data: files of held-out lines; left out, part "held_out" of the data.
      width: numbers per embedding.
      hidden: features of the convolution.
      drop: share of embeddings that are set to zero in training.
    """

    model: Path
    eval_data: Path | None = None  # type: ignore[assignment]
    width: int = 48
    hidden: int = 96
    drop: float = 0.15
    optimizer: str = "adamw"
    batch_size: int = 128
    weight_decay: float = 0.02
    ema_decay: float = 0.99
    num_eval: int = 1024

    def resolved(self) -> Config:
        """With the settings of a smoke run, if one was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, width=8, hidden=8, batch_size=8, steps=4, warmup=2, eval_every=2, save_every=2,
            num_eval=32,
        )  # fmt: skip


def labelled(
    config: Config, tokenizer: TextTokenizer, length: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ids int32 [N, L] and labels int32 [N] for "train" and "eval"."""
    found = {}
    held_out = config.data if config.eval_data is None else (config.eval_data,)
    for name, paths, part in (
        ("train", config.data, "reward"),
        ("eval", held_out, "held_out" if config.eval_data is None else None),
    ):
        pairs = [
            (tokenizer.encode(line.text), line.label)
            for line in lines.read_lines(paths, part)
            if line.label >= 0
        ]
        pairs = [pair for pair in pairs if len(pair[0]) < length]
        if not pairs:
            raise ValueError("no line has a label: name the files of negative lines NAME.0 and "
                             "those of positive ones NAME.1")  # fmt: skip
        ids = lines.padded([pair[0] for pair in pairs], length)
        found[name] = (ids, np.array([pair[1] for pair in pairs], np.int32))
    order = np.random.default_rng(0).permutation(len(found["eval"][0]))[: config.num_eval]
    found["eval"] = tuple(part[order] for part in found["eval"])
    return found


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    training.claim(config)
    tokenizer = load_tokenizer(config.model)
    card = checkpoint.read_card(config.model)
    data = labelled(config, tokenizer, card["text"]["length"])
    sizes = ClassifierConfig(
        vocab_size=tokenizer.size, width=config.width, hidden=config.hidden,
        vocabulary=tokenizer.fingerprint(),
    )  # fmt: skip
    params = init_classifier_params(jax.random.key(config.seed), sizes)
    print(f"{num_params(params) / 1e6:.2f} M parameters, {len(data['train'][0])} lines", flush=True)
    optimizer = training.make_optimizer(config)

    def loss(params, batch, key):
        ids, labels = batch
        x = classifier_table(params, sizes)[ids]
        x = x * jax.random.bernoulli(key, 1 - config.drop, ids.shape)[..., None]
        losses, hits = cross_entropy(classifier_logits(params, x, config=sizes), labels)
        return jnp.mean(losses), {"loss": jnp.mean(losses), "accuracy": jnp.mean(hits)}

    key = jax.random.key(config.seed + 1)
    update = training.make_update(loss, optimizer, config.ema_decay, key)

    def batches(steps):
        ids, labels = data["train"]
        for step in steps:
            rng = np.random.default_rng((config.seed, 1, step))
            chosen = rng.integers(len(ids), size=config.batch_size)
            yield step, (ids[chosen], labels[chosen])

    def score(state, row):
        ids, labels = data["eval"]
        chance = np.asarray(TextReward(state.ema, sizes).probabilities(jnp.asarray(ids)))
        own = chance[np.arange(len(labels)), labels]
        scores = {"eval_accuracy": float(np.mean(own > 0.5)), "eval_ce": -float(np.log(own).mean())}
        checkpoint.save_params(config.model / "classifier.safetensors", state.ema, "float16")
        sizes_of_data = {"lines": len(data["train"][0]), "eval_lines": len(labels)}
        rounded = {name: round(value, 4) for name, value in scores.items()}
        facts = training.facts(config, row, "classifier_training") | sizes_of_data | rounded
        checkpoint.update_card(
            config.model, classifier=dataclasses.asdict(sizes), classifier_training=facts
        )
        return scores

    log = config.out / "reward.jsonl"
    training.fit(training.init_state(params, optimizer), update, batches, score, config, log)


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_text_reward", train, arguments)
