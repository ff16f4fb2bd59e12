"""Converters from published weight files to the formats that `aps_jax` loads.

`aps-jax convert NAME` runs them: an installation has this package as `aps_jax.convert`, a clone as
`convert`, where `python -m convert.NAME` does the same.
"""

#: What each of them converts, by name.
CONVERTERS = {
    "magvitv2": "the MagVIT-v2 tokenizer showlab/magvitv2, a codec",
    "llada": "LLaDA and MMaDA language models, a prior",
    "dream": "Dream language models, a prior",
    "showo": "Show-o with discrete image tokens, a prior",
    "kernel_wizard": "the network of --task nonlinear_blur",
    "clip": "CLIP, for scores and rewards of images by texts or images",
    "dino": "DINO, for the likeness of images",
    "reward": "reward models of the Llama and Qwen families, for answers to a prompt",
    "lpips": "the weights of LPIPS, into the cache of the Hugging Face hub",
}
