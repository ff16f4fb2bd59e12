"""Converts CLIP (openai/clip-vit-base-patch32, -large-patch14 and others of their form).

`python -m convert.clip SRC DST` takes both towers, and the tokenizer.json beside them. Sizes come
from the tensors and are checked against config.json, which alone knows the heads.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from aps_jax.scores.clip import ClipConfig, init_clip_params
from aps_jax.text.tokenizer import CLIP_TOKENIZER

from .command import main
from .engine import Built, Family
from .rules import Rule, hwio, keep, transpose
from .sources import ConversionError, Source
from .tokenizers import tokenizer_files

_IMAGE, _TEXT = "vision_model", "text_model"
#: Names of a block's parts, in the checkpoint and here.
_PARTS = {
    "layer_norm1": "attn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ff_norm",
    "mlp.fc1": "ff_in",
    "mlp.fc2": "ff_out",
}


def part_rules(old: str, new: str) -> tuple[Rule, Rule]:
    """Where weight and bias of a linear layer or a norm go."""
    is_norm = new.endswith("_norm")
    name, transform = ("scale", keep) if is_norm else ("kernel", transpose)
    weight = Rule(f"{old}.weight", f"{new}/{name}", transform)
    return weight, Rule(f"{old}.bias", f"{new}/bias")


def _tower(old: str, new: str) -> tuple[Rule, ...]:
    block = f"{old}.encoder.layers.{{layer}}"
    pairs = (part_rules(f"{block}.{a}", f"{new}/blocks/{b}") for a, b in _PARTS.items())
    return tuple(rule for pair in pairs for rule in pair)


RULES = (
    Rule(f"{_IMAGE}.embeddings.class_embedding", "image/class"),
    Rule(f"{_IMAGE}.embeddings.patch_embedding.weight", "image/patch/kernel", hwio),
    Rule(f"{_IMAGE}.embeddings.position_embedding.weight", "image/positions"),
    *part_rules(f"{_IMAGE}.pre_layrnorm", "image/pre_norm"),  # So spelt in the checkpoints.
    *_tower(_IMAGE, "image"),
    *part_rules(f"{_IMAGE}.post_layernorm", "image/post_norm"),
    Rule("visual_projection.weight", "image_projection/kernel", transpose),
    Rule(f"{_TEXT}.embeddings.token_embedding.weight", "text/embedding"),
    Rule(f"{_TEXT}.embeddings.position_embedding.weight", "text/positions"),
    *_tower(_TEXT, "text"),
    *part_rules(f"{_TEXT}.final_layer_norm", "text/post_norm"),
    Rule("text_projection.weight", "text_projection/kernel", transpose),
    Rule("logit_scale", "logit_scale"),
)


def build(source: Source, dtype: str) -> Built:
    """Reads the sizes off the tensors; heads, activation and epsilon come from config.json."""
    del dtype
    side = patches_side(source, f"{_IMAGE}.embeddings.position_embedding.weight")
    image, text = (_part(source, name) for name in ("vision_config", "text_config"))
    vocab_size = source.size(f"{_TEXT}.embeddings.token_embedding.weight")
    for name in ("hidden_act", "layer_norm_eps"):
        if image.setting(name) != text.setting(name):
            raise ConversionError(
                f"config.json gives the towers {name} {image.setting(name)!r} and "
                f"{text.setting(name)!r}; only CLIP with one of both can be converted"
            )
    image_width = source.size(f"{_IMAGE}.embeddings.class_embedding")
    text_width = source.size(f"{_TEXT}.final_layer_norm.weight")
    # Configurations from before 2023 say 2, for a tokenizer whose last id ends a text.
    end_id = text.config.get("eos_token_id", 2)
    end_id = vocab_size - 1 if end_id == 2 else end_id
    if not isinstance(end_id, int) or not 0 <= end_id < vocab_size:
        raise ConversionError(f"config.json says eos_token_id is {end_id!r} of {vocab_size} ids")
    try:
        config = ClipConfig(
            embed_dim=source.size("visual_projection.weight"),
            patch_size=source.size(f"{_IMAGE}.embeddings.patch_embedding.weight", 2),
            side=side,
            image_width=image_width,
            image_layers=source.count(f"{_IMAGE}.encoder.layers."),
            image_heads=image.num_heads("num_attention_heads", image_width),
            image_mlp=source.size(f"{_IMAGE}.encoder.layers.0.mlp.fc1.weight"),
            vocab_size=vocab_size,
            context=source.size(f"{_TEXT}.embeddings.position_embedding.weight"),
            end_id=end_id,
            text_width=text_width,
            text_layers=source.count(f"{_TEXT}.encoder.layers."),
            text_heads=text.num_heads("num_attention_heads", text_width),
            text_mlp=source.size(f"{_TEXT}.encoder.layers.0.mlp.fc1.weight"),
            activation=image.setting("hidden_act"),
            norm_eps=image.setting("layer_norm_eps"),
        )
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{source.folder} is no CLIP: {error}") from None
    _check(image, config, "image", {"patch_size": config.patch_size, "num_channels": 3})
    _check(text, config, "text", {"vocab_size": vocab_size})
    return Built(
        config=config,
        init=init_clip_params,
        files=tokenizer_files(source, name=CLIP_TOKENIZER),
    )


def patches_side(source: Source, name: str, axis: int = 0) -> int:
    """Patches along each axis of a square image, of the positions of all and of the class token."""
    length = source.size(name, axis)
    side = math.isqrt(max(length - 1, 0))
    if side < 1 or side**2 + 1 != length:
        raise ConversionError(
            f"tensor {name!r} has {length} positions, which are no square of patches and a class "
            "token"
        )
    return side


def _part(source: Source, name: str) -> Source:
    """The checkpoint with one tower's part of config.json as its configuration."""
    part = source.setting(name)
    if not isinstance(part, Mapping):
        raise ConversionError(f"config.json says {name} is {part!r}, which describes no tower")
    return dataclasses.replace(source, config=part)


def _check(part: Source, config: ClipConfig, tower: str, more: Mapping[str, Any]) -> None:
    sizes = getattr(config, tower)
    expected = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "intermediate_size": sizes.mlp_width,
    }
    part.check_config(expected | dict(more), "fits the tensors")


def _positions(config: ClipConfig) -> Mapping[str, np.ndarray]:
    """Counters that older checkpoints save along."""
    return {
        f"{_IMAGE}.embeddings.position_ids": np.arange(config.side**2 + 1)[None],
        f"{_TEXT}.embeddings.position_ids": np.arange(config.context)[None],
    }


FAMILY = Family(
    name="clip",
    section="clip",
    rules=RULES,
    build=build,
    default_dtype="float32",
    checked=_positions,
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
