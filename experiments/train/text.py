"""Trains a small masked diffusion language model on lines of text, by LLaDA's recipe.

    python -m experiments.train_text --data TEXTS --out runs/lines

Every line becomes the ids of a byte-pair tokenizer, which is made first, filled up with end tokens
that are learned and written like any other (LLaDA, arXiv:2502.09992, section 2.3 and appendix B).
Each token is masked with probability t, t uniform, and the cross-entropy of the masked ones is
divided by t, which bounds the likelihood (its equation 3). The first steps read short lines only,
at half the cost (as BERT's, arXiv:1810.04805, appendix A.2).

The model reads part "prior" of the data (`experiments.lines`). A run that is interrupted goes on
where it stopped when started again with the same `--out`; with `--init MODEL` a new one goes on
from the weights of that model and keeps its tokenizer, so that rewards on it still fit. The
averaged weights are exported at every held-out score to `OUT/model`: `prior.safetensors` in half
precision, `tokenizer.json` and the card; at the end beside a log, its curves and a page of samples.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.io import checkpoint
from aps_jax.pretrained import load_prior, model_folder
from aps_jax.prior.transformer import (
    Transformer,
    TransformerConfig,
    init_transformer_params,
    num_params,
)
from aps_jax.text.sampling import TextConfig, sample_text
from aps_jax.text.tokenizer import TOKENIZER_NAME, TextTokenizer, load_tokenizer, until
from aps_jax.types import Array, Key, Prior, PyTree
from experiments import lines, training
from experiments.train.prior_scores import cross_entropy

#: Least share of masked tokens, LLaDA's epsilon.
LEAST_SHARE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      eval_data: file of held-out lines; left out, part "held_out" of the data.
      vocab_size: ids of the tokenizer, the end of a line included.
      length: tokens of the longest line, its end included; longer ones are left out.
      short_length: the same in the first steps.
      short_steps: steps on short lines only.
      width: residual width.
      num_layers: number of blocks.
      num_heads: attention heads.
      mlp_width: hidden width of the MLP.
      rope_theta: base of the rotary frequencies.
    """

    eval_data: Path | None = None  # type: ignore[assignment]
    vocab_size: int = 1536
    length: int = 32
    short_length: int = 16
    short_steps: int = 2400
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    mlp_width: int = 320
    rope_theta: float = 1000.0
    batch_size: int = 64
    weight_decay: float = 0.01
    num_eval: int = 256

    def resolved(self) -> Config:
        """With the sizes of `init`, and the settings of a smoke run if one was asked for."""
        config = self
        if self.init is not None:
            sizes = training.initial_sizes(self, "prior", TransformerConfig)
            names = ("width", "num_layers", "num_heads", "mlp_width", "rope_theta")
            config = dataclasses.replace(self, **{name: getattr(sizes, name) for name in names})
        if not self.smoke:
            return config
        tiny = {"vocab_size": 300, "width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 24}
        return dataclasses.replace(
            config, **({} if self.init else tiny), batch_size=4, steps=6, short_steps=3, warmup=2,
            eval_every=3, save_every=3, num_eval=8,
        )  # fmt: skip

    def transformer(self, num_codes: int) -> TransformerConfig:
        """Sizes of a prior over `num_codes` ids; the one after them is the mask."""
        return TransformerConfig(
            vocab_size=num_codes + 1,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_width=self.mlp_width,
            rope_theta=self.rope_theta,
            tie_embeddings=True,
        )


def read_ids(config: Config, tokenizer: TextTokenizer) -> dict[str, list[list[int]]]:
    """Ids of the lines that fit into the window, for "train" and "eval"."""
    held_out = "held_out" if config.eval_data is None else None
    texts = {
        "train": lines.read_lines(config.data, "prior"),
        "eval": lines.read_lines(
            config.data if config.eval_data is None else (config.eval_data,), held_out
        ),
    }
    ids = {name: [tokenizer.encode(line.text) for line in part] for name, part in texts.items()}
    fitting = {
        name: [line for line in part if len(line) < config.length] for name, part in ids.items()
    }
    order = np.random.default_rng(0).permutation(len(fitting["eval"]))[: config.num_eval]
    fitting["eval"] = [fitting["eval"][index] for index in order]
    return fitting


def draw_shares(key: Key, batch: int) -> Array:
    """Shares t of masked tokens [batch], uniform and stratified over the batch."""
    strata = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
    return LEAST_SHARE + (1 - LEAST_SHARE) * strata


def bound(params: PyTree, tokens: Array, key: Key, config: TransformerConfig) -> Array:
    """Upper bound of -log p(line) in nats [B], from one random mask of each line of tokens [B, L].

    The mean over keys is the bound; LLaDA, equation 3.
    """
    batch, length = tokens.shape
    key_share, key_mask = jax.random.split(key)
    share = draw_shares(key_share, batch)[:, None]
    is_masked = jax.random.uniform(key_mask, (batch, length)) < share
    noisy = jnp.where(is_masked, config.vocab_size - 1, tokens)
    logits = Transformer(config).apply({"params": params}, noisy)
    losses, _ = cross_entropy(logits[..., : config.vocab_size - 1], tokens)
    return jnp.sum(losses * is_masked / share, axis=-1)


def evaluate(
    params: PyTree, ids: list[list[int]], config: Config, model: TransformerConfig
) -> dict[str, float]:
    """The bound on held-out lines: nats per line, and the perplexity per token with one end."""
    if not ids:
        raise ValueError("no held-out line fits into the window; give another --eval-data")
    tokens = lines.padded(ids, config.length)
    nats = jax.jit(bound, static_argnums=3)
    size = min(64, len(tokens))
    total = [
        float(np.sum(nats(params, tokens[i : i + size], jax.random.key(1000 * draw + i), model)))
        for i in range(0, len(tokens), size)
        for draw in range(4)
    ]
    nats_per_line = sum(total) / (4 * len(tokens))
    per_line = np.mean([len(line) + 1 for line in ids])
    perplexity = float(np.exp(nats_per_line / per_line))
    return {"eval_nats": nats_per_line, "eval_perplexity": perplexity}


def samples(prior: Prior, tokenizer: TextTokenizer, length: int, count: int) -> list[str]:
    """Lines by exact ancestral sampling, one token at a time in random order."""
    config = TextConfig(num_steps=length, reveal="random")
    tokens = jax.jit(
        lambda prior, key: sample_text(prior, key, length=length, batch=count, config=config)
    )(prior, jax.random.key(0))
    return [tokenizer.decode(until(row, [0])) for row in np.asarray(tokens)]


def export(params: PyTree, config: Config, model: TransformerConfig, facts: dict) -> None:
    """Writes the model folder; the tokenizer is there already."""
    folder = config.out / "model"
    checkpoint.save_params(folder / "prior.safetensors", params, "float16")
    checkpoint.update_card(
        folder,
        prior=dataclasses.asdict(model),
        prior_window=config.length,
        text={"length": config.length, "end_id": 0},
        prior_training=facts,
    )


def make_batch(
    ids: list[list[int]], short: list[list[int]], config: Config, step: int
) -> np.ndarray:
    """Tokens int32 [B, L] of one step: a function of (seed, step)."""
    rng = np.random.default_rng((config.seed, 1, step))
    is_short = step < config.short_steps
    pool = short if is_short else ids
    chosen = rng.integers(len(pool), size=config.batch_size)
    length = config.short_length if is_short else config.length
    return lines.padded([pool[index] for index in chosen], length)


def read_tokenizer(config: Config, folder: Path) -> TextTokenizer:
    """The tokenizer of the run: that of `config.init`, or one made by the first start."""
    if config.init is not None:
        load_tokenizer(model_folder(config.init))  # Says what is missing.
        shutil.copyfile(model_folder(config.init) / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    elif not (folder / TOKENIZER_NAME).exists():
        texts = [line.text for line in lines.read_lines(config.data, "prior")]
        lines.train_tokenizer(texts, folder / TOKENIZER_NAME, config.vocab_size)
    return load_tokenizer(folder)


def initial_params(config: Config, model: TransformerConfig) -> PyTree:
    """Random weights, or those of the language model in `config.init`.

    Raises:
      ValueError: it is none of lines, or of other sizes than its tokenizer.
    """
    random = init_transformer_params(jax.random.key(config.seed), model)
    if config.init is None:
        return random
    source = training.initial_sizes(config, "prior", TransformerConfig)
    if dataclasses.replace(source, dtype=model.dtype, param_dtype=model.param_dtype) != model:
        raise ValueError(
            f"--init {config.init} is no language model of lines; give lines32, or a folder by "
            "experiments.train_text"
        )
    return checkpoint.load_params(model_folder(config.init) / "prior.safetensors", random)


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    training.claim(config)
    folder = config.out / "model"
    folder.mkdir(exist_ok=True)
    tokenizer = read_tokenizer(config, folder)
    ids = read_ids(config, tokenizer)
    short = [line for line in ids["train"] if len(line) < config.short_length]
    model = config.transformer(tokenizer.size)
    params = initial_params(config, model)
    size = num_params(params)
    print(f"{size / 1e6:.2f} M parameters, {len(ids['train'])} lines, {len(short)} short ones")
    compute = dataclasses.replace(model, dtype=config.dtype)
    optimizer = training.make_optimizer(config)

    def loss(params, tokens, key):
        value = jnp.mean(bound(params, tokens, key, compute)) / tokens.shape[1]
        return value, {"loss": value}

    key = jax.random.key(config.seed + 1)
    update = training.make_update(loss, optimizer, config.ema_decay, key)

    def batches(steps):
        for step in steps:
            yield step, make_batch(ids["train"], short, config, step)

    def facts(row, scores):
        sizes = {"parameters": size, "lines": len(ids["train"]), "eval_lines": len(ids["eval"])}
        rounded = {name: round(value, 3) for name, value in scores.items()}
        return training.facts(config, row, "prior_training") | sizes | rounded

    def score(state, row):
        scores = evaluate(state.ema, ids["eval"], config, model)
        export(state.ema, config, model, facts(row, scores))
        return scores

    log = config.out / "text.jsonl"
    training.fit(training.init_state(params, optimizer), update, batches, score, config, log)

    rows = training.read_rows(log)
    panels = {"training loss (nats per position)": ["loss"], "held out": ["eval_nats"]}
    training.plot_curves(rows, panels, config.out / "text_curves.png")
    # The rounded weights, as they are used.
    prior = load_prior(folder)
    scores = evaluate(prior.params, ids["eval"], config, model)
    checkpoint.update_card(folder, prior_training=facts(rows[-1], scores))
    written = samples(prior, tokenizer, config.length, 32)
    (config.out / "samples.txt").write_text("".join(line + "\n" for line in written))
    print("exported weights:", scores, *written[:8], sep="\n", flush=True)


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_text", train, arguments)
