"""ResNet-20 with filter response norm in place of batch norm, whose rows depend on each other.

    ν² = mean over positions of x²,    y = γ x / √(ν² + ε) + β,    z = max(y, τ)      for each channel of each row

Singh and Krishnan (2020), "Filter response normalization layer: eliminating batch dependence in the training of deep
neural networks", CVPR, equations 1 to 4. He et al. (2016), "Deep residual learning for image recognition", CVPR,
section 4.2: three stages of three blocks with 16, 32 and 64 channels; where the width changes, the shortcut is a
convolution of one position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FilterResponseNorm(nn.Module):
    """Filter response norm followed by its thresholded linear unit.

    The gain is kept as γ − 1, so that zero is where a prior belongs for all three parameters.
    """

    def __init__(self, channels: int, epsilon: float = 1e-6, thresholded: bool = True) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.excess_gain = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.threshold = nn.Parameter(torch.zeros(channels)) if thresholded else None

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.epsilon)
        y = (1.0 + _per_channel(self.excess_gain)) * (x * scale) + _per_channel(self.shift)
        return y if self.threshold is None else torch.maximum(y, _per_channel(self.threshold))


def _per_channel(parameter: Tensor) -> Tensor:
    return parameter.reshape(-1, 1, 1)


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = FilterResponseNorm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = FilterResponseNorm(outputs, thresholded=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()
        self.threshold = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(self.first_norm(self.first(x))))
        return torch.maximum(y + self.shortcut(x), _per_channel(self.threshold))


class ResNet20(nn.Module):
    """Images ``(rows, 3, height, width)`` to logits ``(rows, classes)``."""

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), FilterResponseNorm(width))
        blocks, inputs = [], width
        for outputs, first_stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for stride in (first_stride, 1, 1):
                blocks.append(Block(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))
