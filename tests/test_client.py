"""What a hospital does: the network, local training, samples, what it remembers, on noise with a class signal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import CLASSES, as_bytes, client, noise
from torch.nn import functional as F

from fedssg_helpers import client as hospital
from fedssg_helpers import metrics
from fedssg_helpers.client import train_local
from fedssg_helpers.keys import rng
from fedssg_helpers.methods import DeviceStyles, LogitAdjusted, Method, Proximal
from fedssg_helpers.models import SmallCNN, augment, predict, scale
from fedssg_helpers.partition import Client

START = SmallCNN(1, CLASSES).weights.clone()


def local(method: Method = Method(), number: int = 40, steps: int = 6, **options) -> torch.Tensor:
    net, own = SmallCNN(1, CLASSES), client(number)
    known = dict(steps=steps, lr=0.05, random=rng(0, "local"), method=method)
    return train_local(net, net.weights.clone(), own.images, own.labels, **known, **options)


# ---------------------------------------- the network


def test_flat_weights_are_the_network():
    net, images = SmallCNN(1, CLASSES), client(8).images
    before = net(images)
    net.weights.mul_(1.5)
    assert not torch.allclose(net(images), before)
    assert len(net.weights) == sum(p.numel() for p in net.parameters())
    F.cross_entropy(net(images), client(8).labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert net.grad.abs().sum() > 0 and torch.equal(net.grad, gradient)


def test_initial_weights_belong_to_the_seed():
    assert torch.equal(SmallCNN(3, 5, 1).weights, SmallCNN(3, 5, 1).weights)
    assert not torch.equal(SmallCNN(3, 5, 1).weights, SmallCNN(3, 5, 2).weights)


def test_eight_different_orientations():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    assert len({tuple(augment(image, o).flatten().tolist()) for o in range(8)}) == 8


def test_norms_are_the_normalisation_layers():
    net = SmallCNN(3, 5)
    chosen = net.norms()
    net.weights[chosen] = 7.0
    norms = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert all((m.weight == 7).all() and (m.bias == 7).all() for m in norms)
    assert int(chosen.sum()) == 2 * sum(m.num_channels for m in norms)


# ---------------------------------------- local training


def test_local_training_is_sgd_with_momentum_and_weight_decay():
    """Against torch.optim.SGD on the same batches, with logit adjustment."""
    own, net, random = client(40), SmallCNN(1, CLASSES), rng(0, "local")
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    offset = hospital.log_prior(own.labels, CLASSES)
    for rows in hospital.batches(len(own), 6, 32, random):
        optimiser.zero_grad(set_to_none=False)
        x = augment(scale(own.images[rows]), int(random.integers(8)))
        F.cross_entropy(net(x) + offset, own.labels[rows]).backward()
        optimiser.step()
    assert torch.allclose(net.weights, local(Method(loss=LogitAdjusted())), atol=1e-5)


def test_the_round_starts_from_the_given_weights_and_leaves_them_alone():
    net, own, ends = SmallCNN(1, CLASSES), client(40), []
    start = torch.randn(len(net.weights), generator=torch.Generator().manual_seed(0)) * 0.01
    kept = start.clone()
    for rubbish in (0.0, 3.0):
        net.weights.fill_(rubbish)
        ends.append(train_local(net, start, own.images, own.labels, steps=3, lr=0.05, random=rng(0, "x")))
    assert torch.equal(start, kept) and torch.equal(ends[0], ends[1])


def test_fedprox_adds_mu_times_the_distance_to_the_gradient(monkeypatch):
    """After two steps without momentum, the only difference is lr * mu * (w1 - w0); mu = 0 is FedAvg."""
    drift = [float((local(Method(gradient=Proximal(mu)), steps=20) - START).norm()) for mu in (0, 0.1, 1, 5)]
    assert drift == sorted(drift, reverse=True)
    assert torch.equal(local(Method(gradient=Proximal(0.0))), local())
    monkeypatch.setattr(hospital, "MOMENTUM", 0.0)
    monkeypatch.setattr(hospital, "WEIGHT_DECAY", 0.0)
    plain = {"number": 100}  # one pass serves both: the same batches
    first, pulled = local(steps=1, **plain), Method(gradient=Proximal(0.5))
    assert torch.equal(first, local(pulled, steps=1, **plain))  # at the start the pull is zero
    difference = local(steps=2, **plain) - local(pulled, steps=2, **plain)
    assert torch.allclose(difference, 0.05 * 0.5 * (first - START), atol=1e-6)


def test_passes_see_every_image_equally_often():
    rows = torch.cat(list(hospital.batches(40, 5, 16, rng(0, "x"))))
    assert (torch.bincount(rows, minlength=40) == 2).all()


def test_log_prior_counts_as_drawn():
    prior = hospital.log_prior(torch.tensor([0] * 6 + [1] * 3), 3)
    assert torch.allclose(prior, (torch.tensor([6, 3, 0.1]) / 9.1).log()) and torch.isfinite(prior).all()
    chance = np.repeat([0.6 / 100, 0.4 / 20], [100, 20])  # the last 20, of class 1, are drawn more often
    prior = hospital.log_prior(torch.tensor([0] * 90 + [1] * 30), 3, chance).exp()
    assert torch.allclose(prior, torch.tensor([0.54, 0.46, 0.1 / 120]) / (1 + 0.1 / 120), atol=1e-5)


def test_distance_is_that_of_sgd_with_momentum():
    """SCAFFOLD divides by it: where the gradient is constant, it recovers the gradient."""
    gradient, w = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for _ in range(7):
        w.grad = gradient.clone()
        optimiser.step()
    assert torch.allclose(-w.detach() / hospital.distance(7, 0.1), gradient, rtol=1e-5)


@pytest.mark.parametrize(
    "labels, word", [([], "images to train on"), ([0, 1, 3], "0 to 2"), ([0, -1, 1], "-1")], ids=str
)
def test_bad_clients_are_named(labels, word):
    net, labels = SmallCNN(1, CLASSES), torch.tensor(labels, dtype=torch.long)
    images = torch.zeros(len(labels), 1, 12, 12, dtype=torch.uint8)
    with pytest.raises(ValueError, match=word):
        train_local(net, net.weights.clone(), images, labels, steps=1, lr=0.1, random=rng(0, "x"))


# ---------------------------------------- test


def test_the_test_is_on_plain_logits_and_by_device():
    net, weights = SmallCNN(1, CLASSES), local(Method(loss=LogitAdjusted()), steps=30)
    test = Client.joined([client(30, 90, 0), client(20, 91, 1)])
    seen = hospital.evaluate(net, weights, test, CLASSES, 2, Method(loss=LogitAdjusted()))
    net.weights.copy_(weights)
    assert np.array_equal(
        seen, metrics.confusions(test.labels, predict(net, test.images), test.device, CLASSES, 2)
    )
    assert seen.sum((1, 2)).tolist() == [30, 20]
    nobody = hospital.evaluate(net, weights, test.take(slice(0)), CLASSES, 2)
    assert nobody.shape == (2, CLASSES, CLASSES) and not nobody.any()


# ---------------------------------------- samples


def test_a_hospital_refuses_a_cell_that_is_too_small():
    with pytest.raises(ValueError, match="wanted of hospital 4.*8 images or more"):
        hospital.synthesise(noise([[20], [7]]), np.array([[5], [1]]), 4, 0)


def test_real_uploads_are_the_hospitals_own_images_each_once():
    own = noise([[20, 0], [12, 5]])
    sent = hospital.chosen(own, np.array([[15, 4], [30, 2]]), rng(0, "x"))
    place = dict(zip(as_bytes(own.images), zip(own.labels.tolist(), own.device.tolist())))
    images = as_bytes(sent.images)
    assert len(set(images)) == len(images) == 15 + 0 + 12 + 2
    assert [place[i] for i in images] == list(zip(sent.labels.tolist(), sent.device.tolist()))


def test_copies_come_from_the_classes_that_are_there():
    own = noise([[2], [0], [3]])
    again = hospital.copies(own, np.array([[3, 1], [5, 0], [0, 6]]), rng(0, "x"))
    assert torch.bincount(again.labels, minlength=3).tolist() == [4, 0, 6]
    assert set(as_bytes(again.images)) <= set(as_bytes(own.images))
    assert len(hospital.copies(own, np.zeros((3, 2), int), rng(0, "x"))) == 0


def test_a_hospital_keeps_what_it_received_last():
    own = hospital.Hospital(0, client(20), client(5), ("a", "b", "c"), ("x", "y"))
    assert len(own.training[1]) == 20
    for number in (7, 4):
        own.keep(client(number, 1))
        images, labels = own.training
        assert len(labels) == 20 + number
        assert torch.equal(images[:20], own.data.images) and torch.equal(
            labels[20:], client(number, 1).labels
        )


# ---------------------------------------- the view


def test_styles_at_test_are_the_devices_own():
    test = Client.joined([client(9, 1, 0), client(9, 1, 1)])
    styles = torch.tensor([[[0.5], [2.0]], [[-1.0], [0.5]]])
    shown = DeviceStyles().at_test(test.images, test.device, styles)
    assert torch.allclose(shown[:9], (scale(test.images[:9]) - 0.5) / 2)
    assert torch.allclose(shown[9:], (scale(test.images[9:]) + 1) / 0.5)
