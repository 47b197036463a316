"""What the server checks before it uses what came: weights, samples, and sources that disagree with all others.

A check returns a reason that names cause and cure, or "" where all is well; it never raises for what a hospital sent.
Checks read no image of any hospital. They find faults and simple attacks; careful, plausible attacks pass (then a
robust aggregate bounds the harm).
"""

from __future__ import annotations

import math
import numbers

import numpy as np
import torch
from torch.nn import functional as F

from .sharing import Pool, unpacked

FEWEST = 8  # a source with fewer samples is not judged by its images
STRANGE = 0.25  # a source is refused where its `strangeness` is above this and three times the median
EXPECTED = 6.0  # a source is judged by its labels where an honest one would agree by so many deviations
AGREEING = 0.25  # ... and refused where it agrees by less than this fraction of that
ALONE = 2.5  # ... less so many standard deviations, where nobody else has its device


def weights_refusal(update, like: torch.Tensor, images, reported: int) -> str:
    """Why the server refuses what a hospital sent as its weights; "" where it is fine.

    `like` (P,) are the agreed model's weights; `images` is the number of images that the hospital says its update comes
    from, `reported` the number it reported before the first round: its weight in the aggregate.
    """
    if not isinstance(update, torch.Tensor) or update.shape != like.shape or update.dtype != like.dtype:
        cure = "it must use the model that all agreed on"
        return f"sent {_kind(update)} for weights, needed is {_kind(like)}; {cure}"
    if not torch.isfinite(update).all():
        cause = "its training diverged (lower the learning rate) or the upload is damaged"
        return f"sent weights that are not finite; {cause}"
    if isinstance(images, bool) or not isinstance(images, numbers.Integral) or images < 1:
        return f"says that it trained on {images!r} images; the number must be whole and above 0"
    if images != reported:
        return f"says that it trained on {images} images but reported {reported}; it must report again first"
    return ""


def _kind(value) -> str:
    """A tensor's dtype and shape in words, or the type of something else."""
    tensor = isinstance(value, torch.Tensor)
    return f"{value.dtype} of shape {tuple(value.shape)}" if tensor else type(value).__name__


def misfit(answer: dict, **needed) -> str:
    """Why an answer lacks what is needed, by name: a tensor like the given one, or a number >= 0; "" if it is there."""
    for name, like in needed.items():
        part, wanted = answer.get(name), "a number, 0 or more"
        good = isinstance(part, int | float) and 0 <= part < math.inf
        if isinstance(like, torch.Tensor):
            good, wanted = _kind(part) == _kind(like), _kind(like)
        if not good:
            return f"sent {_kind(part)} for {name}; needed is {wanted}"
    return ""


def byte_budget(number: int, shape: tuple[int, int, int]) -> float:
    """The most bytes that `number` packed images (C, H, W) may take: samples stay well below, noise does not."""
    return 0.85 * number * math.prod(shape) + 400 * math.ceil(number / 100)


def opened(answer: dict, asked: np.ndarray, shape: tuple, any_size=False) -> tuple[tuple | None, str]:
    """A hospital's upload (images, labels, device) from its answer, or None and why the server refuses it.

    Needed are images uint8 (n, C, H, W), labels and device int64 (n,), packed small (`byte_budget`), and no more than
    `asked` (C, D) of any cell. Nothing is asked of a class that the hospital does not have.
    """
    pictures, labels, device = (answer.get(name) for name in ("pictures", "labels", "device"))
    for name, part in (("labels", labels), ("devices", device)):
        if not (isinstance(part, torch.Tensor) and part.ndim == 1 and part.dtype == torch.int64):
            return None, f"sent {_kind(part)} for {name}; needed is torch.int64 of shape (number of samples,)"
    if not isinstance(pictures, list) or not all(isinstance(picture, bytes) for picture in pictures):
        return None, f"sent {_kind(pictures)} for pictures; needed is a list of bytes"
    size, most = sum(map(len, pictures)), byte_budget(len(labels), shape)
    if size > most and not any_size:
        why = "images pack well and noise does not, so it must look at its samples"
        return None, f"sent {size:.0f} bytes for {len(labels)} images, allowed are {most:.0f}; {why}"
    try:
        images = unpacked(pictures, *shape[:2])
    except Exception as error:  # Pillow raises whatever a damaged picture makes it
        return None, f"sent pictures that cannot be read ({error})"
    why = _counts_refusal(images, labels, device, asked)
    return (None, why) if why else ((images, labels, device), "")


def _counts_refusal(images, labels, device, asked: np.ndarray) -> str:
    """Why the numbers of an upload do not fit, "" where they do."""
    if not len(images) == len(labels) == len(device):
        found = f"{len(images)} images, {len(labels)} labels and {len(device)} devices"
        return f"sent {found}; each image needs one of both"
    for name, part, end in (("labels", labels, asked.shape[0]), ("devices", device, asked.shape[1])):
        if len(part) and not 0 <= int(part.min()) <= int(part.max()) < end:
            known = f"known are 0 to {end - 1}, in the order of names that all agreed on"
            return f"sent {name} from {int(part.min())} to {int(part.max())}; {known}"
    sent = torch.bincount(labels * asked.shape[1] + device, minlength=asked.size).numpy().reshape(asked.shape)
    if (sent > asked).any():
        c, d = np.argwhere(sent > asked)[0]
        cure = "it must send what the plan says, of classes that it reported"
        return f"sent {sent[c, d]} samples of class {c} from device {d} but {asked[c, d]} were asked of it; {cure}"
    return ""


def _features(pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images at 7 x 7 pixels, float64 (N, q), less the mean of their group (N,): samples of one source and device.

    Coarse, because classes differ there on every device; finer details differ more between devices.
    """
    group = pool.source * (max(pool.device.tolist(), default=0) + 1) + pool.device
    return _centred(F.adaptive_avg_pool2d(pool.images.float() / 255, 7).flatten(1).double(), group), group


def _centred(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """x (N, q) less the mean of its group."""
    number = torch.bincount(group)
    sums = x.new_zeros(len(number), x.shape[1]).index_add_(0, group, x)
    return x - (sums / number.clamp(min=1)[:, None])[group]


def strangeness(pool: Pool) -> dict[int, float]:
    """Fraction of each source's variation, 0..1, that the others' main principal components do not express.

    The main ones are the first quarter. Noise about 0.75, all images alike 1; honest hospitals 0.01 to 0.20.
    """
    x, _ = _features(pool)
    spread = {k: x[pool.source == k].T @ x[pool.source == k] for k in pool.source.unique().tolist()}
    total, result = sum(spread.values()), {}
    for k, own in spread.items():
        main = torch.linalg.eigh(total - own)[1][:, -(x.shape[1] // 4) :]
        result[k] = 1 - float((main.T @ own @ main).trace() / own.trace().clamp(min=1e-9))
    return result


def agreement(pool: Pool, classes: int) -> dict[int, tuple[float, float]]:
    """How far each source's labels agree with its images, judged by the others' samples: (found, expected).

    The judge W of source k is a ridge classifier from principal components x to one-hot labels d, fitted to the other
    sources' samples, all centred within each (source, device); M are the others' class means:

        found = sum_i (x_i W) . d_i / sd,   expected = sum_i (d_i M W) . d_i / sd

    sd is the deviation of the sum when labels are shuffled (a permutation test): random labels find 0, give or take 1.
    One half of the others' samples gives W, the other half M, and the other way round: from the same samples, chance
    alone would make both agree. A source with one class per device cannot be judged and is left out.
    """
    (x, group), half = _features(pool), torch.arange(len(pool)) % 2
    x = x @ torch.linalg.eigh(x.T @ x)[1][:, -32:]
    number = torch.bincount(pool.labels, minlength=classes).clamp(min=1)
    weight = number.double().rsqrt()  # rare classes count too
    d = _centred(F.one_hot(pool.labels, classes).double(), group)
    result = {}
    for k in pool.source.unique().tolist():
        judges, means = [], []
        for h in (0, 1):
            others = (pool.source != k) & (half == h)
            xx, xd, dd = x[others].T @ x[others], x[others].T @ d[others], d[others].T @ d[others]
            ridge = 0.1 * xx.diagonal().mean() + 1e-9
            judges.append(torch.linalg.solve(xx + ridge * torch.eye(len(xx)), xd) * weight)
            means.append(torch.linalg.solve(dd + 3 * torch.eye(classes), xd.T))  # 3: few samples say little
        judge, likely = (judges[0] + judges[1]) / 2, (means[0] @ judges[1] + means[1] @ judges[0]) / 2
        found, expected, variance = 0.0, 0.0, 0.0
        for g in group[pool.source == k].unique():
            rows = group == g
            score, claim = x[rows] @ judge, d[rows] * weight
            found += float((score * claim).sum())
            expected += float((d[rows] @ likely * claim).sum())
            variance += float((score @ claim.T).square().sum()) / max(len(claim) - 1, 1)
        if expected > 1e-9:
            deviation = max(variance, 1e-12) ** 0.5
            result[k] = (found / deviation, expected / deviation)
    return result


def implausible_sources(pool: Pool, classes: int) -> dict[int, str]:
    """Sources of a pool whose samples disagree with everybody else's, each with the reason.

    The worst goes first, and the others are judged again without it. With fewer than three sources nobody is judged; a
    source with few samples, or with one class only, is not judged by its labels.
    """
    refused = {}
    while True:
        left = pool.take(~torch.isin(pool.source, torch.tensor(list(refused), dtype=torch.int64)))
        doubts = len(left.source.unique()) >= 3 and (_strange(left) or _disagreeing(left, classes))
        if not doubts:
            return refused
        _, worst, why = max(doubts)
        refused[worst] = why


def _strange(pool: Pool) -> list[tuple[float, int, str]]:
    """Sources that look like no image: (how strange, which, reason)."""
    found = {k: value for k, value in strangeness(pool).items() if (pool.source == k).sum() >= FEWEST}
    usual = float(np.median(list(found.values()))) if found else 0.0
    said = "its samples look like none of the others' images: {:.0%} of their variation is not found there"
    cure = f"(usual: {usual:.0%}); it must look at its samples"
    strange = {k: value for k, value in found.items() if value > max(STRANGE, 3 * usual)}
    return [(value, k, f"{said.format(value)} {cure}") for k, value in strange.items()]


def _disagreeing(pool: Pool, classes: int) -> list[tuple[float, int, str]]:
    """The source whose labels go least with its images, where that is too little: [(how much, which, reason)].

    Where nobody else has a source's device, nobody knows how classes look there: such a source gets the benefit of the
    doubt. Where it is the most doubtful one, all others get it too, as it may be the one that they disagree with.
    """
    owners, agreed = set(zip(pool.source.tolist(), pool.device.tolist())), agreement(pool, classes)
    devices = [d for _, d in owners]
    alone = {k for k, d in owners if devices.count(d) == 1}
    judged = {k: of for k, of in agreed.items() if of[1] >= EXPECTED}
    lacking = {k: AGREEING * expected - found for k, (found, expected) in judged.items()}
    worst = max(lacking, key=lacking.get, default=None)
    if worst is None or lacking[worst] <= ALONE * (worst in alone):
        return []
    found, expected = agreed[worst]
    why = f"agreement {found:.1f}, expected {expected:.1f} (random labels: 0, give or take 1); it must check both"
    return [(lacking[worst], worst, f"its labels do not go with its images as the others' do: {why}")]
