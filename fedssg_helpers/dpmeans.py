"""A generator in closed form with differential privacy: noisy means and one noisy covariance per hospital.

It sees images as a few slow cosine waves, in units that only the built-in phantoms say: they are drawings, so public.
What is protected is a *group*: all images of one lesion or patient. Numbers of groups per cell are public.
Images are uint8 tensors (N, C, H, H), cells and groups int64 (N,); d is the number of waves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor

from . import data, devices
from .errors import require
from .keys import one_thread
from .models import augment, scale, unscale

EVERY = 8  # of so many phantoms one is used: they are quick to load then, and enough for a scale
WAVES, SLOW = 6, 4  # cosine waves along each side of an image; the class means use the slower ones only
PARTS = {"centre": 0.1, "means": 0.7, "spread": 0.2}  # of mu squared, the budget of the three releases
WIDER = {"centre": 2.0, "means": 1.0, "spread": 3.0}  # clips of the three, in units of `DPMeans.clip`


@dataclass(frozen=True)
class Public:
    """What is known without any hospital's image; from the phantoms: `scale`, `mean`, `covariance`."""

    waves: Tensor  # (d, C, H, H): cosine pictures; a coefficient is the sum over an image times one of them
    turns: Tensor  # (O, d, d): what each plausible orientation does to coefficients
    slow: Tensor  # (d,), bool: which waves the means use
    scale: Tensor  # (d,): spread of each coefficient inside the cells of the phantoms
    mean: Tensor  # (d,): their mean, in units of `scale`, as the others
    covariance: Tensor  # (d, d), inside cells


def cosines(channels: int, size: int) -> Tensor:
    """The lowest `WAVES` x `WAVES` pictures of the discrete cosine transform in each channel, (d, C, H, H).

    They are orthogonal, and so long that the coefficients of an image do not depend on its `size`.
    """
    x, k = (torch.arange(size) + 0.5) * math.pi / size, torch.arange(WAVES)
    wave = torch.cos(k[:, None] * x) * torch.where(k == 0, 1.0, 2.0).sqrt()[:, None] / size
    flat = torch.einsum("ky,lx->klyx", wave, wave).flatten(0, 1)
    return torch.einsum("cb,kyx->ckbyx", torch.eye(channels), flat).flatten(0, 1)


@lru_cache(maxsize=4)
def public(channels: int, size: int) -> Public:
    """The public part for images of 1 (grey) or 3 channels.

    Which orientations are plausible is a choice here, as a hospital's own images may not be asked: all eight in colour,
    and for grey images, which have an up and a down as X-rays do, only the first.
    """
    waves, drawn = cosines(channels, size), data.read_npz(data.PROJECT_DATA / "phantom.npz", data.NO_CLONE)
    images, label, device = (drawn[name][::EVERY] for name in ("images", "labels", "device"))
    device = np.unique(device, return_inverse=True)[1]
    x = scale(torch.from_numpy(devices.apply(images.transpose(0, 3, 1, 2), device)))
    z = (x if channels == 3 else x.mean(1, keepdim=True)).flatten(1) @ cosines(channels, 28).flatten(1).T
    turned = [augment(waves, o).flatten(1) for o in (range(8) if channels == 3 else (0,))]
    turns = torch.stack(turned) @ waves.flatten(1).T * size**2
    cells = torch.from_numpy(np.unique(np.stack([label, device]), axis=1, return_inverse=True)[1].ravel())
    inside = z - torch.stack([z[cells == c].mean(0) for c in range(int(cells.max()) + 1)])[cells]
    covariance = (turns @ torch.cov(inside.T) @ turns.mT).mean(0)
    unit, low = covariance.diagonal().sqrt(), (torch.arange(WAVES) < SLOW).float()
    slow = torch.outer(low, low).flatten().repeat(channels).bool()
    mean = turns.mean(0) @ z.mean(0) / unit
    return Public(waves, turns, slow, unit, mean, covariance / torch.outer(unit, unit))


def mu_of(epsilon: float, delta: float) -> float:
    """The mu that may be spent in all: a sum of sensitivity s with normal noise of deviation s / mu is (epsilon, delta)-DP.

    This is exact (Balle & Wang 2018, arXiv 1805.06530, theorem 8). Releases with mu_1, mu_2, ... are as one with
    mu^2 = mu_1^2 + mu_2^2 + ... (Gaussian DP: Dong et al. 2019, arXiv 1905.02383, corollary 3.3). In zero-concentrated
    DP (Bun & Steinke 2016, arXiv 1605.02065) the same is rho = mu^2 / 2, whose usual conversion to epsilon is looser.
    """
    if np.isinf(epsilon):
        return math.inf

    def above(mu: float) -> float:
        return ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta

    return brentq(above, 1e-12, 2 * math.sqrt(epsilon) + 20)


def one_each(z: Tensor, groups: Tensor, cells: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """One vector for each group and cell that occur together, (M, d), and the cells (M,): the mean of these images.

    All vectors of one group together are at most `clip` long, so replacing one group moves the sums of all cells by at
    most 2 `clip`, and the sum of outer products by at most sqrt(2) `clip`^2.
    """
    pairs, at = torch.unique(torch.stack([groups, cells], 1), dim=0, return_inverse=True)
    mean = torch.zeros(len(pairs), z.shape[1]).index_add_(0, at, z) / torch.bincount(at)[:, None]
    owner = torch.unique(pairs[:, 0], return_inverse=True)[1]
    length = torch.zeros(len(owner)).index_add_(0, owner, mean.square().sum(1)).sqrt()
    return mean * (clip / length.clamp(min=clip))[owner, None], pairs[:, 1]


def shrunk(noisy: Tensor, towards: Tensor | float, energy: float) -> Tensor:
    """A noisy vector or matrix, drawn `towards` a guess as far as its noise, of expected squared length `energy`, says.

    James & Stein 1961, positive part. It uses no image again, so it costs no privacy.
    """
    apart = noisy - towards
    return towards + apart * (1 - energy / apart.square().sum().clamp(min=1e-12)).clamp(min=0)


@dataclass(frozen=True)
class Moments:
    """What a hospital's generator knows: a mean for each cell (cells, d), one factor (d, d) of the covariance."""

    known: Public
    mean: Tensor
    factor: Tensor

    @one_thread()
    def sample(self, cell: int, number: int, random: np.random.Generator, temperature: float = 0.9) -> Tensor:
        """`number` images of a cell, uint8 (n, C, H, W): smooth, each in a plausible orientation drawn at random."""
        require(0 <= cell < len(self.mean), "the cell to sample", cell, f"one of 0 to {len(self.mean) - 1}")
        waves, turns = self.known.waves, self.known.turns
        normal = torch.from_numpy(random.standard_normal((number, len(self.factor)), dtype=np.float32))
        z = (self.mean[cell] + temperature * normal @ self.factor.T) * self.known.scale
        z = torch.einsum("nij,nj->ni", turns[random.integers(len(turns), size=number)], z)
        return unscale((z @ waves.flatten(1)).view(number, *waves.shape[1:]) * waves.shape[-1] ** 2)


def private_moments(z: Tensor, groups, cells, known: Public, clip: float, mu: float, random) -> Moments:
    """Mean of each cell and covariance inside cells of coefficients z (N, d), in units of ``known.scale``.

    Three releases with normal noise share the budget `mu` by `PARTS`: the centre of all images, the means of the cells
    about it, the covariance about those. All are averaged over the plausible orientations, in which samples come.
    """
    slow, turns = known.turns.mean(0) * torch.outer(known.slow, known.slow), known.turns
    most = {name: clip * wider for name, wider in WIDER.items()}
    noise = {name: 2 * most[name] / (mu * part**0.5) for name, part in PARTS.items()}

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))

    own, _ = one_each((z - known.mean) @ slow, groups, torch.zeros_like(cells), most["centre"])
    centre = known.mean + (own.sum(0) + noise["centre"] * normal(z.shape[1]) @ slow) / len(own)

    own, cell = one_each((z - centre) @ slow, groups, cells, most["means"])
    number = torch.bincount(cell).clamp(min=1)[:, None]
    sums = torch.zeros(len(number), z.shape[1]).index_add_(0, cell, own)
    means = (sums + noise["means"] * normal(*sums.shape) @ slow) / number
    energy = (float(slow.trace()) - 2) * (noise["means"] / number) ** 2
    means = centre + torch.stack([shrunk(mean, 0.0, float(e)) for mean, e in zip(means, energy)])

    rest, _ = one_each(z - means[cells], groups, cells, most["spread"])
    deviation = noise["spread"] * most["spread"] / 2**0.5
    products = rest.T @ rest + deviation * normal(z.shape[1], z.shape[1])
    products = (turns @ (products + products.T) @ turns.mT).mean(0) / (2 * len(rest))
    guess = known.covariance * (products.trace() / known.covariance.trace()).clamp(min=0.1)
    freedom = float((turns.diagonal(0, 1, 2).sum(1) ** 2 + (turns * turns.mT).sum((1, 2))).mean() / 2)
    size, axes = torch.linalg.eigh(shrunk(products, guess, freedom * (deviation / len(rest)) ** 2))
    return Moments(known, means, axes * size.clamp(min=0).sqrt())


@dataclass(frozen=True)
class DPMeans:
    """A source of samples with differential privacy in closed form: see `private_moments`.

    The guarantee is for *replacing* all images of one group (lesion or patient; without groups: one image) at one
    hospital by others of the same cells: whatever is computed from its samples, however many, changes its probability
    by a factor of at most exp(`epsilon`), but for `delta`. A lesion photographed at two hospitals is covered at each by
    itself. Public, so not covered: numbers of images and of groups per cell, and the six style numbers where they are
    asked for. Noise that `random` can draw again can be subtracted: a real release draws it in secret. An infinite
    `epsilon` clips and adds no noise. Means of cells with few groups are mostly noise: see `sharing.Budget.minimum`.
    """

    epsilon: float = 3.0
    delta: float = 1e-5  # for each hospital
    clip: float = 3.5  # longest vector of a group about the centre, in units of the phantoms' spread
    temperature: float = 0.9

    per_group = True  # `client.synthesise` hands over the groups

    def __post_init__(self):
        require(self.epsilon > 0, "epsilon", self.epsilon, "above 0 (infinite: no noise)")
        require(0 < self.clip < np.inf, "clip", self.clip, "above 0, and finite")
        require(0 < self.delta < 1, "delta", self.delta, "in 0..1, both excluded")
        require(0 <= self.temperature < np.inf, "temperature", self.temperature, "0 or more")

    @one_thread()
    def __call__(self, images, labels, cells, random, orientations=None, groups=None):
        """Learn from a hospital's images; gives ``sample(cell, number, random)``."""
        require(len(images) > 0, "the number of images to learn from", 0, "1 or more")
        groups, known = torch.arange(len(images)) if groups is None else groups, public(*images.shape[1:3])
        z = scale(images).flatten(1) @ known.waves.flatten(1).T / known.scale
        mu = mu_of(self.epsilon, self.delta)
        moments = private_moments(z, groups, cells, known, self.clip, mu, random)
        return partial(moments.sample, temperature=self.temperature)
