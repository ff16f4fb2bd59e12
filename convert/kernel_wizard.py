"""Converts the nonlinear-blur network of BKSE (`GOPRO_wVAE.pth`) for `nonlinear_blur`.

`python -m convert.kernel_wizard GOPRO_wVAE.pth DST`; the README of
github.com/VinAIResearch/blur-kernel-space-exploring links the file. Then
`aps-jax restore photo.jpg --task nonlinear_blur --weights DST`. The part of the file that extracts
blur codes from pairs of images is left out.
"""

from __future__ import annotations

import sys

import numpy as np

from aps_jax.operators.kernel_wizard import (
    BLOCKS_FROM,
    NUM_LEVELS,
    KernelWizardConfig,
    init_network_params,
)

from .command import main
from .engine import Built, Family
from .rules import Rule, hwio, keep
from .sources import ConversionError, Source


def _hwio_flipped(array: np.ndarray) -> np.ndarray:
    """Weight of a torch transposed convolution [in, out, h, w] as a kernel [h, w, in, out]."""
    return array[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)


def _level(level: int) -> str:
    """Where the nested U-Net has a level; the outermost has no activation before its first map."""
    return "adapter.model." + level * "submodule."


RULES = (
    *(
        Rule(f"{_level(level)}down.{min(level, 1)}.weight", f"down_{level}/kernel", hwio)
        for level in range(NUM_LEVELS)
    ),
    *(
        Rule(f"{_level(level)}up.1.weight", f"up_{level}/kernel", _hwio_flipped)
        for level in range(NUM_LEVELS)
    ),
    Rule(f"{_level(0)}up.1.bias", "up_0/bias"),
    *(
        Rule(f"{part}.{{index}}{layer}.{old}", f"{part}_{{index}}{new_layer}/{new}", transform)
        for part in BLOCKS_FROM
        for layer, new_layer in ((".conv1", "/conv1"), (".conv2", "/conv2"), ("", ""))
        for old, new, transform in (("weight", "kernel", hwio), ("bias", "bias", keep))
    ),
)


def build(source: Source, dtype: str) -> Built:
    """Reads the sizes off the tensors; activations stay float32 whatever the weights are."""
    del dtype
    blocks = {part: _count_blocks(source, part) for part in ("feature_extractor", "recon_trunk")}
    num_features = source.size("feature_extractor.0.weight")
    deepest = _level(NUM_LEVELS - 1)
    code_and_features = source.size(f"{deepest}up.1.weight")
    config = KernelWizardConfig(
        num_features=num_features,
        num_front_blocks=blocks["feature_extractor"],
        num_back_blocks=blocks["recon_trunk"],
        kernel_dim=code_and_features - source.size(f"{deepest}down.1.weight"),
    )
    if config.kernel_dim < 1 or num_features < 1:
        raise ConversionError(f"{source.folder} has a network that takes no blur code")
    return Built(config=config, init=init_network_params)


def _count_blocks(source: Source, part: str) -> int:
    """Residual blocks, which are one run of numbers from `BLOCKS_FROM[part]` on."""
    first = BLOCKS_FROM[part]
    last = source.count(f"{part}.")
    return sum(f"{part}.{index}.conv1.weight" in source.shapes for index in range(first, last))


FAMILY = Family(
    name="kernel_wizard",
    section="kernel_wizard",
    rules=RULES,
    build=build,
    default_dtype="float32",
    ignored=("kernel_extractor.",),
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
