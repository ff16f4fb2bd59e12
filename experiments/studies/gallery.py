"""The pictures of the README: the bundled photo restored for several tasks by the embedded model.

python -m experiments.gallery
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax import images, metrics
from aps_jax.operators import make_operator
from aps_jax.presets import make_config
from aps_jax.restore import restore
from aps_jax.scores import report
from aps_jax.types import Params
from experiments.command import command

#: Task by title of its row.
ROWS = {
    "super-resolution x4": "super_resolution",
    "box inpainting": "inpainting_box",
    "Gaussian deblurring": "gaussian_blur",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: PNG file to write.
      model: embedded model or folder.
      preset: preset of the sampler.
      sigma: noise standard deviation.
      seed: seed of the noise, the masks and the sampler.
    """

    out: Path = Path("experiments/results/gallery.png")
    model: str = "photo64"
    preset: str = "balanced"
    sigma: float = 0.05
    seed: int = 0


@command("gallery", memory_cure="close other programs and try again")
def main(arguments: Arguments) -> None:
    """Restores the photo for every task and writes one picture."""
    photo = jnp.asarray(images.sample_photo())
    model = aps_jax.load_pretrained(arguments.model)
    key_state, key_noise, key_sampler = jax.random.split(jax.random.key(arguments.seed), 3)
    strips = []
    for title, task in ROWS.items():
        operator = make_operator(task).init(key_state, photo.shape[:2])
        y = aps_jax.measure(key_noise, photo[None], operator=operator, sigma=arguments.sigma)
        params = Params(prior=model.prior, codec=model.codec, operator=operator)
        config = make_config(preset=arguments.preset)
        restored = restore(params, y, key_sampler, config=config).result.images
        score = float(metrics.psnr(restored, photo[None])[0])
        panels = [
            ("photo", photo),
            (title, report.measurement_view(y, operator, photo.shape[:2])),
            ("restored", restored[0]),
        ]
        strips.append(images.comparison(panels, captions=["", "", f"{score:.1f} dB"]))
    images.save_image(arguments.out, np.concatenate(strips, axis=0))
