"""The classifier every hospital trains, held as one flat vector of weights."""
from __future__ import annotations

import torch
from torch import nn

from .keys import torch_rng

WIDTHS = (16, 32, 64)


class SmallCNN(nn.Module):
    """A small strided convolutional network with GroupNorm.

    Strided convolutions shrink the image before the expensive layers, and GroupNorm (Wu & He 2018,
    arXiv 1803.08494) keeps no batch statistics: those leak, and averaging them over clients breaks them.

    All parameters are views into one vector ``weights`` (P,), and their gradients views into ``grad`` (P,):
    a federated algorithm is then a line of vector arithmetic, and sending a model is sending one vector.

    Parameters
    ----------
    channels : int
        1 (grey) or 3 (colour).
    classes : int
        Number of classes, at least 2.
    seed : int
        Names the initial weights; equal seeds give equal weights.
    device : str
        Where to compute, a PyTorch device; the initial weights are drawn on the CPU and the same everywhere.
    """

    def __init__(self, channels: int, classes: int, seed: int = 0, device: str = "cpu"):
        super().__init__()
        layers, before = [], channels
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, width),
                       nn.ReLU(inplace=True)]
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, classes)
        self._initialise(torch_rng(seed, "initial weights"))
        self.to(device)
        self._flatten()

    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    def norms(self) -> torch.Tensor:
        """Which of the weights (P,), bool, are scales and shifts of a normalisation layer."""
        kinds = [torch.full((p.numel(),), isinstance(module, nn.GroupNorm))
                 for module in self.modules() for p in module.parameters(recurse=False)]
        return torch.cat(kinds)

    def _flatten(self) -> None:
        parameters = list(self.parameters())
        self.weights = torch.cat([p.data.reshape(-1) for p in parameters])
        self.grad = torch.zeros_like(self.weights)
        start = 0
        for p in parameters:
            end = start + p.numel()
            p.data = self.weights[start:end].view_as(p)
            p.grad = self.grad[start:end].view_as(p)
            start = end

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of images (B, C, H, W): uint8, or float already scaled by `scale`."""
        return self.head(self.body(scale(images) if images.dtype == torch.uint8 else images))


def scale(images: torch.Tensor) -> torch.Tensor:
    """uint8 images, 0..255, as float32 in about -2..2 (mid-grey is 0, a quarter of the range is 1)."""
    return images.float().sub_(127.5).div_(63.75)


def normalise(images: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Scaled images (B, C, H, W) in units of a style: less its mean, over its standard deviation.

    `style` (B, 2, C), or (2, C) for all: mean and standard deviation of each channel, in scaled units.
    """
    mean, deviation = style.unsqueeze(-1).unsqueeze(-1).unbind(-4)
    return (images - mean) / deviation


def turn(images: torch.Tensor, which: int) -> torch.Tensor:
    """One of the eight flips and quarter turns (which = 0..7) of square images (B, C, H, W)."""
    images = torch.rot90(images, which % 4, (2, 3))
    return images.flip(3) if which >= 4 else images


def orientations(images: torch.Tensor) -> list[int]:
    """Which flips and quarter turns (see `turn`) images of this kind come in; 0, as they are, always.

    Lesions have no up and down, chest X-rays do: learnt in eight orientations they become a blur. A turn is kept if
    it moves the mean of the images (N, C, H, H) by at most half their variance, chance (2 / N) allowed for.
    """
    x = scale(images[::max(1, len(images) // 500)])
    mean = x.mean(0, keepdim=True)
    most = (0.5 + 2 / len(x)) * (x - mean).square().sum() / len(x)
    return [i for i in range(8) if i == 0 or (mean - turn(mean, i)).square().sum() <= most]


@torch.no_grad()
def predict(net: nn.Module, images: torch.Tensor, batch: int = 512) -> torch.Tensor:
    """Most likely class (N,), int64, of uint8 images (N, C, H, W), computed where the network is."""
    place = next(net.parameters()).device
    return torch.cat([net(part.to(place)).argmax(1).cpu() for part in images.split(batch)])
