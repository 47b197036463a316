"""Attacks that must succeed where something leaks and fail where nothing can; protection; the private generator."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from fedssg_helpers import (
    client,
    data,
    dpsgd,
    generator,
    partition,
    privacy,
    protection,
    runs,
    server,
    sharing,
)
from fedssg_helpers.keys import rng
from fedssg_helpers.methods import RealImages, Sharing
from fedssg_helpers.models import augment
from fedssg_helpers.partition import Client
from fedssg_helpers.protection import Protection
from fedssg_helpers.sharing import Budget

IMAGES = data.load("phantom")


@pytest.fixture(scope="module")
def hospitals():
    return partition.federate(IMAGES, 0, count=4)


def noise(number: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (number, 3, size, size), dtype=np.uint8)
    )


# --- distances and the limit ---


def test_distance_is_the_root_mean_square_in_the_best_orientation():
    a, b = noise(3), noise(4, 1)
    x, y = a.double().numpy(), b.double().numpy()
    plain = np.sqrt(((x[:, None] - y) ** 2).mean((2, 3, 4)))
    assert np.allclose(protection.distances(a, b, [0]), plain, rtol=1e-4)
    turned = torch.cat([augment(a[i : i + 1], which) for i, which in enumerate((1, 4, 7))])
    assert protection.distances(turned, a).diagonal().max() < 0.1 < protection.distances(turned, a, [0]).min()
    assert protection.distances(a[:0], b).shape == (0, 4)


def test_a_second_picture_of_a_lesion_does_not_hide_how_far_images_are_apart():
    images = noise(30)
    again = (images[:5].float() + 2).clamp(0, 255).to(torch.uint8)
    alone, twins = protection.apart(images), protection.apart(torch.cat([images, again]))
    assert twins.min() > 0.9 * alone.min()
    assert protection.distances(again, images).min(1)[0].max() < 3


def test_limits_leave_out_what_is_not_generated_and_pool_the_small_cells():
    images, cells = (
        torch.cat([noise(60), noise(12, 1), noise(5, 2)]),
        torch.tensor([0] * 60 + [1] * 12 + [2] * 5),
    )
    limits = protection.limits(images, cells, 0.05)
    assert set(limits) == {0, 1}
    apart = [protection.apart(images[cells == d]) for d in (0, 1)]
    assert limits[0] == pytest.approx(float(apart[0].quantile(0.05)))
    pooled = torch.cat([a / a.median() for a in apart]).quantile(0.05)
    assert limits[1] == pytest.approx(float(apart[1].median() * pooled))
    assert limits[0] < protection.limits(images, cells, 0.5)[0]


# --- protection at the source ---


def copying(copies: int):
    """A source whose first `copies` samples are training images, the others new."""

    def source(images, labels, cells, random, orientations):
        left = [copies]

        def sample(cell, number, random):
            some = min(left[0], number)
            left[0] -= some
            new = noise(number - some, int(random.integers(99)), images.shape[-1])
            return torch.cat([augment(images[cells == cell][:some], 3), new])

        return sample

    return source


def wish(hospital: Client, number: int) -> np.ndarray:
    numbers = np.zeros((6, 4), int)
    numbers.flat[int(torch.bincount(hospital.labels * 4 + hospital.device).argmax())] = number
    return numbers


REJECT = Protection(reject=0.05)


def test_copies_are_rejected_and_drawn_again(hospitals):
    hospital = hospitals.clients[0]
    upload, rejected = client.synthesise(
        hospital, wish(hospital, 20), 0, 0, Sharing(source=copying(7), protection=REJECT)
    )
    assert len(upload) == 20 and rejected.sum() == 7
    assert protection.distances(upload.images, hospital.images).min() > 1
    unprotected, _ = client.synthesise(hospital, wish(hospital, 20), 0, 0, Sharing(source=copying(7)))
    assert protection.distances(unprotected.images, hospital.images).min() < 0.5


def test_who_can_only_copy_uploads_less(hospitals):
    hospital = hospitals.clients[0]
    how = Sharing(source=copying(10**6), protection=REJECT)
    upload, rejected = client.synthesise(hospital, wish(hospital, 5), 0, 0, how)
    assert len(upload) == 0 and rejected.sum() == 5 * (1 + protection.REDRAWS)


def test_off_means_off_and_noise_is_what_it_says(hospitals):
    hospital = hospitals.clients[1]
    numbers = wish(hospital, 12)
    cell, cells = int(numbers.argmax()), hospital.labels * 4 + hospital.device
    model = generator.fit(hospital.images, hospital.labels, cells, rng(3, "generator", 1))
    plain = model.sample(cell, 12, rng(3, "samples 0", 1, cell))
    assert torch.equal(client.synthesise(hospital, numbers, 1, 3)[0].images, plain)
    noisy = [
        client.synthesise(hospital, numbers, 1, 3, Sharing(protection=Protection(noise=5.0)))[0]
        for _ in range(2)
    ]
    inside = (plain > 25) & (plain < 230)
    assert 4.8 < float((noisy[0].images.float() - plain)[inside].std()) < 5.2
    assert torch.equal(noisy[0].images, noisy[1].images)
    for wrong in ({"reject": 1.0}, {"reject": -0.1}, {"noise": -1.0}, {"outlier": -1.0}, {"noise": np.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Protection(**wrong)


def test_images_like_no_other_are_not_learnt_from(hospitals):
    hospital, learnt = hospitals.clients[0], []
    numbers = wish(hospital, 5)
    c, d = np.argwhere(numbers)[0].tolist()
    strange = privacy.plant(hospital, privacy.canary((3, 28, 28), rng(0, "test")), c, d)
    keep = protection.inliers(strange.images, strange.labels * 4 + strange.device, 2.0)
    assert not keep[-1] and keep[:-1].float().mean() > 0.95

    def watched(images, *rest):
        learnt.append(len(images))
        return generator.ClosedForm()(images, *rest)

    how = Sharing(source=watched, protection=Protection(outlier=2.0))
    assert len(client.synthesise(strange, numbers, 0, 0, how)[0]) == 5
    assert learnt == [int(keep.sum())]


def test_a_cell_with_too_few_inliers_is_not_uploaded(hospitals, monkeypatch):
    hospital = hospitals.clients[0]
    monkeypatch.setattr(protection, "inliers", lambda images, cells, *a, **o: cells != cells[0])
    first = np.zeros((6, 4), int)
    first[hospital.labels[0], hospital.device[0]] = 3
    how = Sharing(protection=Protection(outlier=2.0))
    assert len(client.synthesise(hospital, first, 0, 0, how)[0]) == 0


# --- attacks ---


def test_sharing_real_images_is_found_out(hospitals):
    everything = Sharing(source=RealImages(), budget=Budget(receive=5000))
    shared = server.share(hospitals, everything, 0)
    found = privacy.membership(hospitals.clients, hospitals.test, shared.pool)
    sent = found[found.held <= 60]  # of small cells a large part was uploaded
    assert privacy.auc(sent, "nearest") > 0.75 and privacy.auc(sent, "subspace") > 0.75
    assert privacy.true_positives(sent, "nearest") > 0.4
    assert privacy.pairs(hospitals.clients, hospitals.test, shared.pool).distance.max() < 0.5


def test_who_was_not_learnt_from_is_not_found(hospitals):
    """The attack on strangers who are said to be members: what it makes of no leak at all."""
    parts = [c.take(torch.arange(i, len(c), 2)) for c in hospitals.clients for i in (0, 1)]
    learnt, others = parts[::2], parts[1::2]
    shared = server.share(replace(hospitals, clients=learnt), Sharing(), 0)
    # Images of one lesion lie side by side and fall on both sides; what is left of lesions is in neither.
    rows = {image.tobytes(): lesion for image, lesion in zip(IMAGES.images, IMAGES.group)}
    group = [np.array([rows[image.tobytes()] for image in c.images.numpy()]) for c in parts]
    alone = [torch.from_numpy(~np.isin(b, a)) for a, b in zip(group[::2], group[1::2])]
    strangers = [c.take(s) for c, s in zip(others, alone)]
    found = privacy.membership(strangers, hospitals.test, shared.pool)
    assert found.member.sum() > 300
    for attack in privacy.ATTACKS:
        assert abs(privacy.auc(found, attack) - 0.5) < 0.06


def test_auc_compares_inside_cells_only():
    table = pd.DataFrame(
        {
            "source": 0,
            "class": [0] * 5 + [1] * 4,
            "device": 0,
            "held": 99,
            "member": [True, True, True, False, False, True, False, False, False],
            "nearest": [3.0, 1.0, 2.0, 2.0, 0.0, -9.0, -10.0, -8.0, -9.5],
        }
    )
    first = (1 + 0.5 + 0.75) / 3
    assert privacy.auc(table, "nearest") == pytest.approx((3 * first + 1 * 2 / 3) / 4)


def test_true_positives_at_a_false_rate():
    outside = pd.DataFrame(
        {"source": 0, "class": 0, "device": 0, "member": False, "subspace": np.arange(100.0)}
    )
    inside = outside[:50].assign(member=True, subspace=np.linspace(90.5, 139.5, 50))
    table = pd.concat([outside, inside])
    assert privacy.true_positives(table, "subspace", 0.01) == pytest.approx((inside.subspace > 98).mean())
    assert privacy.true_positives(table, "subspace", 0.001) == pytest.approx((inside.subspace > 99).mean())


def test_the_subspace_of_samples_is_found_and_noise_hides_it():
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((3 * 16 * 16, 4)))[0] * 200
    mean = random.uniform(100, 150, 3 * 16 * 16)
    draw = [np.clip(mean + random.standard_normal((100, 4)) @ axes.T, 0, 255) for _ in range(2)]
    learnt, unseen = (torch.from_numpy(x.round().astype(np.uint8)).view(-1, 3, 16, 16) for x in draw)
    plane = privacy.subspace(learnt)
    assert plane[1].shape == (768, 4) and torch.allclose(plane[1].T @ plane[1], torch.eye(4), atol=1e-4)
    assert privacy.off_subspace(unseen, plane).max() < 0.5 < 20 < privacy.off_subspace(noise(5), plane).min()
    assert privacy.subspace(protection.add_noise(learnt, 6.0, random))[1].shape[1] > 50


def test_nothing_shared_is_an_empty_table(hospitals):
    nothing = sharing.Pool(hospitals.test.images[:0], *torch.empty(3, 0, dtype=torch.int64))
    table = privacy.membership(hospitals.clients, hospitals.test, nothing)
    assert len(table) == len(privacy.pairs(hospitals.clients, hospitals.test, nothing)) == 0
    assert all(np.isnan(value) for value in privacy.attack_summary(table).values())


# --- canaries ---


def test_canaries_are_recovered_where_images_leak_and_only_there(hospitals):
    agreed, leaks = sharing.plan(sharing.reports(hospitals.clients, 6, 4)), []

    def leaky(images, *rest):  # the last image is the one that was planted
        leaks.append(1)
        return lambda cell, number, random: augment(images[-9:], 5)

    found = {}
    for name, how in {
        "as it is": Sharing(),
        "protected": Sharing(protection=Protection(outlier=2.0)),
        "leaky": Sharing(source=leaky),
    }.items():
        found[name], planted, nearest = privacy.canaries(
            hospitals.clients, hospitals.test, agreed, 0, how, number=3
        )
        assert len(found[name]) == len(planted) == len(nearest) == 3
    assert found["as it is"].held.is_monotonic_increasing and not found["as it is"].recovered.any()
    assert not found["protected"].noticed.any()
    assert len(leaks) == 3 and found["leaky"].recovered.all() and found["leaky"].noticed.all()
    assert found["leaky"].distance.max() < 0.1


def test_resemblance_is_correlation_in_the_best_orientation():
    samples = noise(6)
    middle = samples.double().mean(0)
    x, y = (samples[0].double() - middle).flatten(), (samples[1].double() - middle).flatten()
    alike = privacy.resemblance(augment(samples[:1], 3), samples)[0]
    assert float(alike[0]) > 0.9
    plain = privacy.resemblance(samples[:1], samples, [0])[0]
    assert float(plain[0]) == pytest.approx(1)
    assert float(plain[1]) == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-5)


def test_no_place_for_a_canary_is_said(hospitals):
    nothing = np.zeros((4, 6, 4), int)
    with pytest.raises(ValueError, match="nothing is shared"):
        privacy.canaries(hospitals.clients, hospitals.test, sharing.Plan(nothing, nothing), 0, Sharing())


# --- trials ---


@pytest.mark.slow
def test_trials_are_made_in_other_processes():
    job = runs.Job("fedssg", 3, hospitals=3)
    ways = {"course": Sharing(), "own": Sharing(source=lambda *a: generator.ClosedForm()(*a))}
    table = privacy.trials([job], ways, workers=2, steps=40, most=20)
    assert list(table.index) == [("course", 3), ("own", 3)]
    course, own = (table.loc[name].iloc[0] for name in ways)
    pd.testing.assert_series_equal(course, own, check_names=False)  # a source of one's own, from a notebook
    assert course.samples > 0 and course.bytes > 0 and 0 < course.taught < 1


# --- differential privacy ---


def test_without_opacus_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(dpsgd.importlib.util, "find_spec", lambda name: None)
    for call in (
        dpsgd.DPSGD,
        lambda: dpsgd.fit_private(noise(20), torch.arange(20) % 2, 2, 3.0, rng(0, "x")),
    ):
        with pytest.raises(ValueError, match=r"pip install -e '.\[privacy\]'"):
            call()


needs_opacus = pytest.mark.skipif(bool(dpsgd.opacus_missing()), reason="the privacy extra is not installed")


@needs_opacus
def test_private_training_keeps_its_budget(monkeypatch):
    from opacus.accountants import RDPAccountant
    from opacus.optimizers import DPOptimizer

    noises, add_noise = [], DPOptimizer.add_noise
    monkeypatch.setattr(
        DPOptimizer, "add_noise", lambda self: noises.append(self.noise_multiplier) or add_noise(self)
    )
    images, labels, spent, nets = noise(200), torch.arange(200) % 3, {}, {}
    for epsilon in (np.inf, 10.0, 1.0):
        noises.clear()
        nets[epsilon], spent[epsilon] = dpsgd.fit_private(
            images, labels, 3, epsilon, rng(0, "x"), steps=21, batch=50
        )
        assert len(noises) == 21 and len(set(noises)) == 1 and (noises[0] == 0) == np.isinf(epsilon)
        if np.isfinite(epsilon):
            by_hand = RDPAccountant()
            by_hand.history = [(noises[0], 0.25, len(noises))]
            assert 0.9 * epsilon < spent[epsilon] <= epsilon
            assert spent[epsilon] == pytest.approx(by_hand.get_epsilon(1 / 2000))
    assert np.isinf(spent[np.inf])
    again = dpsgd.fit_private(images, labels, 3, 1.0, rng(0, "x"), steps=21, batch=50)[0]
    assert all(torch.equal(a, b) for a, b in zip(nets[1.0].parameters(), again.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(nets[1.0].parameters(), nets[np.inf].parameters()))
    with pytest.raises(ValueError, match="epsilon is 0"):
        dpsgd.fit_private(images, labels, 3, 0, rng(0, "x"))


@needs_opacus
def test_each_image_takes_part_by_chance_and_moves_the_network_by_at_most_the_clip(monkeypatch):
    """Poisson sampling, and the sensitivity that noise is scaled to: every summed gradient is at most `clip` an image."""
    from opacus.optimizers import DPOptimizer

    sizes, clip_and_accumulate = [], DPOptimizer.clip_and_accumulate

    def watched(self):
        sizes.append(len(self.grad_samples[0]))
        clip_and_accumulate(self)
        length = torch.cat([p.summed_grad.flatten() for p in self.params]).norm()
        assert float(length) <= 0.5 * sizes[-1] + 1e-4
        if sizes[-1] == 1:
            assert float(length) == pytest.approx(0.5, rel=1e-3)

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", watched)
    net, _ = dpsgd.fit_private(
        noise(6), torch.arange(6) % 2, 2, np.inf, rng(0, "x"), steps=60, batch=1, clip=0.5
    )
    assert set(sizes) >= {0, 1, 2} and len(sizes) == 60 and 0.6 < np.mean(sizes) < 1.4
    assert all(torch.isfinite(p).all() for p in net.parameters())


@needs_opacus
def test_differential_privacy_is_a_source_like_others(hospitals):
    part = dpsgd.DPSGD(epsilon=3.0, steps=5)
    assert pickle.loads(pickle.dumps(part)) == part and hash(part) == hash(replace(part))
    hospital = hospitals.clients[0]
    numbers = wish(hospital, 6)
    upload, _ = client.synthesise(hospital, numbers, 0, 0, Sharing(source=part))
    c, d = np.argwhere(numbers)[0]
    assert upload.images.shape == (6, 3, 28, 28) and upload.images.dtype == torch.uint8
    assert (upload.labels == int(c)).all() and (upload.device == int(d)).all()
    for wrong in ({"epsilon": 0}, {"steps": 0}, {"clip": -1.0}, {"epsilon": np.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dpsgd.DPSGD(**wrong)
    with pytest.raises(ValueError, match="even"):
        part(noise(9, size=15), torch.arange(9), torch.arange(9), rng(0, "x"))
