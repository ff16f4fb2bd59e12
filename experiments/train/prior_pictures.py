"""What a prior knows: samples from nothing, completions of held-out pictures, prompted completions.

    python -m experiments.prior_pictures --model face64 --data HELD_OUT --shrink 1 \
        --out experiments/results/face64

Writes `reconstructions.png` (pictures above what the codec keeps of them), `samples.png`,
`completions.png` (a row of pictures, of what is left of them, and of two completions, for their
left and upper halves) and, for a prior that reads prompts, `prompts.png`: a row of pictures without
their lower (or upper) half, and one row of completions per prompt.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax.codec.magvit2 import decode_tokens, encode_tokens
from aps_jax.pretrained import Model
from aps_jax.types import Array
from experiments import photos
from experiments.command import command
from experiments.figures import save_grid
from experiments.train import completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line.

    Attributes:
      model: embedded model or folder.
      data: folder of pictures that nothing was trained on.
      out: folder of the PNG files.
      size: side of the pictures in pixels.
      shrink: they are centre squares of so many times `size`, reduced to it.
      count: pictures, spread over the folder; columns of every grid.
      num_steps: steps of decoding.
      temperature: divides the prior's logits.
      prompts: one row of completions per prompt, of the lower half unless it starts with "^".
      guidance_scale: of those.
      seed: seed of all draws.
    """

    model: str
    data: Path
    out: Path
    size: int = 64
    shrink: int = 2
    count: int = 8
    num_steps: int = 32
    temperature: float = 1.0
    prompts: tuple[str, ...] = ()
    guidance_scale: float = 2.0
    seed: int = 0


def rows_of(arguments: Arguments, model: Model, tokens: Array) -> dict[str, list[np.ndarray]]:
    """Rows of pictures [count, H, W, 3] by name of their grid."""
    decode = jax.jit(decode_tokens)
    prior, codec, count = model.prior, model.codec, len(tokens)
    height, width = tokens.shape[1:]
    keys = iter(jax.random.split(jax.random.key(arguments.seed), 4 + len(arguments.prompts)))

    def show(grid: Array) -> np.ndarray:
        return np.asarray(decode(codec, jnp.minimum(grid, prior.num_codes - 1)))

    def complete(
        prior: aps_jax.Prior, grid: Array, guidance_scale: float | None = None
    ) -> np.ndarray:
        options = {"prior_temperature": arguments.temperature, "guidance_scale": guidance_scale}
        steps = arguments.num_steps
        return show(completion.complete(next(keys), prior, grid, num_steps=steps, **options))

    def hide(is_hidden: np.ndarray) -> tuple[Array, np.ndarray]:
        pixels = np.kron(is_hidden, np.ones((codec.stride, codec.stride), bool))
        rest = np.where(pixels[:, :, None], 0.0, show(tokens))
        return jnp.where(is_hidden, prior.num_codes, tokens), rest

    is_right = np.broadcast_to(np.arange(width) >= width // 2, (height, width))
    is_low = np.broadcast_to((np.arange(height) >= height // 2)[:, None], (height, width))
    nothing = jnp.full((4 * count, height, width), prior.num_codes, jnp.int32)
    grids = {
        "samples": list(complete(prior, nothing).reshape(4, count, *show(tokens).shape[1:])),
        "completions": [show(tokens)],
    }
    for is_hidden in (is_right, is_low):
        grid, rest = hide(is_hidden)
        both = complete(prior, jnp.concatenate([grid, grid]))
        grids["completions"] += [rest, both[:count], both[count:]]
    grids["prompts"] = []
    is_upper_before = None
    for prompt in arguments.prompts:
        is_upper = prompt.startswith("^")
        grid, rest = hide(~is_low if is_upper else is_low)
        grids["prompts"] += [rest] if is_upper != is_upper_before else []
        is_upper_before = is_upper
        text = prompt.removeprefix("^")
        prompted = aps_jax.load_pretrained(arguments.model, prompt=text).prior
        grids["prompts"].append(complete(prompted, grid, arguments.guidance_scale))
    return {name: rows for name, rows in grids.items() if rows}


@command("prior_pictures", memory_cure="lower --count")
def main(arguments: Arguments) -> None:
    """Writes the grids."""
    model = aps_jax.load_pretrained(arguments.model)
    _, pictures = photos.center_crops(
        arguments.data, size=arguments.size, shrink=arguments.shrink, count=arguments.count
    )
    tokens = jax.jit(encode_tokens)(model.codec, pictures)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in rows_of(arguments, model, tokens).items():
        save_grid(rows, arguments.out / f"{name}.png")
    restored = np.asarray(jax.jit(decode_tokens)(model.codec, tokens))
    save_grid([pictures, restored], arguments.out / "reconstructions.png")
