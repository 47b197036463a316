"""What the server checks before it uses what came back: bad uploads are refused with a reason, honest ones never."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from fedssg_helpers import checks, data, partition, rounds, sharing
from fedssg_helpers.keys import rng, torch_rng

LIKE = torch.zeros(50)
SHAPE = (3, 28, 28)


# ---------------------------------------------------------------------------------------------- weights


def test_good_weights_pass():
    assert checks.weights_refusal(torch.ones(50), LIKE, 30, 30) == ""
    assert checks.weights_refusal(torch.ones(50), LIKE, np.int64(30), 30) == ""


@pytest.mark.parametrize("update, images, part", [
    (None, 30, "NoneType"), ([0.0] * 50, 30, "list"), (np.zeros(50, np.float32), 30, "ndarray"),
    (torch.zeros(49), 30, "shape (49,)"), (torch.zeros(50, 1), 30, "shape (50, 1)"),
    (torch.zeros(50, dtype=torch.float64), 30, "float64"), (torch.zeros(50, dtype=torch.int64), 30, "int64"),
    (torch.full((50,), torch.nan), 30, "not finite"), (torch.arange(50) / 0, 30, "not finite"),
    (torch.zeros(50), 0, "whole and above 0"), (torch.zeros(50), -30, "whole and above 0"),
    (torch.zeros(50), 30.0, "whole and above 0"), (torch.zeros(50), float("nan"), "whole and above 0"),
    (torch.zeros(50), None, "whole and above 0"), (torch.zeros(50), True, "whole and above 0"),
    (torch.zeros(50), "30", "whole and above 0"), (torch.zeros(50), 3000, "reported 30")])
def test_bad_weights_are_refused_with_the_reason(update, images, part):
    assert part in checks.weights_refusal(update, LIKE, images, 30)


# ---------------------------------------------------------------------------------------------- one upload

OFFER = np.array([[5, 0], [0, 0], [3, 4]])


def upload(counts=OFFER, shape=SHAPE):
    cells = torch.from_numpy(np.repeat(np.arange(counts.size), counts.ravel()))
    return torch.full((len(cells), *shape), 90, dtype=torch.uint8), cells // 2, cells % 2


def refusal(images, labels, device, **options):
    return checks.samples_refusal(images, labels, device, OFFER, SHAPE, **options)


def test_good_samples_pass():
    assert refusal(*upload()) == ""
    assert refusal(*upload(OFFER // 2)) == ""  # fewer than asked: a hospital may reject some of its own
    assert refusal(*upload(OFFER * 0)) == ""


IMAGES, LABELS, DEVICE = upload()
BAD = {
    "images as float": ((IMAGES / 255, LABELS, DEVICE), "float32"),
    "images of NaN": ((torch.full(IMAGES.shape, torch.nan), LABELS, DEVICE), "float32"),
    "an array": ((IMAGES.numpy(), LABELS, DEVICE), "ndarray"),
    "nothing": ((None, LABELS, DEVICE), "NoneType"),
    "grey images": ((IMAGES[:, :1], LABELS, DEVICE), "shape (12, 1, 28, 28)"),
    "a scalar": ((IMAGES[0, 0, 0, 0], LABELS, DEVICE), "shape ()"),
    "labels as float": ((IMAGES, LABELS.float(), DEVICE), "float32"),
    "labels one-hot": ((IMAGES, torch.eye(12, 3, dtype=torch.int64), DEVICE), "shape (12, 3)"),
    "devices as bytes": ((IMAGES, LABELS, DEVICE.to(torch.uint8)), "uint8"),
    "a label short": ((IMAGES, LABELS[1:], DEVICE), "12 images, 11 labels"),
    "a label below": ((IMAGES, LABELS - 1, DEVICE), "from -1 to 1"),
    "a label beyond": ((IMAGES, LABELS + 1, DEVICE), "from 1 to 3"),
    "a device beyond": ((IMAGES, LABELS, DEVICE + 1), "devices from 1 to 2"),
    "a class it does not own": ((IMAGES, torch.ones_like(LABELS), DEVICE), "0 were asked"),
    "too many of one": ((IMAGES, torch.zeros_like(LABELS), torch.zeros_like(DEVICE)), "12 samples of class 0 from"),
    "noise": ((torch.randint(256, IMAGES.shape, generator=torch_rng(0, "noise"), dtype=torch.uint8), LABELS, DEVICE),
              "bytes for 12 images"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_samples_are_refused_with_the_reason(fault):
    sent, part = BAD[fault]
    assert part in refusal(*sent)


def test_the_byte_budget_can_be_set():
    assert "allowed are 10" in refusal(*upload(), most_bytes=10)
    assert refusal(*upload(), most_bytes=1e6) == ""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", [1, 7, 100, 101])
def test_noise_exceeds_the_byte_budget_and_real_images_do_not(channels, number):
    shape = (channels, 28, 28)
    noise = torch.from_numpy(rng(0, "noise").integers(0, 256, (number, *shape), dtype=np.uint8))
    real = torch.from_numpy(data.load("phantom").images[:number, :channels].copy())
    if number > 1:  # what one picture of noise takes more than its head is less than the room for heads
        assert sharing.size_of(noise) > checks.byte_budget(number, shape)
    assert sharing.size_of(real) < 0.9 * checks.byte_budget(number, shape)


# ---------------------------------------------------------------------------------------------- odd sources


def shared_by(federation, seed: int, **options) -> sharing.Shared:
    return sharing.share(federation.clients, federation, "class_and_device", seed, **options)


@pytest.fixture(scope="module")
def phantom():
    return data.load("phantom")


@pytest.fixture(scope="module")
def exchanged(phantom):
    """A federation and its honest exchange; the same uploads serve every further exchange of it."""
    federation, uploads = partition.federation(phantom, 0), {}
    own = sharing.offer_of

    def once(client, numbers, k, seed, **options):
        if client is not federation.clients[k]:
            return own(client, numbers, k, seed, **options)
        if k not in uploads:
            uploads[k] = own(client, numbers, k, seed, latent=40)
        return uploads[k]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "offer_of", once)
        yield federation, shared_by(federation, 0)


def faulty(kind: str, k: int, classes: int):
    """A `tamper` for `sharing.share`: hospital k sends samples with a fault, all others are honest."""
    def tamper(hospital, images, labels, device):
        random = rng(0, f"tamper {kind}", hospital)
        if hospital != k:
            return images, labels, device
        if kind == "labels shifted":
            return images, (labels + 1) % classes, device
        if kind == "labels shuffled":
            return images, labels[random.permutation(len(labels))], device
        if kind == "black":
            return torch.zeros_like(images), labels, device
        coarse = random.integers(0, 256, (len(images), 3, 7, 7)).repeat(4, 2).repeat(4, 3)
        noise = random.integers(0, 256, images.shape) if kind == "noise" else coarse
        return torch.from_numpy(noise.astype(np.uint8)), labels, device
    return tamper


def test_honest_hospitals_are_not_odd(exchanged):
    federation, honest = exchanged
    assert honest.refused == shared_by(federation, 0, real=True).refused == {}


def test_honest_hospitals_of_real_devices_are_not_odd(shared_data):
    ham = data.load("ham10000", shared_data)
    for seed, count in ((5, 0), (7, 0), (0, 10)):  # 5 and 7: where labels and images agree least
        federation = partition.federation(ham, seed, count=count)
        assert shared_by(federation, seed).refused == {}


@pytest.mark.parametrize("kind", ["labels shuffled", "noise", "coarse noise", "black"])
def test_a_faulty_source_is_found_and_no_other(exchanged, kind):
    federation, shared = exchanged
    pool, classes = shared.pool, len(federation.classes)
    for k in (0, 4, 8):
        own = pool.source == k
        images, labels, _ = faulty(kind, k, classes)(k, pool.images[own], pool.labels[own], pool.device[own])
        bad = sharing.Pool(pool.images.clone(), pool.labels.clone(), pool.device, pool.source)
        bad.images[own], bad.labels[own] = images, labels
        assert list(checks.odd_sources(bad, classes)) == [k], (kind, k)


def test_shifted_labels_are_found(exchanged):
    federation, shared = exchanged
    pool, classes = shared.pool, len(federation.classes)
    found = 0
    for k in range(10):
        labels = torch.where(pool.source == k, (pool.labels + 1) % classes, pool.labels)
        odd = checks.odd_sources(sharing.Pool(pool.images, labels, pool.device, pool.source), classes)
        assert set(odd) <= {k}
        found += k in odd
    assert found >= 5  # the others send one class only or few samples, or are alone with their device


def test_two_faulty_sources_of_ten_are_both_found(exchanged):
    federation, shared = exchanged
    pool = shared.pool
    labels = torch.where((pool.source == 0) | (pool.source == 4), (pool.labels + 1) % 6, pool.labels)
    odd = checks.odd_sources(sharing.Pool(pool.images, labels, pool.device, pool.source), len(federation.classes))
    assert sorted(odd) == [0, 4] and all("labels do not go with" in reason for reason in odd.values())


def test_two_sources_cannot_say_who_is_odd(exchanged):
    federation, shared = exchanged
    two = (shared.pool.source == 0) | (shared.pool.source == 4)
    pool = sharing.Pool(*(part[two] for part in vars(shared.pool).values()))
    labels = torch.where(pool.source == 0, (pool.labels + 1) % 6, pool.labels)
    assert checks.odd_sources(sharing.Pool(pool.images, labels, pool.device, pool.source), 6) == {}


def test_an_empty_pool_has_no_odd_source():
    none = torch.empty(0, dtype=torch.int64)
    assert checks.odd_sources(sharing.Pool(torch.empty(0, *SHAPE, dtype=torch.uint8), none, none, none), 3) == {}


# ---------------------------------------------------------------------------------------------- in the exchange


def test_a_refused_upload_is_left_out_and_the_exchange_goes_on(exchanged):
    federation, honest = exchanged
    bad = {0: lambda i, l, d: (i / 255, l, d), 3: lambda i, l, d: (i, l + 9, d),
           8: lambda i, l, d: (255 - i, l.flip(0), d)}
    shared = shared_by(federation, 0, tamper=lambda k, *sent:
                           bad[k](*sent) if k in bad else sent)
    assert sorted(shared.refused) == [0, 3, 8]
    assert "float32" in shared.refused[0] and "labels from" in shared.refused[3] and "agreement" in shared.refused[8]
    rest = ~torch.isin(honest.pool.source, torch.tensor([0, 3, 8]))
    for part, kept in zip(vars(shared.pool).values(), vars(honest.pool).values()):
        assert torch.equal(part, kept[rest])  # the others' samples, to the bit
    assert all(not torch.isin(shared.pool.source[rows], torch.tensor([0, 3, 8])).any() for rows in shared.rows)
    assert len(shared.rows) == 10 and 0 < shared.costs["bytes_up"] < honest.costs["bytes_up"]


def test_tampering_with_nothing_changes_nothing(exchanged):
    federation, honest = exchanged
    again = shared_by(federation, 0, tamper=lambda k, *sent: sent)
    assert again.refused == {} == honest.refused
    assert all(torch.equal(a, b) for a, b in zip(vars(again.pool).values(), vars(honest.pool).values()))
    assert all(torch.equal(a, b) for a, b in zip(again.rows, honest.rows))
    for name in ("bytes_up", "bytes_down", "bytes_samples_up", "bytes_samples_down"):
        assert again.costs[name] == honest.costs[name]


def test_an_honest_exchange_is_what_it_was_without_checks(exchanged, monkeypatch):
    federation, honest = exchanged
    monkeypatch.setattr(sharing, "accepted", lambda offers, asked, shape: (offers, {}))
    plain = shared_by(federation, 0)
    assert all(torch.equal(a, b) for a, b in zip(vars(plain.pool).values(), vars(honest.pool).values()))
    assert all(torch.equal(a, b) for a, b in zip(plain.rows, honest.rows))
    assert all(value == honest.costs[name] for name, value in plain.costs.items() if "bytes" in name)


def test_everybody_refused_leaves_an_empty_pool(exchanged):
    federation, _ = exchanged
    shared = shared_by(federation, 0, tamper=lambda k, images, labels, device: (images.float(), labels, device))
    assert len(shared.refused) == 10 and len(shared.pool) == 0 and not any(len(rows) for rows in shared.rows)
    assert shared.costs["bytes_up"] == shared.costs["bytes_down"] == 0


def test_a_run_goes_on_with_what_is_left_and_reports(exchanged):
    federation, _ = exchanged
    method = rounds.Method(sharing="class_and_device", pretrain_steps=4)
    run = rounds.run(federation, method, 0, rounds=1, tamper_samples=lambda k, i, l, d: (i.float() if k else i, l, d))
    assert np.isfinite(run.weights).all() and run.took_part.all()
    assert [(r, k) for r, k, _ in run.missed] == [(0, k) for k in range(1, 10)] and "uint8" in run.missed[0][2]
