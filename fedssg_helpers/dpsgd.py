"""A generator with differential privacy: a small VAE trained by DP-SGD. Needs Opacus, an extra of this course."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from .errors import require
from .keys import one_thread
from .models import scale, unscale


class ConditionalVAE(nn.Module):
    """A small VAE that is told the class, at half resolution: differential privacy pays for every weight.

    All that it learns passes through its gradients: no batch statistics, and codes are drawn from the prior.
    """

    def __init__(self, channels: int, size: int, classes: int, generator, latent: int = 8, width: int = 32):
        super().__init__()
        require(size % 2 == 0, "size", size, "even for the private generator, which halves it")
        self.shape, self.classes, self.latent = (channels, size // 2, size // 2), classes, latent
        pixels = channels * (size // 2) ** 2
        self.encode = nn.Sequential(nn.Linear(pixels, width), nn.SiLU(), nn.Linear(width, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent + classes, width), nn.SiLU(), nn.Linear(width, pixels))
        for layer in (*self.encode[::2], *self.decode[::2]):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, labels: Tensor, normal: Tensor) -> Tensor:
        """Loss of each image, float (B,): negative ELBO with a decoder of fixed variance 1/4, in nats.

        `generator.loss` shares one variance over a batch; then no image has a gradient of its own to be clipped.
        """
        mean, log_variance = self.encode(x).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * normal
        error = (self.decode(torch.cat([z, F.one_hot(labels, self.classes).float()], 1)) - x).square().sum(1)
        return 2 * error + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)

    @torch.no_grad()
    def sample(self, c: int, number: int, random: np.random.Generator) -> Tensor:
        """`number` images of class c, uint8 (n, C, H, W), from the prior."""
        z = torch.from_numpy(random.standard_normal((number, self.latent), dtype=np.float32))
        told = F.one_hot(torch.full((number,), c), self.classes).float()
        small = self.decode(torch.cat([z, told], 1)).view(-1, *self.shape)
        return unscale(F.interpolate(small, scale_factor=2, mode="bilinear"))


def opacus_missing() -> str:
    """What to do if the `privacy` extra is not installed; empty where it is."""
    cure = "differential privacy needs Opacus, an extra of this course: pip install -e '.[privacy]'"
    return "" if importlib.util.find_spec("opacus") else cure


@one_thread()
def fit_private(images, labels, classes, epsilon, random, *, steps=400, batch=128, clip=1.0, lr=3e-3):
    """Train a `ConditionalVAE` by DP-SGD (Abadi et al. 2016, arXiv 1607.00133); gives it, and which epsilon it spent.

    In every step each image takes part with the same chance (about batch / N), its gradient is clipped to length
    `clip`, and normal noise is added to the sum. One accountant (Renyi) counts all steps. The guarantee is for adding
    or removing one *image*, at delta = 1 / (10 N); it covers all that is computed from the images here, and neither
    the counts that a hospital reports nor other images of the same patient.

    Images are uint8 (N, C, H, H), H even; labels int64 (N,), 0..classes-1. An infinite `epsilon` clips and adds no
    noise. Noise that `random` can draw again can be subtracted: a real release must draw it in secret.
    """
    if missing := opacus_missing():
        raise ValueError(missing)
    require(len(images) > 0, "the number of images to learn from", 0, "1 or more")
    require(epsilon > 0, "epsilon", epsilon, "above 0 (infinite: no noise)")
    from opacus import PrivacyEngine
    from opacus.accountants.utils import get_noise_multiplier

    first, drawn, added = (torch.Generator().manual_seed(int(random.integers(2**62))) for _ in range(3))
    net, delta = ConditionalVAE(*images.shape[1:3], classes, first), 1 / (10 * len(images))
    data = TensorDataset(F.avg_pool2d(scale(images), 2).flatten(1), labels)
    loader, adam = DataLoader(data, batch, generator=drawn), torch.optim.Adam(net.parameters(), lr)
    parts = {"module": net, "optimizer": adam, "data_loader": loader, "noise_generator": added}
    target = {"target_epsilon": epsilon, "target_delta": delta, "steps": steps, "accountant": "rdp"}
    with warnings.catch_warnings(action="ignore"):  # keyed noise is not secure: said above
        noise = 0.0 if np.isinf(epsilon) else get_noise_multiplier(sample_rate=1 / len(loader), **target)
        engine = PrivacyEngine(accountant="rdp")
        model, optimiser, loader = engine.make_private(noise_multiplier=noise, max_grad_norm=clip, **parts)
        for x, own in islice(chain.from_iterable(repeat(loader)), steps):
            normal = torch.from_numpy(random.standard_normal((len(x), net.latent), dtype=np.float32))
            optimiser.zero_grad()
            model(x, own, normal).mean().backward()
            optimiser.step()
        model.to_standard_module()
        return net, engine.get_epsilon(delta)


@dataclass(frozen=True)
class DPSGD:
    """A source of samples with differential privacy: `fit_private`, told the cell of each image."""

    epsilon: float = 10.0
    steps: int = 400
    clip: float = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            require(value > 0, f"the private generator's {name}", value, "above 0")
        if missing := opacus_missing():
            raise ValueError(missing)

    def __call__(self, images, labels, cells, random, orientations=None):
        """Learn from a hospital's images; gives ``sample(cell, number, random)``."""
        options = {"steps": self.steps, "clip": self.clip}
        return fit_private(images, cells, int(cells.max()) + 1, self.epsilon, random, **options)[0].sample
