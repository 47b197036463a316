"""The sample generator of a hospital: a class-conditional VAE that starts from its closed form.

A VAE (Kingma & Welling 2014, arXiv 1312.6114) with a linear encoder and decoder has its optimum in closed form:
probabilistic PCA (Tipping & Bishop 1999; Lucas et al. 2019, arXiv 1911.02469). Classes enter by ex-post density
estimation (Ghosh et al. 2020, arXiv 1903.12436): one Gaussian per cell over the codes of the training images.
Images are uint8 tensors (N, C, H, H), labels and cells int64 (N,); a cell is class * devices + device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import require
from .keys import one_thread
from .models import augment, plausible_orientations, scale, unscale

MINIMUM = 8  # a cell with fewer local images is not generated: its samples would be near copies
FLOOR = 1e-6  # least variance of the decoder's noise, scaled units squared: a deviation of 0.06 grey levels
SIDE = 48  # pixels: larger images are made smaller for the generator, and its samples larger again where they arrive
WIDTH = 32  # channels of the residual networks


class VAE(nn.Module):
    """Linear VAE plus a residual that starts at zero; images are (channels, size, size), codes z have `latent` values.

    encoder: mean(x) = A (x - mu) + r(x),  log-variance(x) = log v + s(x);  decoder: x(z) = mu + W z + t(z).
    The last layers of the small networks r, s and t start at zero: an untrained VAE is exactly its linear part.
    """

    def __init__(self, channels: int, size: int, latent: int, generator: torch.Generator):
        super().__init__()
        pixels, self.shape = channels * size * size, (channels, size, size)
        require(1 <= latent < pixels, "latent", latent, f"1 to {pixels - 1} for images of shape {self.shape}")
        self.linear = True  # the residuals are still zero: do not compute them
        self.mu = nn.Parameter(torch.zeros(pixels))
        self.encode_matrix = nn.Parameter(torch.zeros(latent, pixels))
        self.decode_matrix = nn.Parameter(torch.zeros(pixels, latent))
        self.log_variance = nn.Parameter(torch.zeros(latent))
        small = -(-size // 4)  # sides that are no multiple of 4 are padded inside the residuals
        flat = WIDTH * small**2
        half = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, WIDTH, 3, 1, 1), nn.SiLU()]
        code = [nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(flat, 2 * latent)]
        self.encode_residual = nn.Sequential(*half, *code)
        start = [nn.Linear(latent, flat), nn.SiLU(), nn.Unflatten(1, (WIDTH, small, small))]
        last = [nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.SiLU(), nn.Conv2d(WIDTH, 4 * channels, 3, 1, 1)]
        self.decode_residual = nn.Sequential(*start, nn.Upsample(scale_factor=2), *last, nn.PixelShuffle(2))
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(part.bias)
        nn.init.zeros_(code[-1].weight)
        nn.init.zeros_(last[-1].weight)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, q) of the code of scaled images x (B, C, H, W)."""
        mean = (x.flatten(1) - self.mu) @ self.encode_matrix.T
        if self.linear:
            return mean, self.log_variance.expand(len(x), -1)
        rest = -x.shape[-1] % 4
        correction, log_variance = self.encode_residual(F.pad(x, (0, rest, 0, rest))).chunk(2, 1)
        return mean + correction, self.log_variance + log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Scaled images (B, C, H, W) of codes z (B, q)."""
        x = (self.mu + z @ self.decode_matrix.T).view(-1, *self.shape)
        size = self.shape[-1]
        return x if self.linear else x + self.decode_residual(z)[..., :size, :size]


def chances(labels: Tensor, power: float) -> np.ndarray:
    """Chance (N,) of each image to be drawn: a class of n images gets n ** power of the draws (0: all alike)."""
    chance = torch.bincount(labels).double()[labels].numpy() ** (power - 1)
    return chance / chance.sum()


def _checked(images: Tensor, labels: Tensor, orientations: list[int] | None) -> list[int]:
    """The orientations to use; a ValueError if images or labels do not fit."""
    square = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[2] == images.shape[3]
    if not square or len(images) < 2 or labels.shape != (len(images),):
        found = f"{images.dtype} of shape {tuple(images.shape)}, with labels of shape {tuple(labels.shape)}"
        needed = "at least two square uint8 images (N, C, H, H), 0..255, and one label for each"
        raise ValueError(f"images are {found}; needed are {needed}")
    return plausible_orientations(images) if orientations is None else orientations


@one_thread()
@torch.no_grad()
def fit_linear(images, labels, latent: int, random, *, orientations=None, rows=1500, power=0.5) -> VAE:
    """The closed-form linear VAE: probabilistic PCA (Tipping & Bishop 1999, eqs. 7 to 9).

    The axes come from at most `rows` images, and at most N times the `orientations` (None: the plausible ones). They
    are drawn evenly (systematic sampling), class by class in proportion to n ** power, so that rare classes count for
    more than their number. Neighbouring draws, so copies of an image too, come in different orientations.
    """
    orientations = _checked(images, labels, orientations)
    every = len(orientations)
    rows = min(rows, every * len(images))
    ends = np.cumsum(chances(labels, power))
    pick = np.searchsorted(ends, ends[-1] * (np.arange(rows) + random.random()) / rows)
    x = torch.cat([augment(scale(images[pick[i::every]]), o) for i, o in enumerate(orientations)]).flatten(1)
    net = VAE(*images.shape[1:3], latent, torch.Generator().manual_seed(int(random.integers(2**62))))
    net.mu.copy_(x.mean(0))
    x -= net.mu
    variance, axes = _principal(x, latent, int(random.integers(2**62)))
    noise = ((x.square().sum() / rows - variance.sum()) / (x.shape[1] - latent)).clamp(min=FLOOR)
    signal = (variance - noise).clamp(min=0)
    net.decode_matrix.copy_(axes * signal.sqrt())
    net.encode_matrix.copy_((axes * (signal.sqrt() / (signal + noise))).T)
    net.log_variance.copy_((noise / (signal + noise)).log())
    return net


def _principal(x: Tensor, latent: int, seed: int) -> tuple[Tensor, Tensor]:
    """Variances (q,) along, and the axes (M, q), of centred rows x (N, M), by randomised SVD (Halko et al. 2011).

    These are the steps of `torch.svd_lowrank`, which would draw from the global generator, shared by all threads.
    """
    tall = x if len(x) >= x.shape[1] else x.T
    size = tall.shape[1], min(latent + 8, *x.shape)
    basis = torch.linalg.qr(tall @ torch.randn(size, generator=torch.Generator().manual_seed(seed))).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis).Q).Q
    left, singular, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    axes = right.T if tall is x else basis @ left
    missing = max(latent - len(singular), 0)  # fewer rows than latent dimensions: the others stay unused
    singular, axes = F.pad(singular, (0, missing)), F.pad(axes, (0, missing))
    return singular[:latent] ** 2 / len(x), axes[:, :latent]


def loss(net: VAE, x: Tensor, epsilon: Tensor, beta: float = 1.0) -> Tensor:
    """Negative ELBO per image x (B, C, H, W) of M scaled values, in nats up to the constant M/2 (1 + log 2 pi).

    Standard normal numbers `epsilon` (B, q) draw the codes; `beta` weights the KL term (1: the ELBO). The decoder's
    variance that fits best is the mean squared error itself, so the error enters by its logarithm (sigma-VAE: Rybkin
    et al. 2021, arXiv 2006.13202, eq. 5).
    """
    mean, log_variance = net.encode(x)
    z = mean + (0.5 * log_variance).exp() * epsilon
    error = (net.decode(z) - x).square().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return x.shape[1:].numel() / 2 * error.clamp(min=FLOOR).log() + beta * divergence


@one_thread()
def train(net: VAE, images, labels, steps: int, random, *, orientations=None, lr=1e-3, warm_up=1 / 3) -> VAE:
    """Train the whole network in place by Adam, on batches of 64, the learning rate falling along a cosine.

    The default `lr` suits a start from scratch; a start in the closed form needs a tenth of it. The weight of the KL
    term rises to 1 over the fraction `warm_up` of the steps, so that a start from scratch learns to use its codes
    first; a start in the closed form needs 0. Images are drawn as in `fit_linear`. Returns `net`.
    """
    orientations, net.linear = _checked(images, labels, orientations), False
    optimiser = torch.optim.Adam(net.parameters(), lr)
    order = torch.from_numpy(random.choice(len(labels), (steps, 64), p=chances(labels, 0.5)))
    for step, rows in enumerate(order, 1):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + np.cos(np.pi * (step - 1) / steps))
        x = augment(scale(images[rows]), orientations[int(random.integers(len(orientations)))])
        epsilon = torch.from_numpy(random.standard_normal((len(x), len(net.log_variance)), dtype=np.float32))
        optimiser.zero_grad()
        loss(net, x, epsilon, min(1.0, step / max(warm_up * steps, 1))).backward()
        optimiser.step()
    return net


@dataclass(frozen=True)
class Generator:
    """A trained VAE, and of each cell's codes the mean (q,) and the Cholesky factor (q, q) of the covariance."""

    net: VAE
    mean: dict[int, Tensor]
    factor: dict[int, Tensor]

    @one_thread()
    @torch.no_grad()
    def sample(self, cell: int, number: int, random, temperature: float = 0.9) -> Tensor:
        """`number` images of a cell, uint8 (n, C, H, W): the decoder's mean, without its pixel noise.

        Codes spread `temperature` (>= 0) times as far from the cell's mean as the data's; 0 gives the mean itself.
        """
        if cell not in self.mean:
            others = f"choose one of {sorted(self.mean)}"
            raise ValueError(f"cell {cell} had fewer than {MINIMUM} images to learn from; {others}")
        require(temperature >= 0, "temperature", temperature, "0 or more")
        normal = torch.from_numpy(random.standard_normal((number, len(self.mean[cell])), dtype=np.float32))
        return unscale(self.net.decode(self.mean[cell] + temperature * normal @ self.factor[cell].T))


def trust(number: int, shrink: float = 30.0) -> float:
    """How far a cell of `number` images trusts its own covariance, 0..1: n / (n + shrink)."""
    return number / (number + shrink)


@one_thread()
@torch.no_grad()
def fit_density(net: VAE, images, cells, shrink=30.0, *, orientations=None, most=1600) -> Generator:
    """Fit a Gaussian to the codes of each cell; cells with fewer than `MINIMUM` images are left out.

    The covariance is that of the aggregate posterior (scatter of the codes' means plus their mean variance), the
    scatter shrunk towards the one pooled over all cells, by `trust`. About `most` codes of a cell are enough: images
    of a small cell come in all orientations, those of a large one in one each, neighbours in different ones.
    """
    orientations = _checked(images, cells, orientations)
    numbers, mean, scatter, spread = torch.bincount(cells), {}, {}, 0.0
    for c in torch.nonzero(numbers >= MINIMUM)[:, 0].tolist():
        own = images[cells == c][:: -(-int(numbers[c]) // most)]
        step = len(orientations) if len(own) * len(orientations) > most else 1
        codes = [net.encode(augment(scale(own[i % step :: step]), o)) for i, o in enumerate(orientations)]
        z, log_variance = (torch.cat(parts) for parts in zip(*codes))
        mean[c], scatter[c] = z.mean(0), torch.cov(z.T.double(), correction=0)
        spread = spread + numbers[c] * log_variance.double().exp().mean(0)
    total = sum(int(numbers[c]) for c in mean)
    pooled = sum(int(numbers[c]) * scatter[c] for c in mean) / max(total, 1)
    factor = {}
    for c in mean:
        a = trust(int(numbers[c]), shrink)
        covariance = a * scatter[c] + (1 - a) * pooled + torch.diag(spread / total)
        factor[c] = torch.linalg.cholesky(covariance).float()
    return Generator(net, mean, factor)


def fit(images, labels, cells, random, orientations=None, *, latent=200, steps=0) -> Generator:
    """Closed form, `steps` of training, density; at most `latent` dimensions, and a quarter of an image's values."""
    orientations = _checked(images, labels, orientations)
    net = fit_linear(images, labels, min(latent, images[0].numel() // 4), random, orientations=orientations)
    if steps:
        train(net, images, labels, steps, random, orientations=orientations, lr=1e-4, warm_up=0.0)
    return fit_density(net, images, cells, orientations=orientations)


@dataclass(frozen=True)
class ClosedForm:
    """The course's own source of samples: `fit` with `latent` and `steps`, sampled at `temperature`."""

    latent: int = 200
    steps: int = 0
    temperature: float = 0.9

    def __post_init__(self):
        for name, least in (("latent", 1), ("steps", 0), ("temperature", 0)):
            value = getattr(self, name)
            require(least <= value < np.inf, f"the generator's {name}", value, f"{least} or more")

    def __call__(self, images, labels, cells, random, orientations=None):
        """Learn from a hospital's images; gives ``sample(cell, number, random)``."""
        model = fit(images, labels, cells, random, orientations, latent=self.latent, steps=self.steps)
        return partial(model.sample, temperature=self.temperature)
