"""Attacks that must succeed where something leaks and fail where nothing can; protection; the private generator."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fedssg_helpers import data, generator, partition, privacy, sharing
from fedssg_helpers.keys import rng
from fedssg_helpers.models import turn
from fedssg_helpers.partition import Client

IMAGES = data.load("phantom")


@pytest.fixture(scope="module")
def hospitals():
    return partition.federation(IMAGES, 0, count=4)


@pytest.fixture(scope="module")
def groups():
    return IMAGES.group[data.split(IMAGES, seed=0)[1]]


def noise(number: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (number, 3, size, size), dtype=np.uint8))


# --- distances and the limit ---


def test_distance_is_the_root_mean_square_in_the_best_orientation():
    a, b = noise(3), noise(4, 1)
    x, y = a.double().numpy(), b.double().numpy()
    plain = np.sqrt(((x[:, None] - y) ** 2).mean((2, 3, 4)))
    assert np.allclose(generator.distances(a, b, [0]), plain, rtol=1e-4)
    turned = torch.cat([turn(a[i:i + 1], which) for i, which in enumerate((1, 4, 7))])
    assert generator.distances(turned, a).diagonal().max() < 0.1 < generator.distances(turned, a, [0]).min()
    assert generator.distances(a[:0], b).shape == (0, 4)


def test_a_second_picture_of_a_lesion_does_not_hide_how_far_images_are_apart():
    images = noise(30)
    again = (images[:5].float() + 2).clamp(0, 255).to(torch.uint8)
    alone, twins = generator.apart(images), generator.apart(torch.cat([images, again]))
    assert twins.min() > 0.9 * alone.min()
    assert generator.distances(again, images).min(1)[0].max() < 3


def test_limits_leave_out_what_is_not_generated_and_pool_the_small_cells():
    client = Client(torch.cat([noise(60), noise(12, 1), noise(5, 2)]), torch.zeros(77, dtype=torch.int64),
                    torch.tensor([0] * 60 + [1] * 12 + [2] * 5))
    limits = generator.limits(client.images, client.device, 0.05)
    assert set(limits) == {0, 1}
    apart = [generator.apart(client.images[client.device == d]) for d in (0, 1)]
    assert limits[0] == pytest.approx(float(apart[0].quantile(0.05)))
    pooled = torch.cat([a / a.median() for a in apart]).quantile(0.05)
    assert limits[1] == pytest.approx(float(apart[1].median() * pooled))
    assert limits[0] < generator.limits(client.images, client.device, 0.5)[0]


# --- rejection and grain, at the source ---


def copying(client: Client, copies: int):
    """In place of `generator.fit`: a generator whose first `copies` samples are training images, the others new."""
    left = [copies]

    def sample(cell, number, random, temperature):
        own = client.images[client.labels * 4 + client.device == cell]
        some = min(left[0], number)
        left[0] -= some
        return torch.cat([turn(own[:some], 3), noise(number - some, int(random.integers(99)), own.shape[-1])])

    return lambda *args, **options: SimpleNamespace(sample=sample)


def wish(client: Client, number: int) -> np.ndarray:
    numbers = np.zeros((6, 4), int)
    numbers.flat[int(torch.bincount(client.labels * 4 + client.device).argmax())] = number
    return numbers


def test_copies_are_rejected_and_drawn_again(hospitals, monkeypatch):
    client = hospitals.clients[0]
    monkeypatch.setattr(generator, "fit", copying(client, 7))
    rejected = np.zeros((6, 4), int)
    images, labels, device = sharing.offer_of(client, wish(client, 20), 0, 0, reject=0.05, rejected=rejected)
    assert len(images) == len(labels) == len(device) == 20 and rejected.sum() == 7
    assert generator.distances(images, client.images).min() > 1
    open_handed, _, _ = sharing.offer_of(client, wish(client, 20), 0, 0)
    assert len(open_handed) == 20


def test_who_can_only_copy_offers_less(hospitals, monkeypatch):
    client = hospitals.clients[0]
    monkeypatch.setattr(generator, "fit", copying(client, 10**6))
    rejected = np.zeros((6, 4), int)
    images, labels, _ = sharing.offer_of(client, wish(client, 5), 0, 0, reject=0.05, rejected=rejected)
    assert len(images) == len(labels) == 0 and rejected.sum() == 5 * (1 + sharing.REDRAWS)


def test_off_means_off_and_grain_is_what_it_says(hospitals):
    client = hospitals.clients[1]
    numbers = wish(client, 12)
    cell, cells = int(numbers.argmax()), client.labels * 4 + client.device
    plain = generator.fit(client.images, client.labels, cells, rng(3, "generator", 1)).sample(
        cell, 12, rng(3, "samples 0", 1, cell))
    assert torch.equal(sharing.offer_of(client, numbers, 1, 3)[0], plain)
    grainy = sharing.offer_of(client, numbers, 1, 3, grain=5.0)[0]
    inside = (plain > 25) & (plain < 230)
    assert 4.8 < float((grainy.float() - plain)[inside].std()) < 5.2
    assert torch.equal(grainy, sharing.offer_of(client, numbers, 1, 3, grain=5.0)[0])
    for wrong in ({"reject": 1.0}, {"reject": -0.1}, {"grain": -1.0}, {"odd": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sharing.offer_of(client, numbers, 1, 3, **wrong)


def test_a_larger_minimum_keeps_small_cells_at_home(hospitals):
    have = sharing.reports(hospitals.clients, 6, 4)
    agreed = sharing.plan(have, "class_and_device", sharing.Budget(minimum=50))
    assert agreed.offer.sum() > 0 and have[agreed.offer > 0].min() >= 50
    with pytest.raises(ValueError, match="minimum"):
        sharing.Budget(minimum=generator.MINIMUM - 1)


# --- attacks ---


def test_sharing_real_images_is_found_out(hospitals, groups):
    shared = sharing.share(hospitals.clients, hospitals, "class_and_device", 0, real=True)
    found = privacy.membership(hospitals.clients, hospitals.test, shared.pool, groups=groups)
    sent = found[found.held <= 60]  # of small cells a large part was uploaded
    assert privacy.auc(sent, "nearest") > 0.75 and privacy.auc(sent, "span") > 0.75
    assert privacy.true_positives(sent, "nearest") > 0.4
    assert privacy.pairs(hospitals.clients, hospitals.test, shared.pool).distance.max() < 0.5


def test_who_was_not_learnt_from_is_not_found(hospitals, groups):
    """The attack on strangers who are said to be members: what it makes of no leak at all."""
    parts = [Client(*(x[i::2] for x in (c.images, c.labels, c.device))) for c in hospitals.clients for i in (0, 1)]
    learnt, others = parts[::2], parts[1::2]
    shared = sharing.share(learnt, hospitals, "class_and_device", 0)
    # Images of one lesion lie side by side and fall on both sides; what is left of lesions is in neither.
    rows = {image.tobytes(): lesion for image, lesion in zip(IMAGES.images, IMAGES.group)}
    group = [np.array([rows[image.tobytes()] for image in c.images.numpy()]) for c in parts]
    alone = [torch.from_numpy(~np.isin(b, a)) for a, b in zip(group[::2], group[1::2])]
    strangers = [Client(c.images[s], c.labels[s], c.device[s]) for c, s in zip(others, alone)]
    found = privacy.membership(strangers, hospitals.test, shared.pool, groups=groups)
    assert found.member.sum() > 300
    for attack in privacy.ATTACKS:
        assert abs(privacy.auc(found, attack) - 0.5) < 0.06


def test_auc_compares_inside_cells_only():
    table = pd.DataFrame({"source": 0, "class": [0] * 5 + [1] * 4, "device": 0, "held": 99,
                          "member": [True, True, True, False, False, True, False, False, False],
                          "nearest": [3.0, 1.0, 2.0, 2.0, 0.0, -9.0, -10.0, -8.0, -9.5]})
    first = (1 + 0.5 + 0.75) / 3
    assert privacy.auc(table, "nearest") == pytest.approx((3 * first + 1 * 2 / 3) / 4)
    assert np.isnan(privacy.auc(table[:0], "nearest")) and np.isnan(privacy.true_positives(table[:0], "nearest"))


def test_true_positives_at_a_false_rate():
    outside = pd.DataFrame({"source": 0, "class": 0, "device": 0, "member": False, "span": np.arange(100.0)})
    inside = outside[:50].assign(member=True, span=np.linspace(90.5, 139.5, 50))
    table = pd.concat([outside, inside])
    assert privacy.true_positives(table, "span", 0.01) == pytest.approx((inside.span > 98).mean())
    assert privacy.true_positives(table, "span", 0.001) == pytest.approx((inside.span > 99).mean())


def test_the_flat_of_samples_is_found_and_grain_hides_it():
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((3 * 16 * 16, 4)))[0] * 200
    mean = random.uniform(100, 150, 3 * 16 * 16)
    draw = [np.clip(mean + random.standard_normal((100, 4)) @ axes.T, 0, 255) for _ in range(2)]
    learnt, unseen = (torch.from_numpy(x.round().astype(np.uint8)).view(-1, 3, 16, 16) for x in draw)
    flat = privacy.span(learnt)
    assert flat[1].shape == (768, 4) and torch.allclose(flat[1].T @ flat[1], torch.eye(4), atol=1e-4)
    assert privacy.off_span(unseen, flat).max() < 0.5 < 20 < privacy.off_span(noise(5), flat).min()
    grainy = learnt + 6 * torch.from_numpy(random.standard_normal(learnt.shape))
    grainy = grainy.round().clamp(0, 255).to(torch.uint8)
    assert privacy.span(grainy)[1].shape[1] > 50


def test_nothing_shared_is_an_empty_table(hospitals):
    nothing = sharing.pool_of([(hospitals.test.images[:0], hospitals.test.labels[:0], hospitals.test.device[:0])])
    assert len(privacy.membership(hospitals.clients[:1], hospitals.test, nothing)) == 0
    assert len(privacy.pairs(hospitals.clients[:1], hospitals.test, nothing)) == 0
    assert all(np.isnan(value) for value in privacy.figures(privacy.membership(hospitals.clients, hospitals.test,
                                                                               nothing)).values())


# --- canaries ---


def test_canaries_are_recovered_where_images_leak_and_only_there(hospitals, monkeypatch):
    agreed = sharing.plan(sharing.reports(hospitals.clients, 6, 4), "class_and_device")
    table, planted, nearest = privacy.canaries(hospitals.clients, hospitals.test, agreed, 0, number=3)
    assert len(table) == len(planted) == len(nearest) == 3 and not table.recovered.any()
    assert table.held.is_monotonic_increasing
    table, _, _ = privacy.canaries(hospitals.clients, hospitals.test, agreed, 0, number=3, odd=2.0)
    assert not table.noticed.any()

    def leaky(client, numbers, k, seed, **options):  # the last image is the one that was planted
        return turn(client.images[-9:], 5), client.labels[-9:], client.device[-9:]

    monkeypatch.setattr(sharing, "offer_of", leaky)
    table, _, _ = privacy.canaries(hospitals.clients, hospitals.test, agreed, 0, number=3)
    assert table.recovered.all() and table.noticed.all() and table.distance.max() < 0.1


def test_resemblance_is_correlation_in_the_best_orientation():
    samples = noise(6)
    middle = samples.double().mean(0)
    x, y = (samples[0].double() - middle).flatten(), (samples[1].double() - middle).flatten()
    alike = privacy.resemblance(turn(samples[:1], 3), samples)[0]
    assert float(alike[0]) > 0.9 and float(privacy.resemblance(samples[:1], samples, [0])[0, 0]) == pytest.approx(1)
    plain = privacy.resemblance(samples[:1], samples, [0])[0, 1]
    assert float(plain) == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-5)


def test_images_like_no_other_are_not_learnt_from(hospitals, monkeypatch):
    client, learnt = hospitals.clients[0], []
    numbers = wish(client, 5)
    c, d = np.argwhere(numbers)[0]
    strange = privacy.plant(client, privacy.canary((3, 28, 28), rng(0, "test")), int(c), int(d))
    keep = generator.ordinary(strange.images, strange.labels * 4 + strange.device, 2.0)
    assert not keep[-1] and keep[:-1].float().mean() > 0.95
    true_fit = generator.fit
    monkeypatch.setattr(generator, "fit",
                        lambda images, *a, **o: learnt.append(len(images)) or true_fit(images, *a, **o))
    assert len(sharing.offer_of(strange, numbers, 0, 0, odd=2.0)[0]) == 5
    assert learnt == [int(keep.sum())]
    # A cell of which too few are ordinary is not offered at all, and that is no error.
    monkeypatch.setattr(generator, "ordinary", lambda images, cells, most: cells != cells[0])
    first = np.zeros((6, 4), int)
    first[client.labels[0], client.device[0]] = 3
    assert len(sharing.offer_of(client, first, 0, 0, odd=2.0)[0]) == 0


def test_no_place_for_a_canary_is_said(hospitals):
    nothing = np.zeros((4, 6, 4), int)
    with pytest.raises(ValueError, match="nothing is shared"):
        privacy.canaries(hospitals.clients, hospitals.test, sharing.Plan(nothing, nothing), 0)


# --- the card ---


def test_the_card_says_what_left(hospitals, groups):
    shared = sharing.share(hospitals.clients, hospitals, "class_and_device", 0, reject=0.3)
    card = privacy.audit_card(hospitals.clients, hospitals.test, shared, groups=groups)
    have = sharing.reports(hospitals.clients, 6, 4)
    assert card.reported == have.size and card.samples == len(shared.pool) <= card.asked == shared.plan.offer.sum()
    assert card.rejected == shared.rejected.sum() > 0
    assert card.fewest == have[shared.plan.offer > 0].min() and 0.8 < card.ratio < 1.2
    for text in (f"{card.samples} samples of {card.asked}", f"{card.rejected} samples", "none: no differential"):
        assert text in str(card)
    assert "epsilon = 3.0" in str(privacy.Card(**vars(card) | {"epsilon": 3.0}))


# --- differential privacy ---


def test_without_opacus_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(privacy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[privacy\]'"):
        privacy.fit_private(noise(20), torch.zeros(20, dtype=torch.int64), 2, 3.0, 0)


@pytest.mark.filterwarnings("ignore")
def test_private_training_keeps_its_budget(monkeypatch):
    opacus = pytest.importorskip("opacus", reason="the privacy extra is not installed")
    from opacus.accountants import RDPAccountant

    noises = []

    class Watched(opacus.optimizers.DPOptimizer):
        def add_noise(self):
            noises.append(self.noise_multiplier)
            super().add_noise()

    monkeypatch.setattr(opacus.optimizers, "DPOptimizer", Watched)
    images, labels, spent, nets = noise(200), torch.arange(200) % 3, {}, {}
    for epsilon in (np.inf, 10.0, 1.0):
        noises.clear()
        nets[epsilon], spent[epsilon] = privacy.fit_private(images, labels, 3, epsilon, 0, steps=20, batch=50)
        if np.isfinite(epsilon):
            by_hand = RDPAccountant()
            by_hand.history = [(noises[0], 0.25, len(noises))]
            assert len(noises) == 20 and len(set(noises)) == 1
            assert 0.9 * epsilon < spent[epsilon] <= epsilon
            assert spent[epsilon] == pytest.approx(by_hand.get_epsilon(1 / 2000))
    assert np.isinf(spent[np.inf])
    again = privacy.fit_private(images, labels, 3, 1.0, 0, steps=20, batch=50)[0]
    assert all(torch.equal(a, b) for a, b in zip(nets[1.0].parameters(), again.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(nets[1.0].parameters(), nets[np.inf].parameters()))
    assert nets[1.0].sample(2, 5, rng(0, "x")).shape == (5, 3, 16, 16)
    with pytest.raises(ValueError, match="epsilon is 0"):
        privacy.fit_private(images, labels, 3, 0, 0)


@pytest.mark.filterwarnings("ignore")
def test_each_image_moves_the_private_network_by_at_most_the_clip():
    """The sensitivity that noise is scaled to: one image, one plain step, no noise."""
    pytest.importorskip("opacus", reason="the privacy extra is not installed")
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    net = privacy.ConditionalVAE(3, 16, 3, privacy.torch_rng(0, "x"))
    model = GradSampleModule(net)
    optimiser = DPOptimizer(torch.optim.SGD(net.parameters(), 1.0), noise_multiplier=0.0, max_grad_norm=0.5,
                            expected_batch_size=1)
    x = torch.randn(1, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)) * 3
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    model(x, torch.tensor([1]), torch.zeros(1, net.latent)).sum().backward()
    optimiser.step()
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5, rel=1e-3)
