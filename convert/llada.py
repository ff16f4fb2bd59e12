"""Converts masked language models of the LLaDA family to priors of aps_jax.

`python -m convert.llada SRC DST` takes the folders of LLaDA-8B Base and Instruct (GSAI-ML), which
become text priors, and of MMaDA-8B Base and MixCoT (Gen-Verse), which become priors over image
tokens. Sizes come from the tensors and are checked against config.json.
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

_ROOT = "model.transformer"
_BLOCK = _ROOT + ".blocks.{layer}"
RULES = (
    Rule(f"{_ROOT}.wte.weight", "embed/embedding"),
    Rule(f"{_ROOT}.ln_f.weight", "ln_f/scale"),
    Rule(f"{_ROOT}.ff_out.weight", "head/kernel", transpose),
    Rule(f"{_BLOCK}.attn_norm.weight", "blocks/attn_norm/scale"),
    Rule(f"{_BLOCK}.ff_norm.weight", "blocks/ff_norm/scale"),
    Rule(f"{_BLOCK}.q_proj.weight", "blocks/q/kernel", transpose),
    Rule(f"{_BLOCK}.k_proj.weight", "blocks/k/kernel", transpose),
    Rule(f"{_BLOCK}.v_proj.weight", "blocks/v/kernel", transpose),
    Rule(f"{_BLOCK}.attn_out.weight", "blocks/attn_out/kernel", transpose),
    Rule(f"{_BLOCK}.ff_proj.weight", "blocks/ff_proj/kernel", transpose),
    Rule(f"{_BLOCK}.up_proj.weight", "blocks/up_proj/kernel", transpose),
    Rule(f"{_BLOCK}.ff_out.weight", "blocks/ff_out/kernel", transpose),
)

#: Number of ids of the tokenizer, which all four models share; their embeddings have more rows.
NUM_TEXT_IDS = 126349
#: Image codes of MMaDA; their ids follow those of the tokenizer, on rows that LLaDA left unused.
NUM_IMAGE_CODES = 8192
MASK_ID = 126336
#: Largest side of a token grid that MMaDA was trained on, 512 pixels.
WINDOW = 32

TEXT_PROMPT = PromptConfig(num_codes=NUM_TEXT_IDS, mask_token_id=MASK_ID, mask_uncond=True)
#: `t2i, bos, text, eos | soi, image, eoi`, in the ids that MMaDA took from LLaDA's reserved ones.
IMAGE_PROMPT = PromptConfig(
    num_codes=NUM_IMAGE_CODES,
    image_offset=NUM_TEXT_IDS,
    mask_token_id=MASK_ID,
    begin_id=126084,
    end_id=126085,
    prefix=(126088, 126080),
    suffix=(126081,),
    pad_token_id=126093,
    length=513,
    understanding_prefix=(126089,),
)

#: What config.json may say about parts of the architecture that aps_jax has in this form only.
_FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
    "weight_tying": False,
}


def _prompt(source: Source, vocab_size: int) -> PromptConfig:
    is_image_model = (
        source.config.get("model_type") == "mmada"
        or "codebook_size" in source.config
        or vocab_size >= NUM_TEXT_IDS + NUM_IMAGE_CODES
    )
    prompt = IMAGE_PROMPT if is_image_model else TEXT_PROMPT
    last = prompt.image_offset + prompt.num_codes
    if vocab_size < last:
        raise ConversionError(
            f"tensor '{_ROOT}.wte.weight' has {vocab_size} rows; the ids of this model need {last}"
        )
    codes = source.config.get("codebook_size", prompt.num_codes)
    if codes != prompt.num_codes:
        raise ConversionError(f"config.json says codebook_size is {codes}; only 8192 is known")
    return prompt


def _check_blocks(source: Source) -> None:
    """ConversionError if the layers are saved in groups, as LLaDA's class does when asked to."""
    groups = f"{_ROOT}.block_groups."
    if any(name.startswith(groups) for name in source.shapes):
        raise ConversionError(
            f"the layers are saved in groups ({groups}G.I, block_group_size above 1); name them "
            f"{_ROOT}.blocks.N with N = G * block_group_size + I, and save them again"
        )


def build(source: Source, dtype: str) -> Built:
    """Reads the sizes off the tensors; heads, epsilon and rotary base come from config.json.

    The vocabulary is the tensor's: configurations of MMaDA keep the language model's number. So are
    the number of image tokens and the resolution, which they keep from the first training stage.
    """
    _check_blocks(source)
    vocab_size = source.size(f"{_ROOT}.wte.weight")
    width = source.size(f"{_ROOT}.wte.weight", 1)
    first = _BLOCK.format(layer=0)
    num_heads = source.num_heads("n_heads", width)
    num_layers = source.count(f"{_ROOT}.blocks.")
    mlp_width = source.size(f"{first}.ff_proj.weight")
    kv_heads = source.size(f"{first}.k_proj.weight") // (width // num_heads)
    source.check_config(_FIXED, "can be converted")
    sizes = {
        "d_model": width,
        "n_layers": num_layers,
        "n_kv_heads": kv_heads,
        "mlp_hidden_size": mlp_width,
    }
    source.check_config(sizes, "fits the tensors")
    prompt = _prompt(source, vocab_size)
    try:
        config = TransformerConfig(
            vocab_size=vocab_size,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            mlp_width=mlp_width,
            norm_eps=source.setting("rms_norm_eps"),
            rope_theta=source.setting("rope_theta"),
            rope_in_float32=source.config.get("rope_full_precision", True),
            dtype=dtype,
            param_dtype=dtype,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{source.folder} is no LLaDA model: {error}") from None
    window = WINDOW if prompt == IMAGE_PROMPT else None
    card = {"prompt": dataclasses.asdict(prompt), "prior_window": window}
    if prompt == IMAGE_PROMPT:
        card["text_prompt"] = dataclasses.asdict(TEXT_PROMPT)
    files = tokenizer_files(source, NUM_TEXT_IDS)
    return Built(config=config, init=init_transformer_params, card=card, files=files)


FAMILY = Family(
    name="llada",
    section="prior",
    rules=RULES,
    build=build,
    default_dtype="bfloat16",
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
