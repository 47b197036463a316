"""Federated rounds: what a client does, what the server does, and the loop between them.

FedAvg (McMahan et al. 2017, arXiv 1602.05629) is the whole file with every field of `Method` at its default;
each other method is one of those fields, and each field is one or two lines below.
"""
from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from . import metrics, sharing
from .keys import rng
from .models import SmallCNN, normalise, orientations, predict, scale, turn
from .partition import Client, Federation
from .sharing import Budget


@dataclass(frozen=True)
class Method:
    """What a method changes; the defaults are FedAvg.

    Attributes
    ----------
    lr : float, > 0
        Local learning rate of the first round; it falls to 0 over the rounds along a half cosine.
    mu : float, >= 0
        FedProx (Li et al. 2020, arXiv 1812.06127): weight of the pull mu/2 |w - w_round|^2 towards the weights
        that the round started from. 0 is FedAvg.
    scaffold : bool
        SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, option II): every local gradient is corrected by how the
        hospital's mean gradient of its last round differs from all hospitals'. Twice the bytes.
    server_momentum : float, 0..1 (1 excluded)
        FedAvgM (Hsu et al. 2019, arXiv 1909.06335): the server keeps this part of its last step. 0 is FedAvg.
    at_home : str
        Which weights never leave their hospital: "" none; "norm" the scales and shifts of normalisation layers
        (as in FedBN, Li et al. 2021, arXiv 2102.07623); "all", so that every hospital trains alone.
    balanced : bool
        Draw every class with the same probability (balanced sampling). False: every image once per pass.
    logit_adjustment : bool
        Add the log of the client's own class frequencies to the logits while training (Menon et al. 2021,
        arXiv 2007.07314, equation 10); the test uses plain logits.
    device_statistics : bool
        Normalise each training image with the channel mean and deviation of a random *device* of the federation,
        each test image with its own device's (FedRDN, Yan et al. 2023, arXiv 2308.14439, with devices for clients).
    sharing : str
        Which rule of `sharing.RULES` says who gets what; empty: nothing is shared.
    budget : Budget
        How much is shared at most.
    content : str
        What the rule's numbers are filled with: "synthetic"; "real", the oracle that no privacy rule allows; "copies"
        of the hospital's own images (duplication), so that nothing is exchanged.
    deal : bool
        False: the pool stays at the server, which trains on it; no hospital receives any.
    pretrain_steps : int, >= 0
        Steps that the *server* trains the first global weights on the pool of shared images.
    temperature : float, >= 0
        Spread of the samples, see `generator.Generator.sample`.
    restyled : bool
        Re-render samples for the (class, device) cells that nobody owns, see `sharing.restyle`.
    drop : float, 0..1 (1 excluded)
        Part of each class's samples that is not dealt: those that the pre-trained model finds least like their class.
    share : float, 0..1
        Part of every batch that is received samples; 0 leaves them their part of the images.
    decay : bool
        Let `share` fall to 0 over the rounds, linearly.
    refresh : bool
        Half-way, replace what was dealt by newly drawn samples.
    trained_at : str
        "hospitals"; or one place with all gradient steps: "centre", which holds every image (the bound that sharing
        nothing has to be judged by), "pool", the server with nothing but the pool (as in FedCVAE-Ens).
    """

    lr: float = 0.05
    mu: float = 0.0
    scaffold: bool = False
    server_momentum: float = 0.0
    at_home: str = ""
    balanced: bool = False
    logit_adjustment: bool = False
    device_statistics: bool = False
    sharing: str = ""
    budget: Budget = Budget()
    content: str = "synthetic"
    deal: bool = True
    pretrain_steps: int = 0
    temperature: float = 0.9
    restyled: bool = False
    drop: float = 0.0
    share: float = 0.0
    decay: bool = False
    refresh: bool = False
    trained_at: str = "hospitals"

    def __post_init__(self):
        for name, good, needed in (
                ("lr", 0 < self.lr < np.inf, "above 0"), ("mu", self.mu >= 0, "0 or above"),
                ("pretrain_steps", self.pretrain_steps >= 0, "0 or above"),
                ("server_momentum", 0 <= self.server_momentum < 1, "in 0..1, without 1"),
                ("drop", 0 <= self.drop < 1, "in 0..1, without 1"), ("share", 0 <= self.share <= 1, "in 0..1"),
                ("temperature", self.temperature >= 0, "0 or above"),
                ("at_home", self.at_home in ("", "norm", "all"), "'', 'norm' or 'all'"),
                ("content", self.content in ("synthetic", "real", "copies"), "'synthetic', 'real' or 'copies'"),
                ("trained_at", self.trained_at in ("hospitals", "centre", "pool"), "'hospitals', 'centre' or 'pool'")):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {needed}")
        if self.sharing and self.sharing not in sharing.RULES:
            raise ValueError(f"there is no sharing rule {self.sharing!r}; the rules are {', '.join(sharing.RULES)}")
        if not self.sharing and (self.pretrain_steps or self.trained_at == "pool"):
            raise ValueError("the server has no pool to train on: name a sharing rule")


def draw_chances(labels: torch.Tensor, balanced: bool = False, own: int = 0, share: float = 0.0) -> np.ndarray | None:
    """Chance (N,), float64, that each image is drawn next; None: every image once per pass.

    Parameters
    ----------
    labels : int64 tensor (N,)
    balanced : bool
        Every class equally often.
    own : int
        The first `own` images are the hospital's, the others received.
    share : float, 0..1
        Part of the draws that goes to received images; without effect where there are none.
    """
    if balanced:
        chance = 1 / np.bincount(labels)[labels]
        return chance / chance.sum()
    if share and 0 < own < len(labels):
        return np.where(np.arange(len(labels)) < own, (1 - share) / own, share / (len(labels) - own))
    return None


def batches(number: int, steps: int, size: int, random: np.random.Generator, chance: np.ndarray | None = None):
    """Yield `steps` index tensors (size,): passes over `number` shuffled images, or draws with the given chances."""
    if chance is None:
        passes = math.ceil(steps * size / number)
        order = np.concatenate([random.permutation(number) for _ in range(passes)])
    else:
        order = random.choice(number, steps * size, p=chance)
    yield from torch.from_numpy(order[:steps * size]).split(size)


def log_prior(labels: torch.Tensor, classes: int, chance: np.ndarray | None = None) -> torch.Tensor:
    """Log class frequencies (classes,), float32, as drawn; an absent class counts as a tenth of an image, not as none."""
    weight = None if chance is None else torch.from_numpy(chance * len(labels))
    counts = torch.bincount(labels, weight, minlength=classes).float().clamp(min=0.1)
    return (counts / counts.sum()).log()


def train_local(net: SmallCNN, start: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, *, steps: int,
                lr: float, random: np.random.Generator, method: Method = Method(), own: int = 0, share: float = 0.0,
                correction: torch.Tensor | None = None, styles: torch.Tensor | None = None, batch: int = 32,
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
    own, share
        See `draw_chances`.
    correction : float32 tensor (P,), optional
        Added to every gradient (SCAFFOLD).
    styles : float32 tensor (D, 2, C), optional
        Devices' styles, see `sharing.styles`: each image is normalised with a random one.

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
    chance = draw_chances(labels, method.balanced, own, share)
    offset = log_prior(labels, net.head.out_features, chance) if method.logit_adjustment else 0.0
    size, turns = min(batch, len(labels)), orientations(images)
    for rows in batches(len(labels), steps, size, random, chance):
        x = turn(scale(images[rows]), turns[int(random.integers(len(turns)))])
        if styles is not None:
            x = normalise(x, styles[torch.from_numpy(random.integers(len(styles), size=len(x)))])
        net.grad.zero_()
        F.cross_entropy(net(x) + offset, labels[rows]).backward()
        if method.mu:
            net.grad.add_(net.weights - start, alpha=method.mu)
        if correction is not None:
            net.grad.add_(correction)
        net.grad.add_(net.weights, alpha=decay)
        speed.mul_(momentum).add_(net.grad)
        net.weights.sub_(speed, alpha=lr)
    return net.weights.clone()


def travel(steps: int, lr: float, momentum: float = 0.9) -> float:
    """How far `steps` of SGD with momentum go along a gradient of length 1: SCAFFOLD's K times lr, with momentum."""
    return lr * sum(1 - momentum ** i for i in range(1, steps + 1)) / (1 - momentum)


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


def pretrain(net: SmallCNN, pool: sharing.Pool, steps: int, seed: int, lr: float = 0.05, *,
             styles: torch.Tensor | None = None) -> torch.Tensor:
    """The server's own training of the first global weights (P,) on the pool: no image, no client step."""
    weights = net.weights.clone()
    for part, rate in enumerate((lr, lr, 0.4 * lr, 0.1 * lr)):
        weights = train_local(net, weights, pool.images, pool.labels, steps=steps // 4, lr=rate, batch=64,
                              random=rng(seed, "pretrain", round=part), method=Method(balanced=True), styles=styles)
    return weights


@torch.no_grad()
def convincing(net: SmallCNN, weights: torch.Tensor, pool: sharing.Pool, drop: float,
               styles: torch.Tensor | None = None) -> torch.Tensor:
    """Which samples to deal, bool (M,): all of each class but the part `drop` that the model finds least like it."""
    net.weights.copy_(weights)
    x = pool.images if styles is None else normalise(scale(pool.images), styles[pool.device])
    logits = torch.cat([net(part) for part in x.split(512)])
    belief = logits.log_softmax(1)[torch.arange(len(pool)), pool.labels]
    least = torch.stack([belief[pool.labels == c].quantile(drop) if (pool.labels == c).any() else belief.new_zeros(())
                         for c in range(logits.shape[1])])
    return belief >= least[pool.labels]


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


def exchange(clients: list[Client], federation: Federation, method: Method, seed: int, draw: int = 0):
    """What a method's sharing leaves behind: a `sharing.Shared`, or None where nothing is uploaded."""
    if not method.sharing or method.content == "copies":
        return None
    return sharing.share(clients, federation, method.sharing, seed, budget=method.budget, draw=draw,
                         real=method.content == "real", restyled=method.restyled, temperature=method.temperature)


def holdings(clients: list[Client], federation: Federation, method: Method, seed: int,
             shared: sharing.Shared | None, keep: torch.Tensor | None = None) -> list[tuple]:
    """What is trained on where: (images, labels, number of own real images, steps per round) of each place.

    Hospitals train on their own images and, behind them, what they receive (of the pool, the rows in `keep`). The
    steps count real images only, so that no method gets more of them.
    """
    if method.trained_at != "hospitals":
        steps, at = steps_of(Client.joined(clients)), Client.joined(clients)
        images, labels = (at.images, at.labels) if method.trained_at == "centre" else (shared.pool.images, shared.pool.labels)
        return [(images, labels, len(labels), steps)]
    places = []
    if method.content == "copies":
        want = sharing.plan(sharing.reports(clients, len(federation.classes), len(federation.devices)), method.sharing,
                            method.budget).want
    for k, c in enumerate(clients):
        more = []
        if method.content == "copies":
            rows = sharing.copies(c.labels, want[k], rng(seed, "copies", k))
            more = [(c.images[rows], c.labels[rows])]
        elif shared and method.deal:
            rows = shared.rows[k] if keep is None else shared.rows[k][keep[shared.rows[k]]]
            more = [(shared.pool.images[rows], shared.pool.labels[rows])]
        images, labels = (torch.cat(part) for part in zip((c.images, c.labels), *more))
        places.append((images, labels, len(c), steps_of(c)))
    return places


def run(federation: Federation, method: Method, seed: int, *, rounds: int, after_round=lambda r, run: None) -> Run:
    """One federated training: share once, pre-train once, then `rounds` of local training and averaging.

    Parameters
    ----------
    rounds : int, >= 1
    after_round : callable (round number from 1, Run so far)
        Called after every round, for progress bars.

    Raises
    ------
    ValueError
        `rounds` out of range, a client without images, or weights that are not finite (see `average`).
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 round is needed")
    clients = federation.clients
    empty = [k for k, client in enumerate(clients) if len(client) == 0]
    if empty:
        raise ValueError(f"hospital {empty[0]} has no images; leave it out of the federation")
    net = SmallCNN(federation.test.images.shape[1], len(federation.classes), seed)
    weights = net.weights.clone()
    costs = dict.fromkeys(("train_seconds", "generator_seconds", "server_seconds", "bytes_up", "bytes_down",
                           "bytes_samples_up", "bytes_samples_down"), 0.0)
    styles = sharing.styles(clients, len(federation.devices)) if method.device_statistics else None

    shared, keep = exchange(clients, federation, method, seed), None
    if shared:
        costs.update(shared.costs)
        began = time.perf_counter()
        if method.pretrain_steps and len(shared.pool):  # a hospital that is alone has nobody to share with
            weights = pretrain(net, shared.pool, method.pretrain_steps, seed, styles=styles)
        if method.drop and len(shared.pool):
            keep = convincing(net, weights, shared.pool, method.drop, styles)
        costs["server_seconds"] = time.perf_counter() - began
    places = holdings(clients, federation, method, seed, shared, keep)
    if shared and (method.drop or not method.deal or method.trained_at == "pool"):  # not all of it is dealt
        costs["bytes_down"] = costs["bytes_samples_down"] = sum(sharing.size_of(images[own:])
                                                                for images, _, own, _ in places)

    kept = {"": torch.zeros(len(weights), dtype=torch.bool), "norm": net.norms(),
            "all": torch.ones(len(weights), dtype=torch.bool)}[method.at_home]  # which weights stay at their hospital
    own_weights = [weights] * len(places)
    control, controls = torch.zeros_like(weights), [torch.zeros_like(weights)] * len(places)  # of SCAFFOLD
    speed = torch.zeros_like(weights)  # of FedAvgM
    sent = 4 * int((~kept).sum()) * len(places) * (method.trained_at == "hospitals") * (2 if method.scaffold else 1)
    tested = [(0, evaluate(net, weights, federation, styles))]
    result = Run(weights.numpy(), np.array([0]), tested[0][1][None], costs)
    for r in range(rounds):
        if method.refresh and shared and r == rounds // 2:
            shared = exchange(clients, federation, method, seed, draw=1)
            places = holdings(clients, federation, method, seed, shared)
            for name, value in shared.costs.items():
                costs[name] += value
        rate = method.lr * 0.5 * (1 + math.cos(math.pi * r / rounds))
        share = method.share * (1 - r / rounds if method.decay else 1)

        def updates():
            for k, (images, labels, own, steps) in enumerate(places):
                start = torch.where(kept, own_weights[k], weights) if method.at_home else weights
                correction = control - controls[k] if method.scaffold else None
                update = train_local(net, start, images, labels, steps=steps, lr=rate, method=method, own=own,
                                     share=share, correction=correction, styles=styles,
                                     random=rng(seed, "local training", k, r))
                if method.at_home:
                    own_weights[k] = update
                if method.scaffold:
                    controls[k] = (start - update) / travel(steps, rate) - correction
                yield update, own

        began = time.perf_counter()
        mean = average(updates())
        costs["train_seconds"] += time.perf_counter() - began
        control = sum(controls) / len(controls) if method.scaffold else control
        speed = method.server_momentum * speed + (weights - mean)
        weights = weights - speed if method.server_momentum else mean
        costs["bytes_up"] += sent
        costs["bytes_down"] += sent
        if (rounds - 1 - r) % max(1, rounds // 20) == 0:
            models = [torch.where(kept, own, weights) for own in own_weights] if method.at_home else weights
            tested.append((r + 1, evaluate_at_home(net, models, federation, seed, styles) if method.at_home else
                           evaluate(net, weights, federation, styles)))
            result.rounds, result.confusions = (np.array(x) for x in zip(*tested))
            result.weights = weights.numpy()
        after_round(r + 1, result)
    return result


def evaluate(net: SmallCNN, weights: torch.Tensor, federation: Federation,
             styles: torch.Tensor | None = None) -> np.ndarray:
    """Test confusion matrices per device, int64 (D, C, C), of the model with these weights (P,).

    `styles` (D, 2, C), where given, normalise each test image by its own device's.
    """
    net.eval()
    net.weights.copy_(weights)
    test = federation.test
    images = test.images if styles is None else normalise(scale(test.images), styles[test.device])
    return metrics.confusions(test.labels, predict(net, images), test.device, len(federation.classes),
                              len(federation.devices))


def evaluate_at_home(net: SmallCNN, models: list[torch.Tensor], federation: Federation, seed: int,
                     styles: torch.Tensor | None = None) -> np.ndarray:
    """`evaluate` where hospitals' models (P,) differ: each test image is seen by one hospital, and judged by its model.

    The hospital is drawn among those that own the image's device, in proportion to their images of it.
    """
    have = sharing.reports(federation.clients, len(federation.classes), len(federation.devices)).sum(1)  # (K, D)
    have = np.where(have.sum(0) > 0, have, have.sum(1, keepdims=True))  # a device of nobody: by all images
    ends = np.cumsum(have / have.sum(0), axis=0)[:, federation.test.device]  # (K, N)
    home = (rng(seed, "home of a test image").random(ends.shape[1]) >= ends[:-1]).sum(0)
    parts = [replace(federation, test=Client(*(part[torch.from_numpy(home == k)] for part in vars(federation.test).values())))
             for k in range(len(models))]
    return sum(evaluate(net, w, part, styles) for w, part in zip(models, parts) if len(part.test))
