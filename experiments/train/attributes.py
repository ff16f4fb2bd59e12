"""Trains the network of face attributes on the faces of CelebA.

    python -m experiments.train_attributes --data CELEBA --attributes celeba_attributes.csv \
        --eval-data HELD_OUT --out runs/attributes

Half of the faces it sees were encoded and decoded by `face64`, with noise on their codes, and some
are blurred, noisy, moved or of other contrast: a reward is asked about such pictures, and its
gradient must mean something there. A run that is interrupted goes on where it stopped when started
again with the same `--out`; the averaged weights are exported to `OUT/model` at every held-out
score.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import aps_jax
from aps_jax.faces.attributes import (
    SECTION,
    Attributes,
    AttributesConfig,
    init_attributes_params,
    make_attributes,
)
from aps_jax.images import from_uint8, to_uint8
from aps_jax.io import checkpoint
from aps_jax.types import Array, Key
from experiments import photos, training
from experiments.train.codec_loss import noisy_codes

#: Our names, which are those of the prompts, and CelebA's; "-" where CelebA says the opposite.
ATTRIBUTES = {
    "man": "Male",
    "young": "Young",
    "smiling": "Smiling",
    "open_mouth": "Mouth_Slightly_Open",
    "eyeglasses": "Eyeglasses",
    "hat": "Wearing_Hat",
    "bangs": "Bangs",
    "beard": "-No_Beard",
    "mustache": "Mustache",
    "bald": "Bald",
    "black_hair": "Black_Hair",
    "blond_hair": "Blond_Hair",
    "brown_hair": "Brown_Hair",
    "gray_hair": "Gray_Hair",
    "lipstick": "Wearing_Lipstick",
    "necktie": "Wearing_Necktie",
    "earrings": "Wearing_Earrings",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      attributes: CSV file with a column `file` and one per attribute of CelebA, 1 or 0.
      first: number of the first file to train on, counted from 1.
      last: number of the last one.
      num_decoded: faces that are also seen as the codec of `face64` shows them, half of the time.
      code_noise: noise on the codes of the faces that were decoded, as for `train_codec`.
    """

    attributes: Path
    first: int = 1
    last: int = 4750
    num_decoded: int = 1600
    code_noise: float = 0.35
    steps: int = 800
    batch_size: int = 48

    def resolved(self) -> Config:
        """With the settings of a smoke run if one was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, last=self.first + 7, steps=4, batch_size=4, eval_every=2, save_every=2,
            num_eval=8, warmup=1,
        )  # fmt: skip


def read_labels(path: Path, names: Sequence[str]) -> np.ndarray:
    """Labels bool [N, A] of files by name, in the order of `ATTRIBUTES`.

    Raises:
      ValueError: if the file has no row for one of them, or lacks an attribute.
    """
    with path.open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    labels = []
    for name in names:
        if name not in rows:
            raise ValueError(f"{path} has no row for {name}; give the attributes of these faces")
        row = rows[name]
        for column in ATTRIBUTES.values():
            if column.removeprefix("-") not in row:
                raise ValueError(f"{path} has no column {column.removeprefix('-')}")
            labels.append((int(row[column.removeprefix("-")]) == 1) != column.startswith("-"))
    return np.array(labels).reshape(len(names), len(ATTRIBUTES))


def load_faces(
    data: Sequence[Path], attributes: Path, first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """Faces uint8 [N, 64, 64, 3], the files from number `first` to `last`, and their labels.

    Raises:
      ValueError: if there is no such file, or one is of another size or has no labels.
    """
    named = photos.load_named_photos(data, min_side=64)[first - 1 : last]
    if not named:
        raise ValueError(f"--data has no file number {first}; lower --first")
    wrong = [path.name for path, image in named if image.size != (64, 64)]
    if wrong:
        raise ValueError(f"{wrong[0]} is not 64x64 pixels; give aligned faces of that size")
    faces = np.stack([np.asarray(image) for _, image in named])
    return faces, read_labels(attributes, [path.name for path, _ in named])


def decoded(faces: np.ndarray, seed: int, noise: float) -> np.ndarray:
    """Faces uint8 [N, 64, 64, 3] as the codec of `face64` shows them, with noise on their codes."""
    codec = aps_jax.load_pretrained("face64").codec

    @jax.jit
    def show(codec, key, x):
        codes = codec.quantizer.lookup(codec.quantizer.nearest(codec.encode(codec.params, x)))
        return codec.decode(codec.params, noisy_codes(key, codes, noise))

    shown, size = [], 32
    for start in range(0, len(faces), size):
        batch = faces[start : start + size]
        padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        key = jax.random.fold_in(jax.random.key(seed), start)
        shown.append(to_uint8(show(codec, key, from_uint8(padded)))[: len(batch)])
    return np.concatenate(shown)


def cached_decoded(faces: np.ndarray, config: Config) -> np.ndarray:
    """`decoded` of the first `config.num_decoded` faces, made once per run."""
    path = config.out / "decoded.npy"
    if not path.exists():
        shown = decoded(faces[: config.num_decoded], config.seed, config.code_noise)
        part = path.with_suffix(".part.npy")
        np.save(part, shown)
        part.replace(path)
    return np.load(path)


def augment(key: Key, x: Array) -> Array:
    """Faces [B, H, W, 3] mirrored, moved, blurred, noisy and of other contrast, each at random."""
    flip, move, blur, noise, level, light = jax.random.split(key, 6)
    batch, height, width, _ = x.shape

    def each(shape: tuple[int, ...] = (1, 1, 1)) -> tuple[int, ...]:
        return (batch, *shape)

    x = jnp.where(jax.random.bernoulli(flip, 0.5, each()), x[:, :, ::-1], x)
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    x = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (height, width, 3)))(
        padded, jax.random.randint(move, (batch, 2), 0, 5)
    )
    blurred = [
        jax.image.resize(
            jax.image.resize(x, (batch, height // factor, width // factor, 3), "linear"),
            x.shape, "linear",
        )
        for factor in (2, 4)
    ]  # fmt: skip
    which = jax.random.choice(blur, 3, each(), p=jnp.array([0.6, 0.25, 0.15]))
    x = jnp.select([which == 0, which == 1], [x, blurred[0]], blurred[1])
    contrast, brightness = jax.random.uniform(light, (2, *each()), minval=-1.0)
    x = x * (1 + 0.15 * contrast) + 0.15 * brightness
    sigma = 0.15 * jax.random.uniform(level, each()) ** 2
    return x + sigma * jax.random.normal(noise, x.shape)


def loss_of(net: Attributes, x: Array, labels: Array, weights: Array) -> Array:
    """Mean cross-entropy, an attribute that is there counted `weights` [A] times."""
    losses = optax.sigmoid_binary_cross_entropy(net(x), labels)
    return jnp.mean(losses * jnp.where(labels, weights, 1.0))


def positive_weights(labels: np.ndarray) -> np.ndarray:
    """Root of how much rarer an attribute is than its absence, from 1/4 to 4."""
    share = np.clip(labels.mean(axis=0), 1e-3, 1 - 1e-3)
    return np.clip(np.sqrt((1 - share) / share), 0.25, 4).astype(np.float32)


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a face with the attribute scores above one without; NaN if there is one kind."""
    with_it, without = scores[labels], scores[~labels]
    if not (len(with_it) and len(without)):
        return float("nan")
    difference = with_it[:, None] - without[None]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def scores_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy and area under the curve per attribute [A]."""
    right = (logits > 0) == labels
    count = labels.sum(axis=0)
    with np.errstate(invalid="ignore"):
        sensitivity = (right & labels).sum(axis=0) / count
        specificity = (right & ~labels).sum(axis=0) / (len(labels) - count)
    return {
        "accuracy": right.mean(axis=0),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "auc": np.array([area_under_curve(s, y) for s, y in zip(logits.T, labels.T, strict=True)]),
    }


_logits = jax.jit(lambda net, x: net(x))


def evaluate(net: Attributes, faces: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean scores over attributes, of float faces [N, H, W, 3]."""
    logits = np.asarray(_logits(net, faces))
    return {
        f"eval_{name}": float(np.nanmean(values))
        for name, values in scores_of(logits, labels).items()
    }


def export(net: Attributes, sizes: AttributesConfig, config: Config, row: dict, count: int) -> None:
    """Writes the model folder."""
    folder = config.out / "model"
    checkpoint.save_params(folder / f"{SECTION}.safetensors", net.params, "float16")
    facts = training.facts(config, row, f"{SECTION}_training") | {
        "files": f"{config.first} to {config.last}",
        "faces": count,
        "num_decoded": config.num_decoded,
        "code_noise": config.code_noise,
    }
    facts |= {name: round(value, 4) for name, value in row.items() if name.startswith("eval_")}
    checkpoint.update_card(
        folder, **{SECTION: dataclasses.asdict(sizes), f"{SECTION}_training": facts}
    )


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    training.claim(config)
    faces, labels = load_faces(config.data, config.attributes, config.first, config.last)
    names, held_out = photos.center_crops(
        config.eval_data, size=64, shrink=1, count=config.num_eval
    )
    held_labels = read_labels(config.attributes, names)
    print(f"{len(faces)} faces, {len(held_out)} held out", flush=True)
    shown = cached_decoded(faces, config)
    weights = positive_weights(labels)
    sizes = AttributesConfig(names=tuple(ATTRIBUTES))
    optimizer = training.make_optimizer(config)

    def loss(params, batch, key):
        x = augment(key, batch["x"].astype(jnp.float32) / 127.5 - 1)
        value = loss_of(make_attributes(sizes, params), x, batch["labels"], weights)
        return value, {"loss": value}

    update = training.make_update(
        loss, optimizer, config.ema_decay, jax.random.key(config.seed + 1)
    )

    def batches(steps: range) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for step in steps:
            rng = np.random.default_rng((config.seed, step))
            chosen = rng.integers(len(faces), size=config.batch_size)
            is_shown = rng.random(config.batch_size) < 0.5
            chosen = np.where(is_shown, chosen % len(shown), chosen)
            among_shown = shown[chosen % len(shown)]
            x = np.where(is_shown[:, None, None, None], among_shown, faces[chosen])
            yield step, {"x": x, "labels": labels[chosen]}

    def score(state, row):
        net = make_attributes(sizes, state.ema)
        scores = evaluate(net, held_out, held_labels)
        export(net, sizes, config, row | scores, len(faces))
        return scores

    log = config.out / "attributes.jsonl"
    start = training.init_state(
        init_attributes_params(jax.random.key(config.seed), sizes), optimizer
    )
    training.fit(start, update, batches, score, config, log)
    panels = {"loss": ["loss"], "held-out": ["eval_balanced_accuracy", "eval_auc"]}
    training.plot_curves(training.read_rows(log), panels, config.out / "attributes_curves.png")


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_attributes", train, arguments)
