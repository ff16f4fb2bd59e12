r"""Trains a denoiser of pixels, the continuous rival of the masked prior.

    python -m experiments.train_diffusion --data FACES --eval-data HELD_OUT --out runs/diffusion
    python -m experiments.train_diffusion --crops --eval-shrink 2 --data PHOTOS \
        --eval-data HELD_OUT --out runs/diffusion_photos

The transformer has the sizes of `experiments.train_prior`, and a patch of 4x4 pixels is a position,
as a token is there, so that as many steps of as many pictures cost the same arithmetic. The loss
and its levels of noise are those of EDM (arXiv:2206.00364). A run that is interrupted goes on
where it stopped when started again with the same `--out`. The averaged weights are exported at
every held-out score to `OUT/model` (`denoiser.safetensors` in half precision and the card), beside
the log, its curves and, at the end, a grid of samples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec import latents
from aps_jax.denoiser import Denoiser
from aps_jax.io import checkpoint
from aps_jax.pretrained import load_denoiser
from aps_jax.prior.patch_denoiser import (
    PatchDenoiserConfig,
    denoising_loss,
    init_patch_denoiser_params,
    make_patch_denoiser,
)
from aps_jax.prior.transformer import num_params
from aps_jax.types import Array, Codec, Key, PyTree
from experiments import photos, training

#: Levels of noise at which held-out pictures are denoised, on the scale [-1, 1].
LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserRun(training.RunConfig):
    """Settings of the training of any denoiser.

    Attributes:
      denoiser: sizes; with `init` those of its denoiser.
    """

    SECTION: ClassVar = "denoiser"
    LOG_SIGMA_MEAN: ClassVar = -1.2

    denoiser: PatchDenoiserConfig = PatchDenoiserConfig()
    ema_decay: float = 0.995
    weight_decay: float = 0.01
    num_eval: int = 128
    eval_shrink: int = 1

    def resolved(self) -> Self:
        """With the sizes of `init`, and the settings of a smoke run if one was asked for."""
        config = self
        if self.init is not None:
            sizes = training.initial_sizes(self, self.SECTION, PatchDenoiserConfig)
            config = dataclasses.replace(self, denoiser=sizes)
        if not self.smoke:
            return config
        side = 4 * config.denoiser.patch
        tiny = dataclasses.replace(
            config.denoiser, side=side, width=16, num_layers=2, num_heads=2, mlp_width=24
        )
        return dataclasses.replace(
            config, denoiser=config.denoiser if self.init else tiny, steps=6, batch_size=4,
            warmup=2, eval_every=3, save_every=3, num_eval=4,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DenoiserRun):
    """Settings of one training run.

    Attributes:
      crops: learn random squares of several scales, for photos; without it pictures are read whole,
        as their centre squares, for aligned ones. All are resized to the denoiser's side.
      max_flat: as for `train_codec`, with `crops`.
    """

    crops: bool = False
    max_flat: float = 1.0


_decode = jax.jit(latents.decode, static_argnums=2)


@jax.jit
def _errors(denoiser: Denoiser, x: Array, pictures: Array, key: Key) -> Array:
    """Mean squared errors [levels, 1 or 2] of denoised rows, and of the pictures of latents."""
    errors = []
    for level in LEVELS:
        noisy = x + level * jax.random.normal(key, x.shape)
        found = denoiser.apply(denoiser.params, noisy, jnp.full(len(x), level))
        pairs = [(found, x)]
        if denoiser.codec is not None:
            height, width = pictures.shape[1:3]
            seen = latents.decode(denoiser.codec, found, (height, width))
            pairs.append((jnp.clip(seen, -1, 1), pictures))
        errors.append([jnp.mean(jnp.square(one - two)) for one, two in pairs])
    return jnp.asarray(errors)


def evaluate(denoiser: Denoiser, held_out: np.ndarray, pictures: np.ndarray) -> dict[str, float]:
    """PSNR in dB, peak to peak 2, of held-out rows denoised at every level.

    Those of latents decode to pictures, whose PSNR tells of the codec, too: `eval_picture_psnr`.
    """
    size = min(16, len(held_out))
    starts = range(0, len(held_out), size)
    found = [
        np.asarray(
            _errors(
                denoiser,
                jnp.asarray(held_out[i : i + size]),
                jnp.asarray(pictures[i : i + size]),
                jax.random.key(i // size),
            )
        )
        for i in starts
    ]
    sizes = [len(held_out[i : i + size]) for i in starts]
    psnr = 10 * np.log10(4 / np.average(found, axis=0, weights=sizes))
    return {
        f"{name}_{level:g}": float(one)
        for name, column in zip(("eval_psnr", "eval_picture_psnr"), psnr.T, strict=False)
        for level, one in zip(LEVELS, column, strict=True)
    }


@functools.partial(jax.jit, static_argnames=("shape", "num_steps"))
def draw(denoiser: Denoiser, key: Key, shape: tuple[int, ...], num_steps: int = 32) -> Array:
    """Samples [R, H, W, C] of the prior by Heun's method (EDM, algorithm 1, without churn)."""
    smallest, largest, rho = 0.02, 80.0, 7.0
    progress = jnp.linspace(0, 1, num_steps)
    levels = (
        largest ** (1 / rho) + progress * (smallest ** (1 / rho) - largest ** (1 / rho))
    ) ** rho

    def slope(x: Array, level: Array) -> Array:
        clean = denoiser.apply(denoiser.params, x, jnp.full(len(x), level))
        return (x - clean) / level

    def step(x: Array, pair: Array) -> tuple[Array, None]:
        level, after = pair
        first = slope(x, level)
        second = slope(x + (after - level) * first, after)
        return x + (after - level) * (first + second) / 2, None

    x = largest * jax.random.normal(key, shape)
    x, _ = jax.lax.scan(step, x, jnp.stack([levels[:-1], levels[1:]], axis=-1))
    return denoiser.apply(denoiser.params, x, jnp.full(len(x), smallest))


class Data(NamedTuple):
    """What a denoiser learns: rows, which are pictures or latents of pictures.

    Attributes:
      num_pictures: for training.
      batches: yields (step, rows [B, H, W, C]) for a range of steps, as a function of the step.
      held_out: rows that it is scored on.
      codec: whose latents the rows are; None if they are pictures.
      pictures: those behind `held_out`.
    """

    num_pictures: int
    batches: Callable[[range], Iterator[tuple[int, np.ndarray]]]
    held_out: np.ndarray
    pictures: np.ndarray
    codec: Codec | None = None


def pixels_of(config: Config) -> Data:
    """Pictures themselves."""
    side = config.denoiser.side
    pictures = photos.load_photos(config.data, min_side=side, max_short_side=256)
    _, held_out = photos.center_crops(
        config.eval_data, size=side, shrink=config.eval_shrink, count=config.num_eval
    )

    def batches(steps: range) -> Iterator[tuple[int, np.ndarray]]:
        return photos.prefetched_batches(
            pictures, config.seed, steps, batch_size=config.batch_size, size=side,
            is_whole=not config.crops, max_flat=config.max_flat,
        )  # fmt: skip

    return Data(len(pictures), batches, held_out, held_out)


def export(params: PyTree, config: DenoiserRun, facts: dict[str, object]) -> None:
    """Writes the model folder."""
    folder, section = config.out / "model", config.SECTION
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_params(folder / f"{section}.safetensors", params, "float16")
    sections = {section: dataclasses.asdict(config.denoiser), f"{section}_training": facts}
    checkpoint.update_card(folder, **sections)


def initial_params(config: DenoiserRun, *, is_latent: bool) -> PyTree:
    """Random weights, or those of the denoiser in `config.init`."""
    if config.init is not None:
        return load_denoiser(config.init, is_latent=is_latent).params
    return init_patch_denoiser_params(jax.random.key(config.seed), config.denoiser)


def learn(config: DenoiserRun, data: Data) -> None:
    """Runs or resumes a training, exports the model, and draws curves and samples."""
    is_latent, part = data.codec is not None, f"{config.SECTION}_training"
    params = initial_params(config, is_latent=is_latent)
    size = num_params(params)
    print(f"{size / 1e6:.2f} M parameters, {data.num_pictures} pictures", flush=True)
    compute = dataclasses.replace(config.denoiser, dtype=config.dtype)
    optimizer = training.make_optimizer(config)
    loss = functools.partial(denoising_loss, config=compute, log_sigma_mean=config.LOG_SIGMA_MEAN)
    update = training.make_update(
        loss, optimizer, config.ema_decay, jax.random.key(config.seed + 1)
    )

    def facts(row, scores):
        return training.facts(config, row, part) | {
            "parameters": size,
            "pictures": data.num_pictures,
            "eval_pictures": len(data.held_out),
            **{name: round(value, 2) for name, value in scores.items()},
        }

    def score(state, row):
        denoiser = make_patch_denoiser(config.denoiser, state.ema, data.codec)
        scores = evaluate(denoiser, data.held_out, data.pictures)
        export(state.ema, config, facts(row, scores))
        return scores

    log = config.out / "diffusion.jsonl"
    training.fit(training.init_state(params, optimizer), update, data.batches, score, config, log)

    logged = training.read_rows(log)
    # The rounded weights, as they are used.
    denoiser = load_denoiser(config.out / "model", is_latent=is_latent)
    scores = evaluate(denoiser, data.held_out, data.pictures)
    checkpoint.update_card(config.out / "model", **{part: facts(logged[-1], scores)})
    print("exported weights:", scores, flush=True)
    panels = {
        "training loss": ["loss"],
        "held out, denoised (dB)": [f"eval_psnr_{level:g}" for level in LEVELS],
    }
    training.plot_curves(logged, panels, config.out / "diffusion_curves.png")
    drawn = draw(denoiser, jax.random.key(config.seed), (8, *data.held_out.shape[1:]))
    shape = data.pictures.shape[1:3]
    rows = [drawn[: len(data.held_out)], data.held_out[:8]]
    if denoiser.codec is not None:
        rows = [np.asarray(_decode(denoiser.codec, row, shape)) for row in rows]
        rows.append(data.pictures[:8])
    grid = [np.clip(row, -1, 1) for row in rows]
    training.save_grid(grid, config.out / "diffusion_samples.png")


def train(config: Config) -> None:
    """Runs or resumes a training on pictures."""
    config = config.resolved()
    training.claim(config)
    learn(config, pixels_of(config))


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_diffusion", train, arguments)
