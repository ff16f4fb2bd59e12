"""How far samples of priors are from held-out pictures, in the features of a network.

    python -m experiments.prior_distance --model face64 --train FACES --data HELD_OUT \
        --denoisers experiments/models/face64_continuous --out experiments/results/face64

The distance is the kernel distance of Bińkowski et al. (arXiv:1801.01401): the unbiased estimate
of the squared maximum mean discrepancy under their cubic kernel. The features are those of VGG16
(its last block, averaged over the places) in place of the Inception network, so the numbers
compare with each other and with no other table. Beside the priors stand training pictures, which
are the floor, and what the codec keeps of held-out ones, which is the floor of priors over its
tokens. Writes `distance.json`, `distance.md` and `distance.png`, a row of samples per prior.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from PIL import ImageOps

import aps_jax
from aps_jax.codec import latents
from aps_jax.codec.magvit2 import decode_tokens, reconstruct
from aps_jax.io import checkpoint
from aps_jax.io.files import write_atomically, write_json
from aps_jax.presets import kinds_of
from aps_jax.pretrained import Model, load_denoiser, model_folder
from aps_jax.scores.lpips import vgg_features
from aps_jax.types import Array
from experiments import photos
from experiments.bench.summary import Gain, interval
from experiments.command import command
from experiments.figures import save_grid
from experiments.train import completion
from experiments.train.diffusion import draw

#: Pictures in a block, from which one estimate is made. Blocks are independent, but for those of
#: coded pictures, each of which meets the pictures that the next one is made of.
BLOCK = 32

_BATCH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line.

    Attributes:
      model: embedded model or folder with a prior over tokens, unprompted.
      train: folders of pictures that it was trained on.
      data: folder of pictures that nothing was trained on.
      out: folder of the results.
      denoisers: model folders with a denoiser of pixels or of latents.
      size: side of the pictures in pixels.
      count: samples per prior, and pictures of each kind; a multiple of 32, at least 64.
      num_steps: steps of decoding, and of the denoisers' ODE (two calls each).
      temperature: divides the prior's logits.
      seed: seed of all draws.
    """

    model: str
    train: tuple[Path, ...]
    data: Path
    out: Path
    denoisers: tuple[Path, ...] = ()
    size: int = 64
    count: int = 256
    num_steps: int = 32
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count % BLOCK or self.count < 2 * BLOCK:
            raise ValueError(f"--count must be a multiple of {BLOCK} from {2 * BLOCK} up")


def kernel_distance(x: np.ndarray, y: np.ndarray) -> Gain:
    """Squared maximum mean discrepancy, and half the width of its 95 % interval.

    The mean over blocks of `BLOCK` rows of the unbiased estimate under the kernel (x.y / d + 1)^3,
    which may be negative where the laws are alike; the interval is Student's, of the blocks' mean.

    Args:
      x: features [n, d], n a multiple of `BLOCK`.
      y: as many.
    """
    from sklearn.metrics.pairwise import polynomial_kernel

    def mean_of_pairs(gram: np.ndarray) -> float:
        size = len(gram)
        return (gram.sum() - np.trace(gram)) / (size * (size - 1))

    found = []
    for first in range(0, len(x), BLOCK):
        a, b = (rows[first : first + BLOCK].astype(np.float64) for rows in (x, y))
        within = [mean_of_pairs(polynomial_kernel(rows, degree=3)) for rows in (a, b)]
        found.append(sum(within) - 2 * np.mean(polynomial_kernel(a, b, degree=3)))
    return interval(found)


def samples_of(arguments: Arguments, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Name and samples [count, H, W, 3] of every prior."""
    keys = jax.random.split(jax.random.key(arguments.seed), arguments.count // _BATCH)
    side = arguments.size // model.codec.stride
    nothing = jnp.full((_BATCH, side, side), model.prior.num_codes, jnp.int32)
    decode = jax.jit(decode_tokens)

    def one(key: Array) -> np.ndarray:
        tokens = completion.complete(
            key, model.prior, nothing, num_steps=arguments.num_steps,
            prior_temperature=arguments.temperature,
        )  # fmt: skip
        return np.asarray(decode(model.codec, tokens))

    yield f"prior of {arguments.model}", np.concatenate([one(key) for key in keys])
    for folder in arguments.denoisers:
        for kind in kinds_of(folder):
            if kind != "prior":
                yield f"{kind} of {folder.name}", _drawn(arguments, folder, kind, keys)


def _drawn(arguments: Arguments, folder: Path, kind: str, keys: Array) -> np.ndarray:
    """Samples of a denoiser."""
    denoiser = load_denoiser(folder, is_latent=kind == "latent denoiser")
    side = checkpoint.read_card(model_folder(folder))[kind.replace(" ", "_")]["side"]
    shape = (_BATCH, side, side, denoiser.num_channels)
    rows = [draw(denoiser, key, shape, num_steps=arguments.num_steps) for key in keys]
    if denoiser.codec is not None:
        decode = jax.jit(latents.decode, static_argnums=2)
        size = (arguments.size, arguments.size)
        rows = [decode(denoiser.codec, row, size) for row in rows]
    return np.concatenate([np.asarray(row) for row in rows])


@command("prior_distance", memory_cure="lower --count")
def main(arguments: Arguments) -> None:
    """Writes distances and pictures."""
    model = aps_jax.load_pretrained(arguments.model)
    features = vgg_features(aps_jax.load_lpips())
    # The features are an argument: their weights would be constants of the program otherwise.
    mean_of_last = jax.jit(lambda features, x: features(x)[-1].mean(axis=(1, 2)))
    size, count = arguments.size, arguments.count

    def described(pictures: np.ndarray) -> np.ndarray:
        batches = np.split(np.clip(pictures, -1, 1), count // _BATCH)
        return np.concatenate([np.asarray(mean_of_last(features, x)) for x in batches])

    def pictures_of(folders: tuple[Path, ...]) -> np.ndarray:
        # Blocks are to be alike, whatever the order of the files.
        files = np.random.default_rng(arguments.seed).permutation(photos.list_images(folders))
        if len(files) < count:
            raise ValueError(f"--count {count} needs as many pictures; {folders} has {len(files)}")
        pictures = [ImageOps.fit(photos.load_rgb(path), (size, size)) for path in files[:count]]
        return photos.to_float(pictures)

    held_out = pictures_of((arguments.data,))
    wanted = described(held_out)
    restored = jax.jit(reconstruct)
    # No picture is compared with itself: a block meets that of the next ones.
    others = np.split(np.roll(held_out, BLOCK, axis=0), count // _BATCH)
    kept = np.concatenate([np.asarray(restored(model.codec, x)) for x in others])
    rows, grid = [], []
    pictures = {"training pictures": pictures_of(arguments.train), "held out, coded": kept}
    for name, found in itertools.chain(pictures.items(), samples_of(arguments, model)):
        distance, half_width = kernel_distance(described(found), wanted)
        rows.append({"pictures": name, "distance": distance, "interval": half_width})
        print(rows[-1], flush=True)
        grid += [] if name in pictures else [np.clip(found[:8], -1, 1)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_grid(grid, arguments.out / "distance.png", zoom=2)
    shared = {name: getattr(arguments, name) for name in ("count", "num_steps", "seed")}
    write_json(arguments.out / "distance.json", {**shared, "rows": rows})
    write_atomically(arguments.out / "distance.md", _table(rows).encode())


def _table(rows: list[dict[str, float]]) -> str:
    frame = pd.DataFrame(
        {
            "pictures": [row["pictures"] for row in rows],
            "kernel distance": [f"{row['distance']:.3f} ± {row['interval']:.3f}" for row in rows],
        }
    )
    return frame.to_markdown(index=False) + "\n"
