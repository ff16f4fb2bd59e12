"""What a notebook needs: `posterior` samples in one line, `show` draws pictures in another."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import presets
from aps_jax.config import VARIANTS
from aps_jax.images import to_uint8
from aps_jax.pretrained import Model
from aps_jax.samplers import sample
from aps_jax.sampling.checks import check_known_tokens, check_measured_values
from aps_jax.sampling.run import SampleResult
from aps_jax.scores.lpips import load_lpips
from aps_jax.types import Array, Key, Operator, Params, Perceptual, PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A measurement leaves [-1, 1] by its noise; beyond this it is no picture, such as amplitudes.
_LARGEST_VALUE = 6.0
#: Fewest pixels of a side: [B, m, 3] numbers of a few measurements are not a picture.
_MIN_SIDE = 4


def posterior(
    model: Model,
    operator: Operator,
    y: PyTree,
    key: Key,
    preset: str | None = None,
    sigma: float = 0.05,
    num_samples: int = 1,
    sampler: str = "aps",
    known_tokens: Array | None = None,
    **options: Any,
) -> SampleResult:
    """Samples images from the posterior of a measurement.

    Compiled on the first call; later ones of the same shapes, with other images, keys, masks,
    kernels, weights, noise levels or rates, run at once. `aps_sample` is the same without `jit`, as
    one pure function.

    Args:
      model: prior and codec, from `load_pretrained`.
      operator: the operator that measured `y`, its random state drawn.
      y: measurement [B, ...] of B images, as from `measure`.
      key: one typed key, folded with the image index, or one per image [B].
      preset: "draft", "balanced", "fine", "faces" or "paper", for APS and its variants; if left
        out, the one that the model's card names, else "balanced".
      sigma: standard deviation of the noise in `y`, > 0; the likelihood's.
      num_samples: samples S per measurement, each of its own randomness.
      sampler: "aps", a variant, or a key of `aps_jax.samplers.SAMPLERS`.
      known_tokens: int32 [B, L], tokens given from the start; the number of codes where unknown.
      **options: any other option of the sampler, or `budget`, as for `make_config`. A perceptual
        term (preset "paper") loads LPIPS.

    Returns:
      Samples, their mean and standard deviation, and diagnostics per timestep.

    Raises:
      ValueError: an option or a shape that does not fit, random state that was not drawn, values of
        y that are not finite or on another scale, or several samples of which all would be equal.
      PerceptualUnavailable: the perceptual term is asked for and LPIPS is not there.
    """
    if preset is None and sampler in VARIANTS:
        preset = presets.recommended(model.card)
    config = presets.make_config(
        preset=preset, sampler=sampler, sigma=sigma, num_samples=num_samples, **options
    )
    has_distance = operator.is_image and getattr(config, "perceptual_weight", 0.0) > 0
    params = Params(
        prior=model.prior,
        codec=model.codec,
        operator=operator,
        perceptual=_lpips() if has_distance else None,
    )
    y, known_tokens = jax.tree.map(jnp.asarray, (y, known_tokens))
    check_measured_values(operator, y, sigma)
    check_known_tokens(known_tokens, model.prior.num_codes)
    return _sample(params, y, key, config=config, known_tokens=known_tokens)


#: Compiled per shape; numbers of the options are arguments, so that sweeps over them are free.
_sample = jax.jit(sample)


@functools.cache
def _lpips() -> Perceptual:
    return load_lpips()


def show(panels: Mapping[str, Any] | SampleResult, *, max_rows: int = 8) -> Figure:
    """Draws pictures side by side, one row per image of a batch.

    At the end of a cell of a notebook the figure appears; elsewhere `display` or `savefig` it.

    Args:
      panels: pictures by title, from left to right: [H, W, 1 or 3] or [B, H, W, 1 or 3], floats
        in [-1, 1] (noise beyond it is clipped) or uint8. A `SampleResult`, in it or in its place,
        is its first sample and, of several, their mean and standard deviation.
      max_rows: images of a batch that are shown.

    Returns:
      The figure.

    Raises:
      ValueError: nothing to show, or a panel that is not a picture.
      ImportError: matplotlib is not installed.
    """
    if isinstance(panels, SampleResult):
        panels = {"restored": panels}
    parts = [part for name, value in panels.items() for part in _parts(name, value)]
    pictures = {title: _picture(title, x) for title, x in parts}
    if not pictures:
        raise ValueError("there is nothing to show; give pictures by title, {'y': y}")
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("show needs matplotlib: pip install 'aps_jax[notebook]'") from None
    num_rows = min(max(map(len, pictures.values())), max_rows)
    figure, axes = pyplot.subplots(
        num_rows,
        len(pictures),
        figsize=(2.6 * len(pictures), 2.6 * num_rows + 0.3),
        layout="constrained",
        squeeze=False,
    )
    for column, (title, batch) in zip(axes.T, pictures.items(), strict=True):
        column[0].set_title(title)
        for row, axis in enumerate(column):
            axis.axis("off")
            if row < len(batch):
                axis.imshow(batch[row], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    if figure.canvas.required_interactive_framework is None:
        # No window will open; an open figure would appear twice below its cell.
        pyplot.close(figure)
    return figure


def _parts(title: str, value: Any) -> list[tuple[str, Any]]:
    """The titled pictures that one value of `show` stands for."""
    if not isinstance(value, SampleResult):
        return [(title, value)]
    if value.samples.shape[1] == 1:
        return [(title, value.images)]
    spread = np.mean(np.asarray(value.std), axis=-1, keepdims=True)
    white = max(float(spread.max()), 1e-6)
    return [
        (title, value.images),
        (f"{title}: mean", value.mean),
        (f"{title}: std (white: {white:.2g})", 2 * spread / white - 1),
    ]


def _picture(title: str, value: Any) -> np.ndarray:
    """Pixels uint8 [B, H, W, 1 or 3]; ValueError if there are none."""
    if isinstance(value, tuple | list):
        raise ValueError(f"{title!r} is several measurements; show each under a title of its own")
    x = np.asarray(value)
    batch = x[None] if x.ndim == 3 else x
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3) or min(batch.shape[1:3]) < _MIN_SIDE:
        raise ValueError(
            f"{title!r} has shape {x.shape}: not a picture [H, W, 1 or 3] nor a batch of them; "
            "leave it out"
        )
    if batch.dtype == np.uint8:
        return batch
    if batch.dtype.kind not in "fbV":  # "V": bfloat16 as NumPy sees it.
        raise ValueError(f"{title!r} is of {x.dtype}; pictures are floats in [-1, 1] or uint8")
    largest = float(np.max(np.abs(np.asarray(batch, np.float32)), initial=0))
    if largest > _LARGEST_VALUE:
        raise ValueError(
            f"{title!r} has values up to {largest:.3g}: not a picture in [-1, 1]; leave it out, or "
            "scale it (aps_jax.images.from_uint8 takes 0..255)"
        )
    return to_uint8(batch)
