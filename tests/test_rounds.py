"""Federated rounds: FedAvg and what each method changes, on noise with a planted class signal."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedssg_helpers import experiment, rounds, sharing
from fedssg_helpers.keys import rng
from fedssg_helpers.models import SmallCNN, normalise, predict, scale, turn
from fedssg_helpers.partition import Client, Federation
from fedssg_helpers.rounds import Method, average, train_local
from fedssg_helpers.sharing import Budget

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
    for rows in rounds.batches(len(holds), 6, 32, random):
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
    rows = torch.cat(list(rounds.batches(40, 5, 16, rng(0, "x"))))
    assert (torch.bincount(rows, minlength=40) == 2).all()


def test_balanced_sampling_balances():
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    chance = rounds.draw_chances(labels, balanced=True)
    rows = torch.cat(list(rounds.batches(len(labels), 100, 64, rng(0, "x"), chance)))
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
    monkeypatch.setattr(rounds, "evaluate", lambda *a, **k: np.zeros((2, CLASSES, CLASSES), int))
    dealt = federation()
    rounds.run(dealt, experiment.METHODS[name], 0, rounds=2)
    steps, lrs, starts = zip(*calls)
    wanted = [rounds.steps_of(c) for c in dealt.clients]
    method = experiment.METHODS[name]
    if method.trained_at != "hospitals":
        assert steps == (rounds.steps_of(Client.joined(dealt.clients)),) * 2
    else:
        assert list(steps) == wanted * 2
    assert sorted(set(lrs)) == pytest.approx([0.5 * method.lr, method.lr])
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
    assert run.rounds.tolist() == [0, 1, 2, 3] and seen == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert run.confusions.shape == (4, 2, 3, 3) and (run.confusions.sum((1, 2, 3)) == len(dealt.test)).all()
    assert run.costs["bytes_up"] == run.costs["bytes_down"] == 3 * 3 * run.weights.nbytes
    assert run.costs["bytes_samples_up"] == run.costs["generator_seconds"] == 0 < run.costs["train_seconds"]


def test_sharing_is_counted_in_bytes():
    method = Method(sharing="class_and_device")
    dealt = federation()
    costs = rounds.run(dealt, method, 0, rounds=1).costs
    plain = rounds.run(dealt, Method(), 0, rounds=1).costs
    assert costs["bytes_samples_up"] > 0 and costs["bytes_samples_down"] > 0
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
    with pytest.raises(ValueError, match="round 2 was refused, that of hospital 0"), np.errstate(all="ignore"):
        rounds.run(federation(), Method(mu=1e30), 0, rounds=3)


@pytest.mark.parametrize("number", [0, -3])
def test_impossible_settings_are_named(number):
    with pytest.raises(ValueError, match="rounds is"):
        rounds.run(federation(), Method(), 0, rounds=number)


def test_an_empty_hospital_is_named():
    dealt = federation()
    nobody = Client(*(part[:0] for part in vars(dealt.clients[0]).values()))
    broken = Federation([dealt.clients[0], nobody], dealt.test, dealt.classes, dealt.devices, "test")
    with pytest.raises(ValueError, match="hospital 1 has no images"):
        rounds.run(broken, Method(), 0, rounds=1)


@pytest.mark.parametrize("fields, word", [
    ({"mu": -0.1}, "mu"), ({"pretrain_steps": -1}, "pretrain_steps"), ({"sharing": "everything"}, "no sharing rule"),
    ({"lr": 0}, "lr"), ({"lr": float("nan")}, "lr"), ({"server_momentum": 1.0}, "server_momentum"),
    ({"drop": 1.0}, "drop"), ({"share": 1.5}, "share"), ({"temperature": -1}, "temperature"),
    ({"at_home": "head"}, "at_home"), ({"content": "photos"}, "content"), ({"trained_at": "moon"}, "trained_at"),
    ({"pretrain_steps": 5}, "no pool"), ({"trained_at": "pool"}, "no pool")])
def test_impossible_methods_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        Method(**fields)


# ------------------------------------------------------------------------------------- what each method changes

def weights_of(method: Method, number: int = 2, **dealt) -> np.ndarray:
    return rounds.run(federation(**dealt), method, 0, rounds=number).weights


SHARE = Method(sharing="class_and_device", budget=Budget(fill=60, cell=10))


@pytest.mark.parametrize("same", [
    Method(server_momentum=0.0), Method(at_home=""), Method(scaffold=False),
    Method(sharing="class_and_device", budget=Budget(receive=0)),  # nothing is received
    Method(sharing="class_and_device", deal=False),  # a pool that nobody uses
    Method(sharing="class_and_device", content="copies", budget=Budget(fill=0, cell=0))])
def test_each_falls_back_to_fedavg_bit_for_bit(same):
    assert np.array_equal(weights_of(same), weights_of(Method()))


@pytest.mark.parametrize("fields", [
    {"scaffold": True}, {"server_momentum": 0.5}, {"at_home": "norm"}, {"device_statistics": True}, {"share": 0.5},
    {"share": 0.5, "decay": True}, {"drop": 0.5}, {"refresh": True}, {"content": "copies"}, {"content": "real"},
    {"temperature": 0.0}, {"sharing": "class_only"}, {"sharing": "device_only"}, {"sharing": "uniform"}])
def test_each_field_does_something_and_is_bit_equal_when_repeated(fields):
    changed = replace(SHARE, **fields)
    assert not np.array_equal(weights_of(changed), weights_of(SHARE))
    assert np.array_equal(weights_of(changed), weights_of(changed))


def test_server_momentum_is_its_formula():
    """FedAvgM: v = beta v + (w - mean), w = w - v; means are FedAvg's of the same start, so look at round two."""
    dealt, net = federation(), SmallCNN(1, CLASSES)
    sent = []
    for beta in (0.0, 0.5):
        sent.append(torch.from_numpy(rounds.run(dealt, Method(server_momentum=beta), 0, rounds=1).weights))
    assert torch.allclose(*sent, atol=1e-6)  # no last step yet
    calls, real = [], rounds.average
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "average", lambda updates: calls.append(real(updates)) or calls[-1])
        end = torch.from_numpy(rounds.run(dealt, Method(server_momentum=0.5), 0, rounds=2).weights)
    first = net.weights - calls[0]
    assert torch.allclose(end, calls[0] - (0.5 * first + calls[0] - calls[1]), atol=1e-6)


def test_scaffold_starts_as_fedavg_and_its_corrections_sum_to_zero():
    dealt = federation((60, 60, 60))
    first = [rounds.run(dealt, Method(scaffold=on), 0, rounds=1).weights for on in (True, False)]
    assert np.array_equal(*first)  # all controls are zero in the first round
    seen, real = [], rounds.train_local

    def spy(net, start, *a, correction=None, **k):
        seen.append(correction)
        return real(net, start, *a, correction=correction, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "train_local", spy)
        rounds.run(dealt, Method(scaffold=True), 0, rounds=2)
    second = torch.stack(seen[3:])
    assert second.abs().max() > 0 and torch.allclose(second.sum(0), torch.zeros(second.shape[1]), atol=1e-5)


def test_travel_is_the_distance_of_sgd_with_momentum():
    w = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for _ in range(7):
        w.grad = torch.ones(1)
        optimiser.step()
    assert rounds.travel(7, 0.1) == pytest.approx(-w.item(), rel=1e-5)


def test_scaffold_recovers_a_constant_gradient():
    """(start - end) / travel is the mean gradient: exact where the gradient is constant (here: zero loss, a pull)."""
    start, gradient = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    speed, w = torch.zeros(3), start.clone()
    for _ in range(5):
        speed = 0.9 * speed + gradient
        w = w - 0.03 * speed
    assert torch.allclose((start - w) / rounds.travel(5, 0.03), gradient, atol=1e-5)


def test_what_stays_at_home():
    """Norms at home: the shared part is common, bytes are saved; all at home: every hospital is alone."""
    dealt, plain = federation(), rounds.run(federation(), Method(), 0, rounds=2).costs["bytes_up"]
    net = SmallCNN(1, CLASSES)
    saved = plain - rounds.run(dealt, Method(at_home="norm"), 0, rounds=2).costs["bytes_up"]
    assert saved == 4 * 3 * 2 * int(net.norms().sum())
    run = rounds.run(dealt, Method(at_home="all"), 0, rounds=2)
    assert run.costs["bytes_up"] == 0
    alone = []
    for k, c in enumerate(dealt.clients):
        w = SmallCNN(1, CLASSES).weights
        for r in range(2):
            w = train_local(net, w, c.images, c.labels, steps=rounds.steps_of(c), random=rng(0, "local training", k, r),
                            lr=0.05 * 0.5 * (1 + np.cos(np.pi * r / 2)))
        alone.append(w)
    assert np.array_equal(run.confusions[-1], rounds.evaluate_at_home(net, alone, dealt, 0))
    assert (run.confusions.sum((1, 2, 3)) == len(dealt.test)).all()  # each test image is judged once


def test_norms_are_the_normalisation_layers():
    net = SmallCNN(3, 5)
    chosen = net.norms()
    net.weights[chosen] = 7.0
    norms = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert all((m.weight == 7).all() and (m.bias == 7).all() for m in norms)
    assert int(chosen.sum()) == 2 * sum(m.num_channels for m in norms)


def test_centre_is_one_hospital_with_everything():
    dealt = federation()
    merged = replace(dealt, clients=[Client.joined(dealt.clients)])
    run = rounds.run(dealt, Method(trained_at="centre"), 0, rounds=2)
    assert np.array_equal(run.weights, rounds.run(merged, Method(), 0, rounds=2).weights)
    assert run.costs["bytes_up"] == run.costs["bytes_down"] == 0


def test_the_pool_alone_never_sees_a_real_image(monkeypatch):
    seen, real = [], rounds.train_local
    monkeypatch.setattr(rounds, "train_local", lambda net, start, images, *a, **k: (
        seen.append(images), real(net, start, images, *a, **k))[1])
    dealt, method = federation(), replace(SHARE, trained_at="pool")
    costs = rounds.run(dealt, method, 0, rounds=1).costs
    pool = rounds.exchange(dealt.clients, dealt, method, 0).pool.images
    assert len(seen) == 1 and torch.equal(seen[0], pool)
    assert costs["bytes_down"] == 0 and costs["bytes_up"] == costs["bytes_samples_up"] > 0


def test_the_oracle_deals_real_images_and_duplication_ones_own():
    dealt = federation()
    everything = {bytes(image.numpy()) for c in dealt.clients for image in c.images}
    for content in ("real", "copies"):
        method = replace(SHARE, content=content)
        shared = rounds.exchange(dealt.clients, dealt, method, 0)
        for client, place in zip(dealt.clients, rounds.places_of(dealt.clients, dealt, method, 0, shared)):
            mine = {bytes(image.numpy()) for image in client.images}
            received = {bytes(image.numpy()) for image in place.images[place.own:]}
            assert place.own == len(client) < len(place.images) == len(place.labels)
            assert received <= (mine if content == "copies" else everything - mine)
    assert rounds.run(dealt, replace(SHARE, content="copies"), 0, rounds=1).costs["bytes_samples_down"] == 0


def test_a_share_of_every_batch_and_its_prior():
    labels = torch.tensor([0] * 90 + [1] * 10 + [1] * 20)
    chance = rounds.draw_chances(labels, own=100, share=0.4)
    assert chance.sum() == pytest.approx(1) and chance[100:].sum() == pytest.approx(0.4)
    assert rounds.draw_chances(labels, own=120, share=0.4) is None  # nothing received
    prior = rounds.log_prior(labels, 3, chance).exp()
    assert torch.allclose(prior, torch.tensor([0.54, 0.46, 0.1 / 120]) / (1 + 0.1 / 120), atol=1e-5)


def test_normalised_by_a_device_each_device_looks_alike():
    images = torch.cat([client(200, 1).images // 2, client(200, 2).images // 3 + 90])
    device = torch.arange(2).repeat_interleave(200)
    holder = Client(images, torch.zeros(400, dtype=torch.long), device)
    styles = sharing.styles([holder], 2)
    shown = normalise(scale(images), styles[device])
    for d in (0, 1):
        own = shown[device == d]
        assert own.mean().abs() < 1e-4 and float(own.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert torch.equal(sharing.styles([holder], 3)[2], sharing.styles([replace(holder, device=device * 0)], 1)[0])


def test_the_filter_drops_what_is_least_convincing():
    net = SmallCNN(1, CLASSES)
    with torch.no_grad():
        net.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    holds = client(100)
    pool = sharing.Pool(holds.images, holds.labels, holds.device, holds.device)
    keep = rounds.convincing(net, net.weights.clone(), pool, 0.3)
    belief = net(holds.images).log_softmax(1)[torch.arange(100), holds.labels]
    for c in range(CLASSES):
        own = holds.labels == c
        assert int(keep[own].sum()) == pytest.approx(0.7 * int(own.sum()), abs=1)
        assert belief[own & keep].min() > belief[own & ~keep].max()
