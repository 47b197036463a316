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
from torch.nn import functional as F

from .models import orientations, scale, turn

MINIMUM = 8  # a cell with fewer local images is not generated: its samples would be near copies
TWINS = 0.6  # images nearer than this part of a cell's usual nearest distance count as pictures of one lesion
FLOOR = 1e-6  # least variance of the decoder's noise, in scaled units squared: a hundredth of one grey level


def unscale(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `models.scale`: float images to uint8, 0..255, rounded and clipped."""
    return x.mul(63.75).add(127.5).round().clamp(0, 255).to(torch.uint8)


class VAE(nn.Module):
    """Linear VAE plus a residual that starts at zero.

    encoder: mean(x) = A (x - mu) + r(x),  log-variance(x) = a + s(x);  decoder: x(z) = mu + W z + t(z).
    r, s and t are small convolutional networks that work at half resolution (pixel shuffle) and whose last
    layers start at zero, so an untrained VAE *is* its linear part: with `fit_linear`, probabilistic PCA.

    Parameters
    ----------
    channels, size : int
        Images are (channels, size, size).
    latent : int, >= 1
        Dimension q of the code z.
    generator : torch.Generator
        Draws the first weights of the residual networks.
    width : int
        Channels of the residual networks.

    Raises
    ------
    ValueError
        No latent dimension, or as many as an image has values: nothing would be left for the noise.
    """

    def __init__(self, channels: int, size: int, latent: int, generator: torch.Generator, width: int = 32):
        super().__init__()
        pixels, self.shape = channels * size * size, (channels, size, size)
        if not 1 <= latent < pixels:
            raise ValueError(f"latent is {latent}; images of {channels} x {size} x {size} allow 1 to {pixels - 1}")
        self.linear = True  # the residuals are still zero: do not compute them
        self.mu = nn.Parameter(torch.zeros(pixels))
        self.encode_matrix = nn.Parameter(torch.zeros(latent, pixels))
        self.decode_matrix = nn.Parameter(torch.zeros(pixels, latent))
        self.log_variance = nn.Parameter(torch.zeros(latent))
        small = -(-size // 4)  # sides that are no multiple of 4 are padded inside the residuals
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
        rest = -x.shape[-1] % 4
        correction, log_variance = self.encode_residual(F.pad(x, (0, rest, 0, rest))).chunk(2, 1)
        return mean + correction, self.log_variance + log_variance

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled images (B, C, H, W) of codes z (B, q)."""
        x = (self.mu + z @ self.decode_matrix.T).view(-1, *self.shape)
        size = self.shape[-1]
        return x if self.linear else x + self.decode_residual(z)[..., :size, :size]


def chances(labels: torch.Tensor, power: float) -> np.ndarray:
    """Chance (N,) of each image to be drawn: its class gets n ** power of all draws; 1 as they come, 0 all alike."""
    chance = torch.bincount(labels).double()[labels].numpy() ** (power - 1)
    return chance / chance.sum()


def _check(images: torch.Tensor, labels: torch.Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; needed are square uint8 images "
                         "(N, C, H, H), 0..255")
    if len(images) < 2 or labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images with labels of shape {tuple(labels.shape)}; needed are at least two "
                         "images and one label for each")


def fit_linear(images: torch.Tensor, labels: torch.Tensor, latent: int, random: np.random.Generator, *,
               rows: int = 1500, power: float = 0.5) -> VAE:
    """The closed-form linear VAE: probabilistic PCA (Tipping & Bishop 1999, eqs. 7 to 9).

    Parameters
    ----------
    images : uint8 tensor (N, C, H, H), N >= 2
    labels : int64 tensor (N,)
    latent : int, 1 to the values of an image less one
    rows : int
        Images that the principal axes are computed from, at most N times the `orientations`. They are drawn evenly
        (systematic sampling), class by class in proportion to n ** power: rare classes count for more than their
        number. Neighbouring draws, so copies of an image too, come in different orientations.

    Raises
    ------
    ValueError
        Images that are not square uint8, labels that do not fit them, or an impossible `latent`.
    """
    _check(images, labels)
    turns = orientations(images)
    rows = min(rows, len(turns) * len(images))
    ends = np.cumsum(chances(labels, power))
    pick = np.searchsorted(ends, ends[-1] * (np.arange(rows) + random.random()) / rows)
    x = torch.cat([turn(scale(images[pick[i::len(turns)]]), which) for i, which in enumerate(turns)]).flatten(1)
    net = VAE(images.shape[1], images.shape[2], latent, torch.Generator().manual_seed(int(random.integers(2**62))))
    mu = x.mean(0)
    x -= mu
    variance, axes = _principal(x, latent, int(random.integers(2**62)))
    noise = ((x.square().sum() / rows - variance.sum()) / (x.shape[1] - latent)).clamp(min=FLOOR)
    signal = (variance - noise).clamp(min=0)
    with torch.no_grad():
        net.mu.copy_(mu)
        net.decode_matrix.copy_(axes * signal.sqrt())
        net.encode_matrix.copy_((axes * (signal.sqrt() / (signal + noise))).T)
        net.log_variance.copy_((noise / (signal + noise)).log())
    return net


def _principal(x: torch.Tensor, latent: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances (q,) along, and the axes (P, q), of centred rows x (N, P); randomised, Halko et al. 2011."""
    with torch.random.fork_rng(devices=[]):  # svd_lowrank knows the global generator only
        torch.manual_seed(seed)
        _, singular, axes = torch.svd_lowrank(x, min(latent + 8, *x.shape), niter=2)
    missing = max(latent - len(singular), 0)  # fewer rows than latent dimensions: the others stay unused
    singular, axes = F.pad(singular, (0, missing)), F.pad(axes, (0, missing))
    return singular[:latent] ** 2 / len(x), axes[:, :latent]


def loss(net: VAE, x: torch.Tensor, epsilon: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Negative ELBO per image, in nats up to the constant D/2 (1 + log 2 pi), with the optimal shared variance.

    The Gaussian decoder's variance that fits best is the mean squared error itself, which turns the squared error
    into its logarithm (sigma-VAE: Rybkin et al. 2021, arXiv 2006.13202, eq. 5).

    Parameters
    ----------
    x : float tensor (B, C, H, W)
        Scaled images; D = C H W.
    epsilon : float tensor (B, q)
        Standard normal numbers that draw the codes.
    beta : float
        Weight of the KL term; 1 is the ELBO.
    """
    mean, log_variance = net.encode(x)
    z = mean + (0.5 * log_variance).exp() * epsilon
    error = (net.decode(z) - x).square().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return x[0].numel() / 2 * error.clamp(min=FLOOR).log() + beta * divergence


def train(net: VAE, images: torch.Tensor, labels: torch.Tensor, steps: int, random: np.random.Generator, *,
          lr: float = 1e-3, batch: int = 64, power: float = 0.5, warm_up: float = 1 / 3,
          after_step=lambda step, net: None) -> VAE:
    """Gradient training of the whole network, in place, by Adam with a cosine schedule; returns `net`.


    Parameters
    ----------
    images, labels, power
        As in `fit_linear`.
    steps : int, >= 0
    lr : float
        First learning rate; the default suits a start from scratch. A start in the closed form wants a tenth of it.
    warm_up : float, 0..1
        Part of the steps over which the weight of the KL term rises to 1, so that a start from scratch learns to use
        its codes first. A start in the closed form needs none: 0.
    after_step : callable
        Called as ``after_step(step, net)`` after each step, steps counted from 1.

    Raises
    ------
    ValueError
        Images that are not square uint8, or labels that do not fit them.
    """
    _check(images, labels)
    net.linear, turns = False, orientations(images)
    optimiser = torch.optim.Adam(net.parameters(), lr)
    order = torch.from_numpy(random.choice(len(labels), (steps, batch), p=chances(labels, power)))
    for step, rows in enumerate(order, 1):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + np.cos(np.pi * (step - 1) / steps))
        x = turn(scale(images[rows]), turns[int(random.integers(len(turns)))])
        epsilon = torch.from_numpy(random.standard_normal((len(x), len(net.log_variance)), dtype=np.float32))
        optimiser.zero_grad()
        loss(net, x, epsilon, min(1.0, step / max(warm_up * steps, 1))).backward()
        optimiser.step()
        after_step(step, net)
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
        Lower Cholesky factor of the cell's covariance.
    """

    net: VAE
    mean: dict[int, torch.Tensor]
    factor: dict[int, torch.Tensor]

    @torch.no_grad()
    def sample(self, cell: int, number: int, random: np.random.Generator, temperature: float = 0.9) -> torch.Tensor:
        """`number` images of a cell, uint8 (n, C, H, W).

        Codes spread `temperature` (>= 0) times as far from the cell's mean as the data's; 0 gives the mean itself.
        Shown is the decoder's mean, without its pixel noise.

        Raises
        ------
        ValueError
            A cell that was not fitted, or a negative temperature.
        """
        if cell not in self.mean:
            raise ValueError(f"cell {cell} cannot be generated: fewer than {MINIMUM} images of it were there to learn "
                             f"from; the cells that can are {sorted(self.mean)}")
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 or more")
        normal = torch.from_numpy(random.standard_normal((number, len(self.mean[cell])), dtype=np.float32))
        return unscale(self.net.decode(self.mean[cell] + temperature * normal @ self.factor[cell].T))


def trust(number: int, shrink: float = 30.0) -> float:
    """How far a cell of `number` images trusts its own covariance, 0..1: n / (n + shrink)."""
    return number / (number + shrink)


@torch.no_grad()
def fit_density(net: VAE, images: torch.Tensor, cells: torch.Tensor, shrink: float = 30.0, *,
                most: int = 1600) -> Generator:
    """Fit a Gaussian to the codes of each cell's images, in their `orientations`.

    The covariance is that of the aggregate posterior (scatter of the codes' means plus their mean variance), the
    scatter shrunk towards the one pooled over all cells, by `trust`. Cells with fewer than `MINIMUM` images are
    left out.

    Parameters
    ----------
    images : uint8 tensor (N, C, H, H)
    cells : int64 tensor (N,), >= 0
    shrink : float, >= 0, images
        At this many images own and pooled scatter count half each; 0: own only.
    most : int
        So many codes of a cell are enough: a small one's images come in all orientations, those of one that would give
        more codes in one orientation each, neighbours in different ones.
    """
    _check(images, cells)
    numbers, turns = torch.bincount(cells), orientations(images)
    mean, scatter, spread = {}, {}, 0.0
    for c in torch.nonzero(numbers >= MINIMUM)[:, 0].tolist():
        own = images[cells == c][::-(-int(numbers[c]) // most)]
        step = len(turns) if len(own) * len(turns) > most else 1
        z, log_variance = (torch.cat(parts) for parts in zip(*(net.encode(turn(scale(own[i % step::step]), which))
                                                               for i, which in enumerate(turns))))
        mean[c], scatter[c] = z.mean(0), torch.cov(z.T.double(), correction=0)
        spread = spread + numbers[c] * log_variance.double().exp().mean(0)
    total = sum(int(numbers[c]) for c in mean)
    pooled = sum(int(numbers[c]) * scatter[c] for c in mean) / max(total, 1)
    factor = {}
    for c in mean:
        own = trust(int(numbers[c]), shrink)
        covariance = own * scatter[c] + (1 - own) * pooled + torch.diag(spread / total)
        factor[c] = torch.linalg.cholesky(covariance).float()
    return Generator(net, mean, factor)


def distances(images: torch.Tensor, others: torch.Tensor, turns=range(8)) -> torch.Tensor:
    """How far each image is from each other one in the best of the orientations `turns`, float32 (N, M), grey levels.

    Root mean squared difference over all values of the image; uint8 images (N, C, H, H) and (M, C, H, H).
    """
    x, y = images.float(), others.float().flatten(1)
    best = torch.full((len(x), len(y)), torch.inf)
    for which in turns:  # by matrix product: hundreds of times faster than the difference of every pair
        best = torch.minimum(best, torch.cdist(turn(x, which).flatten(1), y))
    return best / max(y.shape[1], 1) ** 0.5


def apart(images: torch.Tensor, turns=range(8), most: int = 200) -> torch.Tensor:
    """How far images of one cell are from the nearest *other* one, float32 (min(N, most),); N >= 2.

    That is what held-out images would show, measured without holding any out (leave-one-out). Pictures of one lesion
    or patient would hide it, so pairs nearer than `TWINS` times the median are passed over: the measure is a little
    larger than the plain one, and rejection by it stricter. Of large cells, `most` images are measured.
    """
    rows = torch.linspace(0, len(images) - 1, min(most, len(images))).long()
    far = distances(images[rows], images, turns)
    far[torch.arange(len(rows)), rows] = torch.inf
    return far.masked_fill(far < TWINS * far.min(1)[0].median(), torch.inf).min(1)[0]


def limits(images: torch.Tensor, cells: torch.Tensor, part: float, few: int = 40) -> dict[int, float]:
    """How near to a hospital's own images of a cell a sample may come, in grey levels: quantile `part` of `apart`.

    A cell of fewer than `few` images has no fifth percentile worth the name: it takes the hospital's pooled one,
    measured in units of each cell's median. Cells with fewer than `MINIMUM` images are left out.

    Parameters
    ----------
    images, cells
        As in `fit_density`.
    part : float, 0..1
    """
    numbers, turns = torch.bincount(cells), orientations(images)
    own = {c: apart(images[cells == c], turns) for c in torch.nonzero(numbers >= MINIMUM)[:, 0].tolist()}
    pooled = float(torch.cat([a / a.median() for a in own.values()]).quantile(part)) if own else 0.0
    return {c: float(a.quantile(part) if numbers[c] >= few else a.median() * pooled) for c, a in own.items()}


def ordinary(images: torch.Tensor, cells: torch.Tensor, most: float, sample: int = 200) -> torch.Tensor:
    """Which images (N,), bool, are like others of their cell: the nearest is at most `most` times as far as usual.

    Usual is the median of the cell. An image that is like no other has axes and codes of its own, and shines
    through in samples; what it alone shows is also what other hospitals can use least. Each image is held against
    `sample` others.
    """
    keep, turns = torch.ones(len(images), dtype=torch.bool), orientations(images)
    for c in torch.nonzero(torch.bincount(cells) >= MINIMUM)[:, 0].tolist():
        rows = torch.nonzero(cells == c)[:, 0]
        some = torch.linspace(0, len(rows) - 1, min(sample, len(rows))).long()
        far = distances(images[rows], images[rows[some]], turns)
        far[some, torch.arange(len(some))] = torch.inf
        nearest = far.min(1)[0]
        keep[rows] = nearest <= most * nearest.median()
    return keep


def fit(images: torch.Tensor, labels: torch.Tensor, cells: torch.Tensor, random: np.random.Generator, *,
        latent: int = 200, steps: int = 0) -> Generator:
    """All that a hospital does: closed form, `steps` of gradient training, density.

    Parameters
    ----------
    images : uint8 tensor (N, C, H, H)
        The hospital's own training images.
    labels, cells : int64 tensors (N,)
        Class, and the (class, device) cell to generate from.
    latent : int
        At most; images of few values get a quarter of their number.

    Raises
    ------
    ValueError
        See `fit_linear`.
    """
    _check(images, labels)
    net = fit_linear(images, labels, min(latent, images[0].numel() // 4), random)
    if steps:
        net = train(net, images, labels, steps, random, lr=1e-4, warm_up=0.0)
    return fit_density(net, images, cells)
