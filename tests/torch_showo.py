"""Show-o by the Phi classes of `transformers`, under the tensor names of the checkpoints."""

import numpy as np
import torch
from transformers import PhiConfig, PhiForCausalLM


def make_oracle(state, *, width=32, hidden=24, layers=2, heads=2, qk_layernorm=True):
    """Phi with these weights; without `qk_layernorm` those of the norm are left out."""
    config = PhiConfig(
        vocab_size=state["showo.lm_head.bias"].shape[0],
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        qk_layernorm=qk_layernorm,
        attn_implementation="eager",
    )
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == 10000.0
    weights = {
        name.removeprefix("showo."): torch.tensor(value)
        for name, value in state.items()
        if qk_layernorm or "_layernorm" not in name.split("self_attn.")[-1]
    }
    if not qk_layernorm:
        names = ("input_layernorm", "final_layernorm")
        weights |= {
            name.removeprefix("showo."): torch.tensor(value)
            for name, value in state.items()
            if any(part in name for part in names)
        }
    oracle = PhiForCausalLM(config)
    oracle.load_state_dict(weights)
    return oracle.eval()


@torch.no_grad()
def logits_of(oracle, ids, mask):
    """Logits [B, T, V] of ids [B, T]; bool masks [B, T, T] hide, float ones are added."""
    mask = torch.tensor(np.asarray(mask))[:, None]
    if mask.dtype == torch.bool:
        hidden = torch.zeros(mask.shape)
        mask = hidden.masked_fill(~mask, torch.finfo(torch.float32).min)
    return oracle(input_ids=torch.tensor(np.asarray(ids)), attention_mask=mask).logits.numpy()
