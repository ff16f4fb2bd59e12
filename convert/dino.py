"""Converts DINO vision transformers (facebook/dino-vits16 and others of their form).

`python -m convert.dino SRC DST` takes the form of the Hugging Face hub. Sizes come from the tensors
and are checked against config.json, which alone knows the heads.
"""

from __future__ import annotations

import sys

import numpy as np

from aps_jax.scores.dino import init_dino_params
from aps_jax.scores.vit import VitConfig

from .clip import part_rules, patches_side
from .command import main
from .engine import Built, Family
from .rules import Rule, hwio
from .sources import ConversionError, Source

_BLOCK = "encoder.layer.{layer}"
#: Names of a block's parts, in the checkpoint and here.
_PARTS = {
    "layernorm_before": "attn_norm",
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.output.dense": "attn_out",
    "layernorm_after": "ff_norm",
    "intermediate.dense": "ff_in",
    "output.dense": "ff_out",
}


def _row(array: np.ndarray) -> np.ndarray:
    """The last axis alone of [1, 1, width]."""
    return array.reshape(array.shape[-1]) if array.shape[:-1] == (1, 1) else array


def _table(array: np.ndarray) -> np.ndarray:
    """[N, width] of [1, N, width]."""
    return array.reshape(array.shape[1:]) if array.shape[0] == 1 else array


RULES = (
    Rule("embeddings.cls_token", "class", _row),
    Rule("embeddings.position_embeddings", "positions", _table),
    Rule("embeddings.patch_embeddings.projection.weight", "patch/kernel", hwio),
    Rule("embeddings.patch_embeddings.projection.bias", "patch/bias"),
    *(
        rule
        for old, new in _PARTS.items()
        for rule in part_rules(f"{_BLOCK}.{old}", f"blocks/{new}")
    ),
    *part_rules("layernorm", "post_norm"),
)


def build(source: Source, dtype: str) -> Built:
    """Reads the sizes off the tensors; heads, activation and epsilon come from config.json."""
    del dtype
    if "patch_embed.proj.weight" in source.shapes:
        raise ConversionError(
            f"{source.folder} has DINO in the form of its authors' own code; take that of the "
            "Hugging Face hub (facebook/dino-vits16), which is the same network"
        )
    side = patches_side(source, "embeddings.position_embeddings", 1)
    width = source.size("layernorm.weight")
    try:
        config = VitConfig(
            width=width,
            num_layers=source.count("encoder.layer."),
            num_heads=source.num_heads("num_attention_heads", width),
            mlp_width=source.size("encoder.layer.0.intermediate.dense.weight"),
            activation=source.setting("hidden_act"),
            norm_eps=source.setting("layer_norm_eps"),
            patch_size=source.size("embeddings.patch_embeddings.projection.weight", 2),
            side=side,
            patch_bias=True,
        )
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{source.folder} is no vision transformer: {error}") from None
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.mlp_width,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "num_channels": 3,
    }
    source.check_config(sizes, "fits the tensors")
    return Built(config=config, init=init_dino_params)


FAMILY = Family(
    name="dino",
    section="dino",
    rules=RULES,
    build=build,
    default_dtype="float32",
    # A layer over the class token that DINO's training never had; the hub's class adds it.
    ignored=("pooler.",),
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
