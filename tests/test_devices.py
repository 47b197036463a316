"""Simulated devices: deterministic, unequal, and different enough on real images to count as devices."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedssg_helpers import devices, metrics
from fedssg_helpers.keys import one_thread, rng
from fedssg_helpers.models import SmallCNN, predict, scale


def grey_blocks(n=40, channels=3, size=28):
    coarse = np.random.default_rng(0).integers(0, 256, (n, channels, size // 4, size // 4), dtype=np.uint8)
    return coarse.repeat(4, 2).repeat(4, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 64])
def test_a_view_depends_on_image_device_and_seed_only(channels, size):
    images, owner = grey_blocks(40, channels, size), np.arange(40) % 4
    seen = devices.apply(images, owner)
    assert seen.shape == images.shape and seen.dtype == np.uint8
    order = np.random.default_rng(1).permutation(40)[:9]
    np.testing.assert_array_equal(devices.apply(images[order], owner[order]), seen[order])
    assert (devices.apply(images, owner, seed=1) != seen).any()
    assert (devices.apply(images, (owner + 1) % 4) != seen).any((1, 2, 3)).all()


def test_a_neutral_profile_changes_nothing(monkeypatch):
    monkeypatch.setattr(devices, "COLOUR", (devices.Profile("neutral"),))
    images = grey_blocks()
    np.testing.assert_array_equal(devices.apply(images, np.zeros(40, int)), images)


def test_blur_softens_and_keeps_the_mean():
    image, settings = np.zeros((1, 28, 28), np.uint8), devices.Profile("soft", blur=0.8).settings()
    image[0, 14, 14] = 255
    soft = devices.render(image, settings, np.zeros((2, 1, 28, 28)))
    assert soft.sum() == pytest.approx(255, abs=15) and soft.max() < 0.3 * 255


def test_assignment_is_unequal_leaves_cells_empty_and_keeps_groups_together():
    labels = np.random.default_rng(0).choice(7, 6000, p=[0.6, 0.15, 0.1, 0.07, 0.04, 0.03, 0.01])
    group = np.arange(6000)
    owner = devices.assign(labels, group)
    counts = np.zeros((7, 4), int)
    np.add.at(counts, (labels, owner), 1)
    assert (counts == 0).sum() >= 2 and (counts[0] > 0).all() and ((counts > 0).sum(1) >= 2).all()
    share = counts.sum(0) / 6000
    assert share.max() > 0.35 and share.min() < 0.1
    np.testing.assert_array_equal(devices.assign(labels, group), owner)
    owner = devices.assign(labels, group // 3)  # three images per patient, with mixed findings
    assert (owner.reshape(-1, 3) == owner.reshape(-1, 3)[:, :1]).all()


@pytest.mark.parametrize("counts", [[50, 20], [10], [5, 0, 3]])
def test_affinity_copes_with_few_classes(counts):
    weight = devices.affinity(np.array(counts))
    assert weight.shape == (len(counts), 4) and ((weight == 1).sum(1) >= 2).all()


# ---------------------------------------- on real images


@pytest.fixture(scope="module", params=["dermamnist", "pneumoniamnist"])
def real(request, shared_data):
    """Real images in random order. DermaMNIST's seven classes are merged to naevus, melanoma and the rest: with
    hundreds of test images in each, chance moves balanced accuracy by less than a point."""
    file = shared_data / f"{request.param}.npz"
    if not file.exists():
        pytest.skip(f"{file} is not there: needs real images")
    with np.load(file, allow_pickle=False) as arrays:
        images = np.concatenate([arrays["train_images"], arrays["val_images"]])
        labels = np.concatenate([arrays["train_labels"], arrays["val_labels"]])[:, 0].astype(np.int64)
    if request.param == "dermamnist":
        labels = np.where(labels == 5, 0, np.where(labels == 4, 1, 2))
    order = np.random.default_rng(0).permutation(len(images))[:5200]
    images = images[order][:, None] if images.ndim == 3 else images[order].transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), labels[order]


def on(images, device):
    return devices.apply(images, np.full(len(images), device))


def fitted(images, labels, epochs=5, seed=0):
    """A small classifier after a few passes, its loss adjusted by the class frequencies."""
    net, random = SmallCNN(images.shape[1], int(labels.max()) + 1, seed), rng(seed, "gate")
    x, y = scale(torch.from_numpy(images)), torch.from_numpy(labels)
    prior = (torch.bincount(y) / len(y)).log()
    steps = epochs * (len(y) // 50)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rows = np.concatenate([random.permutation(len(y)) for _ in range(epochs)])[: steps * 50].reshape(
        steps, 50
    )
    for row in rows:
        optimiser.zero_grad(set_to_none=False)
        F.cross_entropy(net(x[row]) + prior, y[row]).backward()
        optimiser.step()
        schedule.step()
    return net


def score(net, images, labels):
    """Balanced accuracy in points."""
    called, classes = predict(net, torch.from_numpy(images)).numpy(), int(labels.max()) + 1
    return 100 * metrics.balanced_accuracy(metrics.confusions(labels, called, 0 * labels, classes, 1)[0])


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def test_a_linear_probe_names_the_device(real):
    images, _ = real
    owner = np.arange(len(images)) % 4
    seen = devices.apply(images, owner)
    n, c, h, w = seen.shape
    x = (
        seen.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5)).reshape(n, -1) / 255
    )  # half resolution: fewer weights
    x = np.hstack([x, np.ones((n, 1))])
    half = n * 3 // 4
    weights = np.linalg.solve(
        x[:half].T @ x[:half] + np.eye(x.shape[1]), x[:half].T @ np.eye(4)[owner[:half]]
    )
    assert ((x[half:] @ weights).argmax(1) == owner[half:]).mean() >= 0.90


TRAIN, TEST = slice(0, 2700), slice(2700, 5200)


def test_a_model_of_one_device_loses_on_the_others(real):
    images, labels = real
    views = [on(images, d) for d in range(4)]
    grid = np.array(
        [
            [score(net, view[TEST], labels[TEST]) for view in views]
            for net in (fitted(view[:2000], labels[:2000], 4) for view in views)
        ]
    )
    loss = (grid.diagonal()[:, None] - grid).sum(1) / 3  # of each device's model, mean over the other devices
    print("\nloss on other devices, points:", loss.round(1))
    assert 5 <= loss.mean() <= 25, grid


def test_a_model_of_all_devices_loses_little_against_unshifted_images(real):
    images, labels = real
    seen = devices.apply(images, np.random.default_rng(0).integers(0, 4, len(images)))
    clean, mixed = [
        np.mean([score(fitted(x[TRAIN], labels[TRAIN], 8, seed), x[TEST], labels[TEST]) for seed in (1, 2)])
        for x in (images, seen)
    ]
    print("\nunshifted, all devices, points:", round(clean, 1), round(mixed, 1))
    assert clean - mixed <= 3, (clean, mixed)
