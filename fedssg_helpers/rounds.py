"""Federated rounds: what a client does, what the server does, and the loop between them.

FedAvg (McMahan et al. 2017, arXiv 1602.05629) is the whole file with every field of `Method` at its default;
each other method is one of those fields, and each field is one or two lines below.
"""
from __future__ import annotations

import copy
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from queue import SimpleQueue

import numpy as np
import torch
from torch.nn import functional as F

from . import checks, metrics, sharing
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
    reject : float, 0..1 (1 excluded)
        Privacy rejection at the source, see `sharing.offer_of`; 0: none.
    grain : float, >= 0
        Pixel noise put on samples at the source, in grey levels, see `sharing.offer_of`; 0: none.
    odd : float, >= 0
        Images like no other are not learnt from at the source, see `sharing.offer_of`; 0: all are.
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
    aggregate : str
        How the server joins updates: "mean" (FedAvg); against faulty or hostile hospitals "median" or "clip", see
        `median` and `clipped`.
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
    reject: float = 0.0
    grain: float = 0.0
    odd: float = 0.0
    restyled: bool = False
    drop: float = 0.0
    share: float = 0.0
    decay: bool = False
    refresh: bool = False
    aggregate: str = "mean"
    trained_at: str = "hospitals"

    def __post_init__(self):
        for name, good, needed in (
                ("lr", 0 < self.lr < np.inf, "above 0"), ("mu", self.mu >= 0, "0 or above"),
                ("pretrain_steps", self.pretrain_steps >= 0, "0 or above"),
                ("server_momentum", 0 <= self.server_momentum < 1, "in 0..1, without 1"),
                ("drop", 0 <= self.drop < 1, "in 0..1, without 1"), ("share", 0 <= self.share <= 1, "in 0..1"),
                ("temperature", self.temperature >= 0, "0 or above"), ("grain", self.grain >= 0, "0 or above"),
                ("odd", self.odd >= 0, "0 or above"),
                ("reject", 0 <= self.reject < 1, "in 0..1, without 1"),
                ("at_home", self.at_home in ("", "norm", "all"), "'', 'norm' or 'all'"),
                ("aggregate", self.aggregate in ("mean", "median", "clip"), "'mean', 'median' or 'clip'"),
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
    """Log class frequencies (classes,), float32, as drawn; an absent class counts as a tenth of an image, not none."""
    weight = None if chance is None else torch.from_numpy(chance * len(labels))
    counts = torch.bincount(labels, weight, minlength=classes).float().clamp(min=0.1)
    return (counts / counts.sum()).log()


def train_local(net: SmallCNN, start: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, *, steps: int,
                lr: float, random: np.random.Generator, method: Method = Method(), own: int = 0, share: float = 0.0,
                correction: torch.Tensor | None = None, styles: torch.Tensor | None = None,
                turns: list[int] | None = None, batch: int = 32, momentum: float = 0.9,
                decay: float = 5e-4) -> torch.Tensor:
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
    turns : list of int, optional
        The `models.orientations` of the images, where they are known already.

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
    chance = draw_chances(labels.cpu(), method.balanced, own, share)
    offset = log_prior(labels.cpu(), net.head.out_features, chance).to(start.device) if method.logit_adjustment else 0.0
    size, turns = min(batch, len(labels)), turns or orientations(images)
    for rows in batches(len(labels), steps, size, random, chance):
        rows = rows.to(images.device)
        x = turn(scale(images.index_select(0, rows)), turns[int(random.integers(len(turns)))])
        if styles is not None:
            x = normalise(x, styles[torch.from_numpy(random.integers(len(styles), size=len(x))).to(styles.device)])
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


def median(updates) -> torch.Tensor:
    """In place of `average`: of each weight the median over clients, all alike (Yin et al. 2018, arXiv 1803.01498).

    Less than half of the clients cannot move it far; but clients that are few of their kind count for nothing.
    """
    return torch.stack([weights for weights, _ in updates]).quantile(0.5, 0)


def clipped(updates, start: torch.Tensor) -> torch.Tensor:
    """In place of `average`: steps longer than the median step are shortened to it (norm clipping, Sun et al. 2019,
    arXiv 1911.07963), then averaged."""
    updates = list(updates)
    length = torch.stack([(weights - start).norm() for weights, _ in updates])
    keep = (length.quantile(0.5) / length.clamp(min=1e-12)).clamp(max=1)
    return average((start + part * (weights - start), number) for part, (weights, number) in zip(keep, updates))


def aggregate(method: Method, updates, start: torch.Tensor) -> torch.Tensor:
    """The server's new weights (P,), by the method's own way: `average`, `median` or `clipped`."""
    if method.aggregate == "clip":
        return clipped(updates, start)
    return median(updates) if method.aggregate == "median" else average(updates)


def server_step(method: Method, weights: torch.Tensor, mean: torch.Tensor,
                speed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the server's weights (P,) to the aggregate `mean` (P,), with its momentum: new weights and speed (P,)."""
    speed = method.server_momentum * speed + (weights - mean)
    return weights - speed if method.server_momentum else mean, speed


def pretrain(net: SmallCNN, pool: sharing.Pool, steps: int, seed: int, lr: float = 0.05, *,
             styles: torch.Tensor | None = None) -> torch.Tensor:
    """The server's own training of the first global weights (P,) on the pool: no image, no client step."""
    weights, place = net.weights.clone(), net.weights.device
    images, labels = pool.images.to(place), pool.labels.to(place)
    for part, rate in enumerate((lr, lr, 0.4 * lr, 0.1 * lr)):
        weights = train_local(net, weights, images, labels, steps=steps // 4, lr=rate, batch=64,
                              random=rng(seed, "pretrain", round=part), method=Method(balanced=True), styles=styles)
    return weights


@torch.no_grad()
def convincing(net: SmallCNN, weights: torch.Tensor, pool: sharing.Pool, drop: float,
               styles: torch.Tensor | None = None) -> torch.Tensor:
    """Which samples to deal, bool (M,): all of each class but the part `drop` that the model finds least like it."""
    net.weights.copy_(weights)
    x = pool.images if styles is None else normalise(scale(pool.images), styles.cpu()[pool.device])
    logits = torch.cat([net(part.to(weights.device)).cpu() for part in x.split(512)])
    belief = logits.log_softmax(1)[torch.arange(len(pool)), pool.labels]
    least = torch.stack([belief[pool.labels == c].quantile(drop) if (pool.labels == c).any() else belief.new_zeros(())
                         for c in range(logits.shape[1])])
    return belief >= least[pool.labels]


@dataclass
class Run:
    """What a run leaves behind, and all that it needs to go on.

    Attributes
    ----------
    weights : float32 array (P,)
        The global weights.
    rounds : int64 array (E,)
        After which rounds the global model was tested: 0 (the start, so what server pre-training alone gives),
        about twenty in between, and the last one, which is the result.
    confusions : int64 array (E, D, C, C)
        Test confusion matrices per device.
    costs : dict
        train_seconds, generator_seconds (all clients together), server_seconds; bytes_up, bytes_down (weights and
        samples, all clients and rounds), bytes_samples_up, bytes_samples_down.
    took_part : bool array (R, K)
        Whose weights were averaged, for each of the R rounds so far.
    missed : list of (int, int, str)
        Round (from 1; 0: sharing), hospital and reason of everything that did not arrive or was refused.
    memory : dict of float32 tensors
        What the next round needs: the ``weights`` and those of round 0 (``start``), the server's momentum (``speed``),
        and where the method has them, hospitals' own weights (``own``) and SCAFFOLD's ``control`` and ``controls``.
    """

    weights: np.ndarray
    rounds: np.ndarray
    confusions: np.ndarray
    costs: dict[str, float]
    took_part: np.ndarray
    missed: list[tuple[int, int, str]] = field(default_factory=list)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)


class Stop(Exception):
    """Raised by ``after_round`` to end a run early; what was reached by then is its result."""


@dataclass(frozen=True)
class Faults:
    """Chances, per hospital and round, 0..1, that its update does not count.

    Attributes
    ----------
    drop : float
        The hospital is not there: it gets no weights and sends none.
    die : float
        It gets the weights and is lost in mid-round.
    late : float
        Its update arrives when the round is over, and is not used any more.
    """

    drop: float = 0.0
    die: float = 0.0
    late: float = 0.0

    def __post_init__(self):
        if min(self.drop, self.die, self.late) < 0 or self.drop + self.die + self.late > 1:
            raise ValueError(f"the chances of faults are drop {self.drop}, die {self.die}, late {self.late}; each must "
                             "be 0 or more, and their sum at most 1")

    def of(self, seed: int, k: int, r: int) -> str:
        """What befalls hospital k in round r; "" for nothing. Keyed: the same in every run of this seed."""
        if not self.drop + self.die + self.late:
            return ""
        at = rng(seed, "fault", k, r).random()
        return ("dropped out" if at < self.drop else "died in the round" if at < self.drop + self.die else
                "came late" if at < self.drop + self.die + self.late else "")


@dataclass(frozen=True)
class Place:
    """What is trained on at one place: its images, and behind them what it received.

    Attributes
    ----------
    images : uint8 tensor (N, C, H, W)
    labels : int64 tensor (N,)
    own : int
        The first `own` images are its real ones: they alone count in the steps and in the average.
    steps : int
        Gradient steps per round.
    turns : list of int
        The images' `models.orientations`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    own: int
    steps: int
    turns: list[int]


def exchange(clients: list[Client], federation: Federation, method: Method, seed: int, draw: int = 0, tamper=None):
    """What a method's sharing leaves behind: a `sharing.Shared`, or None where nothing is uploaded."""
    if not method.sharing or method.content == "copies":
        return None
    return sharing.share(clients, federation, method.sharing, seed, budget=method.budget, draw=draw,
                         real=method.content == "real", restyled=method.restyled, temperature=method.temperature,
                         reject=method.reject, grain=method.grain, odd=method.odd,
                         tamper=tamper)


def places_of(clients: list[Client], federation: Federation, method: Method, seed: int, shared: sharing.Shared | None,
              keep: torch.Tensor | None = None, *, epochs: int = 1, device: str = "cpu") -> list[Place]:
    """What is trained on where.

    Hospitals train on their own images and, behind them, what they receive (of the pool, the rows in `keep`). The
    steps are `epochs` passes over real images only, so that no method gets more of them.
    """
    if method.trained_at != "hospitals":
        at = Client.joined(clients)
        if method.trained_at == "pool":
            images, labels = shared.pool.images, shared.pool.labels
        else:
            images, labels = at.images, at.labels
        return [Place(images.to(device), labels.to(device), len(labels), steps_of(at, epochs=epochs),
                      orientations(images))]
    places = []
    if method.content == "copies":
        have = sharing.reports(clients, len(federation.classes), len(federation.devices))
        want = sharing.plan(have, method.sharing, method.budget).want
    for k, c in enumerate(clients):
        images, labels = c.images, c.labels
        if method.content == "copies":
            rows = sharing.copies(c.labels, want[k], rng(seed, "copies", k))
            images, labels = torch.cat([images, c.images[rows]]), torch.cat([labels, c.labels[rows]])
        elif shared and method.deal:
            rows = shared.rows[k] if keep is None else shared.rows[k][keep[shared.rows[k]]]
            images = torch.cat([images, shared.pool.images[rows]])
            labels = torch.cat([labels, shared.pool.labels[rows]])
        places.append(Place(images.to(device), labels.to(device), len(c), steps_of(c, epochs=epochs),
                            orientations(images)))
    return places


def learning_rate(method: Method, r: int, rounds: int) -> float:
    """Local learning rate of round r = 0, 1, ...: from ``method.lr`` down to 0, along a half cosine."""
    return method.lr * 0.5 * (1 + math.cos(math.pi * r / rounds))


def local_update(net: SmallCNN, place: Place, start: torch.Tensor, k: int, r: int, *, rounds: int, seed: int,
                 method: Method = Method(), correction: torch.Tensor | None = None,
                 styles: torch.Tensor | None = None) -> torch.Tensor:
    """What hospital k does in round r = 0, 1, ...: `train_local` on its place, from the weights `start` (P,).

    Its draws are keyed by hospital and round, so it does not matter where and in which order hospitals compute.
    """
    share = method.share * (1 - r / rounds if method.decay else 1)
    return train_local(net, start, place.images, place.labels, steps=place.steps, lr=learning_rate(method, r, rounds),
                       method=method, own=place.own, share=share, correction=correction, styles=styles,
                       turns=place.turns, random=rng(seed, "local training", k, r))


def side_by_side(work, items, nets: list[SmallCNN], threads: ThreadPoolExecutor):
    """Yield ``work(net, item)`` of each item, in their order, on as many `threads` as there are networks.

    Threads, as PyTorch lets go of Python's lock while it computes: nothing is copied, nothing has to start up, and at
    most a few results wait at a time. Each item has a network to itself, so results do not depend on their number.
    The threads stay for the whole run: PyTorch prepares its convolutions anew for each thread that it meets.
    """
    if len(nets) == 1:
        yield from (work(nets[0], item) for item in items)
        return
    free, waiting = SimpleQueue(), deque()
    for net in nets:
        free.put(net)

    def with_a_net(item):
        net = free.get()
        try:
            return work(net, item)
        finally:
            free.put(net)

    for item in items:
        waiting.append(threads.submit(with_a_net, item))
        if len(waiting) > 2 * len(nets):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(frozen=True)
class Setup:
    """What stays the same over the rounds of a run: who trains on what, and how. ``kept`` (P,), bool, are the weights
    that never leave their hospital; of ``nets`` and ``threads`` there is one per worker."""

    federation: Federation
    method: Method
    seed: int
    rounds: int
    nets: list[SmallCNN]
    places: list[Place]
    styles: torch.Tensor | None
    kept: torch.Tensor
    threads: ThreadPoolExecutor


def run(federation: Federation, method: Method, seed: int, *, rounds: int, epochs: int = 1, workers: int = 1,
        after_round=lambda r, run: None, go_on: Run | None = None, faults: Faults = Faults(), tamper=None,
        tamper_samples=None, device: str = "cpu") -> Run:
    """One federated training: share once, pre-train once, then `rounds` of local training and averaging.

    Parameters
    ----------
    rounds : int, >= 1
    epochs : int, >= 1
        Passes over its real images that a hospital makes in a round.
    workers : int, >= 1
        Hospitals that train side by side, on a thread each; the result is the same to the last bit.
    after_round : callable (round number, Run so far)
        Called before the first round, with 0, and after every round: for progress bars and checkpoints. May raise
        `Stop`.
    go_on : Run, optional
        The same run as it was after some round, to go on from there, bit for bit. What was shared is made again.
    faults : Faults
        How often hospitals drop out.
    tamper, tamper_samples : callable, optional
        What a faulty or hostile hospital sends: ``tamper(k, r, start, weights)`` gives weights in place of its own,
        with rounds from 0; for the samples see `sharing.share`. For lessons and tests.
    device : str
        Where to compute: a PyTorch device such as "cuda"; not an imaging device.

    Raises
    ------
    ValueError
        `rounds`, `epochs` or `workers` out of range, a client without images, a `go_on` of another run, or a round in
        which every update was refused (as when training diverges).
    """
    for name, number in (("rounds", rounds), ("epochs", epochs), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name} is {number}; at least 1 is needed")
    clients = federation.clients
    empty = [k for k, client in enumerate(clients) if len(client) == 0]
    if empty:
        raise ValueError(f"hospital {empty[0]} has no images; leave it out of the federation")
    nets = [SmallCNN(federation.test.images.shape[1], len(federation.classes), seed, device) for _ in range(workers)]
    start = nets[0].weights.clone()
    styles = sharing.styles(clients, len(federation.devices)).to(device) if method.device_statistics else None

    half, done = rounds // 2, 0 if go_on is None else len(go_on.took_part)
    redrawn = method.refresh and done > half
    shared, keep = exchange(clients, federation, method, seed, int(redrawn), tamper_samples), None
    began = time.perf_counter()
    if go_on is not None:
        go_on = replace(go_on, memory={name: t.to(device) for name, t in go_on.memory.items()})
        start = go_on.memory["start"]
    elif shared and method.pretrain_steps and len(shared.pool):  # a hospital that is alone has nobody to share with
        start = pretrain(nets[0], shared.pool, method.pretrain_steps, seed, styles=styles)
    if shared and method.drop and len(shared.pool) and not redrawn:
        keep = convincing(nets[0], start, shared.pool, method.drop, styles)
    server_seconds, threads = time.perf_counter() - began, ThreadPoolExecutor(workers)

    def setup() -> Setup:
        places = places_of(clients, federation, method, seed, shared, keep, epochs=epochs, device=device)
        return Setup(federation, method, seed, rounds, nets, places, styles, _kept(nets[0], method), threads)

    now = setup()
    so_far = copy.deepcopy(go_on) or _before_the_first_round(now, start, shared, server_seconds)
    if done > rounds or so_far.memory["weights"].shape != start.shape or so_far.took_part.shape[1] != len(now.places):
        raise ValueError(f"the run to go on from has {done} rounds of {so_far.took_part.shape[1]} hospitals and "
                         f"{len(so_far.weights)} weights; it belongs to other parameters than this one")
    try:
        if not done:
            after_round(0, so_far)
        for r in range(done, rounds):
            if method.refresh and shared and r == half:
                shared, keep = exchange(clients, federation, method, seed, 1, tamper_samples), None
                now = setup()
                for name, value in shared.costs.items():
                    so_far.costs[name] += value
            one_round(now, so_far, faults, tamper)
            if (rounds - 1 - r) % max(1, rounds // 20) == 0:
                _test(now, so_far)
            after_round(r + 1, so_far)
    except Stop:
        if so_far.rounds[-1] < len(so_far.took_part):
            _test(now, so_far)
    finally:
        threads.shutdown(cancel_futures=True)
    return so_far


def _kept(net: SmallCNN, method: Method) -> torch.Tensor:
    """Which weights (P,) stay at their hospital."""
    every = torch.full_like(net.weights, method.at_home == "all", dtype=torch.bool)
    return net.norms() if method.at_home == "norm" else every


def _before_the_first_round(setup: Setup, start: torch.Tensor, shared: sharing.Shared | None, seconds: float) -> Run:
    """A run of no rounds: the start, tested, and what sharing has cost."""
    method, places = setup.method, setup.places
    costs = dict.fromkeys(("train_seconds", "generator_seconds", "server_seconds", "bytes_up", "bytes_down",
                           "bytes_samples_up", "bytes_samples_down"), 0.0)
    if shared:
        costs.update(shared.costs)
        costs["server_seconds"] = seconds
        if method.drop or not method.deal or method.trained_at == "pool":  # not all of it is dealt
            down = sum(sharing.size_of(place.images[place.own:].cpu()) for place in places)
            costs["bytes_down"] = costs["bytes_samples_down"] = down
    memory = {"start": start, "weights": start, "speed": torch.zeros_like(start)}
    if method.at_home:
        memory["own"] = start.repeat(len(places), 1)
    if method.scaffold:
        memory |= {"control": torch.zeros_like(start), "controls": torch.zeros_like(start).repeat(len(places), 1)}
    shape = (0, len(setup.federation.devices), len(setup.federation.classes), len(setup.federation.classes))
    run = Run(start.cpu().numpy(), np.empty(0, np.int64), np.empty(shape, np.int64), costs,
              np.empty((0, len(places)), bool), [], memory)
    run.missed += [(0, k, why) for k, why in shared.refused.items()] if shared else []
    _test(setup, run)
    return run


def one_round(setup: Setup, run: Run, faults: Faults = Faults(), tamper=None) -> None:
    """The next round of a run, in place: every hospital trains, the server checks what comes and aggregates it."""
    method, places, memory, r = setup.method, setup.places, run.memory, len(run.took_part)
    weights, rate = memory["weights"], learning_rate(method, r, setup.rounds)
    fate = [faults.of(setup.seed, k, r) for k in range(len(places))]
    run.missed += [(r + 1, k, why) for k, why in enumerate(fate) if why]
    here = [k for k, why in enumerate(fate) if not why]
    took_part = np.zeros(len(places), bool)

    def begins(k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        start = torch.where(setup.kept, memory["own"][k], weights) if method.at_home else weights
        return start, memory["control"] - memory["controls"][k] if method.scaffold else None

    def update(net: SmallCNN, k: int) -> tuple[torch.Tensor, float]:
        (start, correction), began = begins(k), time.perf_counter()
        result = local_update(net, places[k], start, k, r, rounds=setup.rounds, seed=setup.seed, method=method,
                              correction=correction, styles=setup.styles)
        return result, time.perf_counter() - began

    def arrived():
        for k, (sent, seconds) in zip(here, side_by_side(update, here, setup.nets, setup.threads)):
            run.costs["train_seconds"] += seconds
            sent, images = tamper(k, r, weights, sent) if tamper else sent, places[k].own
            if why := checks.weights_refusal(sent, weights, images, images):
                run.missed.append((r + 1, k, why))
                continue
            start, correction = begins(k)
            if method.at_home:
                memory["own"][k] = sent
            if method.scaffold:
                memory["controls"][k] = (start - sent) / travel(places[k].steps, rate) - correction
            took_part[k] = True
            yield sent, images

    updates = arrived()
    if (one := next(updates, None)) is not None:
        mean = aggregate(method, chain([one], updates), weights)
    elif here:
        _, k, why = run.missed[-len(here)]
        raise ValueError(f"every update of round {r + 1} was refused, that of hospital {k} because: {why}")
    else:
        mean = weights  # nobody was there: the model stays as it is
    if method.scaffold:
        memory["control"] = sum(memory["controls"]) / len(places)
    memory["weights"], memory["speed"] = server_step(method, weights, mean, memory["speed"])
    run.weights, run.took_part = memory["weights"].cpu().numpy(), np.vstack([run.took_part, took_part])
    sent = 4 * int((~setup.kept).sum()) * (2 if method.scaffold else 1) * (method.trained_at == "hospitals")
    run.costs["bytes_up"] += sent * sum(why in ("", "came late") for why in fate)
    run.costs["bytes_down"] += sent * sum(why != "dropped out" for why in fate)


def _test(setup: Setup, run: Run) -> None:
    """Test the global model (hospitals' own models, where they differ) as it is now."""
    net, weights, own = setup.nets[0], run.memory["weights"], run.memory.get("own")
    if own is None:
        seen = evaluate(net, weights, setup.federation, setup.styles)
    else:
        models = [torch.where(setup.kept, mine, weights) for mine in own]
        seen = evaluate_at_home(net, models, setup.federation, setup.seed, setup.styles)
    run.rounds = np.append(run.rounds, len(run.took_part))
    run.confusions = np.append(run.confusions, seen[None], axis=0)


def evaluate(net: SmallCNN, weights: torch.Tensor, federation: Federation,
             styles: torch.Tensor | None = None) -> np.ndarray:
    """Test confusion matrices per device, int64 (D, C, C), of the model with these weights (P,).

    `styles` (D, 2, C), where given, normalise each test image by its own device's.
    """
    net.eval()
    net.weights.copy_(weights)
    test = federation.test
    images = test.images if styles is None else normalise(scale(test.images), styles.cpu()[test.device])
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
    mine, test = [torch.from_numpy(home == k) for k in range(len(models))], vars(federation.test).values()
    parts = [replace(federation, test=Client(*(part[rows] for part in test))) for rows in mine]
    return sum(evaluate(net, w, part, styles) for w, part in zip(models, parts) if len(part.test))
