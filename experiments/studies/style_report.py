"""Table, plot and grid of the study of styles, from its rows and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from aps_jax.cli.stylize import style_path
from aps_jax.images import center_crop, load_image, resize_short_side
from aps_jax.io import rows
from experiments.bench import summary
from experiments.figures import figure, save_figure, save_grid
from experiments.studies.style_methods import METHODS, STRENGTHS
from experiments.tables import markdown

#: What is measured of a picture.
MEASURES = ("style distance", "content", "LPIPS")
#: Pictures that nobody painted, for the same columns.
UNTOUCHED = ("photo", "codec")


def table(found: Sequence[rows.Row]) -> str:
    """Markdown: means over photos, those over styles first, and what is paired with the first."""
    frame = pd.DataFrame([row for row in found if row["split"] == "test"])
    parts = []
    for strength, label in [(0.0, "untouched"), *((s, f"strength {s:g}") for s in STRENGTHS)]:
        mine = frame[frame["strength"] == strength]
        lines = [
            _line(method, mine[mine["method"] == method], mine)
            for method in (*UNTOUCHED, *METHODS)
            if (mine["method"] == method).any()
        ]
        if lines:
            parts.append(f"### {label}\n\n{markdown(pd.DataFrame(lines))}\n")
    return "\n".join(parts)


def _by_photo(mine: pd.DataFrame, method: str) -> pd.DataFrame:
    """Measures by photo, means over styles."""
    chosen = mine[mine["method"] == method]
    return chosen.groupby("image")[list(MEASURES)].mean()


def _line(method: str, own: pd.DataFrame, mine: pd.DataFrame) -> dict[str, str | None]:
    # A run that was stopped has not all styles of all methods.
    reference = _by_photo(mine[mine["style"].isin(own["style"])], next(iter(METHODS)))
    by_photo = _by_photo(own, method)
    line: dict[str, str | None] = {
        "method": method, "photos": str(len(by_photo)), "styles": str(own["style"].nunique()),
    }  # fmt: skip
    for name in MEASURES:
        found = summary.interval(by_photo[name])
        line[name] = f"{by_photo[name].mean():.3f}" + (
            f" ± {found.half_width:.3f}" if found else ""
        )
    for name in MEASURES:
        gain = summary.gain(by_photo, reference, name) if method in METHODS else None
        is_first = method == next(iter(METHODS))
        line[f"{name}, more than the first"] = None if gain is None or is_first else gain.shown(3)
    is_painted = method in METHODS
    line["learning rate"] = f"{own['rate'].iloc[0]:g}" if is_painted else None
    # The first batch of a method has its compilation.
    line["seconds"] = f"{own['seconds'].median():.1f}" if is_painted else None
    return line


def plot(found: Sequence[rows.Row], path: Path) -> None:
    """Style against likeness: a curve per method over the strengths, bars of 95 %."""
    frame = pd.DataFrame([row for row in found if row["split"] == "test"])
    picture, axes = figure(1, 2, (4.6, 3.8))
    for axis, likeness in zip(axes[0], ("LPIPS", "content"), strict=True):
        for index, method in enumerate((*METHODS, *UNTOUCHED)):
            strengths = STRENGTHS if method in METHODS else (0.0,)
            cells = [_by_photo(frame[frame["strength"] == s], method) for s in strengths]
            points = [[_point(cell[name]) for name in (likeness, "style distance")]
                      for cell in cells if len(cell)]  # fmt: skip
            if points:
                (x, dx), (y, dy) = np.moveaxis(np.array(points), 0, -1)
                style = {"fmt": "o-" if method in METHODS else "k*", "capsize": 2}
                color = {"color": f"C{index}"} if method in METHODS else {}
                axis.errorbar(x, y, dy, dx, label=method, **style, **color)
                if method in UNTOUCHED:
                    axis.annotate(method, (x[0], y[0]), fontsize=7)
        axis.set_xlabel("LPIPS to the photo" if likeness == "LPIPS" else "content distance")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("style distance to the reference")
    axes[0][1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(picture, path)


def _point(values: pd.Series) -> tuple[float, float]:
    found = summary.interval(values)
    return float(values.mean()), found.half_width if found else 0.0


def draw_grid(
    found: Sequence[rows.Row], path_of: Callable[[rows.Row], Path], path: Path, photos: int = 2
) -> None:
    """A line per photo and style: reference, photo, then per strength the methods in their order.

    Args:
      found: the rows.
      path_of: where the picture of a row is; what is not there yet is white.
      path: of the grid; nothing is drawn where there are no pictures.
      photos: how many, the first.
    """
    own = {
        (row["image"], row["style"], row["strength"], row["method"]): path_of(row)
        for row in found
        if row["split"] == "test" and path_of(row).exists()
    }
    names = sorted({key[0] for key in own})[:photos]
    columns = [(s, m) for s in STRENGTHS for m in METHODS if any(key[2:] == (s, m) for key in own)]
    grid = []
    styles = sorted({key[1] for key in own if key[3] in METHODS})
    for name, style in itertools.product(names, styles):
        photo = load_image(own[name, style, 0.0, "photo"])
        side = photo.shape[0]
        reference = center_crop(resize_short_side(load_image(style_path(style)), side), side)
        paths = [own.get((name, style, *column)) for column in columns]
        panels = [np.ones_like(photo) if place is None else load_image(place) for place in paths]
        grid.append(np.stack([reference, photo, *panels]))
    if grid:
        save_grid(grid, path, zoom=2)
