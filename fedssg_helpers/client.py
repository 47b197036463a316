"""What a hospital does: it answers the server's questions, one function each (see `ANSWERS`).

A question comes with a content and is answered by one: dicts of tensors, numbers, text and lists of bytes. A hospital
keeps its images, and what it remembers between questions, in a `Hospital`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from . import generator, metrics, protection, sharing
from .errors import require
from .keys import rng
from .methods import PARTS, Method, RealImages, Sharing
from .models import Flat, augment, plausible_orientations, predict, resized, scale
from .partition import Client

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of local SGD
FAULTS = ("dropped out", "died in the round", "came late")


class Absence(Exception):
    """A hospital does not answer; the message says why. It is left out, and the run goes on."""


@dataclass(frozen=True)
class Faults:
    """Chances, per hospital and round, 0..1, that its update does not count."""

    absent: float = 0.0  # the hospital is not there: it gets no weights and sends none
    die: float = 0.0  # it gets the weights and is lost during the round
    late: float = 0.0  # its update arrives when the round is over, and is not used any more

    def __post_init__(self):
        chances = list(vars(self).values())
        good = min(chances) >= 0 and sum(chances) <= 1
        require(good, "the chances of faults", self, "0 or more each, and 1 at most together")

    def of(self, seed: int, k: int, r: int) -> str:
        """What happens to hospital k in round r, "" for nothing: the same in every run of this seed."""
        ends = np.cumsum(list(vars(self).values()))
        return (*FAULTS, "")[(rng(seed, "fault", k, r).random() >= ends).sum()]


PARTS[Faults.__name__] = Faults  # it travels in messages, as a method's parts do


@dataclass
class Hospital:
    """Hospital k: its images, its share of the test images, and what it remembers between questions (`home`)."""

    k: int
    data: Client
    test: Client
    classes: tuple[str, ...]
    devices: tuple[str, ...]
    home: dict = field(default_factory=dict)
    compute: object = "cpu"  # where PyTorch computes

    @cached_property
    def orientations(self) -> list[int]:
        """The `models.plausible_orientations` of its images."""
        return plausible_orientations(self.data.images)

    @cached_property
    def training(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels that it trains on: its own, and behind them what it received."""
        received = self.home.get("received")
        joined = self.data if received is None else Client.joined([self.data, received])
        return joined.images.to(self.compute), joined.labels.to(self.compute)

    def keep(self, samples: Client) -> None:
        """Remember received samples, in place of earlier ones."""
        self.home["received"] = samples
        vars(self).pop("training", None)


def batches(number: int, steps: int, size: int, random, chance: np.ndarray | None = None):
    """Yield `steps` index tensors (size,): passes over `number` shuffled images, or draws with the given chances."""
    if chance is None:
        passes = math.ceil(steps * size / number)
        order = np.concatenate([random.permutation(number) for _ in range(passes)])
    else:
        order = random.choice(number, steps * size, p=chance)
    yield from torch.from_numpy(order[: steps * size]).split(size)


def log_prior(labels: torch.Tensor, classes: int, chance: np.ndarray | None = None) -> torch.Tensor:
    """Log class frequencies (C,), float32, as drawn; an absent class counts as a tenth of an image, not as none."""
    weight = None if chance is None else torch.from_numpy(chance * len(labels))
    counts = torch.bincount(labels, weight, minlength=classes).float().clamp(min=0.1)
    return (counts / counts.sum()).log()


def train_local(
    net,
    start,
    images,
    labels,
    *,
    steps,
    lr,
    random,
    method=Method(),
    own=0,
    progress=0.0,
    correction=None,
    styles=None,
    orientations=None,
    batch=32,
) -> torch.Tensor:
    """Local training: `steps` of SGD with momentum from the weights `start` (P,); returns the new weights (P,).

    `net` is scratch space: its weights are overwritten, so that many hospitals can use one network in turn. Of the
    `images`, uint8 (N, C, H, W), and `labels`, int64 (N,), the first `own` are the hospital's, the others received. A
    step takes `batch` images (all N where there are fewer); `random` draws them and their orientation, one of
    `orientations` (None: the `models.plausible_orientations` of the images). `progress`, 0..1, says how much of the run
    is over, for `method.batches`; `correction`, float32 (P,), is for `method.gradient`, `styles`, float32 (D, 2, C), for
    `method.view`. A ValueError where there are no images, or a label out of range.
    """
    require(len(labels) > 0, "the number of images to train on", 0, "at least 1")
    classes, (low, high) = net.classes, (int(labels.min()), int(labels.max()))
    require(0 <= low <= high < classes, "the range of the labels", (low, high), f"within 0 to {classes - 1}")
    net.train()
    net.weights.copy_(start)
    momentum_buffer, size = torch.zeros_like(start), min(batch, len(labels))
    chance = method.batches(labels.cpu(), own, progress)
    prior = log_prior(labels.cpu(), classes, chance).to(start.device)
    orientations = orientations or plausible_orientations(images)
    for rows in batches(len(labels), steps, size, random, chance):
        rows = rows.to(images.device)
        x = scale(images.index_select(0, rows))
        x = method.view(augment(x, orientations[int(random.integers(len(orientations)))]), styles, random)
        net.grad.zero_()
        method.loss(net(x), labels[rows], prior).backward()
        method.gradient(net.grad, net.weights, start, correction)
        net.grad.add_(net.weights, alpha=WEIGHT_DECAY)
        momentum_buffer.mul_(MOMENTUM).add_(net.grad)
        net.weights.sub_(momentum_buffer, alpha=lr)
    return net.weights.clone()


def distance(steps: int, lr: float) -> float:
    """How far `steps` of SGD with momentum go along a gradient of length 1: SCAFFOLD's K times lr, with momentum."""
    return lr * sum(1 - MOMENTUM**i for i in range(1, steps + 1)) / (1 - MOMENTUM)


def learning_rate(lr: float, r: int, rounds: int) -> float:
    """Local learning rate of round r = 0, 1, ...: from `lr` down to 0, along a half cosine."""
    return lr * 0.5 * (1 + math.cos(math.pi * r / rounds))


def steps_of(images: int, epochs: int = 1, batch: int = 32) -> int:
    """Local steps per round: passes over the *real* images, so that every method gets equally many."""
    return epochs * math.ceil(images / batch)


def staying(net: Flat, stays: str) -> torch.Tensor:
    """Which weights (P,), bool, never leave their hospital, see `methods.Method`."""
    every = torch.full_like(net.weights, stays == "all", dtype=torch.bool)
    return net.norms().to(every.device) if stays == "norm" else every


def evaluate(net: Flat, weights, test: Client, classes: int, devices: int, method=Method(), styles=None):
    """Test confusion matrices per device, int64 array (D, C, C), of the model with these weights (P,)."""
    net.eval()
    net.weights.copy_(weights)
    images = method.view.at_test(test.images, test.device, styles)
    predicted = predict(net, images) if len(test) else test.labels
    return metrics.confusions(test.labels, predicted, test.device, classes, devices)


def synthesise(data: Client, wanted: np.ndarray, k: int, seed: int, how=Sharing(), orientations=None):
    """What hospital k uploads: it trains its generator and draws `wanted` (C, D) samples, if any are wanted.

    Returns a Client, smaller than wanted where protection held samples back, and how many it rejected (C, D). A
    ValueError for a cell with fewer than `generator.MINIMUM` images: samples would be near copies.
    """
    devices, guard, served = wanted.shape[1], how.protection, wanted.ravel().copy()
    cells, rejected = data.labels * devices + data.device, np.zeros(wanted.shape, np.int64)
    few = served[torch.bincount(cells, minlength=wanted.size).numpy() < generator.MINIMUM] > 0
    needed = f"of cells with {generator.MINIMUM} images or more (near copies else)"
    require(not few.any(), f"the samples wanted of hospital {k}", f"of {few.sum()} smaller cells", needed)
    orientations, images = orientations or plausible_orientations(data.images), [data.images[:0]]
    if served.any():
        keep = slice(None)
        if guard.outlier:
            keep = protection.inliers(data.images, cells, guard.outlier, orientations)
            served[torch.bincount(cells[keep], minlength=len(served)).numpy() < generator.MINIMUM] = 0
        random = rng(seed, "generator", k)
        own = data.take(keep)
        groups = {"groups": own.group} if getattr(how.source, "per_group", False) else {}
        sample = how.source(own.images, own.labels, cells[keep], random, orientations, **groups)
        limits = protection.limits(data.images, cells, guard.reject, orientations) if guard.reject else {}
    for cell in map(int, np.flatnonzero(served)):
        random = rng(seed, "samples 0", k, cell)
        drawn = sample(cell, served[cell], random)
        if guard.reject:
            own, again = data.images[cells == cell], lambda n: sample(cell, n, random)  # noqa: B023
            drawn, rejected.flat[cell] = protection.redraw(drawn, own, limits[cell], orientations, again)
            served[cell] = len(drawn)
        if guard.noise:
            drawn = protection.add_noise(drawn, guard.noise, rng(seed, "grain 0", k, cell))
        images.append(drawn)
    cells = torch.from_numpy(np.repeat(np.arange(wanted.size), served))
    return Client(torch.cat(images), cells // devices, cells % devices), rejected


def small(data: Client) -> Client:
    """The images as a generator sees them: with sides of `generator.SIDE` pixels at most."""
    return replace(data, images=resized(data.images, min(data.images.shape[-1], generator.SIDE)))


def chosen(data: Client, wanted: np.ndarray, random: np.random.Generator) -> Client:
    """The oracle's upload: `wanted` (C, D) of a hospital's *real* images, or all where it has fewer."""
    cell = (data.labels * wanted.shape[1] + data.device).numpy()
    rows = [random.permutation(np.flatnonzero(cell == c))[: wanted.flat[c]] for c in range(wanted.size)]
    return data.take(torch.from_numpy(np.concatenate(rows)))


def copies(data: Client, wanted: np.ndarray, random: np.random.Generator) -> Client:
    """A hospital's own images again, of each class as many as `wanted` (C, D) says; none of a class that it lacks."""
    numbers = wanted.sum(1) * (torch.bincount(data.labels, minlength=len(wanted)).numpy() > 0)
    rows = [random.choice(np.flatnonzero(data.labels == c), n) for c, n in enumerate(numbers) if n]
    return data.take(torch.from_numpy(np.concatenate([np.empty(0, int), *rows])))


def report(hospital: Hospital, content: dict, net) -> dict:
    """How many images of each class and device it has, and if `styles` are asked for, sums that say how they look."""
    shape = (len(hospital.classes), len(hospital.devices))
    have = sharing.reports([hospital.data], *shape)[0]
    answer = {"have": torch.from_numpy(have), "tests": len(hospital.test)}
    answer |= {"classes": list(hospital.classes), "devices": list(hospital.devices)}
    sums = {"sums": sharing.channel_sums(hospital.data, shape[1])} if content["styles"] else {}
    return answer | sums | {"shape": list(hospital.data.images.shape[1:])}


def generate(hospital: Hospital, content: dict, net) -> dict:
    """Train the generator, and send as many samples of each cell as are wanted."""
    began, k, seed, how = time.thread_time(), hospital.k, content["seed"], content["sharing"]
    wanted, data = content["wanted"].numpy(), small(hospital.data)
    if isinstance(how.source, RealImages):
        rejected = np.zeros_like(wanted)
        samples = chosen(data, wanted, rng(seed, "real upload", k))
    else:
        samples, rejected = synthesise(data, wanted, k, seed, how, hospital.orientations)
    answer = {"labels": samples.labels, "device": samples.device, "rejected": torch.from_numpy(rejected)}
    return answer | {"pictures": sharing.packed(samples.images), "seconds": time.thread_time() - began}


def receive(hospital: Hospital, content: dict, net) -> dict:
    """Keep the samples that came; or, for `methods.Copies`, repeat own images as often as the plan says."""
    if "copies" in content:
        random = rng(content["seed"], "copies", hospital.k)
        hospital.keep(copies(hospital.data, content["copies"].numpy(), random))
    else:
        channels, size = hospital.data.images.shape[1:3]
        images = sharing.unpacked(content["pictures"], channels, min(size, generator.SIDE))
        hospital.keep(Client(resized(images, size), content["labels"], content["device"]))
    return {}


def update(hospital: Hospital, content: dict, net: Flat) -> dict:
    """One round of local training, from the server's weights. Raises `Absence` where `Faults` say so."""
    began, home, own = time.thread_time(), hospital.home, len(hospital.data)
    method, weights, seed, r = (content[name] for name in ("method", "weights", "seed", "round"))
    if why := content["faults"].of(seed, hospital.k, r):
        raise Absence(why)
    stays, steps = staying(net, method.stays), content["steps"] or steps_of(own, content["epochs"])
    start = torch.where(stays, home.get("own", weights), weights)
    correction, lr = method.gradient.correction(home, content), learning_rate(method.lr, r, content["rounds"])
    known = dict(method=method, own=own, progress=r / content["rounds"], correction=correction)
    known |= dict(styles=content.get("styles"), orientations=hospital.orientations)
    random = rng(seed, "local training", hospital.k, r)
    new = train_local(net, start, *hospital.training, steps=steps, lr=lr, random=random, **known)
    answer = {"images": own, "weights": torch.where(stays, weights, new)}
    if torch.isfinite(new).all():  # else the server refuses it, and nothing of it is kept
        if method.stays:
            home["own"] = new
        answer |= method.gradient.after_round(home, start, new, distance(steps, lr), correction)
    return answer | {"seconds": time.thread_time() - began}


def test(hospital: Hospital, content: dict, net: Flat) -> dict:
    """Confusion matrices (D, C, C) of the server's weights, and its own that stay, on its share of the test images."""
    weights, method = content["weights"], content["method"]
    weights = torch.where(staying(net, method.stays), hospital.home.get("own", weights), weights)
    shape = (len(hospital.classes), len(hospital.devices))
    seen = evaluate(net, weights, hospital.test, *shape, method, content.get("styles"))
    return {"confusions": torch.from_numpy(seen)}


ANSWERS = {answer.__name__: answer for answer in (report, generate, receive, update, test)}
