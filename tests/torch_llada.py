"""LLaDA in PyTorch, with the parameter names of the published checkpoints.

Written for the tests from the description of the architecture; forward pass only, float32.
"""

import torch
from torch import nn
from torch.nn import functional


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Rotary(nn.Module):
    """Number i of a head and its partner are one complex number, turned by position * theta."""

    def __init__(self, head_dim, base):
        super().__init__()
        self.is_interleaved = False
        self.rates = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x):
        """Turns [B, heads, T, head_dim]."""
        turns = torch.outer(torch.arange(x.shape[2]).double(), self.rates)
        turns = torch.polar(torch.ones_like(turns), turns)
        if self.is_interleaved:
            pairs = x.unflatten(-1, (-1, 2))
        else:
            pairs = x.unflatten(-1, (2, -1)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * turns)
        return (turned if self.is_interleaved else turned.mT).flatten(-2).float()


class Block(nn.Module):
    def __init__(self, config, rotary):
        super().__init__()
        width, hidden = config["d_model"], config["mlp_hidden_size"]
        self.heads, self.rotary = config["n_heads"], (rotary,)  # hidden: it has no weights here
        self.attn_norm, self.ff_norm = (Norm(width, config["rms_norm_eps"]) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.ff_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x, mask):
        (rotary,) = self.rotary
        h = self.attn_norm(x)
        query, key, value = (
            part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = rotary(query) @ rotary(key).mT / query.shape[-1] ** 0.5
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask[:, None]
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        x = x + self.attn_out(mixed)
        h = self.ff_norm(x)
        return x + self.ff_out(functional.silu(self.ff_proj(h)) * self.up_proj(h))


class Llada(nn.Module):
    def __init__(self, config, vocab_size):
        super().__init__()
        width = config["d_model"]
        self.rotary = Rotary(width // config["n_heads"], config["rope_theta"])
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, width),
                "blocks": nn.ModuleList(
                    Block(config, self.rotary) for _ in range(config["n_layers"])
                ),
                "ln_f": Norm(width, config["rms_norm_eps"]),
                "ff_out": nn.Linear(width, vocab_size, bias=False),
            }
        )
        self.model = nn.ModuleDict({"transformer": transformer})

    def forward(self, ids, mask=None):
        """Logits [B, T, V] of ids [B, T].

        `mask` is bool [B, T, T], True where attention goes; one of floats is added to the scores.
        """
        parts = self.model["transformer"]
        x = parts["wte"](ids)
        for block in parts["blocks"]:
            x = block(x, mask)
        return parts["ff_out"](parts["ln_f"](x))
