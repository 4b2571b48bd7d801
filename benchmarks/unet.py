"""A U-Net for the segmentation of images, as one would write it by hand, with a loss.

After Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015, figure 1, with padded convolutions and batch norms, as is usual since.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """The loss, and logits (batch, classes, height, width)."""

    loss: Tensor
    logits: Tensor


class DoubleConvolution(nn.Sequential):
    """Twice a 3x3 convolution, a batch norm and a ReLU."""

    def __init__(self, before: int, after: int) -> None:
        layers: list[nn.Module] = []
        for width in (before, after):
            convolution = nn.Conv2d(width, after, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """An encoder that halves the image between its blocks, and a decoder that joins what it kept."""

    supports_gradient_checkpointing = False
    blocks = (DoubleConvolution,)

    def __init__(self, width: int = 32, depth: int = 5, classes: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(depth)]
        self.config = SimpleNamespace()
        self.down = nn.ModuleList(
            DoubleConvolution(before, after) for before, after in zip([3, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(widths[1:], widths, strict=False))[::-1]
        self.rise = nn.ModuleList(nn.ConvTranspose2d(deep, flat, 2, stride=2) for deep, flat in pairs)
        self.up = nn.ModuleList(DoubleConvolution(2 * flat, flat) for _, flat in pairs)
        self.classifier = nn.Conv2d(width, classes, 1)

    @property
    def base_model(self) -> nn.Module:
        """The model without a head: there is no other."""
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Output:
        """`pixel_values` (batch, 3, height, width), `labels` int64 (batch, height, width)."""
        kept = []
        x = pixel_values
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            kept.append(x)
        for rise, block, skip in zip(self.rise, self.up, kept[-2::-1], strict=True):
            x = block(torch.cat((skip, rise(x)), dim=1))
        logits = self.classifier(x)
        return Output(nn.functional.cross_entropy(logits, labels), logits)


def build(batch: int, size: int, **options: int) -> tuple[UNet, dict[str, Any]]:
    """The model, and random images of `size` pixels, the same for the same arguments."""
    torch.manual_seed(0)
    model = UNet(**options)
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(model.classifier.out_channels, (batch, size, size))
    return model, {"pixel_values": images, "labels": labels}
