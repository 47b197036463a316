"""The classifier that every hospital trains, as one flat vector of weights; and how images enter it."""

from __future__ import annotations

import torch
from torch import nn

from .keys import torch_rng

WIDTHS = (16, 32, 64)


class SmallCNN(nn.Module):
    """A small strided convolutional network with GroupNorm (Wu & He 2018, arXiv 1803.08494).

    GroupNorm keeps no batch statistics: those leak information, and averaging them over hospitals breaks them.
    All parameters are views into one vector ``weights`` (P,) and their gradients into ``grad`` (P,): a federated
    algorithm is then a line of vector arithmetic, and sending a model is sending one vector.

    `channels`: 1 (grey) or 3 (colour). `classes`: at least 2. Equal seeds give equal first weights, on every machine.
    `compute`: the PyTorch device to compute on, for example "cuda".
    """

    def __init__(self, channels: int, classes: int, seed: int = 0, compute: str = "cpu"):
        super().__init__()
        layers, before = [], channels
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)]
            layers += [nn.GroupNorm(8, width), nn.ReLU(inplace=True)]
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, classes)
        self._initialise(torch_rng(seed, "initial weights"))
        self.to(compute)
        self._flatten()

    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    def _flatten(self) -> None:
        self.weights = torch.cat([p.data.reshape(-1) for p in self.parameters()])
        self.grad, start = torch.zeros_like(self.weights), 0
        for p in self.parameters():
            end = start + p.numel()
            p.data, p.grad = self.weights[start:end].view_as(p), self.grad[start:end].view_as(p)
            start = end

    def norms(self) -> torch.Tensor:
        """Which weights (P,), bool, are scales and shifts of a normalisation layer."""
        layers = [(p, m) for m in self.modules() for p in m.parameters(recurse=False)]
        return torch.cat([torch.full((p.numel(),), isinstance(m, nn.GroupNorm)) for p, m in layers])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of images (B, C, H, W): uint8, or float that `scale` has scaled."""
        return self.head(self.body(scale(images) if images.dtype == torch.uint8 else images))


def scale(images: torch.Tensor) -> torch.Tensor:
    """uint8 images, 0..255, as float32 in about -2..2 (mid-grey is 0)."""
    return images.float().sub_(127.5).div_(63.75)


def unscale(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `scale`: float images as uint8, 0..255, rounded and clipped."""
    return x.mul(63.75).add(127.5).round().clamp(0, 255).to(torch.uint8)


def normalise(images: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Scaled images (B, C, H, W), less the mean and over the deviation of each channel: `style` (B, 2, C) or (2, C)."""
    mean, deviation = style.unsqueeze(-1).unsqueeze(-1).unbind(-4)
    return (images - mean) / deviation


def augment(images: torch.Tensor, orientation: int) -> torch.Tensor:
    """Square images (B, C, H, W) in one of eight orientations, 0..7: quarter turns, and flips of them."""
    images = torch.rot90(images, orientation % 4, (2, 3))
    return images.flip(-1) if orientation >= 4 else images


def plausible_orientations(images: torch.Tensor) -> list[int]:
    """The orientations (see `augment`) that suit images (N, C, H, H) of this kind; 0, as they are, always.

    Skin lesions have no up and down, chest X-rays do. An orientation is kept if it moves the mean image by at most half
    of the images' variance (2 / N is added to the half: with few images the mean moves by chance).
    """
    x = scale(images[:: max(1, len(images) // 500, -(-images.numel() // 2**26))])  # 2 ** 26 values: 256 MiB
    mean = x.mean(0, keepdim=True)
    most = (0.5 + 2 / max(len(x), 1)) * x.sub_(mean).square_().sum() / max(len(x), 1)
    return [i for i in range(8) if i == 0 or (mean - augment(mean, i)).square().sum() <= most]


@torch.no_grad()
def predict(net: nn.Module, images: torch.Tensor, batch: int = 512) -> torch.Tensor:
    """Most likely class (N,), int64, of images (N, C, H, W) that the network takes; computed where the network is.

    At once `batch` images, or as many as have 2 ** 23 values: of 224 pixels, 55 in colour.
    """
    place = next(net.parameters()).device
    batch = max(1, min(batch, 2**23 // images.shape[1:].numel()))
    return torch.cat([net(part.to(place)).argmax(1).cpu() for part in images.split(batch)])
