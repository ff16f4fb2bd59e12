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
import hashlib
import io
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import traverse_util

from aps_jax.codec import lfq
from aps_jax.codec.magvit2 import decode_tokens, encode_tokens
from aps_jax.io import checkpoint
from aps_jax.io.files import write_atomically
from aps_jax.pretrained import load_codec, load_prior, model_folder
from aps_jax.prior.bundle import grid_hidden, make_prior, make_prompted_prior, prompted_hidden
from aps_jax.prior.guidance import carry_over, log_prior
from aps_jax.prior.prompts import PromptConfig
from aps_jax.prior.transformer import (
    Transformer,
    TransformerConfig,
    init_transformer_params,
    num_params,
)
from aps_jax.samplers import decoding
from aps_jax.samplers.maskgit import MaskGITConfig
from aps_jax.sampling.target import fold
from aps_jax.text.tokenizer import TOKENIZER_NAME
from aps_jax.types import Array, Codec, Key, Prior, PyTree
from experiments import captions, photos, training
from experiments.train import prior_scores


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

    def transformer(self, num_bits: int, num_words: int = 0) -> TransformerConfig:
        """Sizes of the prior for a codec with `num_bits` bits per code.

        `num_words` is the number of ids of prompts, behind those of the codes and the mask.
        """
        num_codes = 2**num_bits
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
            code_bits=num_bits,
            code_rank=self.code_rank,
        )


def crop_tokens(config: Config, codec: Codec) -> dict[str, np.ndarray]:
    """Tokens of all crops, uint16 [crops, h, w], for "train" and "eval"; cached in the run folder.

    "train_files" and "eval_files" are the pictures they are from.

    The cache is keyed by the codec's weights and by every setting that changes the crops.
    """
    weights = (config.codec / "codec.safetensors").read_bytes()
    settings = (
        config.data, config.eval_data, config.image_size, config.num_crops, config.seed,
        config.num_eval, config.eval_shrink, config.absolute_positions,
    )  # fmt: skip
    key = hashlib.sha256(weights + repr(settings).encode()).hexdigest()
    path = config.out / "tokens.npz"
    if path.exists():
        with np.load(path) as cached:
            if str(cached["key"]) == key:
                return {name: cached[name] for name in cached.files if name != "key"}

    @jax.jit
    def encode(codec, pixels):
        return encode_tokens(codec, pixels.astype(jnp.float32) / 127.5 - 1).astype(jnp.uint16)

    size, batch = config.image_size, min(16, config.num_crops)
    pictures = photos.load_named_photos(config.data, min_side=size, max_short_side=256)
    print(f"{len(pictures)} training photos", flush=True)
    # Every photo is used equally often before any is used once more.
    order = np.random.default_rng(config.seed).permutation(len(pictures))
    chosen = order[np.arange(config.num_crops) % len(order)]

    def crops(first: int) -> np.ndarray:
        indices = range(first, min(first + batch, config.num_crops))
        made = [
            photos.random_crop(
                np.random.default_rng((config.seed, index)),
                pictures[chosen[index]][1],
                size,
                is_whole=config.absolute_positions,
            )
            for index in indices
        ]
        made += made[:1] * (batch - len(made))  # One shape, one compilation.
        return np.stack([np.asarray(crop) for crop in made])

    start = time.monotonic()
    train = []
    starts = range(0, config.num_crops, batch)
    with ThreadPoolExecutor(1) as pool:
        for first, pixels in zip(starts, pool.map(crops, starts), strict=True):
            train.append(np.asarray(encode(codec, pixels)))
            if first // batch % 200 == 0:
                print(
                    f"tokens of {first + batch} crops, {time.monotonic() - start:.0f} s", flush=True
                )
    files, held_out = photos.center_crops(
        config.eval_data, size=size, shrink=config.eval_shrink, count=config.num_eval
    )
    pixels = np.round((held_out + 1) * 127.5).astype(np.uint8)
    tokens = {
        "train": np.concatenate(train)[: config.num_crops],
        "train_files": np.array([pictures[index][0].as_posix() for index in chosen]),
        "eval": np.concatenate(
            [np.asarray(encode(codec, pixels[i : i + 16])) for i in range(0, len(pixels), 16)]
        ),
        "eval_files": np.array(files),
    }
    archive = io.BytesIO()
    np.savez(archive, key=np.asarray(key), **tokens)
    write_atomically(path, archive.getvalue())
    return tokens


def random_windows(tokens: np.ndarray, config: Config, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [B] and grids int32 [B, window, window] of one step: a function of (seed, step)."""
    rng = np.random.default_rng((config.seed, 1, step))
    side = config.window
    chosen = rng.integers(len(tokens), size=config.batch_size)
    tops = rng.integers(tokens.shape[1] - side + 1, size=config.batch_size)
    lefts = rng.integers(tokens.shape[2] - side + 1, size=config.batch_size)
    return chosen, np.stack(
        [
            tokens[index, top : top + side, left : left + side].astype(np.int32)
            for index, top, left in zip(chosen, tops, lefts, strict=True)
        ]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of training and held-out pictures.

    Attributes:
      vocabulary: words of all captions.
      train: phrases of every crop; empty for pictures without a caption.
      held_out: likewise.
    """

    vocabulary: captions.Vocabulary
    train: list[tuple[str, ...]]
    held_out: list[tuple[str, ...]]

    def draw(self, chosen: np.ndarray, config: Config, step: int) -> np.ndarray:
        """Random prompts int32 [B, max_words] of crops, a function of (seed, step)."""
        rng = np.random.default_rng((config.seed, 2, step))
        drop = config.drop_prompt
        drawn = [captions.random_phrases(rng, self.train[i], drop=drop) for i in chosen]
        return captions.framed(self.vocabulary, drawn)


def read_prompts(config: Config, tokens: dict[str, np.ndarray], num_codes: int) -> Prompts | None:
    """Captions of all crops, None without `config.captions`.

    Raises:
      ValueError: no picture has a caption.
    """
    if config.captions is None:
        return None
    found = captions.read_captions(config.captions)
    train, held_out = (
        [captions.phrases_of(found, Path(file)) for file in tokens[f"{part}_files"]]
        for part in ("train", "eval")
    )
    if not any(train):
        raise ValueError(
            f"no training picture is named in {config.captions}; its column `file` must hold file "
            f"names such as {Path(tokens['train_files'][0]).name}"
        )
    print(f"{sum(map(bool, train))} of {len(train)} crops have captions", flush=True)
    vocabulary = captions.vocabulary(found, num_codes=num_codes, max_words=config.max_words)
    return Prompts(vocabulary=vocabulary, train=train, held_out=held_out)


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


def merge(params: PyTree) -> PyTree:
    """Model weights of the trained ones.

    The head is trained as a free matrix plus a linear map of the bits of every code, so that codes
    share what they learn; the sum is an ordinary head.
    """
    bits = params["head_bits"]
    kernel = params["model"]["head"]["kernel"]
    kernel = kernel + bits @ lfq.codebook(bits.shape[1]).T
    return params["model"] | {"head": {"kernel": kernel}}


def masked_loss(
    params: PyTree,
    tokens: Array,
    prompt_ids: Array | None,
    key: Key,
    model: TransformerConfig,
    num_targets: int,
    prompt: PromptConfig | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy over at most `num_targets` masked positions of every grid [B, h, w].

    `prompt_ids` are framed prompts [B, P], for a model with `prompt`.
    """
    weights = merge(params)
    batch, length = tokens.shape[0], tokens.shape[1] * tokens.shape[2]
    order, counts = draw_masks(key, batch, length)
    is_masked = jnp.argsort(order, axis=-1) < counts[:, None]
    noisy = jnp.where(is_masked.reshape(tokens.shape), model.output_size, tokens)
    if prompt is None:
        hidden = grid_hidden(weights, noisy, config=model)
    else:
        hidden = prompted_hidden(weights, prompt_ids, noisy, config=model, prompt=prompt)

    # The masked positions come first in a random order: its beginning is a random subset of them.
    targets = order[:, :num_targets]
    counted = (jnp.arange(targets.shape[1])[None] < counts[:, None]).astype(jnp.float32)
    hidden = jnp.take_along_axis(hidden, targets[:, :, None], axis=1)
    labels = jnp.take_along_axis(tokens.reshape(batch, length), targets, axis=1)
    logits = Transformer(model).apply({"params": weights}, hidden, method="logits")
    losses, hits = prior_scores.cross_entropy(logits, labels)
    loss = jnp.sum(losses * counted) / jnp.sum(counted)
    return loss, {"loss": loss, "accuracy": jnp.sum(hits * counted) / jnp.sum(counted)}


def complete(
    key: Key, prior: Prior, tokens: Array, *, num_steps: int, **guidance: float | None
) -> Array:
    """Fills the masked positions of `tokens` [B, h, w] by ancestral sampling in random order.

    The number of masked tokens follows the cosine schedule; within a step tokens are drawn
    independently. `guidance` are options of `log_prior`.
    """
    config = MaskGITConfig(num_steps=num_steps, reveal="random")

    @jax.jit
    def sample(prior, tokens, keys):
        flat = tokens.reshape(tokens.shape[0], -1)

        def step(state, index):
            seen = log_prior(prior, state.tokens, tokens.shape[1:], **guidance)
            return decoding.reveal(
                config, fold(keys, index), carry_over(seen, state.tokens), state, index,
                is_unknown=flat == prior.num_codes,
            ), None  # fmt: skip

        state, _ = jax.lax.scan(step, decoding.start(flat), jnp.arange(num_steps))
        return state.tokens.reshape(tokens.shape)

    return sample(prior, tokens, jax.random.split(key, tokens.shape[0]))


def save_samples(path: Path, prior: Prior, codec: Codec, tokens: np.ndarray, key: Key) -> None:
    """Grid of pictures: two rows of samples, held-out crops, their left halves, completions."""
    count, steps = min(8, len(tokens)), 32
    grid = jnp.asarray(tokens[:count].astype(np.int32))
    nothing = jnp.full((2 * count, *grid.shape[1:]), prior.num_codes, jnp.int32)
    keys = jax.random.split(key)
    samples = complete(keys[0], prior, nothing, num_steps=steps)
    half = grid.at[:, :, grid.shape[2] // 2 :].set(prior.num_codes)
    restored = complete(keys[1], prior, half, num_steps=steps)
    decode = jax.jit(decode_tokens)
    samples, originals, restored = (np.asarray(decode(codec, x)) for x in (samples, grid, restored))
    shown = originals.copy()
    shown[:, :, shown.shape[2] // 2 :] = 0
    rows = [samples[:count], samples[count:], originals, shown, restored]
    training.save_grid(rows, path, zoom=2)


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
    checkpoint.save_params(folder / "prior.safetensors", merge(params), "float16")
    checkpoint.update_card(
        folder,
        prior=dataclasses.asdict(model),
        prior_window=None if config.absolute_positions else config.window,
        prior_training=facts,
    )


def initial_params(config: Config, model: TransformerConfig) -> PyTree:
    """Random weights, or those of the prior in `config.init`, which must have the same sizes.

    What that prior lacks, positions or words, starts from random weights.

    Raises:
      ValueError: it is of another codec.
    """
    weights = init_transformer_params(jax.random.key(config.seed), model)
    if config.init is not None:
        source = training.initial_sizes(config, "prior", TransformerConfig)
        if source.code_bits != model.code_bits:
            raise ValueError(
                f"--init {config.init} has a prior of {source.code_bits}-bit codes; this codec has "
                f"{model.code_bits}: leave it out, or start the codec from the same model"
            )
        given = checkpoint.load_params(
            model_folder(config.init) / "prior.safetensors",
            jax.eval_shape(lambda key: init_transformer_params(key, source), jax.random.key(0)),
        )
        own, given = (traverse_util.flatten_dict(tree, sep="/") for tree in (weights, given))
        for name, leaf in given.items():
            if name in own and own[name].shape == leaf.shape:
                own[name] = leaf
            elif name in own:  # Other words: they have only the mask in common, the first row.
                own[name] = own[name].at[0].set(leaf[0])
        weights = traverse_util.unflatten_dict(own, sep="/")
    return {"model": weights, "head_bits": jnp.zeros((model.width, model.code_bits))}


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
    prompts = read_prompts(config, tokens, codec.num_codes)
    num_words = 0 if prompts is None else prompts.vocabulary.size - codec.num_codes - 1
    model = config.transformer(codec.quantizer.num_features, num_words)
    yardsticks = prior_scores.yardsticks(tokens, codec.codebook)
    params = initial_params(config, model)
    size = num_params(params["model"])
    print(f"{size / 1e6:.2f} M parameters, {len(tokens['train'])} crops, {yardsticks}", flush=True)
    compute = dataclasses.replace(model, dtype=config.dtype)
    optimizer = training.make_optimizer(config)
    mask_key = jax.random.key(config.seed + 1)
    frame = None if prompts is None else prompts.vocabulary.prompt

    @jax.jit
    def update(state, batch):
        key = jax.random.fold_in(mask_key, state.step)
        (_, terms), grads = jax.value_and_grad(masked_loss, has_aux=True)(
            state.params, *batch, key, compute, config.num_targets, frame
        )
        return training.apply_gradients(state, grads, optimizer, config.ema_decay), terms

    def batches(steps):
        for step in steps:
            chosen, grids = random_windows(tokens["train"], config, step)
            yield step, (grids, prompts and prompts.draw(chosen, config, step))

    def facts(row, scores):
        return {
            "data": config.description or [str(path) for path in config.data],
            "parameters": size,
            "crops": len(tokens["train"]),
            "steps": row["step"],
            "batch_size": config.batch_size,
            "optimizer": config.optimizer,
            "seconds": round(row["seconds"]),
            "device": training.device_name(),
            "eval_crops": len(tokens["eval"]),
            **training.origin(config, "prior_training"),
            **{name: round(value, 3) for name, value in scores.items()},
        }

    def score(state, row):
        prior = bundle(merge(state.ema), config, model, prompts)
        scores = evaluate(prior, tokens, config, prompts)
        export(state.ema, config, model, prompts, facts(row, yardsticks | scores))
        return scores

    log = config.out / "prior.jsonl"
    training.fit(training.init_state(params, optimizer), update, batches, score, config, log)

    rows = training.read_rows(log)
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


if __name__ == "__main__":
    sys.exit(training.run("train_prior", train, tyro.cli(Config)))
