"""Trains a denoiser of pixels, the continuous rival of the masked prior, on whole pictures.

    python -m experiments.train_diffusion --data FACES --eval-data HELD_OUT --out runs/diffusion

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

import jax
import jax.numpy as jnp
import numpy as np

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
from aps_jax.types import Array, Key, PyTree
from experiments import photos, training

#: Levels of noise at which held-out pictures are denoised, on the scale [-1, 1].
LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      denoiser: sizes; with `init` those of its denoiser. Pictures are read whole, as their centre
        squares, resized to its side.
    """

    denoiser: PatchDenoiserConfig = PatchDenoiserConfig()
    ema_decay: float = 0.995
    weight_decay: float = 0.01
    num_eval: int = 128
    eval_shrink: int = 1

    def resolved(self) -> Config:
        """With the sizes of `init`, and the settings of a smoke run if one was asked for."""
        config = self
        if self.init is not None:
            sizes = training.initial_sizes(self, "denoiser", PatchDenoiserConfig)
            config = dataclasses.replace(self, denoiser=sizes)
        if not self.smoke:
            return config
        tiny = dataclasses.replace(
            config.denoiser, side=16, width=16, num_layers=2, num_heads=2, mlp_width=24
        )
        return dataclasses.replace(
            config, denoiser=config.denoiser if self.init else tiny, steps=6, batch_size=4,
            warmup=2, eval_every=3, save_every=3, num_eval=4,
        )  # fmt: skip


@jax.jit
def _errors(denoiser: Denoiser, x: Array, key: Key) -> Array:
    """Mean squared errors [levels] of denoised pictures."""
    errors = []
    for level in LEVELS:
        noisy = x + level * jax.random.normal(key, x.shape)
        found = denoiser.apply(denoiser.params, noisy, jnp.full(len(x), level))
        errors.append(jnp.mean(jnp.square(found - x)))
    return jnp.stack(errors)


def evaluate(denoiser: Denoiser, held_out: np.ndarray) -> dict[str, float]:
    """PSNR in dB, peak to peak 2, of held-out pictures denoised at every level."""
    size = min(16, len(held_out))
    batches = [held_out[i : i + size] for i in range(0, len(held_out) - size + 1, size)]
    found = [
        np.asarray(_errors(denoiser, jnp.asarray(batch), jax.random.key(index)))
        for index, batch in enumerate(batches)
    ]
    psnr = 10 * np.log10(4 / np.mean(found, axis=0))
    return {f"eval_psnr_{level:g}": float(one) for level, one in zip(LEVELS, psnr, strict=True)}


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


def export(params: PyTree, config: Config, facts: dict[str, object]) -> None:
    """Writes the model folder."""
    folder = config.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_params(folder / "denoiser.safetensors", params, "float16")
    checkpoint.update_card(
        folder, denoiser=dataclasses.asdict(config.denoiser), denoiser_training=facts
    )


def initial_params(config: Config) -> PyTree:
    """Random weights, or those of the denoiser in `config.init`."""
    if config.init is not None:
        return load_denoiser(config.init).params
    return init_patch_denoiser_params(jax.random.key(config.seed), config.denoiser)


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    training.claim(config)
    side = config.denoiser.side
    pictures = photos.load_photos(config.data, min_side=side, max_short_side=256)
    _, held_out = photos.center_crops(
        config.eval_data, size=side, shrink=config.eval_shrink, count=config.num_eval
    )
    params = initial_params(config)
    size = num_params(params)
    print(f"{size / 1e6:.2f} M parameters, {len(pictures)} pictures", flush=True)
    compute = dataclasses.replace(config.denoiser, dtype=config.dtype)
    optimizer = training.make_optimizer(config)
    loss = functools.partial(denoising_loss, config=compute)
    key = jax.random.key(config.seed + 1)
    update = training.make_update(loss, optimizer, config.ema_decay, key)

    def batches(steps):
        return photos.prefetched_batches(
            pictures, config.seed, steps, batch_size=config.batch_size, size=side, is_whole=True
        )

    def facts(row, scores):
        return training.facts(config, row, "denoiser_training") | {
            "parameters": size,
            "pictures": len(pictures),
            "eval_pictures": len(held_out),
            **{name: round(value, 2) for name, value in scores.items()},
        }

    def score(state, row):
        scores = evaluate(make_patch_denoiser(config.denoiser, state.ema), held_out)
        export(state.ema, config, facts(row, scores))
        return scores

    log = config.out / "diffusion.jsonl"
    training.fit(training.init_state(params, optimizer), update, batches, score, config, log)

    logged = training.read_rows(log)
    # The rounded weights, as they are used.
    denoiser = load_denoiser(config.out / "model")
    scores = evaluate(denoiser, held_out)
    checkpoint.update_card(config.out / "model", denoiser_training=facts(logged[-1], scores))
    print("exported weights:", scores, flush=True)
    panels = {
        "training loss": ["loss"],
        "held out, denoised (dB)": [f"eval_psnr_{level:g}" for level in LEVELS],
    }
    training.plot_curves(logged, panels, config.out / "diffusion_curves.png")
    drawn = draw(denoiser, jax.random.key(config.seed), (8, side, side, 3))
    rows = [np.clip(drawn[: len(held_out)], -1, 1), held_out[:8]]
    training.save_grid(rows, config.out / "diffusion_samples.png")


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_diffusion", train, arguments)
