"""Dealing a data set to hospitals: who sees which classes, through which imaging device."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .data import ImageSet, split
from .keys import rng


@dataclass(frozen=True)
class Client:
    """What one hospital holds.

    Attributes
    ----------
    images : uint8 tensor (N, C, H, W)
    labels, device : int64 tensors (N,)
        Class and imaging device of each image.
    """

    images: torch.Tensor
    labels: torch.Tensor
    device: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def joined(clients: list[Client]) -> Client:
        """All clients' images in one place: centralised training, the bound and not the way."""
        return Client(*(torch.cat([getattr(c, part) for c in clients]) for part in ("images", "labels", "device")))


@dataclass(frozen=True)
class Federation:
    """Hospitals and the real test images that they are judged on.

    Attributes
    ----------
    clients : list of Client
    test : Client
        Test images of all devices, pooled; no lesion or patient of theirs is in any client's data.
    classes, devices : tuples of str
    setting : str
        How images were dealt: "by_device" or, for example, "ten_hospitals".
    """

    clients: list[Client]
    test: Client
    classes: tuple[str, ...]
    devices: tuple[str, ...]
    setting: str


def federation(data: ImageSet, seed: int = 0, *, count: int = 0, **dials) -> Federation:
    """Split off the test images, then deal the rest to hospitals.

    Parameters
    ----------
    count : int, >= 0
        Number of hospitals, dealt by `hospitals` with its `dials`. 0: one hospital per device where there are
        several real ones, else (devices simulated, or one only) ten hospitals.
    """
    train, test = split(data, seed=seed)
    if count == 0 and not data.simulated and len(np.unique(data.device[train])) > 1:
        parts, setting = by_device(data, train), "by_device"
    else:
        parts = hospitals(data, train, count or 10, seed=seed, **dials)
        setting = "ten_hospitals" if len(parts) == 10 else f"{len(parts)}_hospitals"
    return Federation(clients_of(data, parts), clients_of(data, [test])[0], data.classes, data.devices, setting)


def clients_of(data: ImageSet, parts: list[np.ndarray]) -> list[Client]:
    """The hospitals' data, as tensors, for a partition given as image indices."""
    return [Client(*(torch.from_numpy(a[part]) for a in (data.images, data.labels, data.device))) for part in parts]


def counts(data: ImageSet, parts: list[np.ndarray]) -> np.ndarray:
    """Images per hospital, class and device: int64 (K, C, D)."""
    shape = (len(data.classes), len(data.devices))
    cells = [data.labels[part] * shape[1] + data.device[part] for part in parts]
    return np.stack([np.bincount(c, minlength=shape[0] * shape[1]).reshape(shape) for c in cells])


def divergence(have: np.ndarray, axis: int) -> float:
    """How far hospitals' mixes lie from the federation's: mean total variation distance, 0..1.

    The distance of one hospital is the part of its images that would have to change class (or device) for its mix
    to be the federation's; hospitals count by their images. 0: all mixes equal.

    Parameters
    ----------
    have : int array (K, C, D)
        Images per hospital, class and device, at least one in all.
    axis : int
        1 for the divergence of classes (labels), 2 for that of devices.
    """
    number = have.sum(3 - axis)  # (K, C) or (K, D)
    size = number.sum(1, keepdims=True)
    mix, overall = number / np.maximum(size, 1), number.sum(0) / number.sum()
    distance = 0.5 * np.abs(mix - overall).sum(1)
    return float((size[:, 0] / size.sum()) @ distance)


def by_device(data: ImageSet, index: np.ndarray) -> list[np.ndarray]:
    """One hospital per imaging device that occurs in `index`; returns one index array per hospital."""
    return [index[data.device[index] == d] for d in np.unique(data.device[index])]


def hospitals(data: ImageSet, index: np.ndarray, count: int = 10, *, alpha: float = 0.3, device_mix: float = 0.0,
              size_skew: float = 0.0, tail: float = 1.0, seed: int = 0, tries: int = 100) -> list[np.ndarray]:
    """Deal images to hospitals with class skew, device skew, unequal sizes and a long tail.

    Every hospital belongs to one device (devices get hospitals in proportion to their images, at least one each).
    Inside a device each class is dealt to its hospitals with shares from a Dirichlet distribution
    (Hsu et al. 2019, arXiv 1909.06335). All images of a group (a lesion, a patient) go to one hospital.

    Parameters
    ----------
    index : int array
        The images to deal: the training part of `data.split`.
    count : int, 1 to the number of groups
        How many hospitals.
    alpha : float, > 0
        Class skew: 100 gives all hospitals of a device the same mix of classes, 0.1 gives nearly one class each.
    device_mix : float, 0..1
        Chance that a group goes to a hospital of any device in place of one of its own device; 1 ends device skew.
    size_skew : float, >= 0
        0: hospitals of a device expect equal sizes; 1: sizes spread by a factor of about e up and down.
    tail : float, >= 1
        Extra long tail: the rarest class keeps 1/tail of its images, the others in between by rank. 1 keeps all.
    tries : int
        How often dealing is repeated when a hospital stays empty.

    Returns
    -------
    list of int arrays
        Image indices of each hospital, sorted; every kept image in exactly one, none empty.

    Raises
    ------
    ValueError
        A dial out of its range, fewer groups than hospitals, or a hospital empty after all tries.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; the Dirichlet class skew needs alpha > 0 (0.1 is strong, 100 is none)")
    if not 0 <= device_mix <= 1 or size_skew < 0 or tail < 1:
        raise ValueError(f"device_mix is {device_mix}, size_skew {size_skew}, tail {tail}; "
                         "they must lie in 0..1, at 0 or above, and at 1 or above")
    groups, first = np.unique(data.group[index], return_index=True)
    label, device = data.labels[index][first], data.device[index][first]
    if not 1 <= count <= len(groups):
        raise ValueError(f"{count} hospitals for {len(groups)} lesions or patients: every hospital needs at least "
                         "one; ask for fewer hospitals or bring more images")
    homes = _homes(np.bincount(device, minlength=len(data.devices)), count)
    keep = _long_tail(label, tail, rng(seed, "long tail"))
    for attempt in range(tries):
        random = rng(seed, "partition", round=attempt)
        owner = np.full(len(groups), -1)
        owner[keep] = _deal(label[keep], device[keep], homes, count, alpha, device_mix, size_skew, random)
        if np.bincount(owner[keep], minlength=count).min() > 0:
            image_owner = owner[np.searchsorted(groups, data.group[index])]
            return [np.sort(index[image_owner == k]) for k in range(count)]
    raise ValueError(f"a hospital stayed empty in {tries} attempts at alpha = {alpha} with {count} hospitals: "
                     "raise alpha, ask for fewer hospitals, or lower size_skew")


def _homes(images: np.ndarray, count: int) -> list[np.ndarray]:
    """Which hospitals belong to each device (D,): shares of `count` in proportion to images, at least one each."""
    present = np.flatnonzero(images)
    if count <= len(present):  # fewer hospitals than devices: a hospital owns several devices
        order = present[np.argsort(-images[present], kind="stable")]
        rank = {d: i % count for i, d in enumerate(order)}
        return [np.array([rank[d]]) if d in rank else np.array([], int) for d in range(len(images))]
    number = (images > 0).astype(int)
    while number.sum() < count:  # the next hospital goes where there are most images per hospital
        number[np.argmax(images / np.maximum(number, 1) * (images > 0))] += 1
    return np.split(np.arange(count), np.cumsum(number)[:-1])


def _long_tail(label: np.ndarray, tail: float, random: np.random.Generator) -> np.ndarray:
    """Which groups (G,) stay, bool, when the class of rank r of C keeps tail ** (-r / (C - 1)) of its groups."""
    keep = np.zeros(len(label), bool)
    order = np.argsort(-np.bincount(label), kind="stable")
    for rank, c in enumerate(order):
        members = random.permutation(np.flatnonzero(label == c))
        keep[members[:int(np.ceil(len(members) * tail ** (-rank / max(len(order) - 1, 1))))]] = True
    return keep


def _deal(label, device, homes, count, alpha, device_mix, size_skew, random) -> np.ndarray:
    """An owner 0..count-1 for each group (G,)."""
    frequency = np.bincount(device, minlength=len(homes)) / len(device)
    moved = random.random(len(device)) < device_mix
    device = np.where(moved, random.choice(len(homes), len(device), p=frequency), device)
    size = np.exp(size_skew * random.standard_normal(count))
    owner = np.empty(len(label), int)
    for d, own in enumerate(homes):
        for c in np.unique(label[device == d]):
            members = random.permutation(np.flatnonzero((device == d) & (label == c)))
            share = random.dirichlet(alpha * len(own) * size[own] / size[own].sum())
            if not np.isfinite(share).all():  # alpha so small that every share underflows: one hospital takes all
                share = np.eye(len(own))[random.integers(len(own))]
            cut = np.round(np.cumsum(share)[:-1] * len(members)).astype(int)
            for hospital, part in zip(own, np.split(members, cut)):
                owner[part] = hospital
    return owner
