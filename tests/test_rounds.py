"""Federated rounds: FedAvg and what each method changes, on noise with a planted class signal."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedssg_helpers import experiment, rounds
from fedssg_helpers.keys import rng
from fedssg_helpers.models import SmallCNN, predict, scale, turn
from fedssg_helpers.partition import Client, Federation
from fedssg_helpers.rounds import Method, average, train_local

CLASSES = 3


def client(number: int, seed: int = 0, device: int = 0, chance=(0.7, 0.2, 0.1)) -> Client:
    random = rng(seed, "test images", number, device)
    labels = random.choice(CLASSES, number, p=chance)
    labels[:CLASSES] = range(CLASSES)
    images = random.integers(0, 200, (number, 1, 12, 12), dtype=np.uint8)
    images += (labels * 25).astype(np.uint8)[:, None, None, None]
    return Client(torch.from_numpy(images), torch.from_numpy(labels), torch.full((number,), device))


def federation(sizes=(60, 33, 40)) -> Federation:
    clients = [client(n, k, k % 2) for k, n in enumerate(sizes)]
    test = Client.joined([client(30, 90, 0), client(30, 91, 1)])
    return Federation(clients, test, ("a", "b", "c"), ("x", "y"), "test")


def local(method: Method = Method(), number: int = 40, steps: int = 6, seed: int = 0, **options) -> torch.Tensor:
    net = SmallCNN(1, CLASSES)
    holds = client(number)
    return train_local(net, net.weights.clone(), holds.images, holds.labels, steps=steps, lr=0.05,
                       random=rng(seed, "local"), method=method, **options)


# ------------------------------------------------------------------------------------------------------ the network

def test_flat_weights_are_the_network():
    net = SmallCNN(1, CLASSES)
    images = client(8).images
    before = net(images)
    net.weights.mul_(1.5)
    assert not torch.allclose(net(images), before)
    assert len(net.weights) == sum(p.numel() for p in net.parameters())
    F.cross_entropy(net(images), client(8).labels).backward()
    assert net.grad.abs().sum() > 0 and torch.equal(net.grad, torch.cat([p.grad.flatten() for p in net.parameters()]))


def test_initial_weights_belong_to_the_seed():
    assert torch.equal(SmallCNN(3, 5, 1).weights, SmallCNN(3, 5, 1).weights)
    assert not torch.equal(SmallCNN(3, 5, 1).weights, SmallCNN(3, 5, 2).weights)


def test_eight_different_orientations():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    assert len({tuple(turn(image, which).flatten().tolist()) for which in range(8)}) == 8


# ---------------------------------------------------------------------------------------------------- local training

def test_local_training_is_sgd_with_momentum_and_weight_decay():
    """Against torch.optim.SGD on the same batches, with logit adjustment."""
    holds = client(40)
    net = SmallCNN(1, CLASSES)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    offset = rounds.log_prior(holds.labels, CLASSES)
    random = rng(0, "local")
    for rows in rounds.batches(holds.labels, 6, 32, random):
        optimiser.zero_grad(set_to_none=False)
        x = turn(scale(holds.images[rows]), int(random.integers(8)))
        F.cross_entropy(net(x) + offset, holds.labels[rows]).backward()
        optimiser.step()
    assert torch.allclose(net.weights, local(Method(logit_adjustment=True)), atol=1e-5)


def test_the_round_starts_from_the_given_weights_and_leaves_them_alone():
    net, holds = SmallCNN(1, CLASSES), client(40)
    start = torch.randn(len(net.weights), generator=torch.Generator().manual_seed(0)) * 0.01
    kept = start.clone()
    ends = []
    for rubbish in (0.0, 3.0):
        net.weights.fill_(rubbish)
        ends.append(train_local(net, start, holds.images, holds.labels, steps=3, lr=0.05, random=rng(0, "x")))
    assert torch.equal(start, kept) and torch.equal(ends[0], ends[1])


def test_fedprox_with_mu_0_is_fedavg_bit_for_bit():
    assert torch.equal(local(Method(mu=0.0)), local(Method()))
    a, b = (rounds.run(federation(), method, 0, rounds=2) for method in (Method(mu=0.0), Method()))
    assert np.array_equal(a.weights, b.weights)


def test_fedprox_adds_mu_times_the_distance_to_the_gradient():
    """After two steps without momentum, the only difference is lr * mu * (w1 - w0)."""
    plain = {"momentum": 0.0, "decay": 0.0, "number": 100}  # one pass serves both, so the batches are the same
    start = SmallCNN(1, CLASSES).weights
    first = local(steps=1, **plain)
    assert torch.equal(first, local(Method(mu=0.5), steps=1, **plain))  # at the start the pull is zero
    difference = local(steps=2, **plain) - local(Method(mu=0.5), steps=2, **plain)
    assert torch.allclose(difference, 0.05 * 0.5 * (first - start), atol=1e-6)


def test_fedprox_gradient_equals_the_closed_form():
    w, start = torch.randn(50, dtype=torch.double, requires_grad=True), torch.randn(50, dtype=torch.double)
    (0.3 / 2 * (w - start).square().sum()).backward()
    assert torch.allclose(w.grad, 0.3 * (w.detach() - start))


def test_a_stronger_pull_keeps_closer():
    start = SmallCNN(1, CLASSES).weights
    drift = [float((local(Method(mu=mu), steps=20) - start).norm()) for mu in (0, 0.1, 1, 5)]
    assert drift == sorted(drift, reverse=True)


def test_passes_see_every_image_equally_often():
    labels = torch.zeros(40, dtype=torch.long)
    rows = torch.cat(list(rounds.batches(labels, 5, 16, rng(0, "x"))))
    assert (torch.bincount(rows, minlength=40) == 2).all()


def test_balanced_sampling_balances():
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    rows = torch.cat(list(rounds.batches(labels, 100, 64, rng(0, "x"), balanced=True)))
    part = torch.bincount(labels[rows], minlength=5) / len(rows)
    assert torch.allclose(part, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3, 0]), atol=0.025)


def test_logit_adjustment_offset():
    prior = rounds.log_prior(torch.tensor([0] * 6 + [1] * 3), 3)
    assert torch.allclose(prior, (torch.tensor([6, 3, 0.1]) / 9.1).log())
    assert torch.isfinite(prior).all()


def test_logit_adjustment_is_only_for_training():
    run = rounds.run(federation(), Method(logit_adjustment=True), 0, rounds=1)
    net = SmallCNN(1, CLASSES)
    net.weights.copy_(torch.from_numpy(run.weights))
    test = federation().test
    called = torch.bincount(predict(net, test.images), minlength=CLASSES).numpy()
    assert np.array_equal(run.confusions[-1].sum((0, 1)), called)


@pytest.mark.parametrize("labels, word", [([], "no images"), ([0, 1, 3], "0 to 2"), ([0, -1, 1], "-1")])
def test_bad_clients_are_named(labels, word):
    net, labels = SmallCNN(1, CLASSES), torch.tensor(labels, dtype=torch.long)
    images = torch.zeros(len(labels), 1, 12, 12, dtype=torch.uint8)
    with pytest.raises(ValueError, match=word):
        train_local(net, net.weights.clone(), images, labels, steps=1, lr=0.1, random=rng(0, "x"))


# -------------------------------------------------------------------------------------------------------- averaging

def updates(number: int = 5):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(100, generator=generator), 10 * k + 1) for k in range(number)]


def test_average_equals_the_closed_form_whatever_the_order():
    sent = updates()
    share = torch.tensor([n for _, n in sent]) / sum(n for _, n in sent)
    wanted = (torch.stack([w for w, _ in sent]) * share[:, None]).sum(0)
    assert torch.isclose(share.sum(), torch.tensor(1.0))
    assert torch.allclose(average(sent), wanted, atol=1e-6)
    assert torch.allclose(average(sent[::-1]), average(sent), atol=1e-6)


def test_shares_sum_to_one():
    assert torch.allclose(average([(torch.ones(4), n) for n in (1, 7, 100)]), torch.ones(4), atol=1e-7)
    alone = updates()[0]
    assert torch.equal(average([alone]), alone[0])


def test_average_takes_a_stream():
    assert torch.equal(average(iter(updates())), average(updates()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_client(bad):
    sent = updates()
    sent[3][0][7] = bad
    with pytest.raises(ValueError, match="client 3"):
        average(sent)


def test_nobody_to_average():
    with pytest.raises(ValueError, match="no client"):
        average([])


# ------------------------------------------------------------------------------------------------------- whole runs

def test_run_is_the_loop_of_the_lesson():
    dealt, weights = federation(), SmallCNN(1, CLASSES).weights.clone()
    net = SmallCNN(1, CLASSES)
    for r in range(2):
        rate = 0.05 * 0.5 * (1 + np.cos(np.pi * r / 2))
        weights = average([(train_local(net, weights, c.images, c.labels, steps=rounds.steps_of(c), lr=rate,
                                        random=rng(0, "local training", k, r)), len(c))
                           for k, c in enumerate(dealt.clients)])
    assert np.array_equal(rounds.run(dealt, Method(), 0, rounds=2).weights, weights.numpy())


@pytest.mark.parametrize("name", experiment.METHODS)
def test_equal_steps_and_equal_start_for_every_federated_method(name, monkeypatch):
    """Synthetic images and balanced batches must not buy a method more local steps, or another start."""
    def spy(net, start, images, labels, *, steps: int, lr: float, **rest):
        calls.append((steps, lr, start.clone()))
        return start + 0.001

    calls: list = []
    monkeypatch.setattr(rounds, "train_local", spy)
    monkeypatch.setattr(rounds, "pretrain", lambda net, *a, **k: net.weights.clone())  # local steps only
    dealt = federation()
    rounds.run(dealt, experiment.METHODS[name], 0, rounds=2)
    steps, lrs, starts = zip(*calls)
    wanted = [rounds.steps_of(c) for c in dealt.clients]
    if name == "centralised":
        assert steps == (rounds.steps_of(Client.joined(dealt.clients)),) * 2
    else:
        assert list(steps) == wanted * 2
    assert sorted(set(lrs)) == pytest.approx([0.025, 0.05])
    assert torch.equal(starts[0], SmallCNN(1, CLASSES).weights)


@pytest.mark.parametrize("name", ["fedavg", "balanced_sampling", "fedssg"])
def test_runs_are_bit_equal_whatever_ran_before(name):
    method = Method(**{**vars(experiment.METHODS[name]), "pretrain_steps": 8 if name == "fedssg" else 0})
    first = rounds.run(federation(), method, 0, rounds=2)
    rounds.run(federation((20, 50)), experiment.METHODS["fedavg+la"], 5, rounds=1)
    torch.manual_seed(99), np.random.seed(99)
    again = rounds.run(federation(), method, 0, rounds=2)
    assert np.array_equal(first.weights, again.weights) and np.array_equal(first.confusions, again.confusions)
    assert not np.array_equal(first.weights, rounds.run(federation(), method, 1, rounds=2).weights)


def test_a_run_learns():
    dealt = federation((200, 200))
    run = rounds.run(dealt, Method(balanced=True), 0, rounds=8)
    right = np.trace(run.confusions.sum(1), axis1=1, axis2=2) / len(dealt.test)
    assert right[-1] > right[0] + 0.1 and right[-1] > 0.6


def test_what_a_run_leaves_behind():
    seen = []
    dealt = federation()
    run = rounds.run(dealt, Method(), 0, rounds=3, after_round=lambda r, so_far: seen.append((r, len(so_far.rounds))))
    assert run.rounds.tolist() == [0, 1, 2, 3] and seen == [(1, 2), (2, 3), (3, 4)]
    assert run.confusions.shape == (4, 2, 3, 3) and (run.confusions.sum((1, 2, 3)) == len(dealt.test)).all()
    assert run.costs["bytes_up"] == run.costs["bytes_down"] == 3 * 3 * run.weights.nbytes
    assert run.costs["bytes_samples_up"] == run.costs["generator_seconds"] == 0 < run.costs["train_seconds"]


def test_sharing_is_counted_in_bytes():
    method = Method(sharing="class_and_device")
    dealt = federation()
    costs = rounds.run(dealt, method, 0, rounds=1).costs
    plain = rounds.run(dealt, Method(), 0, rounds=1).costs
    assert costs["bytes_samples_up"] > 0 and costs["bytes_samples_up"] % (12 * 12) == 0
    assert costs["bytes_up"] == plain["bytes_up"] + costs["bytes_samples_up"]
    assert costs["bytes_down"] == plain["bytes_down"] + costs["bytes_samples_down"]


def test_received_samples_do_not_buy_weight_in_the_average(monkeypatch):
    counted, real = [], rounds.average
    monkeypatch.setattr(rounds, "average", lambda sent: real([(w, counted.append(n) or n) for w, n in sent]))
    dealt = federation()
    rounds.run(dealt, Method(sharing="class_and_device"), 0, rounds=1)
    assert counted == [len(c) for c in dealt.clients]


def test_many_rounds_are_tested_about_twenty_times_and_at_the_end(monkeypatch):
    monkeypatch.setattr(rounds, "train_local", lambda net, start, *a, **k: start)
    tested = rounds.run(federation((5,)), Method(), 0, rounds=50).rounds
    assert 20 <= len(tested) <= 27 and tested[0] == 0 and tested[-1] == 50


def test_centralised_moves_no_weights():
    costs = rounds.run(federation(), experiment.METHODS["centralised"], 0, rounds=1).costs
    assert costs["bytes_up"] == costs["bytes_down"] == 0


def test_a_hospital_that_is_alone_copes():
    run = rounds.run(federation((40,)), experiment.METHODS["fedssg"], 0, rounds=1)
    assert np.isfinite(run.weights).all() and run.costs["bytes_samples_up"] == 0


def test_divergence_names_the_client():
    with pytest.raises(ValueError, match="client 0"), np.errstate(all="ignore"):
        rounds.run(federation(), Method(mu=1e30), 0, rounds=3)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": -3}, {"rounds": 1, "lr": 0}, {"rounds": 1, "lr": -0.1},
                                     {"rounds": 1, "lr": float("nan")}])
def test_impossible_settings_are_named(options):
    with pytest.raises(ValueError, match="rounds is .* lr is"):
        rounds.run(federation(), Method(), 0, **options)


def test_an_empty_hospital_is_named():
    dealt = federation()
    nobody = Client(*(part[:0] for part in vars(dealt.clients[0]).values()))
    broken = Federation([dealt.clients[0], nobody], dealt.test, dealt.classes, dealt.devices, "test")
    with pytest.raises(ValueError, match="hospital 1 has no images"):
        rounds.run(broken, Method(), 0, rounds=1)


@pytest.mark.parametrize("fields, word", [({"mu": -0.1}, "mu"), ({"pretrain_steps": -1}, "pretrain_steps"),
                                          ({"sharing": "everything"}, "no sharing rule")])
def test_impossible_methods_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        Method(**fields)
