"""The sharing strategy: who lacks what, who can supply it, and what is sent. No image leaves a hospital.

Each hospital reports how many images of each class and device it has: ``have`` (K, C, D). A *rule* turns the reports
into wishes (K, C, D): synthetic images of class c and device d that each hospital should receive. `plan` bounds the
wishes by the budget and says which hospital generates how many. `distribute` hands out the pool of uploaded samples.

The idea is published (Pavan et al. 2026, arXiv 2604.26324); rules and budgets are this course's own.
K hospitals, C classes and D devices throughout; all counts are images.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from . import generator
from .errors import require
from .keys import rng
from .partition import Client


@dataclass(frozen=True)
class Budget:
    """How much is shared, in images; a ValueError for a field out of its range."""

    fill: int = 200  # a hospital asks for a class until it holds so many images, real ones included
    cell: int = 120  # ... and for so many of every (class, device) cell that others can generate
    per_image: float = 0.5  # ... but for at most so many per real image that the others learn from
    upload: int = 400  # a hospital uploads at most so many samples of one cell
    receive: int = 500  # a hospital receives at most so many samples in all
    power: float = 0.5  # how much more a source with more images counts: 0 all the same, 1 in proportion
    minimum: int = generator.MINIMUM  # a hospital with fewer images of a cell does not generate it
    silent: tuple[int, ...] = ()  # hospitals that upload nothing (their rules forbid it); they still receive

    def __post_init__(self):
        for name in ("fill", "cell", "upload", "receive"):
            x = getattr(self, name)
            require(0 <= x < np.inf and x == int(x), f"the budget's {name}", x, "a whole number, 0 or more")
        require(0 <= self.per_image < np.inf, "the budget's per_image", self.per_image, "0 or more")
        require(0 <= self.power <= 1, "the budget's power", self.power, "in 0..1")
        least = generator.MINIMUM
        require(self.minimum >= least, "the budget's minimum", self.minimum, f"{least} or more (copies else)")


@dataclass(frozen=True)
class Plan:
    """``want`` and ``upload``, int64 (K, C, D): samples that each hospital receives, and generates, of each cell."""

    want: np.ndarray
    upload: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Uploaded samples: images uint8 (M, C, H, W); labels, device and source (hospital) int64 (M,)."""

    images: torch.Tensor
    labels: torch.Tensor
    device: torch.Tensor
    source: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: torch.Tensor) -> Pool:
        """The samples in these rows (positions or a mask)."""
        return Pool(*(part[rows] for part in vars(self).values()))

    @staticmethod
    def of(uploads: list[tuple]) -> Pool:
        """The uploads (images, labels, device) of hospitals 0, 1, ..., one behind the other."""
        source = [torch.full((len(labels),), k) for k, (_, labels, _) in enumerate(uploads)]
        return Pool(*(torch.cat(parts) for parts in zip(*uploads)), torch.cat(source))


def reports(clients: list[Client], classes: int, devices: int) -> np.ndarray:
    """What hospitals tell the server: images per class and device, int64 (K, C, D)."""
    for k, c in enumerate(clients):
        known = not len(c) or (int(c.labels.max()) < classes and int(c.device.max()) < devices)
        names = f"one of the {classes} classes and {devices} devices that all hospitals agreed on"
        require(known, f"a label or device of hospital {k}", "unknown", names)
    cells = [torch.bincount(c.labels * devices + c.device, minlength=classes * devices) for c in clients]
    return torch.stack(cells).view(len(clients), classes, devices).numpy()


def credible(have: np.ndarray, budget: Budget = Budget()) -> np.ndarray:
    """The reports (K, C, D) without what nobody generates: cells below ``budget.minimum``, silent hospitals."""
    silent = list(budget.silent)
    known = all(0 <= k < len(have) for k in silent)
    require(known, "the budget's silent", budget.silent, f"numbers of hospitals, 0 to {len(have) - 1}")
    able = np.where(have >= budget.minimum, have, 0)
    able[silent] = 0
    return able


def supply(have: np.ndarray, budget: Budget = Budget()) -> np.ndarray:
    """Images (K, C, D) that each hospital's *others* can learn a cell from."""
    able = credible(have, budget)
    return able.sum(0) - able


def class_and_device(have: np.ndarray, budget: Budget) -> np.ndarray:
    """FedSSG: fill each rare class from every device that has it, and each cell that a hospital has never seen.

    ``wishes = min(max(gap * share, floor), per_image * others)``: gap (K, C) is what a hospital lacks of a class, share
    the fraction of each device in what the others can supply, floor what is missing of ``budget.cell`` images in a
    cell, and others (K, C, D) the real images behind it.
    """
    others = supply(have, budget)
    gap = np.maximum(budget.fill - have.sum(2), 0)
    share = _shares(np.where(others > 0, others**budget.power, 0), axis=2)
    floor = np.where(others > 0, np.maximum(budget.cell - have, 0), 0)
    return np.minimum(np.maximum(gap[:, :, None] * share, floor), budget.per_image * others)


def class_only(have: np.ndarray, budget: Budget) -> np.ndarray:
    """Ablation: fill each rare class in the mix of devices that the others have."""
    others = supply(have, budget)
    gap = np.maximum(max(budget.fill, budget.cell) - have.sum(2), 0)
    return np.minimum(gap[:, :, None] * _shares(others, axis=2), budget.per_image * others)


def device_only(have: np.ndarray, budget: Budget) -> np.ndarray:
    """Ablation: fill each device that a hospital lacks in the others' mix of classes."""
    others = supply(have, budget)
    gap = np.maximum(max(budget.fill, budget.cell) - have.sum(1), 0)
    return np.minimum(gap[:, None, :] * _shares(others, axis=1), budget.per_image * others)


def uniform(have: np.ndarray, budget: Budget) -> np.ndarray:
    """The control (uniform shuffle, as in FedSSyn, arXiv 2306.13263): equally many samples, without a choice.

    Every hospital receives exactly as many as `class_and_device` gives it, in proportion to what the others own.
    """
    hospitals = len(have)
    total = _possible(class_and_device(have, budget), have, budget).sum((1, 2))
    others, most = (x.reshape(hospitals, -1).T for x in (supply(have, budget), _capacity(have, budget)))
    parts = _split(total, others, most)
    whole = np.floor(parts + 1e-9)
    rank = np.argsort(np.argsort(whole - parts, axis=0, kind="stable"), axis=0)  # largest remainders first
    return (whole + (rank < total - whole.sum(0))).T.reshape(have.shape)


RULES = {rule.__name__: rule for rule in (class_and_device, uniform, class_only, device_only)}


def _shares(weight: np.ndarray, axis) -> np.ndarray:
    """Weights divided by their sum over `axis`; 0 where the sum is 0."""
    total = weight.sum(axis, keepdims=True)
    return np.divide(weight, total, out=np.zeros(weight.shape), where=total > 0)


def _split(total: np.ndarray, weight: np.ndarray, most) -> np.ndarray:
    """`total` (...) divided in proportion to `weight` (n, ...); what exceeds `most` goes to the others."""
    part = np.zeros(weight.shape)
    for _ in range(len(weight)):  # each pass serves everything, or fills at least one more to `most`
        part = np.minimum(part + (total - part.sum(0)) * _shares(np.where(part < most, weight, 0), 0), most)
    return part


def _capacity(have: np.ndarray, budget: Budget) -> np.ndarray:
    """The most samples of each cell (K, C, D) that the others may upload."""
    able = credible(have, budget) > 0
    return budget.upload * (able.sum(0) - able)


def _possible(want: np.ndarray, have: np.ndarray, budget: Budget) -> np.ndarray:
    """Wishes as whole numbers, int64 (K, C, D), within what others may upload and ``budget.receive``."""
    want = np.minimum(np.ceil(want - 1e-9), _capacity(have, budget))
    total = want.sum((1, 2), keepdims=True)
    return np.floor(want * np.minimum(1, budget.receive / np.maximum(total, 1)) + 1e-9).astype(np.int64)


def plan(have: np.ndarray, rule=class_and_device, budget: Budget = Budget()) -> Plan:
    """The rule's wishes, bounded by the budget, and the uploads that serve them.

    Sources share the work for a cell in proportion to (their images of it) ** power. As one sample may go to several
    hospitals, a source uploads what the neediest *other* hospital takes from it, not the sum over hospitals.

    `have`, int (K, C, D), >= 0, are the reports. ``rule(have, budget)`` returns wishes (K, C, D), numbers >= 0: one of
    `RULES`, or your own function.
    """
    have = np.asarray(have)
    counts = have.ndim == 3 and len(have) and np.issubdtype(have.dtype, np.integer) and (have >= 0).all()
    needed = "whole numbers >= 0 of shape (hospitals, classes, devices)"
    require(counts, "the table of reports", f"{have.dtype} of shape {have.shape}", needed)
    wishes = np.asarray(rule(have, budget), float)
    good = wishes.shape == have.shape and np.isfinite(wishes).all() and (wishes >= 0).all()
    needed = f"finite numbers >= 0 of shape {have.shape} (hospitals, classes, devices)"
    require(good, f"the result of rule {rule.__name__!r}", f"of shape {wishes.shape}", needed)
    want = _possible(wishes, have, budget)
    weight = credible(have, budget)
    weight = np.where(weight > 0, weight**budget.power, 0)
    upload = np.zeros_like(want)
    for k in range(len(have)):
        others = weight.copy()
        others[k] = 0
        upload = np.maximum(upload, np.ceil(_split(want[k], others, budget.upload) - 1e-9).astype(np.int64))
    return Plan(want, upload)


def distribute(wishes: np.ndarray, pool: Pool, client: int, seed: int) -> torch.Tensor:
    """Rows of the pool, int64 (n,), for hospital `client`, whose wishes are (C, D): other hospitals' samples only.

    Each row at most once; of a cell as many as wished, or all that others uploaded where that is less.
    """
    random, devices = rng(seed, "deal", client), wishes.shape[1]
    cell = (pool.labels * devices + pool.device).numpy()
    foreign = (pool.source != client).numpy()
    rows = [np.empty(0, np.int64)]
    for wanted in np.flatnonzero(wishes):
        rows.append(random.permutation(np.flatnonzero((cell == wanted) & foreign))[: wishes.flat[wanted]])
    return torch.from_numpy(np.concatenate(rows))


def packed(images: torch.Tensor) -> list[bytes]:
    """uint8 images (N, C, H, W) as they travel: lossless WebP pictures of up to 100 images, one below the other.

    A picture has 16,383 rows at most.
    """
    pictures = []
    for part in images.split(min(100, 16383 // images.shape[2])) if len(images) else ():
        column = part.permute(0, 2, 3, 1).reshape(-1, part.shape[3], part.shape[1]).numpy()
        stream = io.BytesIO()
        Image.fromarray(column.squeeze()).convert("RGB").save(stream, "WEBP", lossless=True, method=1)
        pictures.append(stream.getvalue())
    return pictures


def unpacked(pictures: list[bytes], channels: int, size: int) -> torch.Tensor:
    """What `packed` packed: uint8 images (N, channels, size, size)."""
    parts = [torch.empty(0, channels, size, size, dtype=torch.uint8)]
    for picture in pictures:
        column = np.array(Image.open(io.BytesIO(picture), formats=["WEBP"]).convert("RGB"))[..., :channels]
        parts.append(torch.from_numpy(column).reshape(-1, size, size, channels).permute(0, 3, 1, 2))
    return torch.cat(parts)


def channel_sums(client: Client, devices: int) -> torch.Tensor:
    """Sum and sum of squares of each channel's values 0..255, per device: float64 (D, 2, C), exact."""
    sums = torch.zeros(devices, 2, client.images.shape[1], dtype=torch.float64)
    for images, device in zip(client.images.split(64), client.device.split(64)):
        for d in device.unique().tolist():
            values = images[device == d].transpose(0, 1).flatten(1).double()
            sums[d] += torch.stack([values.sum(1), values.square().sum(1)])
    return sums


def styles(have: np.ndarray, sums: torch.Tensor, pixels: int) -> torch.Tensor:
    """Mean and deviation per channel of each device's images, in units of `models.scale`: float32 (D, 2, C).

    From counts `have` (K, C, D) of images of so many `pixels`, and `channel_sums` (K, D, 2, C): no image is needed. A
    device without images gets the style of all images together.
    """
    number, total = torch.from_numpy(have.sum((0, 1))).double() * pixels, sums.sum(0)
    missing = number == 0
    number, total = number.masked_fill(missing, number.sum()), total.clone()
    total[missing] = total.sum(0)
    mean, square = (total / number[:, None, None]).unbind(1)
    deviation = (square - mean.square()).clamp(min=0).sqrt() / 63.75
    return torch.stack([(mean - 127.5) / 63.75, deviation.clamp(min=0.01)], 1).float()
