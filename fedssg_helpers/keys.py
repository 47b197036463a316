"""Keyed randomness: every random act has its own generator, so results do not depend on call order.

Seeding one global generator makes a result depend on everything that drew from it before: leave one client
out, or run clients in parallel, and every later number changes. Here each act is named by
(seed, purpose, client, round) and gets an independent stream derived from that name.

PyTorch is held to one thread per process for the same reason: how a sum is split over threads changes its last
bits. The networks here are too small to gain from threads; runs go side by side in processes instead.
"""
from __future__ import annotations

import hashlib

import numpy as np
import torch

torch.set_num_threads(1)


def _entropy(seed: int, purpose: str, client: int, round: int) -> int:
    name = f"{int(seed)}|{purpose}|{int(client)}|{int(round)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """A NumPy generator for one random act.

    Parameters
    ----------
    seed : int
        The run's seed.
    purpose : str
        What is drawn, in words, for example ``"batches"``; two purposes never share a stream.
    client, round : int
        Whose act it is and when.
    """
    return np.random.default_rng(_entropy(seed, purpose, client, round))


def torch_rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> torch.Generator:
    """The same as `rng`, as a CPU `torch.Generator`."""
    return torch.Generator().manual_seed(_entropy(seed, purpose, client, round) % 2**63)
