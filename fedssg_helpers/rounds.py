"""Federated rounds: what a client does, what the server does, and the loop between them.

FedAvg (McMahan et al. 2017, arXiv 1602.05629) is the whole file with every field of `Method` at its default;
each other method is one of those fields, and each field is one or two lines below.
"""
from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from . import metrics, sharing
from .keys import rng
from .models import SmallCNN, orientations, predict, scale, turn
from .partition import Client, Federation


@dataclass(frozen=True)
class Method:
    """What a method changes; the defaults are FedAvg.

    Attributes
    ----------
    mu : float, >= 0
        FedProx (Li et al. 2020, arXiv 1812.06127): weight of the pull mu/2 |w - w_round|^2 towards the weights
        that the round started from. 0 is FedAvg.
    balanced : bool
        Draw every class with the same probability (balanced sampling). False: every image once per pass.
    logit_adjustment : bool
        Add the log of the client's own class frequencies to the logits while training (Menon et al. 2021,
        arXiv 2007.07314, equation 10); the test uses plain logits.
    sharing : str
        Which rule of `sharing.RULES` says who gets which synthetic images; empty: nothing is shared.
    pretrain_steps : int, >= 0
        Steps that the *server* trains the first global weights on the pool of shared synthetic images.
    centralised : bool
        Not federated at all: one client holds every image. The bound that sharing nothing has to be judged by.
    """

    mu: float = 0.0
    balanced: bool = False
    logit_adjustment: bool = False
    sharing: str = ""
    pretrain_steps: int = 0
    centralised: bool = False

    def __post_init__(self):
        if self.mu < 0 or self.pretrain_steps < 0:
            raise ValueError(f"mu is {self.mu} and pretrain_steps is {self.pretrain_steps}; both must be 0 or above")
        if self.sharing and self.sharing not in sharing.RULES:
            raise ValueError(f"there is no sharing rule {self.sharing!r}; the rules are {', '.join(sharing.RULES)}")


def batches(labels: torch.Tensor, steps: int, size: int, random: np.random.Generator, balanced: bool = False):
    """Yield `steps` index tensors (size,): passes over shuffled images, or classes drawn equally often."""
    labels = labels.numpy()
    if balanced:
        counts = np.bincount(labels)
        chance = 1 / counts[labels]
        order = random.choice(len(labels), steps * size, p=chance / chance.sum())
    else:
        passes = math.ceil(steps * size / len(labels))
        order = np.concatenate([random.permutation(len(labels)) for _ in range(passes)])
    yield from torch.from_numpy(order[:steps * size]).split(size)


def log_prior(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Log class frequencies (classes,), float32; an absent class counts as a tenth of an image, not as none."""
    counts = torch.bincount(labels, minlength=classes).float().clamp(min=0.1)
    return (counts / counts.sum()).log()


def train_local(net: SmallCNN, start: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, *, steps: int,
                lr: float, random: np.random.Generator, method: Method = Method(), batch: int = 32,
                momentum: float = 0.9, decay: float = 5e-4) -> torch.Tensor:
    """Local training: `steps` of SGD with momentum from the weights `start`.

    Parameters
    ----------
    net : SmallCNN
        Scratch space: its weights are overwritten, so that all clients can use one network in turn.
    start : float32 tensor (P,)
        The weights that the round starts from; left as they are.
    images : uint8 tensor (N, C, H, W)
    labels : int64 tensor (N,), 0..classes-1
    steps, batch : int
        Number of gradient steps, and images per step (all N where there are fewer).
    lr, momentum, decay : float
        Learning rate, momentum and weight decay.
    random : numpy Generator
        Draws the batches and their orientations.

    Returns
    -------
    float32 tensor (P,)
        The new weights.

    Raises
    ------
    ValueError
        No images, or a label out of range.
    """
    if len(labels) == 0:
        raise ValueError("this client has no images to train on")
    if not 0 <= int(labels.min()) <= int(labels.max()) < net.head.out_features:
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}, but the classifier knows only "
                         f"0 to {net.head.out_features - 1}")
    net.train()
    net.weights.copy_(start)
    speed = torch.zeros_like(start)
    offset = log_prior(labels, net.head.out_features) if method.logit_adjustment else 0.0
    size, turns = min(batch, len(labels)), orientations(images)
    for rows in batches(labels, steps, size, random, method.balanced):
        x = turn(scale(images[rows]), turns[int(random.integers(len(turns)))])
        net.grad.zero_()
        F.cross_entropy(net(x) + offset, labels[rows]).backward()
        if method.mu:
            net.grad.add_(net.weights - start, alpha=method.mu)
        net.grad.add_(net.weights, alpha=decay)
        speed.mul_(momentum).add_(net.grad)
        net.weights.sub_(speed, alpha=lr)
    return net.weights.clone()


def steps_of(client: Client, batch: int = 32, epochs: int = 1) -> int:
    """Local steps per round: passes over the *real* images, so that every method gets the same number."""
    return epochs * math.ceil(len(client) / batch)


def average(updates) -> torch.Tensor:
    """FedAvg's aggregate: the mean of clients' weights (P,), each weighted by its number of real images.

    Parameters
    ----------
    updates : iterable of (float32 tensor (P,), int)
        Weights and number of images of each client; summed as they arrive, so memory stays flat.

    Raises
    ------
    ValueError
        A client's weights are not finite, or no client took part.
    """
    total, images = 0, 0
    for k, (weights, number) in enumerate(updates):
        if not torch.isfinite(weights).all():
            raise ValueError(f"client {k} sent weights that are not finite; its training diverged (lower the "
                             "learning rate) or the upload is damaged, and the round was not averaged")
        total, images = total + weights.double() * number, images + number
    if not images:
        raise ValueError("no client took part in this round, so there is nothing to average")
    return (total / images).float()


def pretrain(net: SmallCNN, pool: sharing.Pool, steps: int, seed: int, lr: float = 0.05) -> torch.Tensor:
    """The server's own training of the first global weights (P,) on the pool: no image, no client step."""
    weights = net.weights.clone()
    for part, rate in enumerate((lr, lr, 0.4 * lr, 0.1 * lr)):
        weights = train_local(net, weights, pool.images, pool.labels, steps=steps // 4, lr=rate, batch=64,
                              random=rng(seed, "pretrain", round=part), method=Method(balanced=True))
    return weights


@dataclass
class Run:
    """What a run leaves behind.

    Attributes
    ----------
    weights : float32 array (P,)
        The final global weights.
    rounds : int64 array (E,)
        After which rounds the global model was tested: 0 (the start, so what server pre-training alone gives),
        about twenty in between, and the last one, which is the result.
    confusions : int64 array (E, D, C, C)
        Test confusion matrices per device.
    costs : dict
        train_seconds, generator_seconds (all clients together), server_seconds; bytes_up, bytes_down (weights and
        samples, all clients and rounds), bytes_samples_up, bytes_samples_down.
    """

    weights: np.ndarray
    rounds: np.ndarray
    confusions: np.ndarray
    costs: dict[str, float]


def run(federation: Federation, method: Method, seed: int, *, rounds: int, lr: float = 0.05,
        budget: sharing.Budget = sharing.Budget(), after_round=lambda r, run: None) -> Run:
    """One federated training: share once, pre-train once, then `rounds` of local training and averaging.

    Parameters
    ----------
    rounds : int, >= 1
    lr : float, > 0
        Local learning rate; falls to 0 over the rounds along a half cosine.
    after_round : callable (round number from 1, Run so far)
        Called after every round, for progress bars.

    Raises
    ------
    ValueError
        `rounds` or `lr` out of range, a client without images, or weights that are not finite (see `average`).
    """
    if rounds < 1 or not lr > 0:
        raise ValueError(f"rounds is {rounds} and lr is {lr}; at least 1 round and a learning rate above 0 are needed")
    empty = [k for k, client in enumerate(federation.clients) if len(client) == 0]
    if empty:
        raise ValueError(f"hospital {empty[0]} has no images; leave it out of the federation")
    clients = [Client.joined(federation.clients)] if method.centralised else federation.clients
    net = SmallCNN(federation.test.images.shape[1], len(federation.classes), seed)
    weights = net.weights.clone()
    costs = dict.fromkeys(("train_seconds", "generator_seconds", "server_seconds", "bytes_up", "bytes_down",
                           "bytes_samples_up", "bytes_samples_down"), 0.0)
    received = [(c.images, c.labels) for c in clients]
    if method.sharing:
        shared = sharing.share(clients, federation, method.sharing, seed, budget=budget)
        received = [(torch.cat([c.images, shared.pool.images[rows]]), torch.cat([c.labels, shared.pool.labels[rows]]))
                    for c, rows in zip(clients, shared.rows)]
        costs.update(shared.costs)
        if method.pretrain_steps and len(shared.pool):  # a hospital that is alone has nobody to share with
            began = time.perf_counter()
            weights = pretrain(net, shared.pool, method.pretrain_steps, seed)
            costs["server_seconds"] = time.perf_counter() - began
    tested = [(0, evaluate(net, weights, federation))]
    result = Run(weights.numpy(), np.array([0]), tested[0][1][None], costs)
    for r in range(rounds):
        rate = lr * 0.5 * (1 + math.cos(math.pi * r / rounds))
        began = time.perf_counter()
        weights = average((train_local(net, weights, images, labels, steps=steps_of(client), lr=rate, method=method,
                                       random=rng(seed, "local training", k, r)), len(client))
                          for k, (client, (images, labels)) in enumerate(zip(clients, received)))
        costs["train_seconds"] += time.perf_counter() - began
        for way in ("bytes_up", "bytes_down"):
            costs[way] += 0 if method.centralised else 4 * len(weights) * len(clients)
        if (rounds - 1 - r) % max(1, rounds // 20) == 0:
            tested.append((r + 1, evaluate(net, weights, federation)))
            result.rounds, result.confusions = (np.array(x) for x in zip(*tested))
            result.weights = weights.numpy()
        after_round(r + 1, result)
    return result


def evaluate(net: SmallCNN, weights: torch.Tensor, federation: Federation) -> np.ndarray:
    """Test confusion matrices per device, int64 (D, C, C), of the model with these weights (P,)."""
    net.eval()
    net.weights.copy_(weights)
    test = federation.test
    return metrics.confusions(test.labels, predict(net, test.images), test.device, len(federation.classes),
                              len(federation.devices))
