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
FEATURES = 32  # principal components that `odd_sources` looks at
EXPECTED = 6.0  # a source is judged where an honest one would agree by this many standard deviations
AGREEING = 0.2  # ... and refused where it agrees by less than this part of that


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
        sent = f"{update.dtype} of shape {tuple(update.shape)}" if isinstance(update, torch.Tensor) else type(update).__name__
        return (f"sent {sent} for weights, needed is {like.dtype} of shape {tuple(like.shape)}; "
                "it must use the model that all agreed on")
    if not torch.isfinite(update).all():
        return "sent weights that are not finite; its training diverged (lower the learning rate) or the upload is damaged"
    if isinstance(images, bool) or not isinstance(images, numbers.Integral) or images < 1:
        return f"says that it trained on {images!r} images; the number must be whole and above 0"
    if images != reported:
        return f"says that it trained on {images} images but reported {reported}; it must report again before it takes part"
    return ""


def byte_budget(number: int, shape: tuple[int, int, int]) -> float:
    """The most bytes that `number` packed images of shape (C, H, W) may take (see `sharing.packed`).

    Packed without loss, samples take 0.31 to 0.45 of their raw bytes (real colour images up to 0.50, grey ones up to 0.72)
    at 28 pixels and less at more; uniform noise takes all of them, Gaussian noise of 30 grey levels 0.87.
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

    for name, part, kind, needed in (("images", images, torch.uint8, tuple(shape)), ("labels", labels, torch.int64, ()),
                                     ("devices", device, torch.int64, ())):
        if not isinstance(part, torch.Tensor) or part.dtype != kind or part.ndim < 1 or part.shape[1:] != needed:
            sent = f"{part.dtype} of shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
            return f"sent {sent} for {name}; needed is {kind} of shape {('n', *needed)}".replace("'", "")
    if not len(images) == len(labels) == len(device):
        return f"sent {len(images)} images, {len(labels)} labels and {len(device)} devices; each image needs one of both"
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
        return (f"sent {size:.0f} bytes for {len(images)} images, allowed are {most:.0f}; images pack well and noise does "
                "not, so it must look at its samples")
    return ""


def smoothness(images: torch.Tensor) -> float:
    """Mean correlation of neighbouring pixels, -1..1, of uint8 images (N, C, H, W): noise 0, images here 0.88 to 0.98."""
    x = images.float() - images.float().mean((2, 3), keepdim=True)
    steps = torch.stack([(x[..., 1:] - x[..., :-1]).square().mean((1, 2, 3)),
                         (x[..., 1:, :] - x[..., :-1, :]).square().mean((1, 2, 3))]).mean(0)
    spread = x.square().mean((1, 2, 3))
    return float(torch.where(spread > 0, 1 - steps / (2 * spread), 0).mean())


def _features(images: torch.Tensor) -> torch.Tensor:
    """The first `FEATURES` principal components, float64 (N, q), of the images at 7 x 7 pixels."""
    x = F.adaptive_avg_pool2d(images.float() / 255, 7).flatten(1)
    x = x - x.mean(0)
    return (x @ torch.linalg.eigh(x.T @ x / len(x))[1][:, -FEATURES:]).double()


def _centred(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """x (N, q) less the mean of its group: what a device or a hospital does to all its images alike is gone."""
    number = torch.bincount(group)
    return x - (x.new_zeros(len(number), x.shape[1]).index_add_(0, group, x) / number.clamp(min=1)[:, None])[group]


def agreement(pool, classes: int) -> dict[int, tuple[float, float]]:
    """How far each source's labels agree with its images, judged by the others' samples: (found, expected).

    The judge of source k is a ridge classifier W on principal components x, fitted to the other sources' samples and
    one-hot labels d, everything centred within each (source, device): another device, another offset, so that a
    hospital is judged by how its classes differ from each other and not by how its images differ from other hospitals'.

        found = sum_i (x_i W) . d_i / sd,   expected = sum_i (d_i M W) . d_i / sd

    sd is the deviation of the sum when the source's labels are shuffled at random (a permutation test), M the others'
    class means. So honest labels find what is expected, or a good part of it; random labels, or labels of images that
    are none, 0 with standard deviation 1.

    A source whose samples are of one class per device, which cannot be judged, is left out.
    """
    devices, x = int(pool.device.max()) + 1, _features(pool.images)
    group = pool.source * devices + pool.device
    weight = torch.bincount(pool.labels, minlength=classes).clamp(min=1).double().rsqrt()  # rare classes count as well
    d = _centred(F.one_hot(pool.labels, classes).double(), group)
    x, sources = _centred(x, group), pool.source.unique().tolist()
    sums = {k: (x[m].T @ x[m], x[m].T @ d[m], d[m].T @ d[m]) for k in sources if (m := pool.source == k) is not None}
    total = [sum(parts) for parts in zip(*sums.values())]
    result = {}
    for k in sources:
        xx, xd, dd = (whole - own for whole, own in zip(total, sums[k]))
        judge = torch.linalg.solve(xx + (0.1 * xx.diagonal().mean() + 1e-9) * torch.eye(len(xx)), xd) * weight
        means = torch.linalg.solve(dd + 5 * torch.eye(classes), xd.T)  # 5: a class of few samples says little
        found, expected, variance = 0.0, 0.0, 0.0
        for g in group[pool.source == k].unique():
            rows = group == g
            score = (x[rows] @ judge) @ (d[rows] * weight).T
            found += float(score.trace())
            expected += float(((d[rows] @ means @ judge) * (d[rows] * weight)).sum())
            variance += float(score.square().sum()) / max(len(score) - 1, 1)
        if expected > 1e-9:
            result[k] = (found, expected) if variance == 0 else (found / variance ** 0.5, expected / variance ** 0.5)
    return result


def odd_sources(pool, classes: int) -> dict[int, str]:
    """Sources of a `sharing.Pool` whose samples disagree with everybody else's, each with the reason.

    Two questions: do neighbouring pixels go together as in the others' images (`smoothness`: at least half of their
    median), and do labels and images go together as in the others' (`agreement`)? The worst source goes first and the
    others are judged again without it, as its samples were part of their judge. With fewer than three sources nobody
    can say who is the odd one. A source with few samples, or with one class only, is not judged by its labels.
    """
    odd = {}
    rough = {k: smoothness(pool.images[pool.source == k]) for k in pool.source.unique().tolist()}
    if len(rough) >= 3:
        for k, value in rough.items():
            usual = float(np.median([v for j, v in rough.items() if j != k]))
            if value < usual / 2:
                odd[k] = (f"its samples look like no image: neighbouring pixels correlate by {value:.2f}, the others' by "
                          f"{usual:.2f}; it must look at its samples")
    while True:
        rest = ~torch.isin(pool.source, torch.tensor(list(odd), dtype=torch.int64))
        if len(pool.source[rest].unique()) < 3:
            return odd
        left = type(pool)(*(part[rest] for part in vars(pool).values()))
        short = {k: AGREEING * expected - found for k, (found, expected) in agreement(left, classes).items()
                 if expected >= EXPECTED}
        worst = max(short, key=short.get, default=None)
        if worst is None or short[worst] <= 0:
            return odd
        found, expected = agreement(left, classes)[worst]
        odd[worst] = (f"its labels do not go with its images as the others' do: agreement {found:.1f}, expected "
                      f"{expected:.1f} (random labels: 0, give or take 1); it must check its labels and samples")
