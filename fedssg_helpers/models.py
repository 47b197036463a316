"""The classifier that every hospital trains, as one flat vector of weights; and how images enter it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .errors import require
from .keys import torch_rng

WIDTHS = (16, 32, 64)


class Flat(nn.Module):
    """A network whose parameters are views into one vector ``weights`` (P,), and their gradients into ``grad`` (P,).

    A federated algorithm is then a line of vector arithmetic, and sending a model is sending one vector.
    """

    def flatten(self) -> None:
        """Make the two vectors, where the parameters are now."""
        self.weights = torch.cat([p.data.reshape(-1) for p in self.parameters()])
        self.grad, start = torch.zeros_like(self.weights), 0
        for p in self.parameters():
            end = start + p.numel()
            p.data, p.grad = self.weights[start:end].view_as(p), self.grad[start:end].view_as(p)
            start = end

    def norms(self) -> torch.Tensor:
        """Which weights (P,), bool, are scales and shifts of a normalisation layer."""
        kinds = nn.GroupNorm | nn.LayerNorm
        layers = [(p, m) for m in self.modules() for p in m.parameters(recurse=False)]
        return torch.cat([torch.full((p.numel(),), isinstance(m, kinds)) for p, m in layers])


class SmallCNN(Flat):
    """A small strided convolutional network with GroupNorm (Wu & He 2018, arXiv 1803.08494).

    GroupNorm keeps no batch statistics: those leak information, and averaging them over hospitals breaks them.

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
        self.head, self.classes = nn.Linear(before, classes), classes
        self._initialise(torch_rng(seed, "initial weights"))
        self.to(compute)
        self.flatten()

    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of images (B, C, H, W): uint8, or float that `scale` has scaled."""
        return self.head(self.body(scale(images) if images.dtype == torch.uint8 else images))


class Torchvision(Flat):
    """A classifier of `torchvision.models`, by name, without batch statistics and without chance.

    Without `weights` its BatchNorm layers become GroupNorm. With them (torchvision's name of trained weights, such as
    "IMAGENET1K_V1") they are frozen: their statistics are constants that never travel. Dropout, which would draw from a
    generator that all threads share, is off. Grey images are shown as colour. A ValueError for a name that torchvision
    does not know, or weights that cannot be had.
    """

    def __init__(self, name: str, classes: int, seed: int = 0, compute: str = "cpu", weights: str = ""):
        super().__init__()
        from torchvision import models  # here, because it takes as long to import as PyTorch itself

        known = models.list_models(module=models)
        needed = f"smallcnn or one of torchvision's, such as {', '.join(known[-9:])}"
        require(name in known, "network", name, needed)
        with torch.random.fork_rng(devices=[]):  # torchvision draws first weights from the global generator
            torch.manual_seed(torch_rng(seed, f"initial weights of {name}").initial_seed())
            self.net, self.classes = models.get_model(name, num_classes=classes), classes
        if weights:
            own, trained = self.net.state_dict(), _trained(name, weights)
            same = {key for key in own if key in trained and trained[key].shape == own[key].shape}
            self.net.load_state_dict(own | {key: trained[key] for key in same})  # all but the last layer
        _replace_layers(self.net, frozen=bool(weights))
        self.to(compute)
        self.flatten()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of images (B, C, H, W): uint8, or float that `scale` has scaled."""
        x = scale(images) if images.dtype == torch.uint8 else images
        logits = self.net(x.expand(-1, 3, -1, -1))
        require(isinstance(logits, torch.Tensor), "what this network gives", type(logits), "logits alone")
        return logits


def _trained(name: str, weights: str) -> dict[str, torch.Tensor]:
    """Trained weights of torchvision by name, from its cache or downloaded, checked by their hash; tensors only."""
    from torchvision import models

    choices = models.get_model_weights(name)
    require(weights in choices.__members__, "weights", weights, f"one of {', '.join(choices.__members__)}")
    chosen = choices[weights]
    try:
        return chosen.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk, the hash
        file = f"{torch.hub.get_dir()}/checkpoints/{chosen.url.rpartition('/')[2]}"
        cure = f"download {chosen.url} elsewhere and put it there"
        raise ValueError(f"{file} is not there, and downloading it failed ({error}); {cure}") from error


def _replace_layers(net: nn.Module, frozen: bool) -> None:
    """BatchNorm becomes GroupNorm or, `frozen`, constants; dropout and stochastic depth go."""
    from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

    for name, layer in list(net.named_children()):
        if isinstance(layer, nn.BatchNorm2d) and frozen:
            constant = FrozenBatchNorm2d(layer.num_features, layer.eps)
            constant.load_state_dict({key: layer.state_dict()[key] for key in constant.state_dict()})
            setattr(net, name, constant)
        elif isinstance(layer, nn.BatchNorm2d):
            setattr(net, name, nn.GroupNorm(math.gcd(8, layer.num_features), layer.num_features))
        elif isinstance(layer, nn.Dropout | StochasticDepth):
            setattr(net, name, nn.Identity())
        else:
            _replace_layers(layer, frozen)


@dataclass(frozen=True)
class Backbone:
    """Which network a method trains: "smallcnn", or a classifier of `torchvision.models` by its name."""

    name: str = "smallcnn"
    weights: str = ""  # torchvision's name of trained weights; without: from scratch

    def __call__(self, channels: int, classes: int, seed: int = 0, compute: str = "cpu") -> Flat:
        """A network with its first weights."""
        if self.name == "smallcnn":
            return SmallCNN(channels, classes, seed, compute)
        return Torchvision(self.name, classes, seed, compute, self.weights)


def compute_device(compute: str) -> str:
    """Where PyTorch computes: "auto" is CUDA where there is one, else the CPU. (MPS has no float64, which `Mean` needs.)"""
    return compute if compute != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 images (N, C, H, H) with sides of `size` pixels: means of pixels where smaller, else bilinear; equal: as they are."""
    if images.shape[-1] == size or not len(images):
        return images if images.shape[-1] == size else images.new_empty(*images.shape[:2], size, size)
    how = {"mode": "area"} if size < images.shape[-1] else {"mode": "bilinear"}
    parts = [F.interpolate(part.float(), (size, size), **how).round().byte() for part in images.split(256)]
    return torch.cat(parts)


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
def predict(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Most likely class (N,), int64, of images (N, C, H, W) that the network takes; computed where the network is."""
    place = next(net.parameters()).device
    batch = max(1, min(512, 2**23 // images.shape[1:].numel()))  # of 224 pixels in colour: 55
    return torch.cat([net(part.to(place)).argmax(1).cpu() for part in images.split(batch)])
