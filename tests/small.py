"""Small hospitals on noise, low enough to pack well, with a class signal: tests of several modules use them."""

from __future__ import annotations

import numpy as np
import torch

from fedssg_helpers.keys import rng
from fedssg_helpers.methods import Method, Sharing
from fedssg_helpers.partition import Client, Federation
from fedssg_helpers.sharing import Budget

CLASSES = 3
SHARE = Method(sharing=Sharing(budget=Budget(fill=60, cell=10)))


def client(number: int, seed: int = 0, device: int = 0, size: int = 12) -> Client:
    """A hospital with images of every class, the class a little brighter each."""
    random = rng(seed, "test images", number, device)
    labels = random.choice(CLASSES, number, p=(0.7, 0.2, 0.1))
    labels[:CLASSES] = range(CLASSES)
    images = random.integers(0, 60, (number, 1, size, size), dtype=np.uint8)
    images += (labels * 15).astype(np.uint8)[:, None, None, None]
    return Client(torch.from_numpy(images), torch.from_numpy(labels), torch.full((number,), device))


def federation(sizes=(60, 33, 40)) -> Federation:
    """Hospitals with so many images, of two devices in turn."""
    clients = [client(n, k, k % 2) for k, n in enumerate(sizes)]
    test = Client.joined([client(30, 90, 0), client(30, 91, 1)])
    return Federation(clients, test, ("a", "b", "c"), ("x", "y"), "test")


def noise(counts, seed: int = 0) -> Client:
    """A hospital with noise images of 16 pixels, `counts` (C, D) of each cell."""
    counts = np.asarray(counts)
    cells = np.repeat(np.arange(counts.size), counts.ravel())
    images = np.random.default_rng(seed).integers(90, 150, (len(cells), 1, 16, 16), dtype=np.uint8)
    cells = torch.from_numpy(cells)
    return Client(torch.from_numpy(images), cells // counts.shape[1], cells % counts.shape[1])


def federation_of(have) -> Federation:
    """Hospitals with noise images, `have` (K, C, D) of each cell."""
    clients = [noise(counts, k) for k, counts in enumerate(have)]
    names = tuple(map(str, range(np.shape(have)[1]))), tuple(map(str, range(np.shape(have)[2])))
    return Federation(clients, clients[0], *names, "test")


def as_bytes(images: torch.Tensor) -> list[bytes]:
    """Each image as bytes: to find it again."""
    return [bytes(image.numpy()) for image in images]
