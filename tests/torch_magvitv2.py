"""The MagVIT-v2 tokenizer in PyTorch, with the parameter names of the published checkpoint.

Written for the tests from the description of the architecture; forward pass only.
"""

import torch
from torch import nn
from torch.nn import functional


def _norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        query, key, value = (part(h).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed[:, 0].mT.reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.block_2 = Block(channels, channels), Block(channels, channels)
        self.attn_1 = Attention(channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """Downsampling pads on the right and at the bottom, or all around if `is_symmetric`."""

    def __init__(self, channels, *, down):
        super().__init__()
        self.down, self.is_symmetric = down, False
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1)

    def forward(self, x):
        if not self.down:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        all_around = self.is_symmetric or not self.down
        return self.conv(functional.pad(x, (1, 1, 1, 1) if all_around else (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, inputs, outputs, num_blocks):
        super().__init__()
        widths = [inputs] + [outputs] * num_blocks
        self.block = nn.ModuleList(Block(*pair) for pair in zip(widths, widths[1:], strict=False))

    def forward(self, x):
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Encoder(nn.Module):
    def __init__(self, bits, channels, blocks):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        inputs = (channels[0], *channels)
        self.down = nn.ModuleList(map(Level, inputs, channels, blocks))
        for level, width in zip(self.down[:-1], channels, strict=False):
            level.downsample = Resample(width, down=True)
        self.mid, self.norm_out = Middle(channels[-1]), _norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.norm_out(self.mid(x))
        return self.quant_conv(self.conv_out(functional.silu(x)))


class Decoder(nn.Module):
    def __init__(self, bits, channels, blocks):
        super().__init__()
        self.conv_in = nn.Conv2d(bits, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        inputs = (*channels[1:], channels[-1])
        self.up = nn.ModuleList(map(Level, inputs, channels, blocks))
        for level, width in zip(self.up[1:], channels[1:], strict=True):
            level.upsample = Resample(width, down=False)
        self.norm_out = _norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, z):
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    def __init__(self, bits):
        super().__init__()
        self.register_buffer("power_vals", 2 ** torch.arange(bits - 1, -1, -1))
        tokens = torch.arange(2**bits)[:, None]
        signs = tokens.bitwise_and(self.power_vals) != 0
        self.register_buffer("embedding", signs.float() * 2 - 1)

    def forward(self, z):
        """Signs [B, bits, h, w] and tokens [B, h, w]."""
        bits = z > 0
        tokens = (bits * self.power_vals[None, :, None, None]).sum(1)
        return bits.float() * 2 - 1, tokens


class MagVitV2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = Encoder(config.num_bits, config.encoder_channels, config.encoder_blocks)
        self.decoder = Decoder(config.num_bits, config.decoder_channels, config.decoder_blocks)
        self.quantize = Quantizer(config.num_bits)
