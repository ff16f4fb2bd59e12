"""Paints the three style references of the package, out of random numbers alone.

    python -m experiments.style_references aps_jax/data/styles

`swirls` has thick strokes of oil along a field of whirls, in blue and gold; `mosaic` stones of warm
colours in dark mortar; `woodcut` black lines on paper that swell and shrink. Nobody's work is in
them, so they are free of rights, and no picture had to be downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw
from scipy import ndimage, spatial

SIDE = 192
#: Painted this many times larger, and averaged down to smooth edges.
SCALE = 3
#: Colours of the files, so that each is small.
NUM_COLOURS = 48

Rng = np.random.Generator


def smooth(rng: Rng, side: int, width: float) -> np.ndarray:
    """A random field [side, side] from 0 to 1 whose hills are about `width` pixels wide."""
    field = ndimage.gaussian_filter(rng.normal(size=(side, side)), width, mode="wrap")
    return np.argsort(np.argsort(field.ravel())).reshape(side, side) / field.size


def blend(palette: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours [..., 3] at shares [...] of the way through a palette [N, 3]."""
    position = share * (len(palette) - 1)
    low = np.clip(position.astype(int), 0, len(palette) - 2)
    return palette[low] + (position - low)[..., None] * (palette[low + 1] - palette[low])


def swirls(rng: Rng) -> Image.Image:
    """Strokes along the level lines of a smooth field."""
    side = SIDE * SCALE
    field, light = smooth(rng, side, 60), smooth(rng, side, 36)
    down, right = np.gradient(ndimage.gaussian_filter(field, 8))
    palette = np.array(
        [
            (16, 24, 70), (26, 62, 130), (58, 116, 178), (140, 178, 190), (226, 190, 84),
            (246, 222, 130),
        ]
    )  # fmt: skip
    image = Image.new("RGB", (side, side), (20, 34, 84))
    draw = ImageDraw.Draw(image)
    for _ in range(9000):
        x, y = rng.uniform(0, side - 1, 2)
        share = np.clip(light[int(y), int(x)] + rng.normal(scale=0.07), 0, 1)
        colour = blend(palette, share) + rng.normal(scale=12)
        points = [(x, y)]
        for _ in range(8):
            row, column = int(np.clip(y, 0, side - 1)), int(np.clip(x, 0, side - 1))
            slope = np.array([-down[row, column], right[row, column]])
            slope = slope / (np.linalg.norm(slope) + 1e-9)
            x, y = x + 4 * slope[0], y + 4 * slope[1]
            points.append((x, y))
        draw.line(points, fill=_rgb(colour), width=int(rng.integers(5, 10)), joint="curve")
    return image


def mosaic(rng: Rng) -> Image.Image:
    """Stones around scattered points, each of one colour, with mortar between them."""
    side = SIDE * SCALE
    centres = rng.uniform(0, side, (900, 2))
    for _ in range(3):  # Lloyd's rule evens their sizes out.
        owner = _nearest(centres, side)[1][..., 0]
        places = ndimage.center_of_mass(np.ones_like(owner), owner, np.arange(len(centres)))
        centres = np.where(np.isfinite(places), places, centres)
    distance, owners = _nearest(centres, side)
    palette = np.array(
        [
            (94, 24, 30), (172, 52, 40), (222, 112, 46), (240, 186, 92), (242, 226, 186),
            (44, 106, 110),
        ]
    )  # fmt: skip
    shares = smooth(rng, side, 60)[tuple(np.clip(centres, 0, side - 1).astype(int).T)]
    shares = np.clip(shares + rng.normal(scale=0.12, size=len(shares)), 0, 1)
    pixels = blend(palette, shares)[owners[..., 0]]
    edge = np.clip((distance[..., 1] - distance[..., 0] - 2) / 3, 0, 1)[..., None]
    pixels = edge * pixels + (1 - edge) * np.array([34, 28, 30])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def woodcut(rng: Rng) -> Image.Image:
    """Bent lines whose width follows the light."""
    side = SIDE * SCALE
    rows, columns = np.mgrid[:side, :side]
    bend, light = smooth(rng, side, 70), smooth(rng, side, 30)
    wave = np.sin(2 * np.pi * (rows + 0.5 * columns + 170 * bend) / 15)
    wave += 0.25 * (2 * smooth(rng, side, 2) - 1)
    ink = wave > 1.8 * light - 0.75
    pixels = np.where(ink[..., None], np.array([22, 18, 20]), np.array([238, 228, 206]))
    return Image.fromarray(pixels.astype(np.uint8))


def _nearest(centres: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    places = np.stack(np.mgrid[:side, :side], axis=-1)
    return spatial.cKDTree(centres).query(places, k=2)


def _rgb(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(colour, 0, 255))


STYLES = {"swirls": swirls, "mosaic": mosaic, "woodcut": woodcut}


def main(out: tyro.conf.Positional[Path]) -> int:
    """Paints the references.

    Args:
      out: folder for the PNG files.
    """
    out.mkdir(parents=True, exist_ok=True)
    for seed, (name, paint) in enumerate(STYLES.items(), start=1):
        image = paint(np.random.default_rng(seed)).resize((SIDE, SIDE), Image.Resampling.BOX)
        image = image.quantize(NUM_COLOURS, dither=Image.Dither.NONE)
        image.save(out / f"{name}.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
