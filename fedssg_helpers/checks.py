"""What the server checks before it uses what came back: weights, samples, and sources that disagree with all others.

A check answers with a reason that names cause and cure, or with "" where all is well, and never raises for what a
client sent: a bad upload is left out and the run goes on. The checks read no image of any hospital. They find faults
and clumsy attacks; a client that sends plausible nonsense with care passes (then a robust aggregate bounds the harm).
"""
from __future__ import annotations

import math
import numbers

import numpy as np
import torch
from torch.nn import functional as F

PACKED_SHARE = 0.85  # of the raw bytes: what a packed upload may take, see `byte_budget`
PACKED_EXTRA = 400  # bytes on top for every started hundred images: the pictures' heads
FEWEST = 8  # a source of so many samples is judged by its images
STRANGE = 0.25  # ... and refused where it is stranger than this and three times the median, see `strangeness`
EXPECTED = 5.0  # a source is judged by its labels where an honest one would agree by this many standard deviations
AGREEING = 0.25  # ... and refused where it agrees by less than this part of that
ALONE = 2.5  # ... less so many standard deviations, where nobody else has its device


def weights_refusal(update, like: torch.Tensor, images, reported: int) -> str:
    """Why the server refuses a client's update; "" where it is fine.

    Parameters
    ----------
    update
        What the client sent as its weights.
    like : float32 tensor (P,)
        Weights of the agreed model.
    images
        The number of images that the client says its update comes from.
    reported : int
        The number it reported before the first round: its weight in the aggregate.
    """
    if not isinstance(update, torch.Tensor) or update.shape != like.shape or update.dtype != like.dtype:
        return f"sent {_kind(update)} for weights, needed is {_kind(like)}; it must use the model that all agreed on"
    if not torch.isfinite(update).all():
        return ("sent weights that are not finite; its training diverged (lower the learning rate) or the upload is "
                "damaged")
    if isinstance(images, bool) or not isinstance(images, numbers.Integral) or images < 1:
        return f"says that it trained on {images!r} images; the number must be whole and above 0"
    if images != reported:
        return f"says that it trained on {images} images but reported {reported}; it must report again first"
    return ""


def _kind(value) -> str:
    """A tensor's dtype and shape in words, or the type of what is no tensor."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def byte_budget(number: int, shape: tuple[int, int, int]) -> float:
    """The most bytes that `number` packed images of shape (C, H, W) may take (see `sharing.packed`).

    Set so that images and samples of small size pass with room to spare and noise does not, which packing without loss
    cannot shorten (`tests/test_checks.py`).
    """
    return PACKED_SHARE * number * math.prod(shape) + PACKED_EXTRA * math.ceil(number / 100)


def samples_refusal(images, labels, device, offer: np.ndarray, shape: tuple[int, int, int],
                    most_bytes: float | None = None) -> str:
    """Why the server refuses a hospital's upload of samples; "" where it is fine.

    Parameters
    ----------
    images, labels, device
        The upload; needed are uint8 (n, C, H, W), int64 (n,) and int64 (n,).
    offer : int array (C, D)
        What the plan asked of this hospital. Nothing is asked of a class it does not own (see `sharing.plan`), so a
        hospital that sends samples of one is refused.
    shape : tuple
        (C, H, W) that the federation agreed on.
    most_bytes : float, optional
        The most that the packed images may take; None: `byte_budget`.
    """
    from .sharing import size_of  # here, because sharing uses these checks

    for name, part, like in (("images", images, torch.empty(0, *shape, dtype=torch.uint8)),
                             ("labels", labels, torch.empty(0, dtype=torch.int64)),
                             ("devices", device, torch.empty(0, dtype=torch.int64))):
        if not (isinstance(part, torch.Tensor) and part.ndim and part.dtype == like.dtype
                and part.shape[1:] == like.shape[1:]):
            return f"sent {_kind(part)} for {name}; needed is {_kind(like)}, with the number of its samples for 0"
    if not len(images) == len(labels) == len(device):
        return (f"sent {len(images)} images, {len(labels)} labels and {len(device)} devices; each image needs one of "
                "both")
    if not len(images):
        return ""
    for name, part, end in (("labels", labels, offer.shape[0]), ("devices", device, offer.shape[1])):
        if not 0 <= int(part.min()) <= int(part.max()) < end:
            return (f"sent {name} from {int(part.min())} to {int(part.max())}; known are 0 to {end - 1}, "
                    "in the order of names that all agreed on")
    sent = torch.bincount(labels * offer.shape[1] + device, minlength=offer.size).numpy().reshape(offer.shape)
    if (sent > offer).any():
        c, d = np.argwhere(sent > offer)[0]
        return (f"sent {sent[c, d]} samples of class {c} from device {d} but {offer[c, d]} were asked of it; "
                "it must send what the plan says, of classes that it reported")
    most, size = byte_budget(len(images), shape) if most_bytes is None else most_bytes, size_of(images)
    if size > most:
        return (f"sent {size:.0f} bytes for {len(images)} images, allowed are {most:.0f}; images pack well and noise "
                "does not, so it must look at its samples")
    return ""


def _features(pool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images at 7 x 7 pixels, float64 (N, q), and their group (N,): all samples of one (source, device).

    Each group's mean is taken off: what a device or a hospital does to all its images alike is gone. So coarse
    because that is where classes differ on every device; finer, devices differ more.
    """
    group = pool.source * (int(pool.device.max()) + 1) + pool.device
    return _centred(F.adaptive_avg_pool2d(pool.images.float() / 255, 7).flatten(1).double(), group), group


def _centred(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """x (N, q) less the mean of its group."""
    number = torch.bincount(group)
    return x - (x.new_zeros(len(number), x.shape[1]).index_add_(0, group, x) / number.clamp(min=1)[:, None])[group]


def strangeness(pool) -> dict[int, float]:
    """Part of the variation of each source's images, 0..1, that the others' main ways to vary do not express.

    The main ways: the first quarter of the principal components of the other sources' images. Noise about 0.75, all
    images alike 1; honest hospitals of any device 0.01 to 0.04 (colour) and 0.06 to 0.20 (grey, fewer components).
    """
    x, _ = _features(pool)
    spread = {k: x[pool.source == k].T @ x[pool.source == k] for k in pool.source.unique().tolist()}
    total, result = sum(spread.values()), {}
    for k, own in spread.items():
        main = torch.linalg.eigh(total - own)[1][:, -(x.shape[1] // 4):]
        result[k] = 1 - float((main.T @ own @ main).trace() / own.trace().clamp(min=1e-9))
    return result


def agreement(pool, classes: int) -> dict[int, tuple[float, float]]:
    """How far each source's labels agree with its images, judged by the others' samples: (found, expected).

    The judge of source k is a ridge classifier W from principal components x to one-hot labels d, fitted to the other
    sources' samples, everything centred within each (source, device): another device is another offset, so a hospital
    is judged by how its classes differ from each other and not by how its images differ from other hospitals'.

        found = sum_i (x_i W) . d_i / sd,   expected = sum_i (d_i M W) . d_i / sd

    sd is the deviation of the sum when the source's labels are shuffled at random (a permutation test), M the others'
    class means. So honest labels find what is expected, or a good part of it; random labels, or labels of images that
    are none, 0 with standard deviation 1. Half of the others' samples gives W and the other half M, and the other way
    round: from the same samples, chance alone would make both agree.

    A source with one class per device, which cannot be judged, is left out.
    """
    (x, group), half = _features(pool), torch.arange(len(pool)) % 2
    x = x @ torch.linalg.eigh(x.T @ x)[1][:, -32:]
    weight = torch.bincount(pool.labels, minlength=classes).clamp(min=1).double().rsqrt()  # rare classes count too
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
            result[k] = (found / max(variance, 1e-12) ** 0.5, expected / max(variance, 1e-12) ** 0.5)
    return result


def odd_sources(pool, classes: int) -> dict[int, str]:
    """Sources of a `sharing.Pool` whose samples disagree with everybody else's, each with the reason.

    Two questions: do its images vary as the others' do (`strangeness`), and do labels and images go together as with
    the others (`agreement`)? The worst source goes first and the others are judged again without it, as its samples
    were part of what they were compared with. With fewer than three sources nobody can say who is the odd one. A
    source with few samples, or with one class only, is not judged by its labels.
    """
    odd = {}
    while True:
        rest = ~torch.isin(pool.source, torch.tensor(list(odd), dtype=torch.int64))
        left = type(pool)(*(part[rest] for part in vars(pool).values()))
        if len(left.source.unique()) < 3:
            return odd
        doubts = _strange(left) or _disagreeing(left, classes)
        if not doubts:
            return odd
        worst = max(doubts)
        odd[worst[1]] = worst[2]


def _strange(pool) -> list[tuple[float, int, str]]:
    """Sources that look like no image: (how strange, which, reason)."""
    part = {k: value for k, value in strangeness(pool).items() if (pool.source == k).sum() >= FEWEST}
    usual = float(np.median(list(part.values()))) if part else 0.0
    return [(value, k, f"its samples look like none of the others' images: {value:.0%} of their variation is not "
             f"found there (usual: {usual:.0%}); it must look at its samples")
            for k, value in part.items() if value > max(STRANGE, 3 * usual)]


def _disagreeing(pool, classes: int) -> list[tuple[float, int, str]]:
    """The source whose labels go least with its images, where that is too little: [(how much, which, reason)].

    Where nobody else has a source's device, nobody knows how classes look there: such a source gets the benefit of
    the doubt, `ALONE` standard deviations of it. Where it is the most doubtful one, all others get it too, as it
    may be the one that they disagree with.
    """
    owners, agreed = set(zip(pool.source.tolist(), pool.device.tolist())), agreement(pool, classes)
    devices = [d for _, d in owners]
    alone = {k for k, d in owners if devices.count(d) == 1}
    lacking = {k: AGREEING * expected - found for k, (found, expected) in agreed.items() if expected >= EXPECTED}
    worst = max(lacking, key=lacking.get, default=None)
    if worst is None or lacking[worst] <= ALONE * (worst in alone):
        return []
    found, expected = agreed[worst]
    return [(lacking[worst], worst, f"its labels do not go with its images as the others' do: agreement {found:.1f}, "
             f"expected {expected:.1f} (random labels: 0, give or take 1); it must check both")]
