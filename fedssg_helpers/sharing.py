"""The sharing strategy: who lacks what, who can supply it, and what is sent. No image leaves a hospital.

1. Each hospital reports how many images it has per class and device: ``have`` (K, C, D).
2. The server sums the reports to the coverage matrix N[c, d], and a *rule* turns each hospital's gaps into wishes
   ``want`` (K, C, D): synthetic images of class c from device d that it should receive.
3. Hospitals that own a (class, device) cell generate and upload their part of it: ``offer`` (K, C, D).
4. The server deals the pool of uploads: nobody gets his own samples, nobody more than the budget.
"""
from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from . import generator
from .keys import rng
from .partition import Client, Federation


@dataclass(frozen=True)
class Budget:
    """How much is shared.

    Attributes
    ----------
    fill : int
        A hospital asks for synthetic images of a class until it holds this many, real ones included.
    cell : int
        ... and for this many of every (class, device) cell that somebody else can generate: other devices are
        covered for its frequent classes too, and no class is synthetic only.
    offer : int
        A hospital uploads at most this many samples of one cell.
    receive : int
        A hospital receives at most this many samples in all.
    power : float, 0..1
        How much more a source with more images counts: 0 all the same, 1 in proportion.
    """

    fill: int = 200
    cell: int = 20
    offer: int = 150
    receive: int = 1500
    power: float = 0.5


@dataclass(frozen=True)
class Plan:
    """``want`` and ``offer``, int64 (K, C, D): samples that each hospital receives, and generates, per cell."""

    want: np.ndarray
    offer: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Uploaded samples: images uint8 (M, C, H, W); labels, device, source (hospital) int64 (M,)."""

    images: torch.Tensor
    labels: torch.Tensor
    device: torch.Tensor
    source: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def reports(clients: list[Client], classes: int, devices: int) -> np.ndarray:
    """What hospitals tell the server: images per class and device, int64 (K, C, D)."""
    cells = [torch.bincount(c.labels * devices + c.device, minlength=classes * devices) for c in clients]
    return torch.stack(cells).view(len(clients), classes, devices).numpy()


def coverage(have: np.ndarray) -> np.ndarray:
    """The coverage matrix N (C, D) of the federation."""
    return have.sum(0)


def supply(have: np.ndarray) -> np.ndarray:
    """Images (K, C, D) that *others* could learn a cell from: cells too small to be generated count as none."""
    credible = np.where(have >= generator.MINIMUM, have, 0)
    return credible.sum(0) - credible


def class_and_device(have: np.ndarray, budget: Budget) -> np.ndarray:
    """FedSSG: fill each rare class from every device that owns it, and each cell that a hospital has never seen.

    ``want = max(gap * share, cell - have)`` where gap (K, C) is what a hospital lacks of a class, share the part of
    each device in what the others can supply, softened by ``budget.power``, and ``cell`` a small floor.
    """
    others = supply(have)
    gap = np.maximum(budget.fill - have.sum(2), 0)
    by_class = gap[:, :, None] * _shares(others ** budget.power, axis=2)
    by_cell = np.where(others > 0, np.maximum(budget.cell - have, 0), 0)
    return _within(np.ceil(np.maximum(by_class, by_cell)), budget.receive)


def uniform(have: np.ndarray, budget: Budget) -> np.ndarray:
    """The control (uniform shuffle, as in FedSSyn, arXiv 2306.13263): as many samples, classes as they come."""
    total = class_and_device(have, budget).sum((1, 2))
    others = supply(have)
    return _within(np.round(total[:, None, None] * _shares(others, axis=(1, 2))), budget.receive)


RULES = {"class_and_device": class_and_device, "uniform": uniform}


def _shares(weight: np.ndarray, axis) -> np.ndarray:
    """Weights divided by their sum over `axis`; 0 where nobody has any."""
    total = weight.sum(axis, keepdims=True)
    return np.divide(weight, total, out=np.zeros(weight.shape), where=total > 0)


def _within(want: np.ndarray, most: int) -> np.ndarray:
    """Wishes (K, C, D) scaled down, hospital by hospital, so that none receives more than `most`."""
    total = want.sum((1, 2), keepdims=True)
    return np.floor(want * np.minimum(1, most / np.maximum(total, 1)) + 1e-9).astype(np.int64)


def plan(have: np.ndarray, rule: str, budget: Budget = Budget()) -> Plan:
    """Wishes by the rule, and the uploads that serve them.

    Sources share a cell's work in proportion to (their images of it) ** power. As a sample may go to several
    hospitals, a source offers what the neediest *other* hospital takes from it, not the sum over hospitals.

    Parameters
    ----------
    have : int64 array (K, C, D)
        The reports.
    rule : str
        A name in `RULES`.
    """
    want = RULES[rule](have, budget)
    weight = np.where(have >= generator.MINIMUM, have, 0) ** budget.power
    offer = np.zeros_like(want)
    for k in range(len(have)):
        others = weight.copy()
        others[k] = 0
        offer = np.maximum(offer, np.ceil(want[k] * _shares(others, axis=0)).astype(np.int64))
    return Plan(want, np.minimum(offer, budget.offer))


def pool_of(offers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Pool:
    """The server's pool of the hospitals' uploads, each (images, labels, device), in order of hospitals."""
    source = [torch.full((len(labels),), k) for k, (_, labels, _) in enumerate(offers)]
    return Pool(*(torch.cat(parts) for parts in zip(*offers)), torch.cat(source))


def deal(wishes: np.ndarray, pool: Pool, client: int, seed: int) -> torch.Tensor:
    """Rows of the pool, int64 (n,), for hospital `client`, whose wishes are (C, D): other hospitals' samples only."""
    random, devices = rng(seed, "deal", client), wishes.shape[1]
    cell = (pool.labels * devices + pool.device).numpy()
    foreign = (pool.source != client).numpy()
    rows = [random.permutation(np.flatnonzero((cell == wanted) & foreign))[:wishes.flat[wanted]]
            for wanted in np.flatnonzero(wishes)]
    return torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, np.int64))


@dataclass(frozen=True)
class Shared:
    """What sharing leaves behind: the plan, the pool, the pool rows each hospital received, and what it cost."""

    plan: Plan
    pool: Pool
    rows: list[torch.Tensor]
    costs: dict[str, float]


def share(clients: list[Client], federation: Federation, rule: str, seed: int, *, budget: Budget = Budget(),
          latent: int = 200, steps: int = 0, temperature: float = 0.9) -> Shared:
    """The whole exchange: reports, plan, generators, uploads, dealing.

    Generators stay at home: a hospital's samples are the only thing that leaves it besides its counts.
    """
    classes, devices = len(federation.classes), len(federation.devices)
    agreed = plan(reports(clients, classes, devices), rule, budget)
    began = time.perf_counter()
    offers = [offer_of(c, agreed.offer[k], k, seed, latent=latent, steps=steps, temperature=temperature)
              for k, c in enumerate(clients)]
    seconds = time.perf_counter() - began
    pool = pool_of(offers)
    rows = [deal(agreed.want[k], pool, k, seed) for k in range(len(clients))]
    image_bytes = clients[0].images[0].numel()
    up, down = float(len(pool) * image_bytes), float(sum(map(len, rows)) * image_bytes)
    return Shared(agreed, pool, rows, {"generator_seconds": seconds, "bytes_up": up, "bytes_down": down,
                                       "bytes_samples_up": up, "bytes_samples_down": down})


def offer_of(client: Client, numbers: np.ndarray, k: int, seed: int, *, latent: int = 200, steps: int = 0,
             temperature: float = 0.9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What hospital k does: train its generator and sample `numbers` (C, D); gives images, labels, device."""
    devices = numbers.shape[1]
    images, cells = [client.images[:0]], np.repeat(np.arange(numbers.size), numbers.ravel())
    if len(cells):
        model = generator.fit(client.images, client.labels, client.labels * devices + client.device,
                              rng(seed, "generator", k), latent=latent, steps=steps)
        images += [model.sample(int(cell), int(numbers.flat[cell]), rng(seed, "samples", k, int(cell)), temperature)
                   for cell in np.flatnonzero(numbers)]
    cells = torch.from_numpy(cells)
    return torch.cat(images), cells // devices, cells % devices
