"""Distributing a data set: which images are for testing, and which hospital has which of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .data import ImageSet
from .files import pick, require, room
from .keys import rng

TRIES = 100  # how often the draw of hospitals is repeated while one of them is empty


@dataclass(frozen=True)
class Client:
    """What one hospital has."""

    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,), the class of each image
    device: torch.Tensor  # int64 (N,), its imaging device
    group: torch.Tensor | None = None  # int64 (N,), its lesion or patient (None: all differ); stays at home

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows) -> Client:
        """The images at `rows` (positions or a mask)."""
        images = torch.from_numpy(pick(self.images.numpy(), rows))
        group = None if self.group is None else self.group[rows]
        return Client(images, self.labels[rows], self.device[rows], group)

    @staticmethod
    def joined(clients: list[Client]) -> Client:
        """All clients' images in one place, as centralised training needs them; with groups if all have them."""
        images = room((sum(map(len, clients)), *clients[0].images.shape[1:]))
        np.concatenate([c.images.numpy() for c in clients], out=images)
        parts = ([getattr(c, name) for c in clients] for name in ("labels", "device", "group"))
        parts = (None if any(x is None for x in part) else torch.cat(part) for part in parts)
        return Client(torch.from_numpy(images), *parts)


@dataclass(frozen=True)
class Federation:
    """Hospitals, and the real test images of all devices, of other lesions or patients."""

    clients: list[Client]
    test: Client
    classes: tuple[str, ...]
    devices: tuple[str, ...]
    setting: str  # how images were distributed: "by_device" or, for example, "ten_hospitals"; "..._64": of 64 pixels


def federate(images: ImageSet, seed: int = 0, *, count: int = 0, **skew) -> Federation:
    """Split off the test images, then distribute the others to hospitals.

    With `count` > 0 there are that many, made by `hospitals` with its parameters `skew`. With 0 there is one
    hospital per device if several real ones have taken two groups (lesions or patients) or more, so that each is on
    both sides of a split; else (devices simulated, or one only) ten hospitals.
    """
    train, test = split(images, seed=seed)
    groups = np.bincount(np.unique(np.stack([images.device, images.group]), axis=1)[0])
    if count == 0 and not images.simulated and (groups > 1).sum() > 1:
        parts, setting = by_device(images, train), "by_device"
    else:
        parts = hospitals(images, train, count or 10, seed=seed, **skew)
        setting = "ten_hospitals" if len(parts) == 10 else f"{len(parts)}_hospitals"
    *clients, held = clients_of(images, [*parts, test])
    side = images.images.shape[-1]
    setting += "" if side == 28 else f"_{side}"  # results of other sizes are other results
    return Federation(clients, held, images.classes, images.devices, setting)


def clients_of(images: ImageSet, parts: list[np.ndarray]) -> list[Client]:
    """The hospitals' data, as tensors, for a partition given as positions of images."""
    whole, sizes = images.subset(np.concatenate(parts)), list(map(len, parts))
    arrays = whole.images, whole.labels, whole.device, whole.group
    return [Client(*own) for own in zip(*(torch.from_numpy(array).split(sizes) for array in arrays))]


def split(images: ImageSet, test: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the test images, sorted; a `DataError` if a side would be empty.

    Whole groups go to one side. They are sorted by class, by device, then at random, and every (1 / test)-th
    is a test group (systematic sampling), so each cell of class and device is split in nearly the same
    proportion. A class or device of two groups or more is on both sides. An `official_test` is kept as it is.
    """
    require(0 < test < 1, f"test = {test}", "the fraction must lie between 0 and 1, for example 0.25.")
    side = images.official_test
    if side is None:
        _, first, group = np.unique(images.group, return_index=True, return_inverse=True)
        require(len(first) > 1, images.name, "all images are of one group. Give at least two per class.")
        label, device = images.labels[first], images.device[first]
        order = np.lexsort((rng(seed, "split").random(len(first)), device, label))
        step = np.floor(np.arange(len(first) + 1) * test + rng(seed, "split start").random())
        held = np.zeros(len(first), bool)
        held[order] = np.diff(step) > 0
        side = _cover(held, group, images.labels, images.device, order)[group]
    require(0 < side.sum() < len(side), images.name, "one side of the split is empty. Give more images.")
    return np.flatnonzero(~side), np.flatnonzero(side)


def _cover(held: np.ndarray, group, labels, device, order: np.ndarray) -> np.ndarray:
    """Test groups `held`, bool (G,), a few moved (in `order`) so that each class and device is on both sides."""
    has = np.zeros((len(held), labels.max() + device.max() + 2), bool)
    has[group, labels] = has[group, labels.max() + 1 + device] = True
    for label in np.flatnonzero(has.sum(0) >= 2):
        for side in (True, False):
            if not has[held == side, label].any():
                donor = has[held != side].sum(0)  # no other class may vanish from the side that gives
                able = [g for g in order[has[order, label]] if (donor[has[g]] >= 2).all()]
                held[able[:1]] = side
    return held


def divergence(have: np.ndarray, axis: int) -> float:
    """Mean total variation distance, 0..1, of the hospitals' mixes from the mix of all images.

    It is the fraction of images that would have to change class (`axis` 1) or device (2) for equal mixes.
    `have` int (K, C, D) are the images per hospital, class and device.
    """
    number = have.sum(3 - axis)  # (K, C) or (K, D)
    size = number.sum(1, keepdims=True)
    mix, overall = number / np.maximum(size, 1), number.sum(0) / number.sum()
    distance = 0.5 * np.abs(mix - overall).sum(1)
    return float((size[:, 0] / size.sum()) @ distance)


def by_device(images: ImageSet, index: np.ndarray) -> list[np.ndarray]:
    """One hospital per imaging device that occurs in `index`: positions of the images of each hospital."""
    return [index[images.device[index] == d] for d in np.unique(images.device[index])]


def hospitals(images, index, count=10, *, alpha=0.3, device_mix=0.0, size_skew=0.0, tail=1.0, seed=0):
    """Distribute the images at positions `index` to hospitals; sorted positions, int array, per hospital.

    Every hospital belongs to one device; devices get hospitals in proportion to their images, at least one.
    Within a device, each class is distributed by a Dirichlet distribution over its hospitals (Yurochkin et
    al. 2019, arXiv 1905.12022). All images of a group go to one hospital, and no hospital is empty.

    - alpha, above 0: 100 gives the hospitals of a device the same mix of classes, 0.1 nearly one class each;
      above a million all are the same.
    - device_mix, 0..1: probability that a group goes to a hospital of any device. 1 ends device skew.
    - size_skew, from 0: 0 gives equal expected sizes within a device, 1 spreads them by a factor of about e.
    - tail, from 1: the rarest class keeps 1 / tail of its groups, the others in between by rank.
    """
    if not (0 < alpha < np.inf and 0 <= device_mix <= 1 and 0 <= size_skew < np.inf and 1 <= tail < np.inf):
        given = f"alpha is {alpha}, device_mix {device_mix}, size_skew {size_skew}, tail {tail}"
        needed = "finite numbers: alpha > 0, device_mix in 0..1, size_skew >= 0, tail >= 1"
        raise ValueError(f"{given}; needed are {needed}")
    groups, first, inverse = np.unique(images.group[index], return_index=True, return_inverse=True)
    if not 1 <= count <= len(groups):
        raise ValueError(f"count is {count}; there are lesions or patients for 1 to {len(groups)} hospitals")
    label, device = images.labels[index][first], images.device[index][first]
    homes = _homes(np.bincount(device, minlength=len(images.devices)), count)
    keep, owner = _long_tail(label, tail, rng(seed, "long tail")), np.full(len(groups), -1)
    label, device = label[keep], device[keep]
    for attempt in range(TRIES):
        random = rng(seed, "partition", round=attempt)
        owner[keep] = distribute_groups(label, device, homes, count, alpha, device_mix, size_skew, random)
        if np.isin(range(count), owner).all():
            return [np.sort(index[owner[inverse] == k]) for k in range(count)]
    cure = f"raise alpha ({alpha}), ask for fewer hospitals ({count}), or lower size_skew ({size_skew})"
    raise ValueError(f"a hospital stayed empty in {TRIES} attempts: {cure}")


def _homes(images: np.ndarray, count: int) -> list[np.ndarray]:
    """The hospitals of each device (D,), of `count`, in proportion to its `images` (D,), at least one."""
    present = np.flatnonzero(images)
    if count <= len(present):  # fewer hospitals than devices: a hospital has several devices
        order = present[np.argsort(-images[present], kind="stable")].tolist()
        return [np.array([order.index(d) % count] if d in order else [], int) for d in range(len(images))]
    number = (images > 0).astype(int)
    while number.sum() < count:  # the next hospital goes where there are most images per hospital
        number[np.argmax(images / np.maximum(number, 1) * (images > 0))] += 1
    return np.split(np.arange(count), np.cumsum(number)[:-1])


def _long_tail(label: np.ndarray, tail: float, random: np.random.Generator) -> np.ndarray:
    """Positions of the groups that stay: the class of rank r of C keeps tail ** (-r / (C - 1)) of its own."""
    kept, order = [], np.argsort(-np.bincount(label), kind="stable")
    for rank, c in enumerate(order):
        members = random.permutation(np.flatnonzero(label == c))
        number = np.ceil(len(members) * tail ** (-rank / max(len(order) - 1, 1)))
        kept.append(members[: int(number)])
    return np.sort(np.concatenate(kept))


def distribute_groups(label, device, homes, count, alpha, device_mix, size_skew, random) -> np.ndarray:
    """A hospital, 0..count-1, for groups of class `label` and `device` (G,); `homes`: hospitals by device."""
    frequency = np.bincount(device, minlength=len(homes)) / len(device)
    moved = random.random(len(device)) < device_mix
    device = np.where(moved, random.choice(len(homes), len(device), p=frequency), device)
    size = np.exp(size_skew * random.standard_normal(count))
    owner = np.empty(len(label), int)
    for d, own in enumerate(homes):
        for c in np.unique(label[device == d]):
            members = random.permutation(np.flatnonzero((device == d) & (label == c)))
            share = random.dirichlet(min(alpha, 1e6) * len(own) * size[own] / size[own].sum())
            if not np.isfinite(share).all():  # alpha is so small that shares underflow: one takes all
                share = np.eye(len(own))[random.integers(len(own))]
            cut = np.round(np.cumsum(share)[:-1] * len(members)).astype(int)
            for hospital, rows in zip(own, np.split(members, cut)):
                owner[rows] = hospital
    return owner
