"""Converts Dream-7B (Dream-org), Base and Instruct, to a text prior of aps_jax.

`python -m convert.dream SRC DST`. Dream is a masked language model grown from Qwen2.5: query heads
share key and value heads, their projections have biases, and the output at one position is about
the next, which the prior undoes. Sizes come from the tensors and are checked against config.json.
"""

from __future__ import annotations

import dataclasses
import sys

from aps_jax.prior.prompts import PromptConfig
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params

from .command import main
from .engine import Built, Family
from .rules import Rule, transpose
from .sources import ConversionError, Source
from .tokenizers import tokenizer_files

_BLOCK = "model.layers.{layer}"
RULES = (
    Rule("model.embed_tokens.weight", "embed/embedding"),
    Rule("model.norm.weight", "ln_f/scale"),
    Rule("lm_head.weight", "head/kernel", transpose),
    Rule(f"{_BLOCK}.input_layernorm.weight", "blocks/attn_norm/scale"),
    Rule(f"{_BLOCK}.post_attention_layernorm.weight", "blocks/ff_norm/scale"),
    Rule(f"{_BLOCK}.self_attn.q_proj.weight", "blocks/q/kernel", transpose),
    Rule(f"{_BLOCK}.self_attn.k_proj.weight", "blocks/k/kernel", transpose),
    Rule(f"{_BLOCK}.self_attn.v_proj.weight", "blocks/v/kernel", transpose),
    Rule(f"{_BLOCK}.self_attn.q_proj.bias", "blocks/q/bias"),
    Rule(f"{_BLOCK}.self_attn.k_proj.bias", "blocks/k/bias"),
    Rule(f"{_BLOCK}.self_attn.v_proj.bias", "blocks/v/bias"),
    Rule(f"{_BLOCK}.self_attn.o_proj.weight", "blocks/attn_out/kernel", transpose),
    Rule(f"{_BLOCK}.mlp.gate_proj.weight", "blocks/ff_proj/kernel", transpose),
    Rule(f"{_BLOCK}.mlp.up_proj.weight", "blocks/up_proj/kernel", transpose),
    Rule(f"{_BLOCK}.mlp.down_proj.weight", "blocks/ff_out/kernel", transpose),
)

#: What config.json may say about parts of the architecture that aps_jax has in this form only.
_FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False}


def build(source: Source, dtype: str) -> Built:
    """Reads the sizes off the tensors; heads, epsilon and rotary base come from config.json."""
    vocab_size = source.size("model.embed_tokens.weight")
    width = source.size("model.embed_tokens.weight", 1)
    first = _BLOCK.format(layer=0)
    num_heads = source.num_heads("num_attention_heads", width)
    kv_heads = source.size(f"{first}.self_attn.k_proj.weight") // (width // num_heads)
    mlp_width = source.size(f"{first}.mlp.gate_proj.weight")
    num_layers = source.count("model.layers.")
    mask_id = source.setting("mask_token_id")
    source.check_config(_FIXED, "can be converted")
    if source.config.get("rope_scaling") is not None:
        raise ConversionError("config.json asks for rope_scaling, which cannot be converted")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp_width,
    }
    source.check_config(sizes, "fits the tensors")
    if not isinstance(mask_id, int) or not 0 <= mask_id < vocab_size:
        raise ConversionError(f"config.json says mask_token_id is {mask_id!r} of {vocab_size} ids")
    try:
        config = TransformerConfig(
            vocab_size=vocab_size,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            mlp_width=mlp_width,
            qkv_bias=True,
            norm_eps=source.setting("rms_norm_eps"),
            rope_theta=source.setting("rope_theta"),
            rope_in_float32=False,
            shift_logits=True,
            dtype=dtype,
            param_dtype=dtype,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{source.folder} is no Dream model: {error}") from None
    prompt = PromptConfig(num_codes=vocab_size, mask_token_id=mask_id, mask_uncond=True)
    return Built(
        config=config,
        init=init_transformer_params,
        card={"prompt": dataclasses.asdict(prompt)},
        files=tokenizer_files(source),
    )


FAMILY = Family(
    name="dream",
    section="prior",
    rules=RULES,
    build=build,
    default_dtype="bfloat16",
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
