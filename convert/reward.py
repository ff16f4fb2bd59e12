"""Converts reward models: sequence classifiers of the Llama, Qwen2 and Qwen3 families.

`python -m convert.reward SRC DST` takes models with one score, such as Skywork-Reward-V2, with the
tokenizer and the chat template beside them. Sizes come from the tensors and are checked against
config.json; what stands around prompt and answer is read off the template once and for all.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.text.reward_model import RewardFrame
from aps_jax.text.tokenizer import REWARD_TOKENIZER

from .command import main
from .dream import RULES as DREAM_RULES
from .engine import Built, Family
from .rules import Rule, transpose
from .sources import ConversionError, Source
from .templates import chat_frame
from .tokenizers import tokenizer_files

_BLOCK = "model.layers.{layer}"
#: Dream grew from Qwen2, so the backbone is the same but for the norms of Qwen3 and the head.
RULES = (
    *(rule for rule in DREAM_RULES if rule.target != "head/kernel"),
    Rule(f"{_BLOCK}.self_attn.q_norm.weight", "blocks/q_norm/scale"),
    Rule(f"{_BLOCK}.self_attn.k_norm.weight", "blocks/k_norm/scale"),
    Rule("score.weight", "head/kernel", transpose),
)

_FAMILIES = ("llama", "qwen2", "qwen3")
#: What config.json may say about parts of the architecture that aps_jax has in this form only.
_FIXED = {"hidden_act": "silu", "use_sliding_window": False, "mlp_bias": False}


def build(source: Source, dtype: str) -> Built:
    """Reads the sizes off the tensors; heads, epsilon and rotary base come from config.json."""
    family = source.config.get("model_type")
    if family not in _FAMILIES:
        raise ConversionError(
            f"config.json says model_type is {family!r}; reward models of {', '.join(_FAMILIES)} "
            "can be converted"
        )
    if source.size("score.weight") != 1:
        raise ConversionError(
            f"{source.folder} scores {source.size('score.weight')} classes; a reward is one number"
        )
    source.check_config(_FIXED, "can be converted")
    config = _config(source, dtype)
    pad = source.config.get("pad_token_id")
    if pad is not None and not isinstance(pad, int):
        raise ConversionError(f"config.json says pad_token_id is {pad!r}, which is no id")
    frame = RewardFrame(**chat_frame(source.folder), pad_token_id=pad)
    files = tokenizer_files(source, name=REWARD_TOKENIZER)
    if not files:
        raise ConversionError(
            f"{source.folder} has no tokenizer.json, without which no prompt can be read; fetch it "
            "from where the weights are from"
        )
    return Built(
        config=config,
        init=init_transformer_params,
        card={"reward_frame": dataclasses.asdict(frame)},
        files=files,
    )


def _config(source: Source, dtype: str) -> TransformerConfig:
    vocab_size = source.size("model.embed_tokens.weight")
    width = source.size("model.embed_tokens.weight", 1)
    attention = _BLOCK.format(layer=0) + ".self_attn"
    query, key = (source.size(f"{attention}.{part}_proj.weight") for part in "qk")
    num_heads = source.num_heads("num_attention_heads", query)
    head_dim = query // num_heads
    theta, stretch = _rotation(source)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": source.count("model.layers."),
        "num_key_value_heads": key // head_dim,
        "head_dim": head_dim,
        "intermediate_size": source.size(f"{_BLOCK.format(layer=0)}.mlp.gate_proj.weight"),
    }
    source.check_config(sizes, "fits the tensors")
    try:
        return TransformerConfig(
            vocab_size=vocab_size,
            num_outputs=1,
            width=width,
            num_layers=sizes["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=head_dim,
            mlp_width=sizes["intermediate_size"],
            qkv_bias=f"{attention}.q_proj.bias" in source.shapes,
            qk_norm=f"{attention}.q_norm.weight" in source.shapes,
            norm_eps=source.setting("rms_norm_eps"),
            rope_theta=theta,
            rope_stretch=stretch,
            rope_in_float32=False,
            dtype=dtype,
            param_dtype=dtype,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{source.folder} is no reward model: {error}") from None


def _rotation(source: Source) -> tuple[float, tuple[float, float, float, int] | None]:
    """Base and stretch of the rotary positions, in the old form of config.json or the new one."""
    new = source.config.get("rope_parameters")
    stretch: Any = source.config.get("rope_scaling") if new is None else new
    theta = source.setting("rope_theta") if new is None else dict(new).get("rope_theta")
    if not isinstance(theta, int | float):
        raise ConversionError(f"config.json says rope_theta is {theta!r}, which is no number")
    stretch = stretch if isinstance(stretch, Mapping) else {}
    kind = stretch.get("rope_type", stretch.get("type", "default"))
    if kind == "default":
        return float(theta), None
    names = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    values = [stretch.get(name) for name in names]
    if kind != "llama3" or not all(isinstance(value, int | float) for value in values):
        raise ConversionError(
            f"config.json asks for rotary positions of the kind {kind!r} with {dict(stretch)}; "
            "only the plain ones and llama3 can be converted"
        )
    factor, low, high, length = map(float, values)  # pyright: ignore[reportArgumentType]
    return float(theta), (factor, low, high, int(length))


FAMILY = Family(
    name="reward",
    section="reward_model",
    rules=RULES,
    build=build,
    default_dtype="bfloat16",
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
