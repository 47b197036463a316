"""The sharing strategy: who lacks what, who can supply it, and what is sent. No image leaves a hospital.

1. Each hospital reports how many images it has per class and device: ``have`` (K, C, D).
2. The server sums the reports to the coverage matrix N[c, d], and a *rule* turns each hospital's gaps into wishes
   (K, C, D): synthetic images of class c from device d that it should receive.
3. `plan` bounds the wishes by the budget (``want``) and tells the hospitals that own a (class, device) cell how
   much of it to generate and upload (``offer``).
4. The server checks the uploads (`checks`) and deals the pool of those that pass: nobody gets his own samples, nobody
   more than the budget.

The strategy's idea is published (Pavan et al. 2026, arXiv 2604.26324); the rule and the budgets here are the
course's own. K hospitals, C classes and D devices throughout; all counts are images.
"""
from __future__ import annotations

import io
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from . import checks, generator
from .keys import rng
from .models import normalise, orientations, scale
from .partition import Client, Federation

REDRAWS = 5  # how often a hospital draws rejected samples again before it offers fewer


@dataclass(frozen=True)
class Budget:
    """How much is shared.

    Attributes
    ----------
    fill : int, >= 0
        A hospital asks for synthetic images of a class until it holds this many, real ones included.
    cell : int, >= 0
        ... and for this many of every (class, device) cell that somebody else can generate: other devices are
        covered for its frequent classes too, and no class is synthetic only.
    worth : float, >= 0
        ... but for no more than so many samples per real image that the others can learn a cell from: a generator of
        twenty images has little to tell, however much one asks it.
    offer : int, >= 0
        A hospital uploads at most this many samples of one cell.
    receive : int, >= 0
        A hospital receives at most this many samples in all.
    power : float, 0..1
        How much more a source with more images counts: 0 all the same, 1 in proportion.
    minimum : int, >= `generator.MINIMUM`
        Nothing is generated from a cell with fewer images at its source: the fewer, the more each of them shows.
    silent : tuple of int
        Hospitals that upload nothing (their rules or their contracts forbid it); they still receive.

    Raises
    ------
    ValueError
        A field out of its range.
    """

    fill: int = 200
    cell: int = 120
    worth: float = 0.5
    offer: int = 400
    receive: int = 1500
    power: float = 0.5
    minimum: int = generator.MINIMUM
    silent: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("fill", "cell", "offer", "receive"):
            number = getattr(self, name)
            if not (0 <= number < np.inf and number == int(number)):
                raise ValueError(f"the budget's {name} is {number}; it counts images: a whole number, 0 or more")
        if not 0 <= self.worth < np.inf:
            raise ValueError(f"the budget's worth is {self.worth}; it must be 0 or more")
        if not 0 <= self.power <= 1:
            raise ValueError(f"the budget's power is {self.power}; it must lie in 0..1 (0: all sources the same, "
                             "1: in proportion to their images)")
        if not self.minimum >= generator.MINIMUM:
            raise ValueError(f"the budget's minimum is {self.minimum}; no generator is allowed a cell of fewer than "
                             f"{generator.MINIMUM} images")


@dataclass(frozen=True)
class Plan:
    """``want`` and ``offer``, int64 (K, C, D): samples that each hospital receives, and generates, per cell."""

    want: np.ndarray
    offer: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Uploaded samples: images uint8 (M, C, H, W); labels, device, source (hospital) int64 (M,)."""

    images: torch.Tensor
    labels: torch.Tensor
    device: torch.Tensor
    source: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def reports(clients: list[Client], classes: int, devices: int) -> np.ndarray:
    """What hospitals tell the server: images per class and device, int64 (K, C, D).

    Raises
    ------
    ValueError
        No client, or a label or device beyond the names that the federation agreed on.
    """
    if not clients:
        raise ValueError("there is no hospital to ask for a report")
    for k, c in enumerate(clients):
        if len(c) and (int(c.labels.max()) >= classes or int(c.device.max()) >= devices):
            raise ValueError(f"hospital {k} has a class or device beyond the {classes} classes and {devices} devices "
                             "of the federation; all hospitals must use the same list of names")
    cells = [torch.bincount(c.labels * devices + c.device, minlength=classes * devices) for c in clients]
    return torch.stack(cells).view(len(clients), classes, devices).numpy()


def coverage(have: np.ndarray) -> np.ndarray:
    """The coverage matrix N, int64 (C, D), of the federation, from the reports (K, C, D)."""
    return have.sum(0)


def credible(have: np.ndarray, budget: Budget = Budget()) -> np.ndarray:
    """The reports (K, C, D) as far as samples can be had: no cell below ``budget.minimum``, no silent one.

    Raises
    ------
    ValueError
        The budget silences a hospital that does not exist.
    """
    silent = list(budget.silent)
    if silent and not 0 <= min(silent) <= max(silent) < len(have):
        raise ValueError(f"the budget silences hospitals {silent}; they are numbered 0 to {len(have) - 1}")
    able = np.where(have >= budget.minimum, have, 0)
    able[silent] = 0
    return able


def supply(have: np.ndarray, budget: Budget = Budget()) -> np.ndarray:
    """Images (K, C, D) that each hospital's *others* could learn a cell from."""
    able = credible(have, budget)
    return able.sum(0) - able


def class_and_device(have: np.ndarray, budget: Budget) -> np.ndarray:
    """FedSSG: fill each rare class from every device that owns it, and each cell that a hospital has never seen.

    ``want = min(max(gap * share, floor), worth * others)`` where gap (K, C) is what a hospital lacks of a class, share
    the part of each device in what the others can supply, softened by ``budget.power``, floor what is missing of
    ``budget.cell`` images in a cell, and others (K, C, D) the real images behind it.
    """
    others = supply(have, budget)
    gap = np.maximum(budget.fill - have.sum(2), 0)
    share = _shares(np.where(others > 0, others ** budget.power, 0), axis=2)
    floor = np.where(others > 0, np.maximum(budget.cell - have, 0), 0)
    return np.minimum(np.maximum(gap[:, :, None] * share, floor), budget.worth * others)


def class_only(have: np.ndarray, budget: Budget) -> np.ndarray:
    """Ablation: fill each rare class in the mix of devices that the others have, and cover no device on purpose."""
    others = supply(have, budget)
    gap = np.maximum(max(budget.fill, budget.cell) - have.sum(2), 0)
    return np.minimum(gap[:, :, None] * _shares(others, axis=2), budget.worth * others)


def device_only(have: np.ndarray, budget: Budget) -> np.ndarray:
    """Ablation: fill each device that a hospital lacks in the others' mix of classes, and no class on purpose."""
    others = supply(have, budget)
    gap = np.maximum(max(budget.fill, budget.cell) - have.sum(1), 0)
    return np.minimum(gap[:, None, :] * _shares(others, axis=1), budget.worth * others)


def uniform(have: np.ndarray, budget: Budget) -> np.ndarray:
    """The control (uniform shuffle, as in FedSSyn, arXiv 2306.13263): as many samples, cells as they come.

    Every hospital receives exactly the number that `class_and_device` gives it, over cells in proportion to what
    the others own; what a cell's uploads cannot serve goes to the other cells.
    """
    hospitals = len(have)
    total = _possible(class_and_device(have, budget), have, budget).sum((1, 2))
    others, most = (x.reshape(hospitals, -1).T for x in (supply(have, budget), _capacity(have, budget)))
    parts = _split(total, others, most)
    whole = np.floor(parts + 1e-9)
    rank = np.argsort(np.argsort(whole - parts, axis=0, kind="stable"), axis=0)  # largest remainders first
    return (whole + (rank < total - whole.sum(0))).T.reshape(have.shape)


# A rule takes (have, budget) and returns wishes (K, C, D), numbers >= 0; `plan` rounds them up and bounds them.
RULES = {"class_and_device": class_and_device, "uniform": uniform, "class_only": class_only,
         "device_only": device_only}


def _shares(weight: np.ndarray, axis) -> np.ndarray:
    """Weights divided by their sum over `axis`; 0 where nobody has any."""
    total = weight.sum(axis, keepdims=True)
    return np.divide(weight, total, out=np.zeros(weight.shape), where=total > 0)


def _split(total: np.ndarray, weight: np.ndarray, most) -> np.ndarray:
    """`total` (...) divided in proportion to `weight` (n, ...); what exceeds a part's `most` goes to the others."""
    part = np.zeros(weight.shape)
    for _ in range(len(weight)):  # each pass either serves everything or fills at least one more part
        part = np.minimum(part + (total - part.sum(0)) * _shares(np.where(part < most, weight, 0), 0), most)
    return part


def _capacity(have: np.ndarray, budget: Budget) -> np.ndarray:
    """The most samples of each cell (K, C, D) that the others may upload."""
    able = credible(have, budget) > 0
    return budget.offer * (able.sum(0) - able)


def _possible(want: np.ndarray, have: np.ndarray, budget: Budget) -> np.ndarray:
    """Wishes as whole numbers, int64 (K, C, D): within what others may upload, and within `budget.receive`."""
    want = np.minimum(np.ceil(want - 1e-9), _capacity(have, budget))
    total = want.sum((1, 2), keepdims=True)
    return np.floor(want * np.minimum(1, budget.receive / np.maximum(total, 1)) + 1e-9).astype(np.int64)


def plan(have: np.ndarray, rule: str, budget: Budget = Budget()) -> Plan:
    """Wishes by the rule, bounded by the budget, and the uploads that serve them to the last sample.

    Sources share a cell's work in proportion to (their images of it) ** power. As a sample may go to several
    hospitals, a source offers what the neediest *other* hospital takes from it, not the sum over hospitals.

    Parameters
    ----------
    have : int array (K, C, D), >= 0
        The reports.
    rule : str
        A name in `RULES`; add your own function there.

    Raises
    ------
    ValueError
        Reports that are no counts, an unknown rule, or a rule that returns something else than wishes.
    """
    have = np.asarray(have)
    if have.ndim != 3 or not len(have) or not np.issubdtype(have.dtype, np.integer) or (have < 0).any():
        raise ValueError(f"the reports must be counts, whole numbers >= 0 of shape (hospitals, classes, devices); "
                         f"got {have.dtype} of shape {have.shape}")
    if rule not in RULES:
        raise ValueError(f"there is no sharing rule {rule!r} among {', '.join(RULES)}; add yours to sharing.RULES")
    wishes = np.asarray(RULES[rule](have, budget), float)
    if wishes.shape != have.shape or not np.isfinite(wishes).all() or (wishes < 0).any():
        raise ValueError(f"the rule {rule!r} must return finite wishes >= 0 of shape {have.shape} "
                         f"(hospitals, classes, devices); its result has shape {wishes.shape}")
    want = _possible(wishes, have, budget)
    weight = credible(have, budget)
    weight = np.where(weight > 0, weight ** budget.power, 0)
    offer = np.zeros_like(want)
    for k in range(len(have)):
        others = weight.copy()
        others[k] = 0
        offer = np.maximum(offer, np.ceil(_split(want[k], others, budget.offer) - 1e-9).astype(np.int64))
    return Plan(want, offer)


def flows(agreed: Plan) -> np.ndarray:
    """Samples that a plan is expected to move, float (K, K): ``[j, k]`` from source j to hospital k.

    A hospital draws evenly from the others' uploads of a cell, so source j serves it in proportion to its upload.
    """
    flow = np.zeros((len(agreed.want), len(agreed.want)))
    for k, want in enumerate(agreed.want):
        others = agreed.offer.copy()
        others[k] = 0
        flow[:, k] = (_shares(others, 0) * want).sum((1, 2))
    return flow


def pool_of(offers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Pool:
    """The server's pool of the hospitals' uploads, each (images, labels, device), in order of hospitals.

    Raises
    ------
    ValueError
        No upload at all, or images that are not uint8 of one shape.
    """
    if not offers or any(images.dtype != torch.uint8 or images.shape[1:] != offers[0][0].shape[1:]
                         for images, _, _ in offers):
        raise ValueError("uploads must be uint8 images of one shape, from one hospital at least (an empty upload "
                         "counts)")
    source = [torch.full((len(labels),), k) for k, (_, labels, _) in enumerate(offers)]
    return Pool(*(torch.cat(parts) for parts in zip(*offers)), torch.cat(source))


def accepted(offers: list[tuple], asked: np.ndarray, shape: tuple) -> tuple[list[tuple], dict[int, str]]:
    """The uploads, an empty one in place of each that the server refuses, and the reasons by hospital.

    Parameters
    ----------
    offers : list of (images, labels, device)
        As they came, in order of hospitals.
    asked : int array (K, C, D)
        What the plan asked for, ``Plan.offer``.
    shape : tuple
        (C, H, W) of the federation's images.
    """
    none = torch.empty(0, *shape, dtype=torch.uint8), *torch.empty(2, 0, dtype=torch.int64)
    refused = {k: reason for k, upload in enumerate(offers)
               if (reason := checks.samples_refusal(*upload, asked[k], shape))}
    fit = [none if k in refused else upload for k, upload in enumerate(offers)]
    refused |= checks.odd_sources(pool_of(fit), asked.shape[1])
    return [none if k in refused else upload for k, upload in enumerate(offers)], refused


def deal(wishes: np.ndarray, pool: Pool, client: int, seed: int, draw: int = 0) -> torch.Tensor:
    """Rows of the pool, int64 (n,), for hospital `client`, whose wishes are (C, D): other hospitals' samples only.

    Each row at most once, and of each cell what is wished, or all that others uploaded where that is less.
    """
    random, devices = rng(seed, "deal", client, draw), wishes.shape[1]
    cell = (pool.labels * devices + pool.device).numpy()
    foreign = (pool.source != client).numpy()
    rows = [random.permutation(np.flatnonzero((cell == wanted) & foreign))[:wishes.flat[wanted]]
            for wanted in np.flatnonzero(wishes)]
    return torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, np.int64))


def packed(images: torch.Tensor) -> list[bytes]:
    """uint8 images (N, C, H, W) as they travel: lossless WebP pictures of up to 100 images, one below the other."""
    pictures = []
    for part in images.split(100) if len(images) else ():
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


def size_of(images: torch.Tensor) -> float:
    """Bytes of images (N, C, H, W) under way, see `packed`."""
    return float(sum(map(len, packed(images))))


def styles(clients: list[Client], devices: int) -> torch.Tensor:
    """How images of each device look on average: mean and standard deviation per channel, float32 (D, 2, C).

    In scaled units, over the images of all hospitals: each sends 2 C sums and a count per device that it has. A
    device without images gets the style of all images together.
    """
    images, device = torch.cat([c.images for c in clients]), torch.cat([c.device for c in clients])
    every = []
    for d in range(devices):
        own = images[device == d] if (device == d).any() else images
        x = scale(own).transpose(0, 1).flatten(1)
        every.append(torch.stack([x.mean(1), x.std(1, correction=0).clamp(min=0.01)]))
    return torch.stack(every)


def restyle(pool: Pool, wishes: np.ndarray, style: torch.Tensor) -> Pool:
    """The pool, and behind it samples re-rendered for the cells (class, device) that nobody can supply.

    For a wished cell without uploads, samples of the class from other devices are given the wished device's mean and
    standard deviation per channel (Reinhard et al. 2001, in RGB). They keep their source.

    Parameters
    ----------
    wishes : int64 array (C, D)
        The most that one hospital wishes of each cell.
    style : float32 tensor (D, 2, C)
        See `styles`.
    """
    parts = [pool]
    for c, d in np.argwhere(wishes > 0):
        if not ((pool.labels == c) & (pool.device == d)).any():
            rows = torch.nonzero(pool.labels == c)[:, 0][:4 * int(wishes[c, d])]
            plain = normalise(scale(pool.images[rows]), style[pool.device[rows]])
            images = generator.unscale(plain * style[d, 1, :, None, None] + style[d, 0, :, None, None])
            parts.append(Pool(images, pool.labels[rows], torch.full((len(rows),), int(d)), pool.source[rows]))
    return Pool(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(pool)))


@dataclass(frozen=True)
class Shared:
    """What sharing leaves behind.

    Attributes
    ----------
    plan : Plan
    pool : Pool
    rows : list of int64 tensors (n_k,)
        The pool rows that each hospital received.
    costs : dict
        generator_seconds (all hospitals together); bytes_up and bytes_down (see `packed`, all hospitals together),
        also as bytes_samples_up and bytes_samples_down.
    refused : dict of int to str
        Hospitals whose upload the server left out, each with the reason.
    rejected : int64 array (K, C, D), or None
        Samples that each hospital's own privacy rejection held back.
    """

    plan: Plan
    pool: Pool
    rows: list[torch.Tensor]
    costs: dict[str, float]
    refused: dict[int, str] = field(default_factory=dict)
    rejected: np.ndarray | None = None


def share(clients: list[Client], federation: Federation, rule: str, seed: int, *, budget: Budget = Budget(),
          real: bool = False, restyled: bool = False, draw: int = 0, tamper=None, **options) -> Shared:
    """The whole exchange: reports, plan, generators, uploads, dealing.

    Generators stay at home: a hospital's samples are the only thing that leaves it besides its counts.

    Parameters
    ----------
    rule, budget
        See `plan`.
    real : bool
        The oracle that no privacy rule allows: real images are uploaded in place of samples, as far as there are.
    restyled : bool
        Also fill ``budget.cell`` places of each cell that nobody can supply, see `restyle`.
    draw : int
        Names the samples: another number, other samples of the same generators.
    tamper : callable (k, images, labels, device) -> the same three, optional
        What a faulty or malicious hospital k sends in place of its upload; for lessons and tests.
    options
        Of the generator: latent, steps, temperature; of its protection: reject, grain, odd; see `offer_of`.

    Raises
    ------
    ValueError
        See `reports` and `plan`.
    """
    classes, devices = len(federation.classes), len(federation.devices)
    have = reports(clients, classes, devices)
    agreed = plan(have, rule, budget)
    began, rejected = time.perf_counter(), np.zeros_like(have)
    offers = [real_offer_of(c, agreed.offer[k], k, seed) if real else
              offer_of(c, agreed.offer[k], k, seed, draw=draw, rejected=rejected[k], **options)
              for k, c in enumerate(clients)]
    seconds = time.perf_counter() - began
    if tamper:
        offers = [tamper(k, *upload) for k, upload in enumerate(offers)]
    refused = {}
    if not real:  # the oracle is a bound, no protocol
        offers, refused = accepted(offers, agreed.offer, federation.test.images.shape[1:])
    pool, wishes = pool_of(offers), agreed.want
    up = sum(size_of(images) for images, _, _ in offers)
    if restyled:
        seen = (have.sum((0, 1)) > 0) & (credible(have, budget).sum(0) == 0)  # devices in use, cells without source
        wishes = np.where(seen, np.maximum(budget.cell - have, 0), wishes)
        pool = restyle(pool, wishes.max(0), styles(clients, devices))
    rows = [deal(wishes[k], pool, k, seed, draw) for k in range(len(clients))]
    down = sum(size_of(pool.images[r]) for r in rows)
    return Shared(agreed, pool, rows, {"generator_seconds": seconds, "bytes_up": up, "bytes_down": down,
                                       "bytes_samples_up": up, "bytes_samples_down": down}, refused, rejected)


def offer_of(client: Client, numbers: np.ndarray, k: int, seed: int, *, draw: int = 0, latent: int = 200,
             steps: int = 0, temperature: float = 0.9, reject: float = 0.0,
             grain: float = 0.0, odd: float = 0.0,
             rejected: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What hospital k does: train its generator and sample `numbers` (C, D); gives images, labels, device.

    Nothing is trained where nothing is asked for. For latent, steps and temperature see `generator.fit` and
    `generator.Generator.sample`; `draw` names the samples.

    Parameters
    ----------
    reject : float, 0..1 (1 excluded)
        Privacy rejection: samples that come nearer to one of the hospital's own images of the cell than the part
        `reject` of unseen images would (see `generator.limits`) are drawn again, `REDRAWS` times at most, then left
        out: the upload can be smaller than asked for. 0: none is looked at.
    grain : float, >= 0, grey levels
        Standard deviation of pixel noise put on the samples: without it all of them lie in one flat of `latent`
        dimensions, which says more of the images it was fitted to than any sample does (see `privacy.span`).
    odd : float, >= 0
        Images whose nearest other image of the cell is more than so many times as far as usual are not learnt from
        (see `generator.ordinary`): they would shine through. 0: all are learnt from.
    rejected : int array (C, D), optional
        The number of samples rejected is added here.

    Raises
    ------
    ValueError
        A cell is asked for of which the hospital has fewer than `generator.MINIMUM` images; `reject`, `grain` or
        `odd` out of range.
    """
    if not 0 <= reject < 1:
        raise ValueError(f"reject is {reject}; it is the part of unseen images that come as near: 0..1, without 1")
    if not (grain >= 0 and odd >= 0):
        raise ValueError(f"grain is {grain} and odd is {odd}; both must be 0 or more")
    devices = numbers.shape[1]
    own = torch.bincount(client.labels * devices + client.device, minlength=numbers.size).numpy()
    if (numbers.ravel()[own < generator.MINIMUM] > 0).any():
        raise ValueError(f"hospital {k} is asked for samples of a (class, device) cell of which it has fewer than "
                         f"{generator.MINIMUM} images; they would be near copies, so it refuses")
    images, served = [client.images[:0]], numbers.ravel().copy()
    if served.any():
        cells = client.labels * devices + client.device
        keep = generator.ordinary(client.images, cells, odd) if odd else slice(None)
        model = generator.fit(client.images[keep], client.labels[keep], cells[keep], rng(seed, "generator", k),
                              latent=latent, steps=steps)
        if odd:  # too few ordinary images of a cell: nothing of it is offered
            served[torch.bincount(cells[keep], minlength=len(served)).numpy() < generator.MINIMUM] = 0
        limits = generator.limits(client.images, cells, reject) if reject else {}
        for cell in map(int, np.flatnonzero(served)):
            random = rng(seed, f"samples {draw}", k, cell)
            drawn = model.sample(cell, served[cell], random, temperature)
            if reject:
                drawn, gone = _distant(drawn, client.images[cells == cell], limits[cell], orientations(client.images),
                                       lambda number: model.sample(cell, number, random, temperature))
                served[cell] = len(drawn)
                if rejected is not None:
                    rejected.flat[cell] += gone
            if grain:
                noise = rng(seed, f"grain {draw}", k, cell).standard_normal(drawn.shape, dtype=np.float32)
                drawn = (drawn + grain * torch.from_numpy(noise)).round().clamp(0, 255).to(torch.uint8)
            images.append(drawn)
    cells = torch.from_numpy(np.repeat(np.arange(numbers.size), served))
    return torch.cat(images), cells // devices, cells % devices


def _distant(drawn: torch.Tensor, own: torch.Tensor, limit: float, turns: list[int],
             again) -> tuple[torch.Tensor, int]:
    """Samples at least `limit` from every image of `own`, topped up by ``again(number)``; and how many were not."""
    kept, gone, number = [], 0, len(drawn)
    for _ in range(REDRAWS + 1):
        far = generator.distances(drawn, own, turns).min(1)[0] >= limit
        kept.append(drawn[far])
        gone += int((~far).sum())
        if (missing := number - sum(map(len, kept))) == 0:
            break
        drawn = again(missing)
    return torch.cat(kept), gone


def real_offer_of(client: Client, numbers: np.ndarray, k: int,
                  seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The oracle's upload: `numbers` (C, D) of hospital k's *real* images, or all where it has fewer."""
    cell, random = (client.labels * numbers.shape[1] + client.device).numpy(), rng(seed, "real upload", k)
    rows = torch.from_numpy(np.concatenate([random.permutation(np.flatnonzero(cell == c))[:numbers.flat[c]]
                                            for c in range(numbers.size)]))
    return client.images[rows], client.labels[rows], client.device[rows]


def copies(labels: torch.Tensor, wishes: np.ndarray, random: np.random.Generator) -> torch.Tensor:
    """Duplication, the control without any exchange: rows of a hospital's *own* images (N,), drawn with replacement.

    As many of each class as `wishes` (C, D) asks for; none of a class that the hospital lacks.
    """
    numbers = wishes.sum(1) * (torch.bincount(labels, minlength=len(wishes)).numpy() > 0)
    return torch.from_numpy(np.concatenate([random.choice(np.flatnonzero(labels == c), n) if n else np.empty(0, int)
                                            for c, n in enumerate(numbers)]))
