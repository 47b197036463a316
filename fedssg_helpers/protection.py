"""Protection at the source, before any sample leaves a hospital; images uint8 (N, C, H, H), cells int64 (N,)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import require
from .generator import MINIMUM
from .keys import one_thread
from .models import augment, plausible_orientations

REDRAWS = 5  # how often a hospital draws rejected samples again before it uploads fewer
TWINS = 0.6  # images nearer than this fraction of the usual nearest distance count as pictures of one lesion


@dataclass(frozen=True)
class Protection:
    """What a hospital does against leaks; a field at 0: nothing.

    `reject`, 0..1 (1 excluded): samples that come nearer to one of the hospital's own images of the cell than this
    fraction of unseen images would (see `limits`) are drawn again, `REDRAWS` times at most, then left out.
    `noise`, >= 0: standard deviation of pixel noise on the samples, in grey levels. Without it all samples lie in one
    subspace of few dimensions, which says more about the training images than any sample does (`privacy.subspace`).
    `outlier`, >= 0: images whose nearest other image of the cell is more than this many times as far away as usual are
    not learnt from (see `inliers`), because they would show in the samples.
    """

    reject: float = 0.0
    noise: float = 0.0
    outlier: float = 0.0

    def __post_init__(self):
        require(0 <= self.reject < 1, "reject", self.reject, "a fraction of unseen images: 0..1, without 1")
        require(0 <= self.noise < np.inf, "noise", self.noise, "0 or more")
        require(0 <= self.outlier < np.inf, "outlier", self.outlier, "0 or more")


@one_thread()
def distances(images: Tensor, others: Tensor, orientations=range(8)) -> Tensor:
    """Root mean squared difference of each image to each other one, in its best orientation: grey levels, (N, M)."""
    x, y = images.float(), others.float().flatten(1)
    best = torch.full((len(x), len(y)), torch.inf)
    for o in orientations:  # by matrix product: hundreds of times faster than the difference of every pair
        best = torch.minimum(best, torch.cdist(augment(x, o).flatten(1), y))
    return best / max(y.shape[1], 1) ** 0.5


def apart(images: Tensor, orientations=None, most: int = 200) -> Tensor:
    """How far images of one cell are from the nearest *other* one, float32 (min(N, most),); N >= 2.

    That is how near held-out images would come, measured by leave-one-out. Pictures of one lesion would hide it, so
    pairs nearer than `TWINS` times the median are passed over. Of large cells, `most` images are measured.
    """
    require(len(images) > 1, "the number of images of a cell", len(images), "2 or more")
    rows = torch.linspace(0, len(images) - 1, min(most, len(images))).long()
    far = distances(images[rows], images, orientations or plausible_orientations(images))
    far[torch.arange(len(rows)), rows] = torch.inf
    return far.masked_fill(far < TWINS * far.min(1)[0].median(), torch.inf).min(1)[0]


def limits(images: Tensor, cells: Tensor, reject: float, orientations=None, few=40) -> dict[int, float]:
    """How near to a hospital's own images of a cell a sample may come, in grey levels: quantile `reject` of `apart`.

    A cell of fewer than `few` images has no reliable fifth percentile: it takes the hospital's pooled one, in units of
    each cell's median. Cells with fewer than `MINIMUM` images are left out.
    """
    orientations = orientations or plausible_orientations(images)
    numbers = torch.bincount(cells).tolist()
    own = {c: apart(images[cells == c], orientations) for c, n in enumerate(numbers) if n >= MINIMUM}
    pooled = float(torch.cat([a / a.median() for a in own.values()]).quantile(reject)) if own else 0.0
    alone = {c: numbers[c] >= few for c in own}
    return {c: float(a.quantile(reject) if alone[c] else a.median() * pooled) for c, a in own.items()}


def inliers(images: Tensor, cells: Tensor, outlier: float, orientations=None, sample=200) -> Tensor:
    """Which images (N,), bool, are like others of their cell: the nearest is at most `outlier` times as far as usual.

    Usual is the median of the cell; each image is compared with `sample` others. A generator learns axes of its own
    for an image that is like no other, so this image would show in the samples.
    """
    orientations = orientations or plausible_orientations(images)
    keep = torch.ones(len(images), dtype=torch.bool)
    for c in torch.nonzero(torch.bincount(cells) >= MINIMUM)[:, 0].tolist():
        rows = torch.nonzero(cells == c)[:, 0]
        some = torch.linspace(0, len(rows) - 1, min(sample, len(rows))).long()
        far = distances(images[rows], images[rows[some]], orientations)
        far[some, torch.arange(len(some))] = torch.inf
        nearest = far.min(1)[0]
        keep[rows] = nearest <= outlier * nearest.median()
    return keep


def redraw(drawn: Tensor, own: Tensor, limit: float, orientations: list[int], again) -> tuple[Tensor, int]:
    """Samples at least `limit` from every image of `own`, filled up by ``again(number)``; and how many were rejected."""
    kept, rejected, number = [], 0, len(drawn)
    for _ in range(REDRAWS + 1):
        far = (distances(drawn, own, orientations) >= limit).all(1)
        kept.append(drawn[far])
        rejected += int((~far).sum())
        if (missing := number - sum(map(len, kept))) == 0:
            break
        drawn = again(missing)
    return torch.cat(kept), rejected


def add_noise(samples: Tensor, noise: float, random: np.random.Generator) -> Tensor:
    """The samples with normal pixel noise of `noise` grey levels, rounded and clipped to uint8."""
    normal = torch.from_numpy(random.standard_normal(samples.shape, dtype=np.float32))
    return (samples + noise * normal).round().clamp(0, 255).to(torch.uint8)
