"""Whole runs: the loop, what it costs, what it leaves behind, and methods of one or no hospital."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kills import equal
from small import CLASSES, SHARE, federation
from small import client as client_of

from fedssg_helpers import client, dpsgd, models, server
from fedssg_helpers.keys import rng
from fedssg_helpers.methods import FEDSSG, METHODS, Balanced, Mean, Method, Proximal, Sharing
from fedssg_helpers.models import SmallCNN
from fedssg_helpers.partition import Client, Federation
from fedssg_helpers.sharing import Budget

# ---------------------------------------- the loop


def test_run_is_the_loop_of_the_lesson():
    hospitals, net = federation(), SmallCNN(1, CLASSES)
    weights = net.weights.clone()
    for r in range(2):
        lr = 0.05 * 0.5 * (1 + np.cos(np.pi * r / 2))
        updates = []
        for k, c in enumerate(hospitals.clients):
            known = dict(steps=client.steps_of(len(c)), lr=lr, random=rng(0, "local training", k, r))
            updates.append((client.train_local(net, weights, c.images, c.labels, **known), len(c)))
        weights = Mean()(updates, weights, {})
    assert np.array_equal(server.run(hospitals, Method(), 0, rounds=2).weights, weights.numpy())


@pytest.mark.parametrize("name", ["fedavg", "balanced_sampling", "fedssg"])
def test_runs_are_bit_equal_whatever_ran_before(name):
    method = METHODS[name]
    if method.sharing:
        method = replace(method, sharing=replace(method.sharing, pretrain_steps=8))
    first = server.run(federation(), method, 0, rounds=2)
    server.run(federation((20, 50)), METHODS["fedavg+la"], 5, rounds=1)
    torch.manual_seed(99), np.random.seed(99)
    assert equal(first, server.run(federation(), method, 0, rounds=2))
    assert not np.array_equal(first.weights, server.run(federation(), method, 1, rounds=2).weights)


def test_a_run_learns_what_it_says():
    hospitals = federation((200, 200))
    run = server.run(hospitals, Method(batches=Balanced()), 0, rounds=8)
    right = np.trace(run.confusions.sum(1), axis1=1, axis2=2) / len(hospitals.test)
    assert right[-1] > max(right[0] + 0.1, 0.6)
    net = SmallCNN(1, CLASSES)
    net.weights.copy_(torch.from_numpy(run.weights))
    called = torch.bincount(models.predict(net, hospitals.test.images), minlength=CLASSES).numpy()
    assert np.array_equal(run.confusions[-1].sum((0, 1)), called)


def test_what_a_run_leaves_behind():
    seen, hospitals = [], federation()
    note = lambda r, so_far: seen.append((r, len(so_far.rounds)))  # noqa: E731
    run = server.run(hospitals, Method(), 0, rounds=3, after_round=note)
    assert run.rounds.tolist() == [0, 1, 2, 3] and seen == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert run.confusions.shape == (4, 2, 3, 3)
    assert (run.confusions.sum((1, 2, 3)) == len(hospitals.test)).all()
    assert run.costs["bytes_up"] == run.costs["bytes_down"] == 3 * 3 * run.weights.nbytes
    assert run.costs["bytes_samples_up"] == run.costs["generator_seconds"] == 0 < run.costs["train_seconds"]
    assert run.took_part.all() and run.took_part.shape == (3, 3) and run.missed == []


def test_samples_are_counted_in_bytes_and_do_not_buy_weight_in_the_average(monkeypatch):
    counted, hospitals = [], federation()

    def counting(updates, weights, memory):
        return Mean()([(w, counted.append(n) or n) for w, n in updates], weights, memory)

    plain = server.run(hospitals, Method(), 0, rounds=1).costs
    costs = server.run(hospitals, replace(SHARE, server=counting), 0, rounds=1).costs
    assert counted == [len(c) for c in hospitals.clients]
    for way in ("up", "down"):
        assert costs[f"bytes_{way}"] == plain[f"bytes_{way}"] + costs[f"bytes_samples_{way}"]
        assert costs[f"bytes_samples_{way}"] > 0
    assert costs["generator_seconds"] > 0


def test_many_rounds_are_tested_about_twenty_times_and_at_the_end(monkeypatch):
    monkeypatch.setattr(client, "train_local", lambda net, start, *a, **k: start)
    tested = server.run(federation((5,)), Method(), 0, rounds=50).rounds
    assert 20 <= len(tested) <= 27 and tested[0] == 0 and tested[-1] == 50


def test_more_epochs_are_more_steps(monkeypatch):
    steps = []
    monkeypatch.setattr(client, "train_local", lambda net, w, *a, **k: steps.append(k["steps"]) or w)
    for epochs in (1, 3):
        server.run(federation((60, 33)), Method(), 0, rounds=1, epochs=epochs)
    assert steps == [2, 2, 6, 6]


def test_divergence_names_the_hospital():
    with pytest.raises(ValueError, match="round 2 .* hospital 0.*not finite"), np.errstate(all="ignore"):
        server.run(federation(), Method(gradient=Proximal(1e30)), 0, rounds=3)


@pytest.mark.parametrize(
    "options",
    [{"rounds": 0}, {"rounds": -3}, {"rounds": 1, "epochs": 0}, {"rounds": 1, "workers": 0}],
    ids=str,
)
def test_impossible_numbers_are_named(options):
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=f"{name} is {value}.*at least 1|{name} is {value}.*1 or"):
        server.run(federation(), Method(), 0, **options)


def test_an_empty_hospital_is_named():
    whole = federation()
    clients = [whole.clients[0], whole.clients[0].take(slice(0))]
    broken = Federation(clients, whole.test, whole.classes, whole.devices, "test")
    with pytest.raises(ValueError, match=r"hospital \[?1\]?.*images"):
        server.run(broken, Method(), 0, rounds=1)


def test_hospitals_that_do_not_fit_together_are_named():
    """They must agree on one shape of images."""
    whole = federation()
    clients = [whole.clients[0], client_of(20, 1, 1, size=16)]
    with pytest.raises(ValueError, match="shape of hospital 1"):
        server.run(replace(whole, clients=clients), Method(), 0, rounds=1)


# ---------------------------------------- what stays, and who trains


def test_what_stays_at_a_hospital():
    """Norms stay: their bytes are saved; all stays: every hospital is alone, and tests its own test images."""
    hospitals, net = federation(), SmallCNN(1, CLASSES)
    plain, some = (server.run(hospitals, m, 0, rounds=2) for m in (Method(), Method(stays="norm")))
    assert plain.costs["bytes_up"] - some.costs["bytes_up"] == 4 * 3 * 2 * int(net.norms().sum())
    run = server.run(hospitals, Method(stays="all"), 0, rounds=2)
    assert run.costs["bytes_up"] == run.costs["bytes_down"] == 0
    owner, expected = server.home_of_tests(hospitals, 0), 0
    for k, c in enumerate(hospitals.clients):
        w = SmallCNN(1, CLASSES).weights
        for r in range(2):
            known = dict(steps=client.steps_of(len(c)), random=rng(0, "local training", k, r))
            w = client.train_local(net, w, c.images, c.labels, lr=client.learning_rate(0.05, r, 2), **known)
        expected = expected + client.evaluate(net, w, hospitals.test.take(owner == k), CLASSES, 2)
    assert np.array_equal(run.confusions[-1], expected)
    assert (run.confusions.sum((1, 2, 3)) == len(hospitals.test)).all()  # each test image is judged once


def test_pooled_is_one_hospital_with_everything():
    hospitals = federation()
    merged = replace(hospitals, clients=[Client.joined(hospitals.clients)])
    run = server.run(hospitals, Method(pooled=True), 0, rounds=2)
    assert np.array_equal(run.weights, server.run(merged, Method(), 0, rounds=2).weights)
    assert run.costs["bytes_up"] == run.costs["bytes_down"] == 0


def test_the_server_alone_never_sees_a_real_image(monkeypatch):
    seen, real = [], client.train_local

    def spy(net, start, images, *rest, **options):
        seen.append(images)
        return real(net, start, images, *rest, **options)

    monkeypatch.setattr(client, "train_local", spy)
    how = replace(SHARE.sharing, to="server only")
    costs = server.run(federation(), replace(SHARE, sharing=how), 0, rounds=1).costs
    assert len(seen) == 1 and torch.equal(seen[0], server.share(federation(), how, 0).pool.images)
    assert costs["bytes_down"] == 0 and costs["bytes_up"] == costs["bytes_samples_up"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_one_hospital_runs_or_says_why_not(name):
    """Nobody can send samples to it: methods that share are then their fallback."""
    if name == "synthetic_only":
        with pytest.raises(ValueError, match="pool .*empty.* two hospitals"):
            server.run(federation((40,)), METHODS[name], 0, rounds=1)
        return
    run = server.run(federation((40,)), METHODS[name], 0, rounds=1)
    assert np.isfinite(run.weights).all() and run.costs["bytes_samples_up"] == 0 and run.took_part.all()


@pytest.mark.parametrize("name", METHODS)
def test_a_hospital_with_one_image_takes_part(name):
    """Issue of old: a one-element index gives a number in place of a vector."""
    hospitals, method = federation((60, 40, 5)), METHODS[name]
    hospitals.clients[2] = hospitals.clients[2].take([1])
    if getattr(method.sharing, "pretrain_steps", 0):
        method = replace(method, sharing=replace(method.sharing, pretrain_steps=8))
    run = server.run(hospitals, method, 0, rounds=2)
    assert np.isfinite(run.weights).all() and run.took_part.all() and not run.missed


@pytest.mark.skipif(bool(dpsgd.opacus_missing()), reason="the privacy extra is not installed")
def test_a_method_with_differential_privacy_runs():
    how = replace(SHARE.sharing, source=dpsgd.DPSGD(epsilon=10, steps=20))
    run = server.run(federation(), replace(SHARE, sharing=how), 0, rounds=1)
    assert np.isfinite(run.weights).all() and run.missed == [] and run.costs["bytes_samples_down"] > 0
    plain = server.share(federation(), SHARE.sharing, 0)
    assert not torch.equal(server.share(federation(), how, 0).pool.images, plain.pool.images)


# ---------------------------------------- processors


STATEFUL = ("scaffold", "local_normalisation", "fedssg")


@pytest.mark.parametrize("name", STATEFUL)
def test_any_number_of_workers_gives_the_same_bits(name):
    method = METHODS[name]
    if method.sharing:
        method = replace(method, sharing=replace(method.sharing, pretrain_steps=8))
    one, two, three = (server.run(federation(), method, 0, rounds=2, workers=n) for n in (1, 2, 3))
    assert equal(one, two) and equal(one, three)


def test_the_number_of_threads_stays_as_it_was():
    before = torch.get_num_threads()
    try:
        for number in (3, 1):
            torch.set_num_threads(number)
            for workers in (1, 2):
                server.run(federation((20, 20)), SHARE, 0, rounds=1, workers=workers)
                assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


def test_train_seconds_are_processor_seconds():
    """Two hospitals side by side report about as much as one after the other: not the time they wait."""
    hospitals = federation((400, 400))
    server.run(hospitals, Method(), 0, rounds=1, workers=2)
    one, two = (server.run(hospitals, Method(), 0, rounds=3, workers=n).costs for n in (1, 2))
    assert 1 / 2.5 < two["train_seconds"] / one["train_seconds"] < 2.5


def test_waiting_is_no_processor_time(monkeypatch):
    import time

    monkeypatch.setattr(client, "train_local", lambda net, start, *a, **k: time.sleep(0.3) or start)
    assert server.run(federation((20, 20)), Method(), 0, rounds=1).costs["train_seconds"] < 0.3


def test_orientations_are_found_once_per_hospital(monkeypatch):
    calls, real = [], models.plausible_orientations
    for module in (client, client.protection, client.generator, server.exchange):
        if hasattr(module, "plausible_orientations"):
            monkeypatch.setattr(module, "plausible_orientations", lambda x: calls.append(len(x)) or real(x))
    how = Sharing(budget=Budget(fill=60, cell=10), pretrain_steps=8)
    server.run(federation((60, 33, 40, 50)), replace(FEDSSG, sharing=how), 0, rounds=1)
    assert 4 <= len(calls) <= 5  # and once for the pool, which the server trains on
