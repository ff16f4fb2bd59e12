"""The blur network of BKSE in PyTorch, with the parameter names of the published file.

Written for the tests from the description of the architecture.
"""

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(x)))


class Level(nn.Module):
    """One level of the U-Net around the next deeper one; the innermost meets the code."""

    def __init__(self, widths, code_dim, is_outermost=True):
        super().__init__()
        (outer, inner), rest = widths[:2], widths[1:]
        down = nn.Conv2d(outer, inner, 4, 2, 1, bias=False)
        self.is_outermost = is_outermost
        self.down = nn.Sequential(*([down] if is_outermost else [nn.LeakyReLU(0.2), down]))
        below = inner if len(rest) > 1 else code_dim
        up = nn.ConvTranspose2d(inner + below, outer, 4, 2, 1, bias=is_outermost)
        self.up = nn.Sequential(nn.ReLU(), up, *([nn.Tanh()] if is_outermost else []))
        if len(rest) > 1:
            self.submodule = Level(rest, code_dim, is_outermost=False)

    def forward(self, x, code):
        h = self.down(x)
        if hasattr(self, "submodule"):
            return self.up(torch.cat([self.submodule(h, code), h], 1))
        return self.up(torch.cat([h, code.expand(len(h), -1, -1, -1)], 1))


class KernelWizard(nn.Module):
    def __init__(self, width, front, back, code_dim):
        super().__init__()
        leaky = [nn.LeakyReLU(0.1) for _ in range(6)]
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1), leaky[0],
            nn.Conv2d(width, width, 3, 2, 1), leaky[1],
            nn.Conv2d(width, width, 3, 2, 1), leaky[2],
            *(Residual(width) for _ in range(front)),
        )  # fmt: skip
        widths = (width, width, 2 * width, 4 * width, 8 * width, 8 * width)
        self.adapter = nn.ModuleDict({"model": Level(widths, code_dim)})
        self.recon_trunk = nn.Sequential(
            *(Residual(width) for _ in range(back)),
            nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), leaky[3],
            nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), leaky[4],
            nn.Conv2d(width, width, 3, 1, 1), leaky[5],
            nn.Conv2d(width, 3, 3, 1, 1),
        )  # fmt: skip
        self.kernel_extractor = nn.Sequential(nn.Conv2d(6, width, 3))  # of no use here

    def forward(self, x, code):
        """Blurs images [B, 3, H, W] in [0, 1] with a code [1, code_dim, H/128, W/128]."""
        features = self.adapter["model"](self.feature_extractor(x), code)
        return x + self.recon_trunk(features)
