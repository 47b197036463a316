"""Differential privacy in closed form: what one lesion can move, how much noise that asks for, and samples as a source."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import small
import torch

from fedssg_helpers import client, described, dpmeans, methods, partition, runs, server
from fedssg_helpers.keys import rng
from fedssg_helpers.methods import DPMeans, Method, Protection, Sharing
from fedssg_helpers.models import scale
from fedssg_helpers.partition import Client
from fedssg_helpers.sharing import Budget


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng(seed, "test normal").standard_normal(shape, dtype=np.float32))


def pictures(number: int, channels: int = 3, size: int = 28, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(
        rng(seed, "test pictures").integers(0, 256, (number, channels, size, size), np.uint8)
    )


def coefficients(images: torch.Tensor, known: dpmeans.Public) -> torch.Tensor:
    return scale(images).flatten(1) @ known.waves.flatten(1).T


# --- what is public ---


@pytest.mark.parametrize("channels", [1, 3])
def test_waves_are_orthogonal_and_turn_into_one_another(channels):
    known = dpmeans.public(channels, 28)
    flat, d = known.waves.flatten(1), channels * dpmeans.WAVES**2
    torch.testing.assert_close(flat @ flat.T * 28**2, torch.eye(d), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        known.turns @ known.turns.mT, torch.eye(d).expand(len(known.turns), d, d), atol=1e-4, rtol=0
    )
    assert (
        len(known.turns) == (8 if channels == 3 else 1)
        and int(known.slow.sum()) == channels * dpmeans.SLOW**2
    )
    assert (torch.linalg.eigvalsh(known.covariance) > 0).all() and (known.scale > 0).all()


def test_the_public_part_asks_for_no_hospital_and_no_size():
    """Coefficients of the same picture at two sizes are the same, so one public scale serves all sizes."""
    coarse = torch.randint(
        0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    large, small_ = (torch.nn.functional.interpolate(coarse, (size, size)) for size in (112, 28))
    found = [coefficients(x, dpmeans.public(3, x.shape[-1])) for x in (large, small_)]
    torch.testing.assert_close(*found, atol=0.02, rtol=0.02)
    torch.testing.assert_close(dpmeans.public(3, 112).scale, dpmeans.public(3, 28).scale)


# --- what one lesion can move ---


def adversarial(number: int, d: int, kind: str) -> torch.Tensor:
    z = normal(number, d)
    return {"random": z, "huge": 1e6 * z, "tiny": 1e-6 * z, "one way": 1e3 * torch.ones(number, d)}[kind]


@pytest.mark.parametrize("kind", ["random", "huge", "tiny", "one way"])
@pytest.mark.parametrize("clip", [0.5, 3.5])
def test_replacing_one_group_moves_sums_and_products_by_at_most_the_bound(kind, clip):
    """A group of seven images in three cells, which pull in one direction, then in the opposite one."""
    z, groups = adversarial(40, 6, kind), torch.arange(40).clamp(max=33)
    cells = torch.arange(40) % 3

    def released(z):
        own, cell = dpmeans.one_each(z, groups, cells, clip)
        return torch.zeros(3, 6).index_add_(0, cell, own), own.T @ own

    (sums, products), moved = released(z), []
    for factor in (-1.0, 1.0, 1e6, -1e6):
        other = z.clone()
        other[33:] = factor * normal(7, 6, seed=1) if kind == "random" else factor * z[33:]
        new = released(other)
        moved.append(float((new[0] - sums).norm()))
        assert moved[-1] <= 2 * clip * (1 + 1e-4)
        assert float((new[1] - products).norm()) <= 2**0.5 * clip**2 * (1 + 1e-4)
    if kind in ("huge", "one way"):
        assert max(moved) == pytest.approx(
            2 * clip, rel=1e-3
        )  # the bound is reached, so less noise would not do


def test_a_group_counts_once_however_many_images_it_has():
    z, cells = normal(30, 5), torch.zeros(30, dtype=torch.int64)
    own, cell = dpmeans.one_each(z, torch.arange(30) // 10, cells, 100.0)
    torch.testing.assert_close(own, z.view(3, 10, 5).mean(1))
    assert cell.tolist() == [0, 0, 0]


# --- how much noise ---


def test_mu_is_that_of_the_exact_formula_and_never_above_the_accountants():
    analysis = pytest.importorskip("opacus.accountants.analysis")
    orders = [1 + x / 100 for x in range(1, 2000)] + list(range(21, 500))
    for epsilon in (0.1, 1.0, 3.0, 10.0):
        mu = dpmeans.mu_of(epsilon, 1e-5)
        assert analysis.gdp.delta_eps_mu(eps=epsilon, mu=mu) == pytest.approx(1e-5, rel=1e-3)
        renyi = analysis.rdp.compute_rdp(q=1.0, noise_multiplier=1 / mu, steps=1, orders=orders)
        spent, _ = analysis.rdp.get_privacy_spent(orders=orders, rdp=renyi, delta=1e-5)
        assert epsilon <= spent <= 1.2 * epsilon, spent  # Renyi's is an upper bound, and a close one
        concentrated = mu**2 / 2 + 2 * math.sqrt(
            mu**2 / 2 * math.log(1e5)
        )  # Bun & Steinke 2016, proposition 1.3
        assert epsilon < concentrated < 1.7 * epsilon
    assert dpmeans.mu_of(np.inf, 1e-5) == math.inf
    assert dpmeans.mu_of(1000.0, 1e-5) > dpmeans.mu_of(1e-9, 1e-9) > 0


def test_three_releases_spend_the_budget_and_no_more(monkeypatch):
    """What is released of images without any content is noise: as much of it as clip, part of the budget and mu say."""
    known, mu, clip, number, seen, drawn = dpmeans.public(3, 28), 0.5, 2.0, 50, [], []
    monkeypatch.setattr(dpmeans, "one_each", lambda z, groups, cells, clip: (torch.zeros_like(z), cells))
    monkeypatch.setattr(
        dpmeans, "shrunk", lambda noisy, towards, energy: seen.append((noisy, energy)) or noisy
    )
    z, one = torch.zeros(number, len(known.mean)), torch.zeros(number, dtype=torch.int64)
    for seed in range(60):
        found = dpmeans.private_moments(z, one, one, known, clip, mu, rng(seed, "x"))
        drawn.append(found.mean[0] - known.mean)
    assert sum(dpmeans.PARTS.values()) == pytest.approx(1)
    centre, means, spread = (
        2 * clip * wider / (mu * part**0.5 * number)
        for wider, part in zip(dpmeans.WIDER.values(), dpmeans.PARTS.values())
    )
    d = 9  # three waves in each channel are slow, and the same in all eight orientations
    assert mean_square(drawn) == pytest.approx(d * (centre**2 + means**2), rel=0.2)
    of_means, of_products = seen[::2], seen[1::2]
    assert mean_square(noisy for noisy, _ in of_means) == pytest.approx(d * means**2, rel=0.2)
    assert of_means[0][1] == pytest.approx((d - 2) * means**2, rel=1e-4)
    most = clip * dpmeans.WIDER["spread"]
    each = (spread * most / 2**0.5) ** 2
    assert of_products[0][1] == pytest.approx(mean_square(noisy for noisy, _ in of_products), rel=0.1)
    assert of_products[0][1] / each == pytest.approx(
        810, rel=1e-3
    )  # free numbers in a covariance of this symmetry


def mean_square(tensors) -> float:
    return float(np.mean([float(x.square().sum()) for x in tensors]))


def test_shrinking_helps_and_knows_its_noise():
    truth, noise = 0.3 * normal(50), normal(200, 50, seed=1)
    raw, better = noise.square().sum(1).mean(), []
    for e in noise:
        better.append(float((dpmeans.shrunk(truth + e, 0.0, 48.0) - truth).square().sum()))
    assert np.mean(better) < 0.5 * float(raw)
    assert torch.equal(dpmeans.shrunk(truth, 0.0, 0.0), truth)
    assert torch.equal(dpmeans.shrunk(truth, truth, 5.0), truth)


def spread_of_means(epsilon: float) -> float:
    """How far means of a hospital's cells swing with the noise."""
    images, cells = pictures(60), torch.arange(60) % 2
    part, known = DPMeans(epsilon), dpmeans.public(3, 28)
    found = [part(images, cells, cells, rng(seed, "fit")).func.__self__.mean for seed in range(8)]
    return float((torch.stack(found) * known.scale).std(0).mean())


def test_less_epsilon_is_more_noise():
    spread = [spread_of_means(epsilon) for epsilon in (np.inf, 30.0, 3.0)]
    assert spread[0] == 0 < spread[1] < spread[2]


# --- as a source ---


def test_without_noise_it_learns_what_the_images_show():
    bright, dark = torch.full((30, 3, 28, 28), 150), torch.full((30, 3, 28, 28), 110)
    images = (torch.cat([bright, dark]) + 4 * normal(60, 3, 28, 28)).round().to(torch.uint8)
    cells = torch.arange(60) // 30
    sample = DPMeans(np.inf, clip=1e3)(images, cells, cells, rng(0, "fit"))
    found = [float(sample(c, 200, rng(0, "draw")).float().mean()) for c in (0, 1)]
    assert found == pytest.approx([150, 110], abs=3)


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (1, 28), (3, 15), (3, 64)])
@pytest.mark.parametrize("epsilon", [0.1, 3.0, np.inf])
def test_shapes_and_keys(channels, size, epsilon):
    images, cells = pictures(12, channels, size), torch.arange(12) % 3
    part = DPMeans(epsilon)
    sample = part(images, cells, cells, rng(0, "fit"), [0], groups=torch.arange(12) // 2)
    drawn = sample(1, 5, rng(0, "draw"))
    assert drawn.shape == (5, channels, size, size) and drawn.dtype == torch.uint8
    again = part(images, cells, cells, rng(0, "fit"), [0, 4], groups=torch.arange(12) // 2)
    assert torch.equal(again(1, 5, rng(0, "draw")), drawn) and sample(1, 0, rng(0, "draw")).shape[0] == 0
    other = part(images, cells, cells, rng(1, "fit"), groups=torch.arange(12) // 2)
    assert torch.equal(other(1, 5, rng(0, "draw")), drawn) == np.isinf(epsilon)


def test_one_image_or_none_and_a_cell_that_is_not_there():
    zero = torch.zeros(1, dtype=torch.int64)
    sample = DPMeans()(pictures(1), zero, zero, rng(0, "fit"))
    assert sample(0, 2, rng(0, "draw")).shape == (2, 3, 28, 28)
    with pytest.raises(ValueError, match="cell to sample is 3; .*0 to 0"):
        sample(3, 1, rng(0, "draw"))
    with pytest.raises(ValueError, match="number of images to learn from is 0"):
        DPMeans()(pictures(1)[:0], zero[:0], zero[:0], rng(0, "fit"))


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": 0}, {"epsilon": np.nan}, {"delta": 0.0}, {"delta": 1.0}, {"clip": -1.0}, {"clip": np.inf}]
    + [{"temperature": -0.1}, {"temperature": np.inf}],
)
def test_impossible_parameters_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DPMeans(**wrong)


def test_protection_that_looks_at_real_images_is_refused():
    Sharing(source=DPMeans(), protection=Protection(noise=5))
    for guard in (Protection(reject=0.05), Protection(outlier=2.5)):
        with pytest.raises(ValueError, match="differential privacy"):
            Sharing(source=DPMeans(), protection=guard)


def test_the_part_travels_and_is_known_again():
    part = DPMeans(np.inf, clip=2.0)
    assert pickle.loads(pickle.dumps(part)) == part and hash(part) == hash(replace(part))
    assert methods.rebuild(described.describe(part)) == part
    assert "dpmeans" in runs.COUNTED.split()


# --- groups ---


def test_clients_keep_their_groups():
    images = runs.images_of("phantom")
    parts = [np.arange(50), np.arange(50, 90)]
    clients = partition.clients_of(images, parts)
    assert [c.group.tolist() for c in clients] == [images.group[p].tolist() for p in parts]
    rows = torch.arange(10)
    assert torch.equal(clients[0].take(rows).group, clients[0].group[:10])
    both = Client.joined(clients)
    assert both.group.tolist() == images.group[:90].tolist() and len(both) == 90
    without = Client(both.images, both.labels, both.device)
    assert without.take(rows).group is None and Client.joined([both, without]).group is None


def test_lesions_are_what_a_hospital_protects():
    """`client.synthesise` hands the groups over: with each image twice under one group, samples are those of one each."""
    one = client_of_groups(1)
    two = client_of_groups(2)
    wanted = np.array([[4], [4]])
    how = Sharing(source=DPMeans(3.0))
    samples = [client.synthesise(data, wanted, 0, 0, how)[0].images for data in (one, two)]
    assert torch.equal(*samples)
    forgot = replace(two, group=None)
    assert not torch.equal(client.synthesise(forgot, wanted, 0, 0, how)[0].images, samples[0])


def client_of_groups(times: int) -> Client:
    images, labels = pictures(40), torch.arange(40) // 20
    repeated = [x.repeat_interleave(times, 0) for x in (images, labels, torch.arange(40))]
    return Client(repeated[0], repeated[1], torch.zeros(40 * times, dtype=torch.int64), repeated[2])


def test_a_whole_run_takes_it_and_other_runs_know_nothing_of_groups():
    plain = small.federation()
    known = replace(plain, clients=[replace(c, group=torch.arange(len(c)) // 2) for c in plain.clients])
    budget = Budget(fill=60, cell=10)
    part = Method(sharing=Sharing(budget=budget, source=DPMeans(3.0), pretrain_steps=4))
    found = [server.run(federation, part, 0, rounds=1) for federation in (plain, known, known)]
    assert np.isfinite(found[0].weights).all() and not np.array_equal(found[0].weights, found[1].weights)
    assert np.array_equal(found[1].weights, found[2].weights)
    others = [server.run(federation, small.SHARE, 0, rounds=1).weights for federation in (plain, known)]
    assert np.array_equal(*others)
