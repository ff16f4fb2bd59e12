"""Random camera-shake kernels, drawn on the host."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_SLACK = 0.1  # Keeps steps and turns possible at the ends of the intensity range.


def motion_kernel(rng: np.random.Generator, *, size: int, intensity: float) -> np.ndarray:
    """Draws a motion-blur kernel: a random walk, drawn as a line at twice the size.

    The steps are Beta-distributed in length, the heading wanders with `intensity`. The distribution
    is that of the kernels used by DPS and DAPS; single kernels differ, as another generator draws.

    Args:
      rng: NumPy generator.
      size: side of the kernel in pixels.
      intensity: 0 for straight paths to 1 for very shaky ones.

    Returns:
      Weights [size, size] in float64, non-negative, summing to 1.
    """
    canvas = 2 * size
    diagonal = canvas * np.sqrt(2.0)
    path = _random_path(rng, diagonal, intensity)
    path = (path - path.mean()) * np.exp(1j * rng.uniform(0, np.pi)) + (1 + 1j) * canvas / 2
    image = Image.new("RGB", (canvas, canvas))
    vertices = list(zip(path.real.tolist(), path.imag.tolist(), strict=True))
    ImageDraw.Draw(image).line(vertices, fill="white", width=max(1, int(diagonal / 150)))
    image = image.filter(ImageFilter.GaussianBlur(int(0.01 * diagonal)))
    image = image.resize((size, size), Image.Resampling.LANCZOS).convert("L")
    kernel = np.asarray(image, np.float64)
    if kernel.sum() == 0:  # A path without length leaves no trace.
        kernel = np.zeros((size, size))
        kernel[size // 2, size // 2] = 1.0
    return kernel / kernel.sum()


def _random_path(rng: np.random.Generator, diagonal: float, intensity: float) -> np.ndarray:
    """Vertices of the walk as complex numbers, in canvas pixels."""
    length = 0.75 * diagonal * (rng.uniform() + rng.uniform(0, intensity**2))
    length = max(length, 1e-3 * diagonal)  # Nearly no step fits into a shorter path.
    steps: list[float] = []
    while sum(steps) < length:
        step = rng.beta(1, 30) * (1 - intensity + _SLACK) * diagonal
        if step < length:
            steps.append(step)
    widest = rng.uniform(0, intensity * np.pi)
    flip_probability = rng.beta(2, 20)
    angles = [rng.uniform(-widest, widest)]
    while len(angles) < len(steps):
        magnitude = rng.triangular(0, intensity * widest, widest + _SLACK)
        sign = -1.0 if angles[-1] < 0 else 1.0
        if rng.uniform() < flip_probability:
            sign = -sign
        angles.append(sign * magnitude)
    return np.cumsum(np.asarray(steps) * np.exp(1j * np.asarray(angles)))
