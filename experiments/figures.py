"""Figures and grids of pictures, each file whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aps_jax import images
from aps_jax.io.files import write_atomically

#: Dots per inch of all figures.
DPI = 110


def figure(num_rows: int, num_columns: int, size: tuple[float, float]) -> Any:
    """A figure and its axes [rows, columns], each of `size` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width, height = size
    return plt.subplots(
        num_rows, num_columns, squeeze=False, figsize=(width * num_columns, height * num_rows),
        layout="constrained",
    )  # fmt: skip


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure as PNG and closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
    return path


def plot_curves(rows: list[dict[str, Any]], panels: dict[str, list[str]], path: Path) -> None:
    """Curves of a training's log: one panel per title, one line per column named there."""
    picture, axes = figure(1, len(panels), (4.5, 3.2))
    log = pd.DataFrame(rows).set_index("step")
    for axis, (title, columns) in zip(axes[0], panels.items(), strict=True):
        for column in log.columns.intersection(columns, sort=False):
            log[column].dropna().plot(ax=axis, grid=True, title=title, legend=True)
    save_figure(picture, path)


def save_grid(rows: list[np.ndarray], path: Path, zoom: int = 1) -> None:
    """Saves equally sized images in [-1, 1] as a grid; each entry of `rows` is [n, H, W, 3]."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    images.save_image(path, np.kron(grid, np.ones((zoom, zoom, 1))))
