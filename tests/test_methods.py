"""What each method changes against FedAvg: the parts, their formulas, and what cannot be combined."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from small import SHARE, as_bytes, federation

from fedssg_helpers import client, exchange, methods, server, sharing
from fedssg_helpers.keys import rng
from fedssg_helpers.methods import (
    FEDSSG,
    METHODS,
    Balanced,
    Clipped,
    Copies,
    DeviceStyles,
    LogitAdjusted,
    Mean,
    Median,
    Method,
    Momentum,
    Plain,
    Proximal,
    RealImages,
    Scaffold,
    Sharing,
)
from fedssg_helpers.models import SmallCNN, normalise, scale
from fedssg_helpers.partition import Client
from fedssg_helpers.sharing import Budget

# ---------------------------------------- what is possible


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Proximal(-0.1), "mu is -0.1"),
        (lambda: Momentum(1.0), "beta is 1.0"),
        (lambda: Momentum(-0.1), "beta"),
        (lambda: Method(lr=0), "lr is 0"),
        (lambda: Method(lr=float("nan")), "lr is nan"),
        (lambda: Method(lr=float("inf")), "lr is inf"),
        (lambda: Method(stays="head"), "stays is 'head'"),
        (lambda: Method(sharing="everything"), "sharing is 'everything'"),
        (lambda: Method(server="best"), "server is 'best'"),
        (lambda: Method(loss=None), "loss is None"),
        (lambda: Method(loss=LogitAdjusted), "loss is .*a part"),  # the class, not a part of it
        (lambda: Method(gradient=lambda grad, weights, start, correction: None), "gradient .*Plain"),
        (lambda: Method(view=lambda x, styles, random: x), "view .*AsIs"),
        (lambda: Sharing(source=RealImages), "source is .*RealImages"),
        (lambda: Sharing(to="moon"), "to is 'moon'"),
        (lambda: Sharing(pretrain_steps=-1), "pretrain_steps is -1"),
        (lambda: Sharing(rule="class_and_device"), "rule is 'class_and_device'"),
        (lambda: Copies(rule="uniform"), "rule is 'uniform'"),
        (lambda: Method(pooled=True, sharing=Sharing()), "contradicts itself"),
        (lambda: Method(pooled=True, sharing=Copies()), "contradicts itself"),
        (lambda: Method(pooled=True, stays="norm"), "contradicts itself"),
        (lambda: Method(stays="all", sharing=Sharing(to="server only")), "contradicts itself"),
    ],
)
def test_impossible_methods_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_the_methods_of_the_results():
    assert {"fedavg", "fedavg+la", "fedssg"} <= set(METHODS) and len(METHODS) == 19
    assert METHODS["fedavg"] == Method() and set(methods.LESSON) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_parts_pickle_hash_print_and_travel_as_text(name):
    method = METHODS[name]
    assert pickle.loads(pickle.dumps(method)) == method and hash(method) == hash(replace(method))
    assert "Method(" in repr(method)
    assert methods.rebuild(json.loads(json.dumps(methods.describe(method)))) == method


def test_a_part_that_is_not_installed_is_named():
    class Mine(Plain):
        pass

    for own in (Method(gradient=Mine()), Method(server=lambda updates, weights, memory: weights)):
        with pytest.raises(ValueError, match="must be installed at every hospital"):
            methods.rebuild(json.loads(json.dumps(methods.describe(own))))


# ---------------------------------------- FedAvg again


def weights_of(method: Method, rounds: int = 2) -> np.ndarray:
    return server.run(federation(), method, 0, rounds=rounds).weights


@pytest.fixture(scope="module")
def plain():
    """The weights of FedAvg, and of the method that only shares."""
    return weights_of(Method()), weights_of(SHARE)


@pytest.mark.parametrize(
    "same",
    [
        Method(gradient=Proximal(0.0)),
        Method(server=Momentum(0.0)),
        Method(sharing=Sharing(budget=Budget(receive=0))),  # nothing is received
        Method(sharing=replace(SHARE.sharing, to="server")),  # a pool that nobody uses
        Method(sharing=Copies(budget=Budget(fill=0, cell=0))),
    ],
)
def test_each_falls_back_to_fedavg_bit_for_bit(same, plain):
    assert np.array_equal(weights_of(same), plain[0])


CHANGES = {
    "logit adjustment": dict(loss=LogitAdjusted()),
    "balanced": dict(batches=Balanced()),
    "proximal": dict(gradient=Proximal(0.5)),
    "scaffold": dict(gradient=Scaffold()),
    "momentum": dict(server=Momentum(0.5)),
    "median": dict(server=Median()),
    "clipped": dict(server=Clipped()),
    "norm stays": dict(stays="norm"),
    "styles": dict(view=DeviceStyles()),
    "copies": dict(sharing=Copies(budget=SHARE.sharing.budget)),
} | {
    name: dict(sharing=replace(SHARE.sharing, **changes))
    for name, changes in {
        "real images": dict(source=RealImages()),
        "temperature": dict(source=methods.ClosedForm(temperature=0.0)),
        "pre-training": dict(pretrain_steps=8),
        "class only": dict(rule=sharing.class_only),
        "device only": dict(rule=sharing.device_only),
        "uniform": dict(rule=sharing.uniform),
    }.items()
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_part_does_something_and_is_bit_equal_when_repeated(change, plain):
    changed = replace(SHARE, **CHANGES[change])
    found = weights_of(changed)
    assert not np.array_equal(found, plain[1]) and np.array_equal(found, weights_of(changed))


def test_every_part_is_named_above():
    changed = {name for change in CHANGES.values() for name in change} | {"lr", "pooled", "network"}
    assert changed == {field.name for field in fields(Method)}


# ---------------------------------------- formulas


def test_balanced_sampling_balances():
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    chance = Balanced()(labels, len(labels), 0.0)
    rows = torch.cat(list(client.batches(len(labels), 100, 64, rng(0, "x"), chance)))
    found = torch.bincount(labels[rows], minlength=5) / len(rows)
    assert torch.allclose(found, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3, 0]), atol=0.025)


def test_scaffold_starts_as_fedavg_and_its_corrections_sum_to_zero(monkeypatch):
    """Equal numbers of images: then the mean of what hospitals keep is what the server keeps."""
    seen, real, hospitals = [], client.train_local, federation((60, 60, 60))

    def spy(*arguments, correction, **rest):
        seen.append(correction)
        return real(*arguments, correction=correction, **rest)

    monkeypatch.setattr(client, "train_local", spy)
    first = [server.run(hospitals, m, 0, rounds=1).weights for m in (Method(), METHODS["scaffold"])]
    assert np.array_equal(*first)  # all controls are zero in the first round
    seen.clear()
    server.run(hospitals, METHODS["scaffold"], 0, rounds=2)
    second = torch.stack(seen[3:])
    assert second.abs().max() > 0 and torch.allclose(second.sum(0), torch.zeros(second.shape[1]), atol=1e-5)


def test_momentum_is_its_formula():
    """v = beta v + (w - mean), w = w - v."""
    w, memory, v = torch.zeros(3), {}, torch.zeros(3)
    for step in ([1.0, 2.0, 3.0], [-1.0, 0.0, 4.0], [0.5, 0.5, 0.5]):
        mean = w + torch.tensor(step)
        v = 0.6 * v + (w - mean)
        new = Momentum(0.6)([(mean - 1, 5), (mean + 1, 5)], w, memory)
        assert torch.allclose(new, w - v)
        w = new
    assert torch.allclose(memory["momentum_buffer"], v)
    inner = Momentum(0.0, Median())([(torch.ones(1) * x, 1) for x in (1, 2, 9)], torch.zeros(1), {})
    assert inner == 2


def updates(number: int = 5) -> list[tuple[torch.Tensor, int]]:
    random = torch.Generator().manual_seed(3)
    return [(torch.randn(100, generator=random), 10 * k + 1) for k in range(number)]


def test_the_mean_takes_a_stream_and_names_what_is_wrong():
    sent, start = updates(), torch.zeros(100)
    assert torch.equal(Mean()(iter(sent), start, {}), Mean()(sent, start, {}))
    assert torch.equal(Mean()(sent[:1], start, {}), sent[0][0])
    for bad in (float("nan"), float("inf")):
        sent[3][0][7] = bad
        with pytest.raises(ValueError, match="update 3"):
            Mean()(sent, start, {})
    with pytest.raises(ValueError, match="number of updates|no client"):
        Mean()([], start, {})


def test_robust_aggregates_bound_one_scaled_update():
    """One of five sends its step times 100; the mean follows it, the others stay near the honest steps."""
    random = rng(0, "updates")
    start, *steps = (torch.from_numpy(random.standard_normal(50).astype(np.float32)) for _ in range(6))
    honest = [(start + step, 10) for step in steps]
    hostile = [(start + 100 * steps[0], 10), *honest[1:]]
    longest, goal = max(float(step.norm()) for step in steps), Mean()(honest, start, {})
    mean, median, clipped = (
        float((part(iter(hostile), start, {}) - goal).norm()) for part in (Mean(), Median(), Clipped())
    )
    assert mean > 10 * longest and median < longest and clipped < longest


def test_robust_aggregates_are_their_formulas():
    start = torch.zeros(4)
    same = [(torch.tensor([1.0, -2.0, 3.0, 0.0]), n) for n in (1, 2, 3)]
    assert torch.equal(Median()(same, start, {}), Mean()(same, start, {}))
    assert torch.allclose(Clipped()(same, start, {}), Mean()(same, start, {}))
    even = [(torch.tensor([float(x)]), 1) for x in (1, 2, 10, 50)]
    assert Median()(even, torch.zeros(1), {}) == 6  # the middle of the two in the middle
    start = torch.ones(2)
    steps = [(start + torch.tensor(step), 1) for step in ((1.0, 0.0), (0.0, 2.0), (8.0, 0.0))]
    expected = start + torch.tensor(
        [(1.0 + 2.0) / 3, 2.0 / 3]
    )  # shortened to the median, 2; shorter ones stay
    assert torch.allclose(Clipped()(steps, start, {}), expected)


@pytest.mark.parametrize("part", [Mean(), Median(), Clipped()], ids=str)
def test_every_aggregate_learns(part):
    hospitals, method = federation((200, 200)), Method(batches=Balanced(), server=part)
    run = server.run(hospitals, method, 0, rounds=8)
    right = np.trace(run.confusions.sum(1), axis1=1, axis2=2) / len(hospitals.test)
    assert right[-1] > max(right[0] + 0.1, 0.6)


def test_normalised_by_a_device_each_device_looks_alike():
    images = torch.cat([federation().clients[0].images // 2, federation().clients[1].images // 3 + 90])
    device = torch.arange(2).repeat_interleave(torch.tensor([60, 33]))
    own = Client(images, torch.zeros(93, dtype=torch.long), device)

    def styles(data, devices):
        have = sharing.reports([data], 1, devices)
        return sharing.styles(have, sharing.channel_sums(data, devices)[None], 12 * 12)

    shown = normalise(scale(images), styles(own, 2)[device])
    for d in (0, 1):
        part = shown[device == d]
        assert part.mean().abs() < 1e-4 and float(part.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert torch.equal(styles(own, 3)[2], styles(replace(own, device=device * 0), 1)[0])  # nobody's: of all


# ---------------------------------------- equal treatment


@pytest.mark.parametrize("name", METHODS)
def test_equal_steps_and_equal_start_for_every_federated_method(name, monkeypatch):
    """Samples and balanced batches must not buy a method more local steps, or another start."""
    calls, hospitals, method = [], federation(), METHODS[name]

    def spy(net, start, images, labels, *, steps, lr, **rest):
        calls.append((steps, lr, start.clone()))
        return start + 0.001

    monkeypatch.setattr(client, "train_local", spy)
    monkeypatch.setattr(client, "evaluate", lambda *a, **k: np.zeros((2, 3, 3), int))
    monkeypatch.setattr(exchange, "pretrain", lambda net, *a, **k: net.weights.clone())  # local steps only
    server.run(hospitals, method, 0, rounds=2)
    steps, lrs, starts = zip(*calls)
    wanted = [client.steps_of(len(c)) for c in hospitals.clients]
    if method.pooled or getattr(method.sharing, "to", "") == "server only":
        wanted = [client.steps_of(sum(map(len, hospitals.clients)))]
    assert list(steps) == wanted * 2
    assert sorted(set(lrs)) == pytest.approx([0.5 * method.lr, method.lr])
    assert torch.equal(starts[0], SmallCNN(1, 3).weights)


def test_the_oracle_shares_real_images_and_duplication_repeats_ones_own():
    hospitals = federation()
    everything = {image for c in hospitals.clients for image in as_bytes(c.images)}
    oracle = server.share(hospitals, replace(SHARE.sharing, source=RealImages()), 0)
    for k, rows in oracle.rows.items():
        received = set(as_bytes(oracle.pool.images[rows]))
        assert received and received <= everything - set(as_bytes(hospitals.clients[k].images))
    trained, real = {}, client.train_local

    def spy(net, start, images, labels, *, own, **rest):
        trained[own] = images, labels
        return real(net, start, images, labels, own=own, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "train_local", spy)
        run = server.run(hospitals, Method(sharing=Copies(budget=SHARE.sharing.budget)), 0, rounds=1)
    for c in hospitals.clients:
        images, labels = trained[len(c)]
        assert len(c) < len(images) == len(labels) and torch.equal(images[: len(c)], c.images)
        assert set(as_bytes(images[len(c) :])) <= set(as_bytes(c.images))
    assert run.costs["bytes_samples_down"] == 0


def test_fedssg_is_the_adjusted_method_with_sharing():
    assert replace(FEDSSG, sharing=None) == METHODS["fedavg+la"] == methods.ADJUSTED
