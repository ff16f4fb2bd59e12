"""Dream in PyTorch, with the parameter names of the published checkpoint.

Written for the tests from the description of the architecture; forward pass only, float32.
"""

from torch import nn
from torch.nn import functional
from torch_llada import Norm, Rotary


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.shared = config["num_key_value_heads"]
        size = width // self.heads
        self.rotary = Rotary(size, config["rope_theta"])
        self.q_proj = nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(width, self.shared * size) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        query = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.k_proj(x).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            self.rotary(query), self.rotary(key), value, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(config), Mlp(width, config["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Dream(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, rows = config["hidden_size"], config["vocab_size"]
        blocks = (Block(config) for _ in range(config["num_hidden_layers"]))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(rows, width),
                "layers": nn.ModuleList(blocks),
                "norm": Norm(width, config["rms_norm_eps"]),
            }
        )
        self.lm_head = nn.Linear(width, rows, bias=False)

    def forward(self, ids):
        """Logits [B, T, V] of ids [B, T], the one at t about the id at t + 1."""
        x = self.model["embed_tokens"](ids)
        for block in self.model["layers"]:
            x = block(x)
        return self.lm_head(self.model["norm"](x))
