"""`aps-jax stylize`: a photo painted in the style of another picture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import numpy as np

from aps_jax import energies, images
from aps_jax.cli import wished
from aps_jax.cli.wished import Figures, Job
from aps_jax.cli.wishes import Stylize, guidance_of
from aps_jax.pretrained import Model
from aps_jax.sampling.edits import whole_target
from aps_jax.scores.lpips import MIN_SIDE, PerceptualUnavailable, load_lpips, vgg_features
from aps_jax.types import Array, Energy, Features

_STYLES = Path(__file__).parents[1] / "data" / "styles"
#: References inside the package, by name.
STYLES = tuple(sorted(path.stem for path in _STYLES.glob("*.png")))
#: Nats per token that a relative distance of 1 costs: enough that the prior, of some nats per
#: token, decides only what style and content leave open.
NATS = 10.0
#: Style against content at --strength 1, chosen by eye.
STYLE_WEIGHT = 10.0


def run(options: Stylize) -> int:
    """Paints one photo as the options say; returns the exit code."""
    style_path(options.style)
    return wished.run(options, "stylized", _job)


def style_path(style: str) -> Path:
    """File of a style by name or path; ValueError if there is none."""
    path = Path(style)
    if style in STYLES:
        return _STYLES / f"{style}.png"
    if not path.is_file():
        raise ValueError(f"no style {style!r}: neither a file nor one of {', '.join(STYLES)}")
    return path


def painting(style: Energy, content: Energy, strength: float) -> Energy:
    """What a painting lowers, per token: style and content at a strength, `NATS` for both."""
    weighted = energies.scaled(style, STYLE_WEIGHT * strength)
    return energies.scaled(energies.total(content, weighted), NATS)


def _job(options: Stylize, model: Model) -> Job:
    photo, source = wished.load_photo(options.image, options.size)
    path = style_path(options.style)
    reference = images.load_image(path)
    if options.style_size is not None:
        if options.style_size < MIN_SIDE:
            raise ValueError(f"--style-size must be at least {MIN_SIDE}, got {options.style_size}")
        reference = images.resize_short_side(reference, options.style_size)
    if options.size is not None and options.size < MIN_SIDE:
        raise ValueError(f"--size must be at least {MIN_SIDE} for features, got {options.size}")
    for name, picture in ((options.image, photo), (path, reference)):
        if min(picture.shape[:2]) < MIN_SIDE:
            raise ValueError(
                f"{name} is {picture.shape[1]}x{picture.shape[0]} pixels; the features of style "
                f"and content need at least {MIN_SIDE} on both sides"
            )
    x, features = wished.batch(photo), _features()
    content = energies.content(features, x)
    style = energies.style(features, wished.batch(reference))
    target = whole_target(
        model.prior, model.codec, x, painting(style, content, options.strength),
        **wished.fields_of(options),
    )  # fmt: skip
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Job(
        target=target,
        sources={"image": source, "style": {"path": str(path), "sha256": digest}},
        settings={
            "strength": options.strength,
            "style_size": options.style_size,
            "guidance_scale": guidance_of(options),
        },
        panels=[("photo", photo), ("style", _fitting(reference, photo))],
        figures=lambda image: _figures((style, content), image),
        compared={"photo": x[0]},
        files={"style.png": reference},
    )


def _features() -> Features:
    """VGG16; ValueError without its weights."""
    try:
        return vgg_features(load_lpips())
    except PerceptualUnavailable as error:
        raise ValueError(f"style is measured by the features of LPIPS: {error}") from None


def _fitting(reference: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """The reference as high as the photo, for the comparison."""
    height, width = reference.shape[:2]
    short = round(min(height, width) * photo.shape[0] / height)
    return images.resize_short_side(reference, max(short, 1))


def _figures(pair: tuple[Energy, Energy], image: Array) -> Figures:
    values = jax.device_get(_distances(pair, image[None]))
    return {"style distance": float(values[0][0]), "content distance": float(values[1][0])}


@jax.jit
def _distances(pair: tuple[Energy, Energy], x: Array) -> tuple[Array, Array]:
    return pair[0](x), pair[1](x)
