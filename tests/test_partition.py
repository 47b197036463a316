"""Distributing images: no leaks, every image once, no empty hospital, and parameters that do what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedssg_helpers import data as sources
from fedssg_helpers import partition, sharing
from fedssg_helpers.data import DataError, ImageSet
from fedssg_helpers.partition import split


def tiny(n: int = 400, classes: int = 4, devices: int = 3, per_group: int = 2, seed: int = 0) -> ImageSet:
    """Grey 8x8 noise with uneven classes and devices, `per_group` images per lesion; some cells may be empty."""
    random = np.random.default_rng(seed)
    group = np.arange(n) // per_group
    label = random.choice(classes, n, p=np.arange(classes, 0, -1) / np.arange(classes, 0, -1).sum())[group]
    device = random.choice(devices, n, p=np.arange(devices, 0, -1) / np.arange(devices, 0, -1).sum())[group]
    return ImageSet(
        "tiny",
        random.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8),
        label.astype(np.int64),
        device.astype(np.int64),
        group.astype(np.int64),
        tuple("abcd"[:classes]),
        tuple("xyz"[:devices]),
        "none",
        True,
    )


def everything(data: ImageSet) -> np.ndarray:
    return np.arange(len(data))


def counts(data: ImageSet, parts) -> np.ndarray:
    return sharing.reports(partition.clients_of(data, parts), len(data.classes), len(data.devices))


def divergence(data: ImageSet, parts) -> float:
    """Mean total-variation distance of the hospitals' class shares from all hospitals' together."""
    have = counts(data, parts).sum(2)
    shares = have / have.sum(1, keepdims=True)
    return float(0.5 * np.abs(shares - have.sum(0) / have.sum()).sum(1).mean())


# ---------------------------------------- training and test


def made(labels, group, device=None):
    labels, n = np.asarray(labels), len(labels)
    device = np.zeros(n, np.int64) if device is None else device
    return ImageSet(
        "made",
        np.zeros((n, 1, 16, 16), np.uint8),
        labels.astype(np.int64),
        device,
        np.asarray(group),
        tuple("abcdefg"),
        tuple("pqrs"),
        "none",
        False,
    )


@pytest.fixture(scope="module")
def phantom():
    return sources.load("phantom")


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_groups_whole_and_proportions(phantom, seed):
    train, test = split(phantom, 0.25, seed)
    assert sorted([*train, *test]) == list(range(len(phantom)))
    assert not set(phantom.group[train]) & set(phantom.group[test])
    assert len(test) / len(phantom) == pytest.approx(0.25, abs=0.02)
    for c in range(6):
        for d in range(4):
            cell = (phantom.labels == c) & (phantom.device == d)
            lesions = len(np.unique(phantom.group[cell]))
            held = len(np.unique(phantom.group[test][cell[test]]))
            assert abs(held - 0.25 * lesions) <= 1
    np.testing.assert_array_equal(split(phantom, 0.25, seed)[1], test)


def test_split_differs_by_seed(phantom):
    assert not np.array_equal(split(phantom, seed=0)[1], split(phantom, seed=1)[1])


@pytest.mark.parametrize("seed", range(10))
def test_rare_classes_are_on_both_sides(seed):
    labels = np.r_[np.zeros(90), np.ones(2), np.full(2, 2), 3]
    group = np.r_[np.arange(92), [100, 101], 102]
    for fraction in (0.05, 0.25, 0.9):
        train, test = split(made(labels, group), fraction, seed)
        assert {0, 1, 2} <= set(labels[train]) and {0, 1, 2} <= set(labels[test])


@pytest.mark.parametrize("seed", range(5))
def test_patients_with_several_findings_stay_whole(seed):
    random = np.random.default_rng(seed)
    d = made(random.choice(4, 200, p=[0.7, 0.2, 0.07, 0.03]), random.integers(0, 40, 200))
    train, test = split(d, seed=seed)
    assert not set(d.group[train]) & set(d.group[test])
    for label in np.unique(d.labels):
        if len(np.unique(d.group[d.labels == label])) >= 2:
            assert label in d.labels[train] and label in d.labels[test]


def test_split_that_cannot_be(phantom):
    with pytest.raises(DataError, match="one group"):
        split(made([0, 1, 0], [5, 5, 5]))
    with pytest.raises(DataError, match="between 0 and 1"):
        split(phantom, 1.5)
    with pytest.raises(DataError, match="one side of the split is empty"):
        split(replace(phantom, official_test=np.zeros(len(phantom), bool)))


def test_an_official_split_is_kept_whatever_the_seed():
    data = replace(tiny(), official_test=np.arange(400) >= 300)
    for seed in (0, 1):
        np.testing.assert_array_equal(split(data, 0.1, seed)[1], np.arange(300, 400))


def test_the_training_side_of_an_official_split_can_be_federated():
    """Validation: the training images are split again, by group, as the test images are not to be looked at."""
    data = replace(tiny(), official_test=np.arange(400) >= 300)
    inner = data.subset(split(data)[0])
    federation = partition.federate(inner, 0, count=4)
    assert sum(map(len, federation.clients)) + len(federation.test) == 300
    assert len(federation.test) == pytest.approx(75, abs=8)
    train, test = split(inner)
    assert not set(inner.group[train]) & set(inner.group[test])


def test_the_training_side_of_pneumoniamnist_can_be_federated(shared_data):
    data = sources.load("pneumoniamnist", shared_data)
    federation = partition.federate(data.subset(split(data)[0]), 0)
    assert federation.setting == "ten_hospitals" and set(federation.test.labels.tolist()) == {0, 1}
    assert sum(map(len, federation.clients)) + len(federation.test) == 5856 - 624
    assert len(partition.federate(data, 0).test) == 624


# ---------------------------------------- hospitals


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 0.1, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("device_mix, size_skew", [(0, 0), (0.5, 1), (1, 0)])
def test_every_image_exactly_once_and_nobody_empty(alpha, count, device_mix, size_skew):
    data = tiny()
    try:
        parts = partition.hospitals(
            data, everything(data), count, alpha=alpha, device_mix=device_mix, size_skew=size_skew
        )
    except ValueError as error:
        assert alpha < 0.1 and "stayed empty" in str(error) and "raise alpha" in str(error)
        return
    assert len(parts) == count and min(map(len, parts)) > 0
    assert np.array_equal(np.sort(np.concatenate(parts)), everything(data))
    owner = np.empty(len(data), int)
    for k, part in enumerate(parts):
        owner[part] = k
    assert all(len(set(owner[data.group == g])) == 1 for g in np.unique(data.group))


def test_very_small_alpha_works_with_as_many_hospitals_as_classes_and_devices_can_feed():
    parts = partition.hospitals(tiny(), everything(tiny()), 4, alpha=1e-3)
    assert min(map(len, parts)) > 0


@pytest.mark.parametrize("seed", range(5))
def test_no_lesion_in_train_and_test(seed):
    data = tiny(seed=seed)
    train, test = split(data, seed=seed)
    assert not set(data.group[train]) & set(data.group[test])
    federation = partition.federate(data, seed, count=5)
    held = partition.Client.joined(federation.clients)
    assert len(held) == len(train) and len(federation.test) == len(test)
    rows = {image.tobytes() for image in held.images.numpy()}
    assert not rows & {image.tobytes() for image in federation.test.images.numpy()}


def test_clients_have_what_the_partition_says():
    data = tiny()
    parts = partition.hospitals(data, everything(data), 5)
    for part, client in zip(parts, partition.clients_of(data, parts)):
        assert np.array_equal(client.images.numpy(), data.images[part])
        assert np.array_equal(client.labels.numpy(), data.labels[part])
        assert np.array_equal(client.device.numpy(), data.device[part])
        few = client.take(client.labels == 0)
        assert len(few) == (data.labels[part] == 0).sum() and not few.labels.any()
        assert np.array_equal(client.take([2, 0]).images.numpy(), data.images[part[[2, 0]]])


@pytest.mark.parametrize("count", [3, 5, 10])
def test_one_device_per_hospital_by_default(count):
    data = tiny()
    have = counts(data, partition.hospitals(data, everything(data), count)).sum(1)
    assert ((have > 0).sum(1) == 1).all() and (have.sum(0) > 0).all()


def test_fewer_hospitals_than_devices_share_them_out():
    data = tiny()
    have = counts(data, partition.hospitals(data, everything(data), 2)).sum(1)
    assert ((have > 0).sum(0) == 1).all()  # each device lies in one hospital


def test_device_mix_mixes_devices():
    data = tiny()
    kinds = [
        (
            counts(data, partition.hospitals(data, everything(data), 6, alpha=100, device_mix=mix)).sum(1) > 0
        ).sum()
        for mix in (0, 0.3, 1)
    ]
    assert kinds[0] == 6 and kinds[1] > 6 and kinds[2] >= 15


def test_alpha_sets_class_skew():
    data = tiny(2000)
    skews = [
        np.mean(
            [
                divergence(data, partition.hospitals(data, everything(data), 6, alpha=alpha, seed=s))
                for s in range(5)
            ]
        )
        for alpha in (0.1, 1, 100)
    ]
    assert skews[0] > 2 * skews[2] and skews[0] > skews[1] > skews[2]


def test_size_skew_spreads_sizes():
    data = tiny(2000, devices=1)
    spread = [
        np.mean(
            [
                np.std(
                    np.log(
                        [
                            len(p)
                            for p in partition.hospitals(
                                data, everything(data), 6, alpha=100, size_skew=skew, seed=s
                            )
                        ]
                    )
                )
                for s in range(8)
            ]
        )
        for skew in (0, 1)
    ]
    assert spread[0] < 0.2 < 0.5 < spread[1]


def test_tail_makes_rare_classes_rarer():
    data = tiny(2000)
    before = np.bincount(data.labels)
    after = counts(data, partition.hospitals(data, everything(data), 4, tail=10)).sum((0, 2))
    order = np.argsort(-before, kind="stable")
    assert after[order[0]] == before[order[0]]
    assert np.allclose((after / before)[order], 10 ** (-np.arange(4) / 3), atol=0.02)
    assert after.min() > 0


def test_same_seed_same_partition_other_seed_another():
    data = tiny()
    first, again, other = (partition.hospitals(data, everything(data), 5, seed=s) for s in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other))


def test_results_of_images_of_another_size_have_a_setting_of_their_own():
    data = tiny()
    large = replace(data, images=np.zeros((len(data), 3, 64, 64), np.uint8))
    assert partition.federate(large).setting == "ten_hospitals_64"
    assert partition.federate(replace(large, simulated=False)).setting == "by_device_64"
    assert partition.federate(data).setting == "ten_hospitals_8"


def test_federation_is_by_device_where_devices_are_real():
    data = tiny()
    real = replace(data, simulated=False)
    federation = partition.federate(real)
    assert federation.setting == "by_device_8" and len(federation.clients) == 3
    assert all(len(c.device.unique()) == 1 for c in federation.clients)
    assert partition.federate(data).setting == "ten_hospitals_8"
    assert partition.federate(real, count=4).setting == "4_hospitals_8"


@pytest.mark.parametrize(
    "patients, setting", [(1, "ten_hospitals_8"), (2, "by_device_8"), (3, "by_device_8")]
)
def test_the_setting_does_not_depend_on_the_seed(patients, setting):
    """A few patients on a second scanner: on both sides of every split, or the scanner does not count."""
    data = replace(tiny(devices=1), simulated=False, devices=("p", "q"))
    data.device[np.isin(data.group, np.unique(data.group)[:: 200 // patients][:patients])] = 1
    made = [partition.federate(data, seed) for seed in range(8)]
    assert {federation.setting for federation in made} == {setting}
    if patients > 1:
        assert all(len(f.clients) == 2 and (f.test.device == 1).any() for f in made)


@pytest.mark.parametrize("alpha", [1e6, 1e9, 1e308])
def test_the_largest_alpha_is_the_least_skew(alpha):
    data = tiny(1200, devices=1)
    parts = [partition.hospitals(data, everything(data), 4, alpha=a) for a in (alpha, 1e5)]
    assert divergence(data, parts[0]) <= divergence(data, parts[1]) + 0.01


def test_one_device_gets_ten_hospitals_or_as_many_as_asked():
    data = replace(tiny(devices=1), simulated=False)
    assert len(partition.federate(data).clients) == 10
    assert len(partition.federate(data, count=1).clients) == 1


@pytest.mark.parametrize(
    "skew, word",
    [
        ({"alpha": 0}, "alpha"),
        ({"alpha": -1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": float("inf")}, "finite"),
        ({"size_skew": float("nan")}, "size_skew"),
        ({"tail": float("inf")}, "tail"),
        ({"device_mix": 1.5}, "device_mix"),
        ({"device_mix": -0.1}, "device_mix"),
        ({"size_skew": -1}, "size_skew"),
        ({"tail": 0.5}, "tail"),
        ({"count": 0}, "hospitals"),
        ({"count": 201}, "for 1 to 200 hospitals"),
    ],
)
def test_impossible_parameters_are_named(skew, word):
    data = tiny()  # 200 lesions
    with pytest.raises(ValueError, match=word):
        partition.hospitals(data, everything(data), **{"count": 5, **skew})


def test_retries_are_bounded(monkeypatch):
    monkeypatch.setattr(partition, "TRIES", 3)
    data = tiny(n=40, classes=2, devices=1, per_group=1)
    with pytest.raises(ValueError, match="stayed empty in 3 attempts"):
        partition.hospitals(data, everything(data), 39, alpha=0.01)


def test_real_devices_of_ham10000(shared_data):
    data = sources.load("ham10000", shared_data)
    federation = partition.federate(data, 0)
    assert federation.setting == "by_device" and len(federation.clients) == len(data.devices) == 4
    assert sum(map(len, federation.clients)) + len(federation.test) == len(data)
    ten = partition.federate(data, 0, count=10, alpha=0.3)
    have = np.stack([np.bincount(c.device, minlength=4) for c in ten.clients])
    stray = have.sum() - have.max(1).sum()  # nine lesions were photographed by two devices, and stay together
    assert len(ten.clients) == 10 and stray < 20
