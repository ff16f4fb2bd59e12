"""Trains the masked image prior on the tokens that a frozen codec gives to photo crops.

    python -m experiments.train_prior --data PHOTOS --eval-data HELD_OUT \
        --codec runs/codec/model --out runs/prior

Crops are turned into tokens once and cached in `OUT/tokens.npz`. A run that is interrupted goes on
where it stopped when started again with the same `--out`. The averaged weights are exported at
every held-out score to `OUT/model` (`prior.safetensors` in half precision, next to a copy of the
codec and the card), beside the log, the loss curves and, at the end, a grid of samples and
completions.

Aligned pictures, such as faces, take `--absolute-positions`: they are read whole, and the prior
learns what belongs where. With `--captions FILE.csv` (columns `file,caption`) it also reads prompts
made of the words of the captions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from aps_jax.codec.lfq import LFQ
from aps_jax.io import checkpoint
from aps_jax.pretrained import load_codec, load_prior, model_folder
from aps_jax.prior.bundle import make_prior, make_prompted_prior
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params, num_params
from aps_jax.text.tokenizer import TOKENIZER_NAME
from aps_jax.types import Array, Prior, PyTree, Quantizer
from experiments import training
from experiments.train import captions, prior_scores, widening
from experiments.train.captions import Prompts, read_prompts
from experiments.train.completion import save_samples
from experiments.train.masked_loss import code_numbers, masked_loss, merge
from experiments.train.tokens import crop_tokens, random_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      codec: name or folder of the model whose codec is used, frozen.
      width: residual width; with `init` all sizes of the prior are those of its prior.
      num_layers: number of blocks.
      num_heads: attention heads.
      mlp_width: hidden width of the MLP.
      code_rank: rank of the free part of the input embedding of a code.
      rope_theta: base of the rotary frequencies, small because the grid is.
      image_size: side of the crops that the codec reads.
      max_flat: as for `train_codec`.
      num_crops: crops that are turned into tokens; the training draws from these.
      window: side of the token grids trained on; larger crops give random windows.
      num_targets: masked positions per grid that enter the loss, a random subset of all.
      absolute_positions: read pictures whole (their centre squares) instead of random crops, and
        learn a vector for every cell of the grid. With `init` from such a prior it stays so.
      captions: CSV file with the columns `file` and `caption` (phrases with commas between them)
        for a prior that takes prompts; needs the `text` extra. Pictures without one are trained on
        without a prompt.
      max_words: words that a prompt may have.
      drop_prompt: share of captioned pictures that are trained on without a prompt.
    """

    codec: Path
    width: int = 192
    num_layers: int = 6
    num_heads: int = 3
    mlp_width: int = 512
    code_rank: int = 32
    rope_theta: float = 100.0
    image_size: int = 64
    max_flat: float = 1.0
    num_crops: int = 24000
    window: int = 16
    num_targets: int = 128
    absolute_positions: bool = False
    captions: Path | None = None
    max_words: int = 15
    drop_prompt: float = 0.2
    ema_decay: float = 0.995
    weight_decay: float = 0.01
    num_eval: int = 128

    def resolved(self) -> Config:
        """With the sizes of `init`, and the settings of a smoke run if one was asked for."""
        config = dataclasses.replace(self, codec=model_folder(self.codec))
        if self.init is not None:
            sizes = training.initial_sizes(self, "prior", TransformerConfig)
            names = ("width", "num_layers", "num_heads", "mlp_width", "code_rank", "rope_theta")
            config = dataclasses.replace(config, **{name: getattr(sizes, name) for name in names})
            if sizes.absolute_side is not None:
                config = dataclasses.replace(config, absolute_positions=True)
        if not self.smoke:
            return config
        tiny = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 24, "code_rank": 4}
        return dataclasses.replace(
            config, **({} if self.init else tiny), image_size=32, num_crops=12, steps=6,
            window=8 if config.absolute_positions else 4, batch_size=4, num_targets=8, warmup=2,
            eval_every=3, save_every=3, num_eval=4,
        )  # fmt: skip

    def transformer(self, quantizer: Quantizer, num_words: int = 0) -> TransformerConfig:
        """Sizes of the prior for the codes of a codebook.

        `num_words` is the number of ids of prompts, behind those of the codes and the mask.
        """
        groups = math.prod(quantizer.axes)
        num_codes = groups * quantizer.num_codes
        return TransformerConfig(
            vocab_size=num_codes + 1 + num_words,
            num_outputs=num_codes,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_width=self.mlp_width,
            rope_theta=self.rope_theta,
            rope_axes=2,
            absolute_side=self.window if self.absolute_positions else None,
            code_bits=quantizer.num_bits if isinstance(quantizer, LFQ) else None,
            code_rank=self.code_rank,
            token_groups=groups,
        )


def bundle(
    weights: PyTree, config: Config, model: TransformerConfig, prompts: Prompts | None
) -> Prior:
    """The prior, its prompt empty if it takes any."""
    window = None if config.absolute_positions else config.window
    if prompts is None:
        return make_prior(model, weights, window=window)
    return make_prompted_prior(
        model,
        weights,
        prompt=prompts.vocabulary.prompt,
        prompt_ids=jnp.zeros((0,), jnp.int32),
        window=window,
    )


def evaluate(
    prior: Prior, tokens: dict[str, np.ndarray], config: Config, prompts: Prompts | None
) -> dict[str, float]:
    """Held-out cross-entropies, with the captions too if there are any."""
    scores = prior_scores.evaluate(prior, tokens["eval"], config.window)
    if prompts is None or not any(prompts.held_out):
        return scores
    ids = captions.framed(prompts.vocabulary, prompts.held_out)
    prompted = prior_scores.evaluate(prior, tokens["eval"], config.window, ids)
    return scores | {f"{name}_prompted": value for name, value in prompted.items()}


def export(
    params: PyTree,
    config: Config,
    model: TransformerConfig,
    numbers: Array,
    prompts: Prompts | None,
    facts: dict[str, object],
) -> None:
    """Writes the model folder."""
    folder = config.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != config.codec.resolve():
        shutil.copyfile(config.codec / "codec.safetensors", folder / "codec.safetensors")
        codec_card = checkpoint.read_card(config.codec)
        kept = {
            name: codec_card[name] for name in ("codec", "codec_training") if name in codec_card
        }
        checkpoint.update_card(folder, **kept)
    if prompts is not None:
        prompts.vocabulary.save_tokenizer(folder / TOKENIZER_NAME)
        checkpoint.update_card(folder, prompt=dataclasses.asdict(prompts.vocabulary.prompt))
    checkpoint.save_params(folder / "prior.safetensors", merge(params, numbers), "float16")
    checkpoint.update_card(
        folder,
        prior=dataclasses.asdict(model),
        prior_window=None if config.absolute_positions else config.window,
        prior_training=facts,
    )


def initial_params(config: Config, model: TransformerConfig, quantizer: Quantizer) -> PyTree:
    """Random weights, or those of the prior in `config.init`, which must have the same sizes.

    What that prior lacks, positions or words, starts from random weights. For a codec that went
    on from one of signs (`train_codec --codec.quantizer`) the prior of those will do.

    Raises:
      ValueError: it is of another codec.
    """
    weights = jax.jit(init_transformer_params, static_argnums=1)(jax.random.key(config.seed), model)
    num_numbers = math.prod(quantizer.axes) * quantizer.num_features
    scale = 1 / math.sqrt(num_numbers)
    if config.init is not None:
        scale = 0.0  # The rows that are given have what the numbers of a code say.
        given = _given(config, model, quantizer)
        own = traverse_util.flatten_dict(weights, sep="/")
        for name, leaf in given.items():
            if name in own and own[name].shape == leaf.shape:
                own[name] = leaf
            elif name == "embed/embedding":  # Other words: they share the codes and the mask.
                shared = model.output_size + 1
                own[name] = own[name].at[:shared].set(leaf[:shared])
            elif name in own:  # Rows without those of codes: the mask is the first.
                own[name] = own[name].at[0].set(leaf[0])
        weights = traverse_util.unflatten_dict(own, sep="/")
    params = {"model": weights, "head_bits": jnp.zeros((model.width, num_numbers))}
    if model.code_bits is None:  # As large as the projection of bits by `CodeEmbedding`.
        shape = (num_numbers, model.width)
        params["embed_numbers"] = scale * jax.random.normal(jax.random.key(config.seed), shape)
    return params


def _given(config: Config, model: TransformerConfig, quantizer: Quantizer) -> dict[str, Array]:
    """Weights by path of the prior in `config.init`, in the form that `model` has."""
    source = training.initial_sizes(config, "prior", TransformerConfig)
    is_widened = source.code_bits is not None and widening.is_wider(source.code_bits, quantizer)
    if source.code_bits != model.code_bits and not is_widened:
        raise ValueError(
            f"--init {config.init} has a prior of {source.code_bits}-bit codes; this codec has "
            f"{model.code_bits}: leave it out, or start the codec from the same model"
        )
    given = checkpoint.load_params(
        model_folder(config.init) / "prior.safetensors",
        jax.eval_shape(lambda key: init_transformer_params(key, source), jax.random.key(0)),
    )
    if is_widened:
        given = widening.prior_of(given, source, quantizer)
    return traverse_util.flatten_dict(given, sep="/")


def learn(
    config: Config,
    model: TransformerConfig,
    params: PyTree,
    numbers: Array,
    tokens: dict[str, np.ndarray],
    prompts: Prompts | None,
    score: Callable[[training.TrainState, dict[str, float]], dict[str, float]],
) -> None:
    """Trains `initial_params` until the end or the minutes are over; writes the log."""
    compute = dataclasses.replace(model, dtype=config.dtype)
    optimizer = training.make_optimizer(config)
    loss = functools.partial(
        masked_loss, model=compute, numbers=numbers, num_targets=config.num_targets,
        prompt=None if prompts is None else prompts.vocabulary.prompt,
    )  # fmt: skip
    key = jax.random.key(config.seed + 1)
    step = training.make_update(loss, optimizer, config.ema_decay, key)

    def batches(steps):
        for step in steps:
            chosen, grids = random_windows(tokens["train"], config, step)
            yield step, (grids, prompts and prompts.draw(chosen, config, step))

    start = training.init_state(params, optimizer)
    training.fit(
        start,
        lambda state, batch: step(state, *batch),
        batches,
        score,
        config,
        config.out / "prior.jsonl",
    )


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    training.claim(config)
    codec = load_codec(config.codec)
    tokens = crop_tokens(config, codec)
    if config.absolute_positions and tokens["train"].shape[1] != config.window:
        raise ValueError(
            f"--absolute-positions reads whole pictures, so --window must be "
            f"{tokens['train'].shape[1]}, the side of their token grid; got {config.window}"
        )
    prompts = read_prompts(config, tokens, codec.quantizer)
    words = None if prompts is None else prompts.vocabulary
    num_words = 0 if words is None else words.size - words.first - 1
    model = config.transformer(codec.quantizer, num_words)
    numbers = code_numbers(codec.quantizer)
    yardsticks = prior_scores.yardsticks(tokens, codec.quantizer)
    shapes = jax.eval_shape(lambda key: init_transformer_params(key, model), jax.random.key(0))
    size = num_params(shapes)
    print(f"{size / 1e6:.2f} M parameters, {len(tokens['train'])} crops, {yardsticks}", flush=True)

    def facts(row, scores):
        return training.facts(config, row, "prior_training") | {
            "parameters": size,
            "crops": len(tokens["train"]),
            "eval_crops": len(tokens["eval"]),
            **{name: round(value, 3) for name, value in scores.items()},
        }

    def score(state, row):
        prior = bundle(merge(state.ema, numbers), config, model, prompts)
        scores = evaluate(prior, tokens, config, prompts)
        export(state.ema, config, model, numbers, prompts, facts(row, yardsticks | scores))
        return scores

    params = initial_params(config, model, codec.quantizer)
    learn(config, model, params, numbers, tokens, prompts, score)

    rows = training.read_rows(config.out / "prior.jsonl")
    # The rounded weights, as they are used.
    prior = load_prior(config.out / "model")
    scores = yardsticks | evaluate(prior, tokens, config, prompts)
    checkpoint.update_card(config.out / "model", prior_training=facts(rows[-1], scores))
    print("exported weights:", scores, flush=True)
    curves = ["eval_ce_0.1", "eval_ce_0.5", "eval_ce_1", "eval_ce"]
    panels = {"training cross-entropy (nats)": ["loss"], "held out, by mask ratio": curves}
    training.plot_curves(rows, panels, config.out / "prior_curves.png")
    key = jax.random.key(config.seed)
    save_samples(config.out / "prior_samples.png", prior, codec, tokens["eval"], key)


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_prior", train, arguments)
