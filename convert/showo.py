"""Converts Show-o (showlab/show-o, show-o-512x512) to a prior over image tokens.

`python -m convert.showo SRC DST`. Show-o is phi-1.5 with a LayerNorm of queries and keys and a
joint vocabulary. Sizes come from the tensors; what neither they nor config.json show (epsilon of
the norms, base and share of the rotation) is phi-1.5's. So is the tokenizer: put tokenizer.json of
microsoft/phi-1_5 into SRC to have it copied, or the one that Show-o's code saves, which has ten
special tokens more.
"""

from __future__ import annotations

import dataclasses
import math
import sys

from aps_jax.prior.prompts import PromptConfig
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params

from .command import main
from .engine import Built, Family
from .rules import Rule, Transform, keep, transpose
from .sources import ConversionError, Source
from .tokenizers import tokenizer_files

_ROOT = "showo.model"
_BLOCK = _ROOT + ".layers.{layer}"


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return _pair(source, target, "kernel", transpose)


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return _pair(source, target, "scale", keep)


def _pair(source: str, target: str, leaf: str, transform: Transform) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"{target}/{leaf}", transform),
        Rule(f"{source}.bias", f"{target}/bias"),
    )


RULES = (
    Rule(f"{_ROOT}.embed_tokens.weight", "embed/embedding"),
    *_norm(f"{_ROOT}.final_layernorm", "ln_f"),
    *_linear("showo.lm_head", "head"),
    *_norm(f"{_BLOCK}.input_layernorm", "blocks/attn_norm"),
    *_linear(f"{_BLOCK}.self_attn.q_proj", "blocks/q"),
    *_linear(f"{_BLOCK}.self_attn.k_proj", "blocks/k"),
    *_linear(f"{_BLOCK}.self_attn.v_proj", "blocks/v"),
    *_linear(f"{_BLOCK}.self_attn.dense", "blocks/attn_out"),
    *_norm(f"{_BLOCK}.self_attn.q_layernorm", "blocks/q_norm"),
    *_norm(f"{_BLOCK}.self_attn.k_layernorm", "blocks/k_norm"),
    *_linear(f"{_BLOCK}.mlp.fc1", "blocks/ff_in"),
    *_linear(f"{_BLOCK}.mlp.fc2", "blocks/ff_out"),
)

#: Ids of the tokenizer; those of special tokens follow, then the image codes, then the mask.
NUM_TEXT_IDS = 50295
NUM_IMAGE_CODES = 8192
#: What Show-o's code adds to the tokenizer, in this order: padding, ends of images and of videos,
#: and tasks.
_SPECIAL = ("[PAD]",) + tuple(
    f"<|{name}|>" for name in ("soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
)
SPECIAL_IDS = {token: NUM_TEXT_IDS + index for index, token in enumerate(_SPECIAL)}
IMAGE_OFFSET = NUM_TEXT_IDS + len(SPECIAL_IDS)
VOCAB_SIZE = IMAGE_OFFSET + NUM_IMAGE_CODES + 1
#: `t2i, bos, text, eos | soi, image, eoi`.
PROMPT = PromptConfig(
    num_codes=NUM_IMAGE_CODES,
    image_offset=IMAGE_OFFSET,
    mask_token_id=VOCAB_SIZE - 1,
    begin_id=SPECIAL_IDS["<|soi|>"],
    end_id=SPECIAL_IDS["<|eoi|>"],
    prefix=(SPECIAL_IDS["<|t2i|>"], 50256),
    suffix=(50256,),
    pad_token_id=SPECIAL_IDS["[PAD]"],
    length=129,
    is_causal=True,
)
#: What config.json may say about parts of the architecture that aps_jax has in this form only.
_FIXED = {
    "codebook_size": NUM_IMAGE_CODES,
    "llm_vocab_size": NUM_TEXT_IDS,
    "mask_token_id": VOCAB_SIZE - 1,
    "vocab_size": VOCAB_SIZE,
    "w_clip_vit": False,
}
_NORM_EPS, _ROPE_THETA, _ROPE_SHARE = 1e-5, 10000.0, 0.5


def _window(source: Source) -> int:
    """Side of the token grid of training, which the number of image tokens gives."""
    num_tokens = source.setting("num_vq_tokens")
    side = math.isqrt(num_tokens) if isinstance(num_tokens, int) and num_tokens > 0 else 0
    if not side or side**2 != num_tokens:
        raise ConversionError(f"config.json says num_vq_tokens is {num_tokens!r}, no square number")
    return side


def build(source: Source, dtype: str) -> Built:
    """Reads the sizes off the tensors, those of the heads off the norm of their queries."""
    embedding = f"{_ROOT}.embed_tokens.weight"
    vocab_size, width = source.size(embedding), source.size(embedding, 1)
    first = _BLOCK.format(layer=0)
    head_dim = source.size(f"{first}.self_attn.q_layernorm.weight")
    num_heads, rest = divmod(source.size(f"{first}.self_attn.q_proj.weight"), head_dim)
    kv_heads, kv_rest = divmod(source.size(f"{first}.self_attn.k_proj.weight"), head_dim)
    if rest or kv_rest:
        raise ConversionError(
            f"{source.folder} has heads of {head_dim}, which do not fit its width"
        )
    source.check_config(_FIXED, "can be converted")
    if vocab_size != VOCAB_SIZE:
        raise ConversionError(
            f"tensor {embedding!r} has {vocab_size} rows; the ids of this model need {VOCAB_SIZE}"
        )
    try:
        config = TransformerConfig(
            vocab_size=vocab_size,
            width=width,
            num_layers=source.count(f"{_ROOT}.layers."),
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=source.size(f"{first}.mlp.fc1.weight"),
            block="phi",
            norm_eps=_NORM_EPS,
            rope_theta=_ROPE_THETA,
            rope_dim=int(head_dim * _ROPE_SHARE),
            rope_in_float32=False,
            dtype=dtype,
            param_dtype=dtype,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{source.folder} is no Show-o model: {error}") from None
    return Built(
        config=config,
        init=init_transformer_params,
        card={"prompt": dataclasses.asdict(PROMPT), "prior_window": _window(source)},
        files=tokenizer_files(source, NUM_TEXT_IDS, added=SPECIAL_IDS),
    )


FAMILY = Family(
    name="showo",
    section="prior",
    rules=RULES,
    build=build,
    default_dtype="float32",
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
