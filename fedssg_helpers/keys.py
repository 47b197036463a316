"""Keyed randomness: every random act has a generator of its own, so results do not depend on the order of calls.

With one global seed, a result depends on everything that drew random numbers before it. Here each act is named by
(seed, purpose, client, round), and gets an independent stream that is derived from this name.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager

import numpy as np
import torch


def _entropy(seed: int, purpose: str, client: int, round: int) -> int:
    name = f"{int(seed)}|{purpose}|{int(client)}|{int(round)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """A NumPy generator for one random act: `purpose` says in words what is drawn, `client` and `round` who and when."""
    return np.random.default_rng(_entropy(seed, purpose, client, round))


def torch_rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> torch.Generator:
    """The same as `rng`, as a CPU `torch.Generator`."""
    return torch.Generator().manual_seed(_entropy(seed, purpose, client, round) % 2**63)


@contextmanager
def one_thread():
    """PyTorch computes on one thread inside, and on as many as before afterwards.

    A sum that is split over threads differs in its last bits, and the networks here are too small to gain from threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
