"""What shared samples give away: attacks on a hospital's upload, canaries, the audit card, and a generator with
differential privacy.

Everything here judges; the one protection that runs with every upload, rejection at the source, is in
`sharing.offer_of`. No attack that fails proves privacy: a cleverer one may not. Only differential privacy bounds
them all, and `fit_private` shows its price.
"""
from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from . import data, experiment, generator, metrics, rounds, sharing
from .generator import distances
from .keys import rng, torch_rng
from .models import SmallCNN, orientations, scale, turn
from .partition import Client

ATTACKS = ("nearest", "span")
SMALL = 50  # a class with fewer images than this at its source counts as small
ROUNDING = 2.0  # grey levels squared: what rounding to whole grey levels adds to the variance along one direction
CELL = ["source", "class", "device"]


def span(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat that samples lie in: mean (P,) and orthonormal axes (P, q), in grey levels.

    A decoder with q latent dimensions paints on q axes only, and enough of its samples show them all. Directions with
    less variance than rounding makes are not counted.
    """
    x = samples.float().flatten(1)
    _, sizes, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return x.mean(0), axes[sizes.square() / len(x) > ROUNDING].T


def off_span(images: torch.Tensor, flat: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """How far images (N, C, H, W) lie off a `span`, float32 (N,): root mean square over an image, in grey levels."""
    x = images.float().flatten(1) - flat[0]
    rest = x.square().sum(1) - (x @ flat[1]).square().sum(1)
    return (rest.clamp(min=0) / x.shape[1]).sqrt()


def membership(clients: list[Client], outside: Client, pool: sharing.Pool, *, groups=None, seed: int = 0,
               most: int = 200) -> pd.DataFrame:
    """The membership attack: was this image among those that the source learnt from?

    The attacker holds a candidate image with its class and device, and what the hospital uploaded. Two scores, the
    higher the likelier a member, each ``log(reference / distance)``: the distance is that to the nearest uploaded
    sample of the candidate's cell (`nearest`), or to the flat that all uploads of the hospital lie in (`span`). The
    reference, to the nearest unseen image of the class, says how ordinary the candidate is (difficulty calibration,
    Watson et al. 2022, arXiv 2111.08440): ordinary images are near to everything.

    Parameters
    ----------
    clients : list of Client
        Their images are the members.
    outside : Client
        Real images that no hospital holds, such as the test images: non-members of the same class and device.
    pool : sharing.Pool
    groups : int array (len(outside),), optional
        Lesion or patient of each outside image; no image is a reference for another of its group.
    most : int
        At most so many members and so many non-members of a cell are tried, drawn evenly.

    Returns
    -------
    DataFrame
        One row per candidate: source, class, device, held (images of the cell at the source), member (bool), nearest,
        span. Cells with fewer than two outside images are left out: nothing could be compared.
    """
    groups = np.arange(len(outside)) if groups is None else np.asarray(groups)
    parts = []
    for k, client in enumerate(clients):
        ours = pool.source == k
        if not ours.any():
            continue
        flat, turns = span(pool.images[ours]), orientations(client.images)
        for c, d in torch.unique(torch.stack([pool.labels, pool.device], 1)[ours], dim=0).tolist():
            inside = torch.nonzero((client.labels == c) & (client.device == d))[:, 0].numpy()
            others = torch.nonzero((outside.labels == c) & (outside.device == d))[:, 0].numpy()
            like = torch.nonzero(outside.labels == c)[:, 0].numpy()
            random = rng(seed, "candidates", k, c * 1000 + d)
            members, strangers = (np.sort(random.permutation(rows)[:most]) for rows in (inside, others))
            if len(others) < 2 or len(inside) < 1 or len(np.unique(groups[like])) < 3:
                continue
            images = torch.cat([client.images[members], outside.images[strangers]])
            # A stranger is no reference for itself; as much is withheld from members, so that both are treated alike.
            own = np.concatenate([groups[strangers[np.arange(len(members)) % len(strangers)]], groups[strangers]])
            reference = distances(images, outside.images[like], turns)
            reference[torch.from_numpy(own[:, None] == groups[like])] = torch.inf
            reference = reference.min(1)[0].clamp(min=1e-3)
            samples = pool.images[ours & (pool.labels == c) & (pool.device == d)]
            score = {"nearest": distances(images, samples, turns).min(1)[0], "span": off_span(images, flat)}
            parts.append(pd.DataFrame({"source": k, "class": c, "device": d, "held": len(inside),
                                       "member": np.arange(len(images)) < len(members)}
                                      | {name: (reference / far.clamp(min=1e-3)).log().numpy()
                                         for name, far in score.items()}))
    columns = [*CELL, "held", "member", *ATTACKS]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def auc(table: pd.DataFrame, attack: str) -> float:
    """Chance that a member scores above a non-member of the same source, class and device, 0..1; .5 is a coin.

    The area under the ROC curve of each cell, cells weighted by their members; NaN without any.
    """
    total = wins = 0.0
    for _, cell in table.groupby(CELL):
        inside, outside = (cell[attack].to_numpy()[cell.member == side] for side in (True, False))
        above = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
        wins, total = wins + len(inside) * above, total + len(inside)
    return wins / total if total else float("nan")


def true_positives(table: pd.DataFrame, attack: str, false: float = 0.01) -> float:
    """Part of the members that score above all but the part `false` of the non-members, 0..1; NaN without any.

    All cells together, non-members weighted so that each cell has as many of them as members. With fewer than
    1 / `false` non-members: above the highest of them.
    """
    if not len(table):
        return float("nan")
    sizes = table.groupby(CELL).member.agg(["sum", "size"])
    sizes["weight"] = sizes["sum"] / (sizes["size"] - sizes["sum"])
    outside = table[~table.member].join(sizes.weight, on=CELL).sort_values(attack, ascending=False)
    within = outside.weight.cumsum() / outside.weight.sum() <= false
    least = outside[attack][~within].iloc[0]  # the first non-member that would be one too many
    return float((table[attack][table.member] > least).mean())


def figures(table: pd.DataFrame, small: int = SMALL) -> dict[str, float]:
    """The attack in numbers: auc, auc_small, tpr, tpr_small per attack, as ``"nearest auc"``; 0..1.

    ``_small``: classes of fewer than `small` images at their source. ``tpr``: at 1 % false positives.
    """
    few = table[table.held < small]
    return {f"{attack} {name}": value for attack in ATTACKS
            for name, value in (("auc", auc(table, attack)), ("auc_small", auc(few, attack)),
                                ("tpr", true_positives(table, attack)), ("tpr_small", true_positives(few, attack)))}


def pairs(clients: list[Client], outside: Client, pool: sharing.Pool, seed: int = 0) -> pd.DataFrame:
    """Each sample with the real image of its source that is nearest to it.

    Returns
    -------
    DataFrame
        One row per sample: row (in the pool), source, class, device, held, image (row at the source), distance (grey
        levels), usual (median distance of two such images at the source, see `generator.apart`), ratio: distance
        to the nearest training image over that to the nearest outside image, both out of equally many; 1 where a
        sample knows training images no better than unseen ones, NaN where there are no unseen ones.
    """
    parts = []
    cells = torch.stack([pool.source, pool.labels, pool.device], 1)
    for k, c, d in torch.unique(cells, dim=0).tolist():
        rows = torch.nonzero((cells == torch.tensor([k, c, d])).all(1))[:, 0]
        inside = torch.nonzero((clients[k].labels == c) & (clients[k].device == d))[:, 0]
        if len(inside) < generator.MINIMUM:
            continue
        others = outside.images[(outside.labels == c) & (outside.device == d)]
        turns, own = orientations(clients[k].images), clients[k].images[inside]
        near = distances(pool.images[rows], own, turns)
        number, random = min(len(own), len(others)), rng(seed, "equal sizes", k, c * 1000 + d)
        ratio = np.full(len(rows), np.nan)
        if number:
            some, equal = (torch.from_numpy(random.permutation(n)[:number]) for n in (len(own), len(others)))
            ratio = (near[:, some].min(1)[0] / distances(pool.images[rows], others[equal], turns).min(1)[0]).numpy()
        parts.append(pd.DataFrame({
            "row": rows, "source": k, "class": c, "device": d, "held": len(own), "image": inside[near.argmin(1)],
            "distance": near.min(1)[0], "usual": float(generator.apart(own, turns).median()), "ratio": ratio}))
    columns = ["row", *CELL, "held", "image", "distance", "usual", "ratio"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def canary(shape: tuple[int, int, int], random: np.random.Generator, number: int = 1) -> torch.Tensor:
    """Conspicuous images that no hospital takes, uint8 (number, C, H, W): mosaics of four by four random colours."""
    coarse = torch.from_numpy(random.integers(0, 256, (number, shape[0], 4, 4), dtype=np.uint8))
    return F.interpolate(coarse, shape[1:])


def resemblance(images: torch.Tensor, samples: torch.Tensor, turns=range(8)) -> torch.Tensor:
    """How much of each image's pattern each sample shows in the best orientation: correlation, float32 (N, M), -1..1.

    Of the pixels less the mean of the samples: what all samples have in common resembles nobody.
    """
    middle = samples.float().mean(0)
    y = F.normalize((samples.float() - middle).flatten(1), dim=1)
    best = torch.full((len(images), len(samples)), -1.0)
    for which in turns:
        best = torch.maximum(best, F.normalize((turn(images.float(), which) - middle).flatten(1), dim=1) @ y.T)
    return best


def plant(client: Client, image: torch.Tensor, c: int, device: int) -> Client:
    """The hospital with one more image (1, C, H, W), said to be of class c."""
    return Client(torch.cat([client.images, image]), torch.cat([client.labels, torch.tensor([c])]),
                  torch.cat([client.device, torch.tensor([device])]))


def canaries(clients: list[Client], outside: Client, agreed: sharing.Plan, seed: int, *, number: int = 10,
             **options) -> tuple[pd.DataFrame, torch.Tensor, torch.Tensor]:
    """Plant one canary at a time in the smallest cells that are shared, and look for it in the upload.

    *Recovered*: a sample of its cell is nearer to the canary than all but 1 % of unseen images of the cell come to an
    image at the source (of fewer than 100, than the nearest of them): as good as a copy. *Noticed* asks for much less
    (the exposure of Carlini et al. 2019, arXiv 1802.08232): a sample resembles it (`resemblance`) more than 99 % of
    500 other mosaics that were not planted. Without any leak, one of a hundred is noticed by chance.

    Parameters
    ----------
    agreed : sharing.Plan
    options
        Of the generator and the rejection, see `sharing.offer_of`.

    Returns
    -------
    DataFrame, uint8 tensors (number, C, H, W)
        A row per canary: source, class, device, held, distance (of the nearest sample, grey levels), copy (the
        distance below which it is recovered), recovered, noticed (bool), samples; the canaries; and the sample that
        resembles each most.
    """
    cells = []
    for k, c, d in np.argwhere(agreed.offer):
        own = clients[k].images[(clients[k].labels == c) & (clients[k].device == d)]
        unseen = outside.images[(outside.labels == c) & (outside.device == d)]
        cells.append((len(own), k, c, d, own, unseen if len(unseen) else own))
    if not cells:
        raise ValueError("nothing is shared under this plan, so there is no cell to plant a canary in")
    cells.sort(key=lambda cell: cell[:4])
    rows, planted, nearest = [], [], []
    for i in range(number):
        held, k, c, d, own, unseen = cells[i % len(cells)]
        turns, random = orientations(clients[k].images), rng(seed, "canary", int(k), i)
        image, free = canary(tuple(own.shape[1:]), random), canary(tuple(own.shape[1:]), random, 500)
        wanted = np.zeros_like(agreed.offer[k])
        wanted[c, d] = agreed.offer[k, c, d]
        samples, _, _ = sharing.offer_of(plant(clients[k], image, int(c), int(d)), wanted, int(k), seed, **options)
        copy = float(distances(unseen, own, turns).min(1)[0].quantile(0.01)) if unseen is not own else \
            float(generator.apart(own, turns).quantile(0.01))
        planted.append(image)
        row = {"source": int(k), "class": int(c), "device": int(d), "held": held, "distance": np.inf, "copy": copy,
               "recovered": False, "noticed": False, "samples": len(samples)}
        if len(samples):
            row["distance"] = float(distances(image, samples, turns).min())
            alike = resemblance(torch.cat([image, free]), samples, turns)
            most = alike.max(1)[0]
            row |= {"recovered": row["distance"] < copy, "noticed": bool(most[0] > most[1:].quantile(0.99))}
        nearest.append(samples[alike[0].argmax()][None] if len(samples) else torch.zeros_like(image))
        rows.append(row)
    return pd.DataFrame(rows), torch.cat(planted), torch.cat(nearest)


@dataclass(frozen=True)
class Card:
    """The audit card of one sharing run.

    Attributes
    ----------
    reported, samples, rejected : int
        Counts and samples that left the hospitals; samples that rejection held back.
    asked : int
        Samples that were asked for.
    bytes_up : float
    fewest : int
        Real images behind the smallest cell that was shared.
    small : int
        Shared cells with fewer than `SMALL` images.
    ratio : float
        Median nearest-neighbour ratio, see `pairs`.
    attack : dict
        See `figures`.
    epsilon : float
        Of differential privacy; infinite: no formal guarantee.
    """

    reported: int
    samples: int
    asked: int
    rejected: int
    bytes_up: float
    fewest: int
    small: int
    ratio: float
    attack: dict[str, float] = field(default_factory=dict)
    epsilon: float = float("inf")

    def __str__(self) -> str:
        guarantee = "none: no differential privacy" if np.isinf(self.epsilon) else f"epsilon = {self.epsilon:.1f}"
        lines = ["Audit card of what was shared",
                 f"  left the hospitals      {self.reported} counts, {self.samples} samples of {self.asked} asked "
                 f"for ({self.bytes_up / 1e6:.2f} MB)",
                 f"  rejected at the source  {self.rejected} samples",
                 f"  smallest cell shared    {self.fewest} real images ({self.small} cells below {SMALL})",
                 f"  nearest-image ratio     {self.ratio:.2f} (1: training images are no nearer than unseen ones)"]
        for name in ATTACKS:
            a = {key.split()[1]: value for key, value in self.attack.items() if key.startswith(name)}
            lines.append(f"  attack by {name:12}  AUC {a['auc']:.3f}, small cells {a['auc_small']:.3f}; finds "
                         f"{a['tpr']:.1%} of members at 1 % false alarms")
        return "\n".join([*lines, f"  formal guarantee        {guarantee}"])


def audit_card(clients: list[Client], outside: Client, shared: sharing.Shared, *, groups=None, seed: int = 0,
               epsilon: float = float("inf")) -> Card:
    """The card of one run: what left, what was held back, and what the attacks make of it (see `membership`)."""
    classes, devices = shared.plan.offer.shape[1:]
    have = sharing.reports(clients, classes, devices)
    behind = have[shared.plan.offer > 0]
    real = pairs(clients, outside, shared.pool, seed).ratio.median()
    found = membership(clients, outside, shared.pool, groups=groups, seed=seed)
    return Card(have.size, len(shared.pool), int(shared.plan.offer.sum()), int(shared.rejected.sum()),
                shared.costs["bytes_samples_up"], int(behind.min(initial=have.max())), int((behind < SMALL).sum()),
                float(real), figures(found), epsilon)


def lesions(job: experiment.Job) -> np.ndarray:
    """Lesion or patient of each test image of a job, int64: the groups that `membership` asks for."""
    images = experiment.load(job.data, job.data_dir)
    return images.group[data.split(images, seed=job.seed)[1]]


def taught(pool: sharing.Pool, federation, seed: int, steps: int = 200) -> np.ndarray:
    """What samples teach: recall of each class (C,) on the test images, of a model that saw nothing but the samples.

    A short stand-in for a whole run of rounds, `steps` of training at the server. Its mean over classes, the balanced
    accuracy, is called the samples' *worth* in the course.
    """
    net = SmallCNN(pool.images.shape[1], len(federation.classes), seed)
    weights = rounds.pretrain(net, pool, steps, seed)
    return metrics.recall(rounds.evaluate(net, weights, federation).sum(0))


def trial(job: experiment.Job, options: dict, steps: int = 200, most: int = 100) -> dict[str, float]:
    """One setting of the trade-off: worth of the samples and the attack's `figures`, for a seed's hospitals.

    `options` are those of `sharing.offer_of`, and ``minimum`` of `sharing.Budget`; `steps` those of `taught`, whose
    mean recall is the worth (0: not asked for).
    """
    hospitals, rest = experiment.hospitals_of(job), dict(options)
    budget = sharing.Budget(minimum=rest.pop("minimum", generator.MINIMUM))
    shared = sharing.share(hospitals.clients, hospitals, "class_and_device", job.seed, budget=budget, **rest)
    table = membership(hospitals.clients, hospitals.test, shared.pool, groups=lesions(job), seed=job.seed, most=most)
    worth = float(np.nanmean(taught(shared.pool, hospitals, job.seed, steps))) if steps else float("nan")
    return {"worth": worth, "samples": len(shared.pool),
            "rejected": int(shared.rejected.sum()), "bytes": shared.costs["bytes_up"]} | figures(table)


def trials(jobs: list[experiment.Job], settings: dict[str, dict], workers: int = 2, steps: int = 200) -> pd.DataFrame:
    """`trial` of every setting and job in parallel processes: a row each, indexed by (setting, seed)."""
    which = [(name, job) for name in settings for job in jobs]
    with ProcessPoolExecutor(workers, experiment.processes()) as pool:
        done = list(pool.map(trial, [job for _, job in which], [settings[name] for name, _ in which],
                             [steps] * len(which)))
    return pd.DataFrame(done, index=pd.MultiIndex.from_tuples([(name, job.seed) for name, job in which],
                                                              names=["setting", "seed"]))


# --- a generator with differential privacy ---


class ConditionalVAE(nn.Module):
    """A small VAE that is told the class: everything it learns passes through its gradients, nothing beside them.

    It sees images at half resolution, as differential privacy pays for every weight. No batch statistics, no density
    fitted afterwards: codes are drawn from the prior.

    Parameters
    ----------
    channels, size : int
        Images are (channels, size, size), size even.
    classes, latent, width : int
    draw : torch.Generator
        Draws the first weights.
    """

    def __init__(self, channels: int, size: int, classes: int, draw: torch.Generator, latent: int = 8,
                 width: int = 32):
        super().__init__()
        if size % 2:
            raise ValueError(f"images have sides of {size} pixels; the private generator halves them: an even size")
        self.shape, self.classes, self.latent = (channels, size // 2, size // 2), classes, latent
        pixels = channels * (size // 2) ** 2
        self.encode = nn.Sequential(nn.Linear(pixels, width), nn.SiLU(), nn.Linear(width, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent + classes, width), nn.SiLU(), nn.Linear(width, pixels))
        for layer in (*self.encode, *self.decode):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight, generator=draw)
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Loss of each image, float (B,): negative ELBO with a decoder of fixed variance 1/4, in nats.

        The course's own generator shares one variance over a batch (`generator.loss`); then no image has a loss, and
        a gradient, of its own that could be clipped.
        """
        mean, log_variance = self.encode(x).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * normal
        error = (self.decode(torch.cat([z, F.one_hot(labels, self.classes).float()], 1)) - x).square().sum(1)
        return 2 * error + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)

    @torch.no_grad()
    def sample(self, c: int, number: int, random: np.random.Generator) -> torch.Tensor:
        """`number` images of class c, uint8 (n, C, H, W), from the prior."""
        z = torch.from_numpy(random.standard_normal((number, self.latent), dtype=np.float32))
        told = F.one_hot(torch.full((number,), c), self.classes).float()
        small = self.decode(torch.cat([z, told], 1)).view(-1, *self.shape)
        return generator.unscale(F.interpolate(small, scale_factor=2, mode="bilinear"))


def opacus_missing() -> str:
    """What to do if the `privacy` extra is not installed; empty where it is."""
    return "" if importlib.util.find_spec("opacus") else \
        "differential privacy needs Opacus, an extra of this course: pip install -e '.[privacy]'"


def fit_private(images: torch.Tensor, labels: torch.Tensor, classes: int, epsilon: float, seed: int,
                client: int = 0, *, steps: int = 400, batch: int = 128, clip: float = 1.0,
                lr: float = 3e-3) -> tuple[ConditionalVAE, float]:
    """Train a `ConditionalVAE` by DP-SGD (Abadi et al. 2016, arXiv 1607.00133) and say which epsilon that spent.

    In every step each image takes part with chance batch / N, its gradient is clipped to length `clip`, and normal
    noise is added to the sum. One accountant (Renyi) counts all steps. The guarantee is for adding or removing one
    *image*, at delta = 1 / (10 N); it covers all that is computed from the images here, and neither the counts that a
    hospital reports nor other images of the same patient.

    Parameters
    ----------
    images : uint8 tensor (N, C, H, H), H even
    labels : int64 tensor (N,), 0..classes-1
    epsilon : float, > 0
        The budget; infinite: clipped, but no noise.
    seed, client : int
        Name the random draws. Noise that can be drawn again can be subtracted: a real release must draw it in secret.

    Returns
    -------
    ConditionalVAE, float
        The trained network, and epsilon as accounted.

    Raises
    ------
    ValueError
        Opacus is not installed, or `epsilon` is not positive.
    """
    if missing := opacus_missing():
        raise ValueError(missing)
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; it must be above 0 (infinite: no noise)")
    from opacus import GradSampleModule
    from opacus.accountants import RDPAccountant
    from opacus.accountants.utils import get_noise_multiplier
    from opacus.optimizers import DPOptimizer

    number, delta, chance = len(images), 1 / (10 * len(images)), min(1.0, batch / len(images))
    noise = 0.0 if np.isinf(epsilon) else get_noise_multiplier(
        target_epsilon=epsilon, target_delta=delta, sample_rate=chance, steps=steps, accountant="rdp")
    net = ConditionalVAE(*images.shape[1:3], classes, torch_rng(seed, "private generator", client))
    model, accountant = GradSampleModule(net), RDPAccountant()
    optimiser = DPOptimizer(torch.optim.Adam(net.parameters(), lr), noise_multiplier=noise, max_grad_norm=clip,
                            expected_batch_size=chance * number, generator=torch_rng(seed, "private noise", client))
    random = rng(seed, "private batches", client)
    x = F.avg_pool2d(scale(images), 2).flatten(1)
    for _ in range(steps):
        rows = torch.from_numpy(np.flatnonzero(random.random(number) < chance))
        normal = torch.from_numpy(random.standard_normal((len(rows), net.latent), dtype=np.float32))
        optimiser.zero_grad()
        model(x[rows], labels[rows], normal).sum().backward()
        optimiser.step()
        accountant.step(noise_multiplier=noise, sample_rate=chance)
    model.to_standard_module()
    return net, float("inf") if not noise else accountant.get_epsilon(delta)


def private_offer_of(client: Client, numbers: np.ndarray, k: int, seed: int,
                     epsilon: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sharing.offer_of` with the private generator: `numbers` (C, D) samples of hospital k; images, labels, device.

    The generator is told the (class, device) cell. Which cells and how many is the plan's choice, from reported
    counts that are not private.
    """
    wanted = np.flatnonzero(numbers)
    cells = torch.from_numpy(np.repeat(np.arange(numbers.size), numbers.ravel()))
    images = [client.images[:0]]
    if len(wanted):
        own = client.labels * numbers.shape[1] + client.device
        net, _ = fit_private(client.images, own, numbers.size, epsilon, seed, k)
        images += [net.sample(int(c), int(numbers.flat[c]), rng(seed, "private samples", k, int(c))) for c in wanted]
    return torch.cat(images), cells // numbers.shape[1], cells % numbers.shape[1]
