"""What each method changes against FedAvg (McMahan et al. 2017, arXiv 1602.05629): it is made of parts.

A part is a small frozen dataclass whose ``__call__`` is the algorithm; with every part at its default a method is
FedAvg. Your own part is a class or a function with the same arguments, in the same place (a gradient part derives from
`Plain`, a view from `AsIs`):

    loss(logits, labels, log_prior)               a scalar; log_prior (C,): log frequency of each class as drawn
    batches(labels, own, progress)                chance (N,) of each image to be drawn; None: each once per pass
    gradient(grad, weights, start, correction)    changes the gradient (P,) of a local step in place
    view(x, styles, random)                       scaled images as the network sees them while it trains
    server(updates, weights, memory)              new weights (P,); an update is (weights (P,), number of images)
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from . import sharing as strategy
from .described import describe as describe
from .dpmeans import DPMeans as DPMeans
from .dpsgd import DPSGD as DPSGD
from .errors import require
from .generator import ClosedForm
from .models import Backbone, normalise, scale
from .protection import Protection
from .sharing import Budget


def _callable(owner, names: str) -> None:
    for name in names.split():
        value = getattr(owner, name)
        good = callable(value) and not isinstance(value, type)
        require(good, name, value, "a part, or a function of your own with its arguments")


@dataclass(frozen=True)
class CrossEntropy:
    """The usual loss: FedAvg."""

    def __call__(self, logits, labels, log_prior):
        return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class LogitAdjusted:
    """Logit adjustment (Menon et al. 2021, arXiv 2007.07314, equation 10): training adds the log of the hospital's
    own class frequencies to the logits; the test uses plain logits. With equal frequencies it is FedAvg."""

    def __call__(self, logits, labels, log_prior):
        return F.cross_entropy(logits + log_prior, labels)


@dataclass(frozen=True)
class Shuffled:
    """Every image once per pass: FedAvg."""

    def __call__(self, labels, own, progress):
        return None


@dataclass(frozen=True)
class Balanced:
    """Balanced sampling: every class is drawn equally often. Where all are equally frequent it is FedAvg."""

    def __call__(self, labels, own, progress):
        chance = 1 / np.bincount(labels)[np.asarray(labels)]
        return chance / chance.sum()


@dataclass(frozen=True)
class Plain:
    """The gradient as it is: FedAvg. Other gradient parts derive from this one.

    A part with a memory also says what travels beside the weights (`sends`), the `correction` that a hospital makes
    of what it keeps (`home`) and what came, what it keeps and sends `after_round`, and how the server `gather`s it.
    """

    sends = ()

    def __call__(self, grad, weights, start, correction):
        pass

    def correction(self, home: dict, message: dict):
        return None

    def after_round(self, home: dict, start, end, distance: float, correction) -> dict:
        return {}

    def gather(self, memory: dict, answers: dict, hospitals: int) -> None:
        pass


@dataclass(frozen=True)
class Proximal(Plain):
    """FedProx (Li et al. 2020, arXiv 1812.06127): a pull mu/2 |w - w_start|^2 to where the round started; mu >= 0,
    and 0 is FedAvg."""

    mu: float

    def __post_init__(self):
        require(self.mu >= 0, "mu", self.mu, "0 or above")

    def __call__(self, grad, weights, start, correction):
        grad.add_(weights - start, alpha=self.mu)


@dataclass(frozen=True)
class Scaffold(Plain):
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, option II): each gradient is corrected by how the
    hospital's mean gradient of its last round, its control, differs from all hospitals'. Twice the bytes."""

    sends = ("control",)

    def __call__(self, grad, weights, start, correction):
        grad.add_(correction)

    def correction(self, home, message):
        return message["control"] - home.get("control", torch.zeros_like(message["control"]))

    def after_round(self, home, start, end, distance, correction):
        home["control"] = (start - end) / distance - correction
        return {"control": home["control"]}

    def gather(self, memory, answers, hospitals):
        memory.setdefault("controls", memory["weights"].new_zeros(hospitals, len(memory["weights"])))
        for k, answer in answers.items():
            memory["controls"][k] = answer["control"]
        memory["control"] = sum(memory["controls"]) / hospitals


@dataclass(frozen=True)
class AsIs:
    """Images as they are: FedAvg."""

    needs_styles = False

    def __call__(self, x, styles, random):
        return x

    def at_test(self, images, device, styles):
        return images


@dataclass(frozen=True)
class DeviceStyles(AsIs):
    """Each training image is normalised with mean and deviation of a random *device*, each test image with its own
    device's (FedRDN, arXiv 2306.09363, with devices for clients). With one device it is plain normalisation."""

    needs_styles = True

    def __call__(self, x, styles, random):
        device = torch.from_numpy(random.integers(len(styles), size=len(x)))
        return normalise(x, styles[device.to(styles.device)])

    def at_test(self, images, device, styles):
        return normalise(scale(images), styles.cpu()[device])


@dataclass(frozen=True)
class Mean:
    """FedAvg: the mean of the hospitals' weights, each weighted by its number of real images.

    Updates are summed as they arrive, so one sum is kept in memory. A ValueError for weights that are not finite, or none.
    """

    def __call__(self, updates, weights, memory):
        total, images = 0, 0
        for k, (update, number) in enumerate(updates):
            cure = "finite (lower the learning rate, or look whether the upload is damaged)"
            require(bool(torch.isfinite(update).all()), f"update {k}", "NaN or infinite", cure)
            total, images = total + update.double() * number, images + number
        require(images > 0, "the number of updates to average", 0, "at least 1")
        return (total / images).float()


@dataclass(frozen=True)
class Median:
    """Of each weight the median over hospitals, all alike (Yin et al. 2018, arXiv 1803.01498). Fewer than half of
    the hospitals cannot move it far; but hospitals that are few of their kind count for nothing."""

    def __call__(self, updates, weights, memory):
        return torch.stack([update for update, _ in updates]).quantile(0.5, 0)


@dataclass(frozen=True)
class Clipped:
    """Steps longer than the median step are shortened to it, then averaged (Sun et al. 2019, arXiv 1911.07963). With
    steps of equal length it is FedAvg."""

    def __call__(self, updates, weights, memory):
        updates = list(updates)
        length = torch.stack([(update - weights).norm() for update, _ in updates])
        keep = (length.quantile(0.5) / length.clamp(min=1e-12)).clamp(max=1)
        shorter = [(weights + c * (update - weights), number) for c, (update, number) in zip(keep, updates)]
        return Mean()(shorter, weights, memory)


@dataclass(frozen=True)
class Momentum:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): the server keeps a fraction of its last step; 0 is FedAvg."""

    beta: float
    inner: object = Mean()

    def __post_init__(self):
        require(0 <= self.beta < 1, "beta", self.beta, "in 0..1, without 1")

    def __call__(self, updates, weights, memory):
        mean = self.inner(updates, weights, memory)
        step = weights - mean
        memory["momentum_buffer"] = self.beta * memory.get("momentum_buffer", torch.zeros_like(step)) + step
        return weights - memory["momentum_buffer"] if self.beta else mean


@dataclass(frozen=True)
class RealImages:
    """The oracle's source, which no privacy rule allows: real images are uploaded in place of samples."""


@dataclass(frozen=True)
class Copies:
    """Duplication, the control without exchange: a hospital repeats its *own* images, as often as the rule says."""

    rule: object = strategy.class_and_device
    budget: Budget = Budget()

    def __post_init__(self):
        _callable(self, "rule")


@dataclass(frozen=True)
class Sharing:
    """Synthetic samples are exchanged, once, before the rounds.

    A source learns from a hospital's images: ``source(images, labels, cells, random, orientations)`` returns a function
    ``sample(cell, number, random)`` that gives uint8 images. See `generator.ClosedForm`; yours works the same way. One
    with an attribute ``per_group = True`` is also given ``groups=`` (lesion or patient of each image, or None).
    """

    rule: object = strategy.class_and_device  # who gets what: rule(have, budget), see `sharing.plan`
    budget: Budget = Budget()
    source: object = ClosedForm()
    protection: Protection = Protection()  # what is done at the source against leaks
    to: str = "hospitals"  # or "server", which pre-trains on them; or "server only": no hospital trains, ever
    pretrain_steps: int = 0  # steps that the *server* trains the first global weights on the pool
    edit: object = None  # edit(pool, wishes, have, styles) -> (pool, wishes) at the server, before all else

    def __post_init__(self):
        to = ("hospitals", "server", "server only")
        require(self.to in to, "to", self.to, f"one of {to}")
        require(self.pretrain_steps >= 0, "pretrain_steps", self.pretrain_steps, "0 or above")
        _callable(self, "rule" if isinstance(self.source, RealImages) else "rule source")
        looks = self.protection.reject or self.protection.outlier
        covered = not (hasattr(self.source, "epsilon") and looks)
        needed = "without reject and outlier: they look at real images outside of differential privacy"
        require(covered, "protection", self.protection, needed)


@dataclass(frozen=True)
class Method:
    """A federated method: which parts it uses. The defaults are FedAvg."""

    lr: float = 0.05  # local learning rate, above 0; over the rounds it falls almost to 0 along a half cosine
    loss: object = CrossEntropy()
    batches: object = Shuffled()
    gradient: object = Plain()
    view: object = AsIs()
    sharing: object = None  # Sharing(...), Copies(...) or nothing
    server: object = Mean()
    stays: str = ""  # weights that stay at home: "norm" (FedBN, arXiv 2102.07623), "all" (it trains alone)
    network: object = Backbone()  # or your own (channels, classes, seed, compute) -> a `models.Flat`
    pooled: bool = False  # all real images in one place: the bound that methods are judged by, not federated

    def __post_init__(self):
        require(0 < self.lr < np.inf, "lr", self.lr, "above 0")
        require(self.stays in ("", "norm", "all"), "stays", self.stays, "'', 'norm' or 'all'")
        _callable(self, "loss batches gradient view server network")
        for name, base in (("gradient", Plain), ("view", AsIs), ("sharing", Sharing | Copies | None)):
            value = getattr(self, name)
            require(isinstance(value, base), name, value, f"of (a class derived from) {base}")
        to = getattr(self.sharing, "to", "")
        for wrong, why in (
            (self.pooled and self.sharing, "all images lie in one place, so nothing can be shared"),
            (self.pooled and self.stays, "all images lie in one place, so no weights stay at a hospital"),
            (to == "server only" and self.stays, "no hospital trains, so no weights stay at one"),
        ):
            if wrong:
                raise ValueError(f"this method contradicts itself: {why}")


ADJUSTED = Method(loss=LogitAdjusted())
FEDSSG = replace(ADJUSTED, sharing=Sharing(pretrain_steps=600))
METHODS = {
    "local_only": Method(stays="all"),
    "fedavg": Method(),
    "fedprox": Method(gradient=Proximal(0.01)),
    "scaffold": Method(gradient=Scaffold()),
    "fedavgm": Method(server=Momentum(0.6)),
    "local_normalisation": Method(stays="norm"),
    "balanced_sampling": Method(batches=Balanced()),
    "fedavg+la": ADJUSTED,
    "device_statistics": Method(view=DeviceStyles()),
    "combined": replace(ADJUSTED, view=DeviceStyles()),
    "duplication": replace(ADJUSTED, sharing=Copies()),
    "uniform_shuffle": replace(FEDSSG, sharing=replace(FEDSSG.sharing, rule=strategy.uniform)),
    "synthetic_only": replace(FEDSSG, sharing=replace(FEDSSG.sharing, to="server only")),
    "server_pretraining": replace(FEDSSG, sharing=replace(FEDSSG.sharing, to="server")),
    "fedssg_no_pretrain": replace(FEDSSG, sharing=Sharing()),
    "fedssg": FEDSSG,
    "fedssg+combined": replace(FEDSSG, view=DeviceStyles()),
    "oracle_real": replace(FEDSSG, sharing=replace(FEDSSG.sharing, source=RealImages())),
    "centralised": replace(ADJUSTED, pooled=True),
}
LESSON = "fedavg fedprox balanced_sampling fedavg+la uniform_shuffle fedssg_no_pretrain fedssg centralised"
LESSON = tuple(LESSON.split())  # the methods of lesson 04
PARTS = {p.__name__: p for p in list(globals().values()) if is_dataclass(p) and isinstance(p, type)}
PARTS |= strategy.RULES


def rebuild(entry):
    """Inverse of `describe` for the course's own parts: no code travels. A ValueError for any other part."""
    if isinstance(entry, list):
        return tuple(map(rebuild, entry))
    if not isinstance(entry, dict):
        return entry
    name = entry.get("part")
    here = "source code" not in entry and name in PARTS
    needed = "installed at every hospital: add it to fedssg_helpers there"
    require(here, "a part of this method", name, needed)
    values = {key: rebuild(item) for key, item in entry.items() if key != "part"}
    return PARTS[name](**values) if is_dataclass(PARTS[name]) else PARTS[name]
