"""What shared samples give away: attacks on what a hospital uploads, and planted canaries.

No attack that fails proves privacy: a better one may succeed. Only differential privacy bounds them all, see `dpmeans`.
"""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import cycle

import cloudpickle
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from . import metrics, partition, runs, server
from .client import evaluate, small, synthesise
from .generator import MINIMUM
from .keys import one_thread, rng
from .methods import Sharing
from .models import SmallCNN, augment, plausible_orientations, resized
from .partition import Client
from .protection import apart, distances
from .sharing import Plan, Pool

ATTACKS = ("nearest", "subspace")
SMALL = 50  # a class with fewer images than this at its source counts as small
ROUNDING = 2.0  # grey levels squared: variance along one direction that rounding to whole grey levels adds
CELL = ["source", "class", "device"]


def subspace(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The subspace that samples lie in: mean (P,) and orthonormal axes (P, q), in grey levels.

    A decoder of q latent dimensions paints along q axes. Axes with less variance than rounding makes are not counted.
    """
    x = samples.float().flatten(1)
    _, sizes, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return x.mean(0), axes[sizes.square() / len(x) > ROUNDING].T


def off_subspace(images: Tensor, plane: tuple[Tensor, Tensor]) -> Tensor:
    """How far images (N, C, H, W) lie off a `subspace`, (N,): root mean square over an image, in grey levels."""
    x = images.float().flatten(1) - plane[0]
    rest = x.square().sum(1) - (x @ plane[1]).square().sum(1)
    return (rest.clamp(min=0) / x.shape[1]).sqrt()


def _rows(data: Client | Pool, c: int, device: int) -> Tensor:
    return torch.nonzero((data.labels == c) & (data.device == device))[:, 0]


def _cells(clients: list[Client], outside: Client, pool: Pool):
    """Each (source, class, device) of the pool; its rows at the source, outside, and in the pool; orientations."""
    orientations = [plausible_orientations(c.images) for c in clients]
    for k, c, d in torch.unique(torch.stack([pool.source, pool.labels, pool.device], 1), dim=0).tolist():
        rows = _rows(pool, c, d)
        rows = rows[pool.source[rows] == k]
        yield (k, c, d), _rows(clients[k], c, d), _rows(outside, c, d), rows, orientations[k]


def _table(parts: list[dict], columns: list[str]) -> pd.DataFrame:
    return pd.concat(map(pd.DataFrame, parts), ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _reference(images: Tensor, groups, unseen: Tensor, unseen_groups, orientations) -> Tensor:
    """Distance (N,) of each image to the nearest unseen one that is not of its own lesion or patient."""
    far = distances(images, unseen, orientations)
    far[torch.from_numpy(groups[:, None] == unseen_groups)] = torch.inf
    return far.min(1)[0].clamp(min=1e-3)


@one_thread()
def membership(clients, outside: Client, pool: Pool, *, seed=0, most=200) -> pd.DataFrame:
    """The membership attack: was this image among those that the source learnt from?

    The attacker holds a candidate image with its class and device, and what the hospital uploaded. Two scores, each
    ``log(reference / distance)``: the distance is that to the `nearest` uploaded sample of the cell, or to the `subspace`
    of all uploads of the hospital; the reference is that to the nearest unseen image of the class (difficulty
    calibration, Watson et al. 2022, arXiv 2111.08440), because typical images are near to everything.

    `outside` are real images that no hospital holds. A row per candidate, at most `most` members and non-members of a
    cell: source, class, device, held (images there), member, nearest, subspace. Fewer than two of `outside`: no row.
    """
    clients, outside, parts = [small(client) for client in clients], small(outside), []
    groups = np.arange(len(outside)) if outside.group is None else outside.group.numpy()
    planes = {k: subspace(pool.images[pool.source == k]) for k in pool.source.unique().tolist()}
    for (k, c, d), inside, others, rows, orientations in _cells(clients, outside, pool):
        like, random = np.flatnonzero(outside.labels.numpy() == c), rng(seed, "candidates", k, c * 1000 + d)
        members, strangers = (np.sort(random.permutation(x.numpy())[:most]) for x in (inside, others))
        if len(others) < 2 or len(inside) < 1 or len(np.unique(groups[like])) < 3:
            continue
        images = torch.cat([clients[k].images[members], outside.images[strangers]])
        # A stranger is no reference for itself; as much is withheld from members, so that both are treated alike.
        own = groups[np.concatenate([np.resize(strangers, len(members)), strangers])]
        reference = _reference(images, own, outside.images[like], groups[like], orientations)
        near = distances(images, pool.images[rows], orientations).min(1)[0]
        far = near, off_subspace(images, planes[k])
        row = dict(zip(ATTACKS, ((reference / x.clamp(min=1e-3)).log().numpy() for x in far)))
        row |= {"held": len(inside), "member": np.arange(len(images)) < len(members)}
        parts.append(dict(zip(CELL, (k, c, d))) | row)
    return _table(parts, [*CELL, "held", "member", *ATTACKS])


def auc(table: pd.DataFrame, attack: str) -> float:
    """Chance, 0..1, that a member scores above a non-member (.5: a coin): the area under the ROC curve.

    Of the candidates of one source, class and device, these cells weighted by their members; NaN without any.
    """
    total = wins = 0.0
    for _, cell in table.groupby(CELL):
        inside, outside = (cell[attack].to_numpy()[cell.member == side] for side in (True, False))
        above = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
        wins, total = wins + len(inside) * above, total + len(inside)
    return wins / total if total else float("nan")


def true_positives(table: pd.DataFrame, attack: str, false: float = 0.01) -> float:
    """Fraction of the members that score above all but the fraction `false` of the non-members, 0..1; NaN without any.

    All cells together, non-members weighted so that each cell has as many of them as members.
    """
    if not len(table):
        return float("nan")
    sizes = table.groupby(CELL).member.agg(["sum", "size"])
    sizes["weight"] = sizes["sum"] / (sizes["size"] - sizes["sum"])
    outside = table[~table.member].join(sizes.weight, on=CELL).sort_values(attack, ascending=False)
    within = outside.weight.cumsum() / outside.weight.sum() <= false
    least = outside[attack][~within].iloc[0]  # the first non-member that would be one too many
    return float((table[attack][table.member] > least).mean())


def attack_summary(table: pd.DataFrame) -> dict[str, float]:
    """auc and tpr (at 1 % false positives) per attack, as ``"nearest auc"``; ``_small``: cells under `SMALL` images."""
    found = {}
    for attack in ATTACKS:
        for suffix, part in (("", table), ("_small", table[table.held < SMALL])):
            found[f"{attack} auc{suffix}"] = auc(part, attack)
            found[f"{attack} tpr{suffix}"] = true_positives(part, attack)
    return found


@one_thread()
def pairs(clients: list[Client], outside: Client, pool: Pool, seed: int = 0) -> pd.DataFrame:
    """Each sample with the real image of its source that is nearest to it: a row per sample.

    row (in the pool), source, class, device, held, image (row at the source), distance (grey levels), usual (median of
    `protection.apart`), ratio: distance to the nearest training image over that to the nearest outside image, both out
    of equally many (1: a sample knows training images no better than unseen ones; NaN: there are no unseen ones).
    """
    parts, clients, outside = [], [small(client) for client in clients], small(outside)
    for (k, c, d), inside, others, rows, orientations in _cells(clients, outside, pool):
        if len(inside) < MINIMUM:
            continue
        own = clients[k].images[inside]
        near = distances(pool.images[rows], own, orientations)
        number, random = min(len(own), len(others)), rng(seed, "equal sizes", k, c * 1000 + d)
        ratio = np.full(len(rows), np.nan)
        if number:
            some, equal = (torch.from_numpy(random.permutation(n)[:number]) for n in (len(own), len(others)))
            unseen = distances(pool.images[rows], outside.images[others[equal]], orientations)
            ratio = (near[:, some].min(1)[0] / unseen.min(1)[0]).numpy()
        best = {"distance": near.min(1)[0], "image": inside[near.argmin(1)], "row": rows, "ratio": ratio}
        usual = {"held": len(own), "usual": float(apart(own, orientations).median())}
        parts.append(dict(zip(CELL, (k, c, d))) | usual | best)
    return _table(parts, [*CELL, "held", "usual", "distance", "image", "row", "ratio"])


def canary(shape: tuple[int, int, int], random: np.random.Generator, number: int = 1) -> Tensor:
    """Conspicuous images that no hospital takes, uint8 (number, C, H, W): mosaics of four by four random colours."""
    coarse = torch.from_numpy(random.integers(0, 256, (number, shape[0], 4, 4), dtype=np.uint8))
    return F.interpolate(coarse, shape[1:])


def resemblance(images: Tensor, samples: Tensor, orientations=range(8)) -> Tensor:
    """Correlation (N, M), -1..1, of images with samples in the best orientation, both less the mean of the samples."""
    middle = samples.float().mean(0)
    y = F.normalize((samples.float() - middle).flatten(1), dim=1)
    best = torch.full((len(images), len(samples)), -1.0)
    for o in orientations:
        x = F.normalize((augment(images.float(), o) - middle).flatten(1), dim=1)
        best = torch.maximum(best, x @ y.T)
    return best


def plant(client: Client, image: Tensor, c: int, device: int) -> Client:
    """The hospital with one more image (1, C, H, W), said to be of class c, in a group of its own."""
    return Client.joined([client, Client(image, *torch.tensor([[c], [device], [-1]]))])


def _look_for(image: Tensor, free: Tensor, samples: Tensor, copy: float, orientations) -> tuple[dict, Tensor]:
    """Is a sample nearer than `copy`? Is the image more like a sample than 99 % of the `free` ones are like any? Which?"""
    found = {"distance": np.inf, "copy": copy, "recovered": False, "noticed": False, "samples": len(samples)}
    if not len(samples):
        return found, torch.zeros_like(image)
    alike = resemblance(torch.cat([image, free]), samples, orientations)
    most, found["distance"] = alike.max(1)[0], float(distances(image, samples, orientations).min())
    found |= {"recovered": found["distance"] < copy, "noticed": bool(most[0] > most[1:].quantile(0.99))}
    return found, samples[alike[0].argmax()][None]


@one_thread()
def canaries(clients, outside: Client, agreed: Plan, seed: int, how: Sharing, *, number=10):
    """Plant one canary at a time in the smallest cells that are shared under a plan, and look for it in the upload.

    *Recovered*: the nearest sample is as good as a copy. Only 1 % of unseen images of the cell come so near to an image at
    the source. *Noticed* asks for much less (the exposure of Carlini et al. 2019, arXiv 1802.08232): the canary is more
    like a sample than 99 % of 500 mosaics that were not planted are like any. Without a leak that happens to one canary
    in a hundred, by chance.

    A DataFrame, a row per canary: source, class, device, held, distance (of the nearest sample, grey levels), copy
    (below this distance it is recovered), recovered, noticed, samples; the canaries; and the samples most like them.
    """
    cells = sorted((len(_rows(clients[k], c, d)), k, c, d) for k, c, d in np.argwhere(agreed.upload).tolist())
    if not cells:
        raise ValueError("nothing is shared under this plan, so there is no cell to plant a canary in")
    clients, outside = [small(client) for client in clients], small(outside)
    rows, planted, nearest = [], [], []
    for i, (held, k, c, d) in zip(range(number), cycle(cells)):
        own, unseen = clients[k].images[_rows(clients[k], c, d)], outside.images[_rows(outside, c, d)]
        orientations, random = plausible_orientations(clients[k].images), rng(seed, "canary", k, i)
        near = distances(unseen, own, orientations).min(1)[0] if len(unseen) else apart(own, orientations)
        image, free = canary(own.shape[1:], random), canary(own.shape[1:], random, 500)
        wanted = np.zeros_like(agreed.upload[k])
        wanted[c, d] = agreed.upload[k, c, d]
        upload, _ = synthesise(plant(clients[k], image, c, d), wanted, k, seed, how)
        found, best = _look_for(image, free, upload.images, float(near.quantile(0.01)), orientations)
        rows.append(dict(zip(CELL, (k, c, d))) | {"held": held} | found)
        planted.append(image)
        nearest.append(best)
    return pd.DataFrame(rows), torch.cat(planted), torch.cat(nearest)


def taught(pool: Pool, federation: partition.Federation, seed: int, steps: int = 200) -> np.ndarray:
    """What samples teach: recall of each class (C,) on real test images, after `steps` of training on samples alone."""
    sizes = len(federation.classes), len(federation.devices)
    net = SmallCNN(pool.images.shape[1], sizes[0], seed)
    pool = replace(pool, images=resized(pool.images, federation.test.images.shape[-1]))
    weights = server.pretrain(net, pool, steps, seed)
    return metrics.recall(evaluate(net, weights, federation.test, *sizes).sum(0))


@one_thread()
def _trial(packed: bytes) -> dict[str, float]:
    job, how, steps, most = pickle.loads(packed)  # from the parent process
    federation = runs.federation_of(job)
    shared = server.share(federation, how, job.seed)
    table = membership(federation.clients, federation.test, shared.pool, seed=job.seed, most=most)
    asked = steps and len(shared.pool)
    found = {"taught": np.nanmean(taught(shared.pool, federation, job.seed, steps)) if asked else np.nan}
    found |= {"samples": len(shared.pool), "rejected": shared.rejected.sum()}
    return found | {"bytes": shared.costs["bytes_samples_up"]} | attack_summary(table)


def trials(jobs: list[runs.Job], ways: dict[str, Sharing], workers=2, steps=200, most=100) -> pd.DataFrame:
    """Every way of sharing with every job's hospitals, in parallel processes: a row each, indexed by (setting, seed).

    taught (mean recall after `steps` on samples alone; NaN without), samples, rejected, bytes, and `attack_summary`.
    """
    places = [(name, job.seed) for name in ways for job in jobs]
    work = [cloudpickle.dumps((job, how, steps, most)) for how in ways.values() for job in jobs]
    if (workers := runs.possible(workers)) == 1:
        found = list(map(_trial, work))
    else:
        with ProcessPoolExecutor(workers, runs.processes()) as pool:
            found = list(pool.map(_trial, work))
    return pd.DataFrame(found, index=pd.MultiIndex.from_tuples(places, names=["setting", "seed"]))
