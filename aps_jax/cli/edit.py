"""`aps-jax edit`: a face changed by words or rewards, in a part of the picture or all over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import energies, images, metrics
from aps_jax.cli import wished, wishes
from aps_jax.cli.inputs import framing_notes
from aps_jax.cli.wished import Figures, Job
from aps_jax.cli.wishes import REWARD_WEIGHT, Edit, guidance_of, rewards_of
from aps_jax.faces.attributes import load_attributes
from aps_jax.io.masks import SIDES, load_mask
from aps_jax.operators import denoising, inpainting_mask
from aps_jax.pretrained import Model
from aps_jax.sampling.edits import part_target, whole_target
from aps_jax.sampling.leaves import or_none
from aps_jax.scores import report
from aps_jax.types import Array

#: Likeness of edits without a mask, if none is given: chosen by eye, so that words are followed and
#: people are still known.
LIKENESS = 4.0


def run(options: Edit) -> int:
    """Edits one picture as the options say; returns the exit code."""
    return wished.run(options, "edited", _job)


def _job(options: Edit, model: Model) -> Job:
    photo, source = wished.load_photo(options.image, options.size)
    mask, sources = None, {"image": source}
    if options.mask is not None:
        mask = _mask(options.mask, options, photo)
        digest = hashlib.sha256(options.mask.read_bytes()).hexdigest()
        sources["mask"] = {"path": str(options.mask), "sha256": digest}
    _check_fit(options, model, photo)
    x, net, reward = wished.batch(photo), None, None
    weight = REWARD_WEIGHT if options.reward_weight is None else options.reward_weight
    if options.reward:
        net = load_attributes()
        wanted = rewards_of(options)
        reward = energies.scaled(energies.classifier(net, wanted), weight)
    fields = wished.fields_of(options)
    scale = fields["decode_scale"]
    likeness = None
    if mask is None:
        likeness = LIKENESS if options.likeness is None else options.likeness
        energy = energies.scaled(energies.l1_lpips(denoising(), x), likeness)
        if reward is not None:  # `whole_target` takes energies per token.
            count = model.codec.grid((scale * photo.shape[0], scale * photo.shape[1]))
            energy = energies.total(energy, energies.scaled(reward, 1 / np.prod(count)))
        target = whole_target(model.prior, model.codec, x, energy, **fields)
    else:
        target = part_target(
            model.prior, model.codec, x, mask, reward=reward,
            consistency=or_none(wishes.config_of(options).data_consistency), **fields,
        )  # fmt: skip
    again = report.codec_reconstruction(model.codec, x[0], scale)
    return Job(
        target=target,
        sources=sources,
        settings={
            "reward": list(options.reward),
            "reward_weight": weight if options.reward else None,
            "guidance_scale": guidance_of(options),
            "likeness": likeness,
        },
        panels=_panels(photo, mask),
        figures=_figures(options, x[0], mask, net),
        compared={"photo": x[0], "codec_reconstruction": again},
        settled=_pasting(options, x, mask),
        files={} if mask is None else {"mask.png": 2 * mask[..., None] - 1},
        notes=framing_notes(options.model, x),
    )


def _mask(path: Path, options: Edit, photo: np.ndarray) -> np.ndarray:
    """The mask [H, W] as large as the photo, 1 where it stays."""
    mask = load_mask(path)
    if options.size is not None and mask.shape != photo.shape[:2]:
        _require_size(path, mask, images.load_image(options.image))
        with_channel = 2 * mask[..., None] - 1
        mask = (wished.square(with_channel, options.size)[..., 0] > 0).astype(np.float32)
    _require_size(path, mask, photo)
    if mask.all() or not mask.any():
        misses = "nothing" if mask.all() else "everything"
        raise ValueError(
            f"--mask {path} frees {misses} of the picture that --size {options.size} "
            f"leaves: {SIDES}"
        )
    return mask


def _require_size(path: Path, mask: np.ndarray, photo: np.ndarray) -> None:
    """ValueError for a mask [H, W] of another size than a picture."""
    if mask.shape != photo.shape[:2]:
        (height, width), (rows, columns) = photo.shape[:2], mask.shape
        raise ValueError(
            f"--mask {path} has {columns}x{rows} pixels, the picture {width}x{height}; "
            "make them one size"
        )


def _check_fit(options: Edit, model: Model, photo: np.ndarray) -> None:
    """ValueError for a picture of another size than the model's, which it may know only one of."""
    side = model.card.get("prior", {}).get("absolute_side")
    if side is None:
        return
    if wishes.config_of(options).decode_scale > 1:
        raise ValueError(
            f"--model {options.model} knows pictures of one size only, so none that are decoded "
            "larger; choose another preset or sampler than fine and aps-l, or leave out "
            "--option decode_scale"
        )
    if model.codec.grid(photo.shape[:2])[:2] == (side, side):
        return
    pixels = side * model.codec.stride
    height, width = photo.shape[:2]
    raise ValueError(
        f"--model {options.model} knows pictures of {pixels}x{pixels} pixels only, {options.image} "
        f"has {width}x{height}; add --size {pixels}, which cuts out the middle"
    )


def _panels(photo: np.ndarray, mask: np.ndarray | None) -> list[tuple[str, Any]]:
    if mask is None:
        return [("photo", photo)]
    return [("photo", photo), ("to be drawn", np.where(mask[..., None] > 0, photo, 0))]


def _pasting(options: Edit, x: Array, mask: np.ndarray | None) -> Callable[[Array], Array]:
    if not options.paste_known or mask is None:
        return lambda image: image
    operator = inpainting_mask(mask)
    known = operator(x)
    return lambda image: report.paste_known(operator, image, known)


def _figures(
    options: Edit, photo: Array, mask: np.ndarray | None, net: Any
) -> Callable[[Array], Figures]:
    """Distance to the photo where it is to stay, and the probability of what is wanted."""
    wanted = rewards_of(options)
    kept = np.ones(photo.shape[:2], bool) if mask is None else mask > 0
    name = "psnr" if mask is None else "psnr_outside"

    def figures(image: Array) -> Figures:
        # Rows of pixels are as good as any other shape.
        difference = float(metrics.psnr(image[kept][None, None], photo[kept][None, None])[0])
        values: dict[str, float | None] = {name: difference if np.isfinite(difference) else None}
        if net is not None:
            chance = jax.nn.sigmoid(net(jnp.clip(image, -1, 1)[None]))[0]
            for attribute, value in wanted.items():
                column = list(net.names).index(attribute)
                values[f"{attribute}={value:g}"] = float(
                    chance[column] if value else 1 - chance[column]
                )
        return values

    return figures
