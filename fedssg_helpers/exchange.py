"""What happens before the rounds: reports, the plan, samples up and down, and the server's pre-training.

It asks through a *channel*, see `server`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import checks, sharing
from .client import train_local
from .errors import require
from .generator import SIDE
from .keys import rng
from .methods import AsIs, Balanced, Copies, Method, RealImages, Sharing
from .models import Flat, plausible_orientations, resized
from .partition import Client

SAMPLES = ("bytes_samples_up", "bytes_samples_down")
COSTS = ("train_seconds", "generator_seconds", "server_seconds", "bytes_up", "bytes_down", *SAMPLES)


@dataclass(frozen=True)
class Shared:
    """What an exchange leaves behind."""

    plan: sharing.Plan
    pool: sharing.Pool
    rows: dict[int, torch.Tensor]  # of the pool, for each hospital
    costs: dict[str, float]
    refused: dict[int, str]  # hospitals whose upload the server left out, and why
    rejected: np.ndarray  # samples held back at the source, int64 (K, C, D)


@dataclass(frozen=True)
class Reports:
    """What the server knows of its hospitals."""

    have: np.ndarray  # images, int64 (K, C, D)
    styles: torch.Tensor | None  # of the devices, where asked for
    shape: tuple[int, int, int]  # of an image
    testers: list[int]  # hospitals with test images


def gather_reports(channel, hospitals: int, styles: bool) -> Reports:
    """Ask all hospitals what they have. A ValueError where one does not answer or does not fit the others."""
    found = {}
    for k, answer, why in channel.ask("report", dict.fromkeys(range(hospitals), {"styles": styles})):
        require(not why, f"hospital {k}", why, "there, and able to report")
        found[k], first = answer, found.get(0, answer)
        for what in ("classes", "devices", "shape"):
            same = answer[what] == first[what]
            require(same, f"{what} of hospital {k}", answer[what], f"as at hospital 0: {first[what]}")
    have, shape = torch.stack([answer["have"] for answer in found.values()]).numpy(), tuple(found[0]["shape"])
    empty = np.flatnonzero(have.sum((1, 2)) == 0)
    require(not len(empty), f"hospital {empty[:1]}", "without images", "left out of the federation")
    looks = [answer["sums"] for answer in found.values() if styles]
    looks = sharing.styles(have, torch.stack(looks), shape[1] * shape[2]) if looks else None
    return Reports(have, looks, shape, [k for k, answer in found.items() if answer["tests"]])


def exchange(channel, reports: Reports, how: Sharing, seed: int) -> Shared:
    """Plan, ask every hospital for its samples, check them, and say who receives which of the pool."""
    agreed, costs = sharing.plan(reports.have, how.rule, how.budget), dict.fromkeys(COSTS, 0.0)
    shape = reports.shape[0], *(min(side, SIDE) for side in reports.shape[1:])  # of a sample: see `SIDE`
    none = torch.empty(0, *shape, dtype=torch.uint8), *torch.empty(2, 0, dtype=torch.int64)
    uploads, refused, rejected, sizes = {}, {}, np.zeros_like(agreed.want), {}
    oracle = isinstance(how.source, RealImages)  # a bound, not a protocol: its images are not judged
    asked = {k: dict(seed=seed, sharing=how, wanted=torch.from_numpy(x)) for k, x in enumerate(agreed.upload)}
    for k, answer, why in channel.ask("generate", asked):
        if answer:
            why = checks.misfit(answer, seconds=0, rejected=asked[k]["wanted"])
            if not why:
                uploads[k], why = checks.opened(answer, agreed.upload[k], shape, any_size=oracle)
        if why:
            refused[k], uploads[k] = why, none
        else:
            rejected[k], sizes[k] = answer["rejected"], sum(map(len, answer["pictures"]))
            costs["generator_seconds"] += answer["seconds"]
    if not oracle:
        refused |= checks.implausible_sources(sharing.Pool.of(uploads.values()), len(agreed.want[0]))
    pool = sharing.Pool.of([none if k in refused else upload for k, upload in uploads.items()])
    costs["bytes_samples_up"] = float(sum(size for k, size in sizes.items() if k not in refused))
    wishes = agreed.want
    if how.edit:
        pool, wishes = how.edit(pool, wishes, reports.have, reports.styles)
    rows = {k: sharing.distribute(wishes[k], pool, k, seed) for k in range(len(wishes))}
    return Shared(agreed, pool, rows, costs, refused, rejected)


def hand_out(channel, shared: Shared) -> list[tuple[int, int, str]]:
    """Send every hospital its rows of the pool, and count the bytes; returns who did not get them, and why."""
    contents = {}
    for k, rows in shared.rows.items():
        samples, began = shared.pool.take(rows), time.thread_time()
        pictures = sharing.packed(samples.images)
        shared.costs["server_seconds"] += time.thread_time() - began
        contents[k] = dict(pictures=pictures, labels=samples.labels, device=samples.device)
        shared.costs["bytes_samples_down"] += sum(map(len, pictures))
    return [(0, k, f"received nothing: {why}") for k, _, why in channel.ask("receive", contents) if why]


def pretrain(net: Flat, pool, steps: int, seed: int, lr=0.05, *, view=AsIs(), styles=None):
    """The server's own training of the first global weights (P,) on the pool: no real image, no hospital's step."""
    weights, images, labels = net.weights.clone(), pool.images.to(net.weights.device), pool.labels
    known = dict(method=Method(batches=Balanced(), view=view), styles=styles, steps=steps // 4, batch=64)
    known["orientations"] = plausible_orientations(pool.images)
    for part, rate in enumerate((lr, lr, 0.4 * lr, 0.1 * lr)):
        random = rng(seed, "pretrain", round=part)
        weights = train_local(net, weights, images, labels.to(images.device), lr=rate, random=random, **known)
    return weights


def before_the_rounds(channel, reports: Reports, method: Method, seed: int, net, styles, fresh: bool):
    """All before the rounds: first weights, costs, what was missed, and the pool where nothing else is trained on."""
    how, weights, pool = method.sharing, net.weights.clone(), None
    if isinstance(how, Copies):
        want = torch.from_numpy(sharing.plan(reports.have, how.rule, how.budget).want)
        list(channel.ask("receive", {k: dict(copies=want[k], seed=seed) for k in range(len(want))}))
    if not isinstance(how, Sharing):
        return weights, dict.fromkeys(COSTS, 0.0), [], None
    shared, began = exchange(channel, reports, how, seed), time.thread_time()
    missed = [(0, k, why) for k, why in sorted(shared.refused.items())]
    if how.pretrain_steps and len(shared.pool) and fresh:  # a hospital that is alone has no pool
        whole = replace(shared.pool, images=resized(shared.pool.images, reports.shape[1]))
        weights = pretrain(net, whole, how.pretrain_steps, seed, view=method.view, **styles)
    shared.costs["server_seconds"] = time.thread_time() - began
    if how.to == "hospitals":
        missed += hand_out(channel, shared)
    elif how.to == "server only":
        needed = "samples, so two hospitals that can generate any"
        require(len(shared.pool) > 0, "the pool that the server trains on", "empty", needed)
        pool = Client(resized(shared.pool.images, reports.shape[1]), shared.pool.labels, shared.pool.device)
    up, down = (shared.costs[name] for name in SAMPLES)
    return weights, shared.costs | {"bytes_up": up, "bytes_down": down}, missed, pool
