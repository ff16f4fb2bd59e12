"""The published sampler in plain PyTorch, with the weights of a JAX model, to compare speeds with.

Channels-last convolutions, fused attention and Adam, one process: how the method would be written
in PyTorch. It has the options of the paper only (cold start, L1 term, cosine counts, anchored
remasking, quantized draw) and noisy images as measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional

from aps_jax.pretrained import Model
from aps_jax.schedules import masked_counts

Tree = Mapping[str, Any]


def to_torch(params: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A tree of Flax weights as tensors; kernels of convolutions become [O, C, kh, kw]."""

    def convert(leaf: Any) -> torch.Tensor:
        tensor = torch.tensor(np.asarray(leaf, np.float32)).to(device, dtype)
        if tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return tensor

    return jax.tree.map(convert, params)


def _conv(x: torch.Tensor, p: Tree) -> torch.Tensor:
    return functional.conv2d(x, p["kernel"], p["bias"], padding=p["kernel"].shape[-1] // 2)


def _norm(x: torch.Tensor, p: Tree, groups: int) -> torch.Tensor:
    return functional.group_norm(x, groups, p["scale"], p["bias"], eps=1e-6)


def _residual(x: torch.Tensor, p: Tree, groups: int) -> torch.Tensor:
    h = _conv(functional.silu(_norm(x, p["norm1"], groups)), p["conv1"])
    h = _conv(functional.silu(_norm(h, p["norm2"], groups)), p["conv2"])
    return h + (_conv(x, p["nin_shortcut"]) if "nin_shortcut" in p else x)


def _attention(x: torch.Tensor, p: Tree, groups: int) -> torch.Tensor:
    h = _norm(x, p["norm"], groups)
    query, key, value = (_conv(h, p[name]).flatten(2).mT[:, None] for name in "qkv")
    mixed = functional.scaled_dot_product_attention(query, key, value)
    return x + _conv(mixed[:, 0].mT.reshape(x.shape), p["proj_out"])


def _layer_norm(x: torch.Tensor, p: Tree) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], eps=1e-6)


def _dense(x: torch.Tensor, p: Tree) -> torch.Tensor:
    return functional.linear(x, p["kernel"].T, p["bias"])


def _layer(tree: Tree, index: int) -> Tree:
    """Weights of one of the stacked blocks; `torch.compile` does not follow `jax.tree`."""
    return {
        name: _layer(part, index) if isinstance(part, dict) else part[index]
        for name, part in tree.items()
    }


def _patches(codes: torch.Tensor, p: Tree, side: int) -> torch.Tensor:
    """What the patch path adds to the image: [B, 3, H, W] of codes [B, d, h, w]."""
    x = _dense(codes.movedim(1, -1), p["dense_in"])
    blocks = p["blocks"]
    for index in range(len(blocks["dense1"]["kernel"])):
        block = _layer(blocks, index)
        h = _dense(_layer_norm(x, block["norm"]), block["dense1"])
        x = x + _dense(functional.silu(h), block["dense2"])
    x = _dense(functional.silu(_layer_norm(x, p["norm_out"])), p["dense_out"])
    x = x.unflatten(-1, (side, side, 3)).permute(0, 5, 1, 3, 2, 4)
    return x.flatten(4).flatten(2, 3)


def decode(p: Tree, codes: torch.Tensor, levels: int, groups: int) -> torch.Tensor:
    """Images [B, 3, H, W] of codes [B, d, h, w]."""
    x = codes.contiguous(memory_format=torch.channels_last)
    x = _conv(_conv(x, p["post_quant_conv"]), p["conv_in"])
    x = _residual(x, p["mid"]["block_1"], groups)
    x = _residual(_attention(x, p["mid"]["attn_1"], groups), p["mid"]["block_2"], groups)
    for level in range(levels - 1, -1, -1):
        part = p[f"up_{level}"] if f"up_{level}" in p else {}
        for index in range(sum(name.startswith("block_") for name in part)):
            x = _residual(x, part[f"block_{index}"], groups)
        if level:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = _conv(x, part["upsample"]["conv"])
    x = _conv(functional.silu(_norm(x, p["norm_out"], groups)), p["conv_out"])
    if "patch" in p:
        x = x + _patches(codes, p["patch"], 2 ** (levels - 1))
    return x


class TorchSampler:
    """Prior, codec and sampler of one model.

    Attributes:
      dtype: of weights and activations; logits and the optimiser stay float32.
      compiled: run the inner step through `torch.compile`.
      device: "cpu" or "cuda".
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        device: str = "cpu",
    ) -> None:
        codec, self.prior = model.card["codec"], model.card["prior"]
        self.dtype, self.device = dtype, device
        self.levels, self.groups = len(codec["decoder_channels"]), codec["num_groups"]
        self.codebook = torch.tensor(np.asarray(model.codec.codebook), device=device)
        self.decoder = to_torch(model.codec.params["decoder"], dtype, device)
        self.transformer = to_torch(model.prior.params, dtype, device)
        # The forward pass alone: autograd.grad inside would break the graph at every call.
        self._losses = torch.compile(self.losses) if compiled else self.losses

    def logits(self, tokens: torch.Tensor, side: int) -> torch.Tensor:
        """Float32 logits [B, L, K] of tokens [B, L] on a grid of `side` x `side`."""
        p, config = self.transformer, self.prior
        bits, heads = config["code_bits"], config["num_heads"]
        ids = tokens.clamp(max=2**bits - 1)
        embed = p["embed"]
        features = torch.cat([self.codebook[ids].to(self.dtype), embed["table"][ids]], dim=-1)
        x = functional.linear(features, embed["project"]["kernel"].T)
        x = torch.where((tokens == 2**bits)[..., None], embed["special"][0], x)
        turns = self._turns(side, config["width"] // heads)
        for layer in range(config["num_layers"]):
            block = _layer(p["blocks"], layer)
            x = self._block(x, block, turns, heads)
        x = functional.rms_norm(x, x.shape[-1:], p["ln_f"]["scale"], config["norm_eps"])
        return (x @ p["head"]["kernel"][:, : 2**bits]).float()

    def _turns(self, side: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = head_size // 4
        rates = self.prior["rope_theta"] ** -(torch.arange(pairs) / pairs)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([rows.ravel(), columns.ravel()], dim=-1)
        angles = (places[..., None] * rates).flatten(1).to(self.device)
        return angles.cos(), angles.sin()

    def _block(self, x: torch.Tensor, p: Tree, turns: tuple, heads: int) -> torch.Tensor:
        def rotate(h: torch.Tensor) -> torch.Tensor:
            cos, sin = turns
            first, second = h.float().chunk(2, dim=-1)
            turned = [first * cos - second * sin, second * cos + first * sin]
            return torch.cat(turned, dim=-1).to(h.dtype)

        eps = self.prior["norm_eps"]
        h = functional.rms_norm(x, x.shape[-1:], p["attn_norm"]["scale"], eps)
        query, key, value = (
            (h @ p[name]["kernel"]).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"
        )
        mixed = functional.scaled_dot_product_attention(rotate(query), rotate(key), value)
        x = x + mixed.transpose(1, 2).flatten(2) @ p["attn_out"]["kernel"]
        h = functional.rms_norm(x, x.shape[-1:], p["ff_norm"]["scale"], eps)
        gate = functional.silu(h @ p["ff_proj"]["kernel"])
        return x + (gate * (h @ p["up_proj"]["kernel"])) @ p["ff_out"]["kernel"]

    def losses(
        self, phi: torch.Tensor, tokens: torch.Tensor, y: torch.Tensor, side: int
    ) -> torch.Tensor:
        """L times the mean absolute error of the measurement, per image [B]."""
        mean = phi.softmax(-1) @ self.codebook
        codes = mean + (torch.where(mean > 0, 1.0, -1.0) - mean).detach()
        is_masked = tokens == len(self.codebook)
        known = self.codebook[torch.where(is_masked, 0, tokens)]
        codes = torch.where(is_masked[..., None], codes, known).to(self.dtype)
        x = decode(self.decoder, codes.mT.unflatten(-1, (side, side)), self.levels, self.groups)
        return tokens.shape[1] * (x.float() - y).abs().mean(dim=(1, 2, 3))

    def gradient(
        self, phi: torch.Tensor, tokens: torch.Tensor, y: torch.Tensor, side: int
    ) -> torch.Tensor:
        """Gradient of the summed losses by phi [B, L, K]."""
        phi = phi.detach().requires_grad_()
        return torch.autograd.grad(self._losses(phi, tokens, y, side).sum(), phi)[0]

    def refine(
        self, phi: torch.Tensor, tokens: torch.Tensor, y: torch.Tensor, num_inner_steps: int
    ) -> torch.Tensor:
        """Phi [B, L, K] after steps of Adam with learning rate 1."""
        phi = phi.clone()
        optimizer = torch.optim.Adam([phi], lr=1.0, fused=True)
        side = int(tokens.shape[1] ** 0.5)
        for _ in range(num_inner_steps):
            phi.grad = self.gradient(phi, tokens, y, side)
            optimizer.step()
        return phi

    def sample(self, y: Any, *, num_steps: int, num_inner_steps: int) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] of square noisy images y [B, H, W, 3]."""
        y = torch.tensor(np.asarray(y), device=self.device).permute(0, 3, 1, 2)
        side = y.shape[-1] // 2 ** (self.levels - 1)
        num_codes = len(self.codebook)
        tokens = torch.full((len(y), side * side), num_codes, device=self.device)
        for left in masked_counts("cosine", num_steps, side * side):
            with torch.no_grad():
                logits = self.logits(tokens, side)
            phi = self.refine(logits, tokens, y, num_inner_steps)
            with torch.no_grad():
                log_probs = phi.log_softmax(-1)
                bits = (log_probs.exp() @ self.codebook) > 0
                weights = 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=self.device)
                proposal = (bits * weights).sum(-1)
                scores = log_probs.gather(-1, proposal[..., None])[..., 0]
                is_masked = tokens == num_codes
                scores = scores.masked_fill(~is_masked, -torch.inf)
                count = is_masked.sum(-1)
                kept = count - (count - 1).clamp(min=0, max=int(left))
                rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
                tokens = torch.where(is_masked & (rank < kept[:, None]), proposal, tokens)
        with torch.no_grad():
            codes = self.codebook[tokens].to(self.dtype).mT.unflatten(-1, (side, side))
            return decode(self.decoder, codes, self.levels, self.groups).float().clamp(-1, 1)
