"""The sample generator each hospital trains: a class-conditional VAE that starts from its closed form.

A VAE (Kingma & Welling 2014, arXiv 1312.6114) with a linear encoder and decoder has its optimum in closed form:
probabilistic PCA (Tipping & Bishop 1999; Lucas et al. 2019, arXiv 1911.02469). `fit_linear` puts the network there
in about a second; `train` then spends as many gradient steps as one likes on a small non-linear residual.
Classes enter by ex-post density estimation (Ghosh et al. 2020, arXiv 1903.12436): one Gaussian per class and
device over the codes of the training images, which is where new codes are drawn from.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .models import scale, turn

MINIMUM = 8  # a class with fewer local images is not generated: its samples would be copies


def unscale(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `models.scale`: float images to uint8, 0..255, rounded and clipped."""
    return x.mul(63.75).add(127.5).round().clamp(0, 255).to(torch.uint8)


class VAE(nn.Module):
    """Linear VAE plus a residual that starts at zero.

    encoder: mean(x) = A (x - mu) + r(x),  log-variance(x) = a + s(x);  decoder: x(z) = mu + W z + t(z).
    r, s and t are small convolutional networks that work at half resolution (pixel shuffle) and whose last
    layers start at zero, so an untrained VAE *is* probabilistic PCA.

    Parameters
    ----------
    channels, size : int
        Images are (channels, size, size); size is a multiple of 4.
    latent : int
        Dimension q of the code z.
    width : int
        Channels of the residual networks.
    """

    def __init__(self, channels: int, size: int, latent: int, generator: torch.Generator, width: int = 32):
        super().__init__()
        self.linear = True  # the residuals are still zero: do not compute them
        pixels, self.shape = channels * size * size, (channels, size, size)
        self.mu = nn.Parameter(torch.zeros(pixels))
        self.encode_matrix = nn.Parameter(torch.zeros(latent, pixels))
        self.decode_matrix = nn.Parameter(torch.zeros(pixels, latent))
        self.log_variance = nn.Parameter(torch.zeros(latent))
        small = size // 4
        self.encode_residual = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 3, 1, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1),
            nn.SiLU(), nn.Flatten(), nn.Linear(width * small * small, 2 * latent))
        self.decode_residual = nn.Sequential(
            nn.Linear(latent, width * small * small), nn.SiLU(), nn.Unflatten(1, (width, small, small)),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1), nn.SiLU(),
            nn.Conv2d(width, 4 * channels, 3, 1, 1), nn.PixelShuffle(2))
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(part.bias)
        nn.init.zeros_(self.encode_residual[-1].weight)
        nn.init.zeros_(self.decode_residual[-2].weight)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance (B, q) of the code of scaled images x (B, C, H, W)."""
        mean = (x.flatten(1) - self.mu) @ self.encode_matrix.T
        if self.linear:
            return mean, self.log_variance.expand(len(x), -1)
        correction, log_variance = self.encode_residual(x).chunk(2, 1)
        return mean + correction, self.log_variance + log_variance

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled images (B, C, H, W) of codes z (B, q)."""
        x = (self.mu + z @ self.decode_matrix.T).view(-1, *self.shape)
        return x if self.linear else x + self.decode_residual(z)


def fit_linear(images: torch.Tensor, labels: torch.Tensor, latent: int, random: np.random.Generator, *,
               rows: int = 3000, power: float = 0.5) -> VAE:
    """The closed-form linear VAE (probabilistic PCA) of uint8 images (N, C, H, W), as a `VAE`.

    The principal axes come from `rows` images drawn with replacement, class by class in proportion to
    n ** power (0.5: rare classes count for more than their number), each in one of eight orientations.
    """
    counts = torch.bincount(labels).double()
    chance = (counts[labels] ** (power - 1)).numpy()
    pick = torch.from_numpy(random.choice(len(labels), rows, p=chance / chance.sum()))
    x = torch.cat([turn(scale(part), i) for i, part in enumerate(images[pick].chunk(8))]).flatten(1)
    net = VAE(images.shape[1], images.shape[2], latent, torch.Generator().manual_seed(int(random.integers(2**62))))
    mu = x.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**62)))
        _, singular, v = torch.svd_lowrank(x - mu, latent + 8, niter=3)
    variance = singular[:latent] ** 2 / len(x)
    total = (x - mu).square().sum() / len(x)
    noise = ((total - variance.sum()) / (x.shape[1] - latent)).clamp(min=1e-6)
    signal = (variance - noise).clamp(min=1e-6)
    with torch.no_grad():
        net.mu.copy_(mu)
        net.decode_matrix.copy_(v[:, :latent] * signal.sqrt())
        net.encode_matrix.copy_((v[:, :latent] * (signal.sqrt() / (signal + noise))).T)
        net.log_variance.copy_((noise / (signal + noise)).log())
    return net


def loss(net: VAE, x: torch.Tensor, epsilon: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative ELBO per image, up to a constant, with the optimal shared variance (sigma-VAE)."""
    mean, log_variance = net.encode(x)
    z = mean + (0.5 * log_variance).exp() * epsilon
    error = (net.decode(z) - x).square().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return x[0].numel() / 2 * error.log() + beta * divergence


def train(net: VAE, images: torch.Tensor, labels: torch.Tensor, steps: int, random: np.random.Generator, *,
          lr: float = 1e-3, batch: int = 64, power: float = 0.5) -> VAE:
    """Gradient training of the whole network, in place, by Adam with a cosine schedule.

    The weight of the KL term rises from 0 to 1 over the first third of the steps.
    """
    net.linear = False
    optimiser = torch.optim.Adam(net.parameters(), lr)
    counts = torch.bincount(labels).double()
    chance = (counts[labels] ** (power - 1)).numpy()
    order = torch.from_numpy(random.choice(len(labels), (steps, batch), p=chance / chance.sum()))
    for step, rows in enumerate(order):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        x = turn(scale(images[rows]), int(random.integers(8)))
        epsilon = torch.from_numpy(random.standard_normal((len(x), len(net.log_variance)), dtype=np.float32))
        optimiser.zero_grad()
        loss(net, x, epsilon, min(1.0, 3 * (step + 1) / steps)).backward()
        optimiser.step()
    return net


@dataclass(frozen=True)
class Generator:
    """A trained VAE with one Gaussian per cell over its codes.

    Attributes
    ----------
    net : VAE
    mean : dict of float32 tensors (q,)
        Mean code of each cell; a cell is any integer label, in the course class * devices + device.
    factor : dict of float32 tensors (q, q)
        Cholesky factor of the cell's covariance.
    """

    net: VAE
    mean: dict[int, torch.Tensor]
    factor: dict[int, torch.Tensor]

    @torch.no_grad()
    def sample(self, cell: int, number: int, random: np.random.Generator, temperature: float = 0.9) -> torch.Tensor:
        """`number` images of a cell, uint8 (n, C, H, W); codes spread `temperature` times as far as the data's."""
        normal = torch.from_numpy(random.standard_normal((number, len(self.mean[cell])), dtype=np.float32))
        return unscale(self.net.decode(self.mean[cell] + temperature * normal @ self.factor[cell].T))


@torch.no_grad()
def fit_density(net: VAE, images: torch.Tensor, cells: torch.Tensor, shrink: float = 30.0) -> Generator:
    """Fit a Gaussian to the codes of each cell's images, in all eight orientations.

    A cell of n images trusts its own covariance with weight n / (n + shrink) and the pooled one with the rest;
    cells with fewer than `MINIMUM` images are left out.
    """
    numbers = torch.bincount(cells)
    kept = [int(c) for c in torch.nonzero(numbers >= MINIMUM)]
    encoded = [net.encode(turn(scale(images), which)) for which in range(8)]
    codes = torch.stack([mean for mean, _ in encoded])  # (8, N, q)
    spread = torch.stack([log_variance.exp().mean(0) for _, log_variance in encoded]).mean(0)
    by_cell = {c: codes[:, cells == c].flatten(0, 1) for c in kept}
    mean = {c: z.mean(0) for c, z in by_cell.items()}
    scatter = {c: (z - mean[c]).T @ (z - mean[c]) for c, z in by_cell.items()}
    pooled = sum(scatter.values()) / max(sum(len(z) for z in by_cell.values()), 1)
    factor = {}
    for c, z in by_cell.items():
        trust = len(z) / 8 / (len(z) / 8 + shrink)
        covariance = trust * scatter[c] / len(z) + (1 - trust) * pooled + torch.diag(spread)
        factor[c] = torch.linalg.cholesky(covariance)
    return Generator(net, mean, factor)


def fit(images: torch.Tensor, labels: torch.Tensor, cells: torch.Tensor, random: np.random.Generator, *,
        latent: int = 200, steps: int = 0) -> Generator:
    """All that a hospital does: closed form, `steps` of gradient training, density.

    Parameters
    ----------
    images : uint8 tensor (N, C, H, W)
        The hospital's own training images.
    labels, cells : int64 tensors (N,)
        Class, and the (class, device) cell to generate from.
    """
    net = fit_linear(images, labels, min(latent, images[0].numel() // 4), random)
    return fit_density(train(net, images, labels, steps, random) if steps else net, images, cells)
