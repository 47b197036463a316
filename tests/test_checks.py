"""What the server checks before it uses what came: bad uploads are refused with a reason, honest ones never."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from PIL import Image

from fedssg_helpers import checks, client, partition, runs, server, sharing
from fedssg_helpers.keys import rng
from fedssg_helpers.methods import ClosedForm, Method, RealImages, Sharing
from fedssg_helpers.sharing import Budget

LIKE = torch.zeros(50)
SHAPE = (3, 28, 28)


# ---------------------------------------- weights


def test_good_weights_pass():
    assert checks.weights_refusal(torch.ones(50), LIKE, 30, 30) == ""
    assert checks.weights_refusal(torch.ones(50), LIKE, np.int64(30), 30) == ""


BAD_WEIGHTS = {
    "NoneType": None,
    "list": [0.0] * 50,
    "ndarray": np.zeros(50, np.float32),
    "shape (49,)": torch.zeros(49),
    "shape (50, 1)": torch.zeros(50, 1),
    "float64": torch.zeros(50, dtype=torch.float64),
    "int64": torch.zeros(50, dtype=torch.int64),
    "not finite": torch.full((50,), torch.nan),
    "are not finite": torch.arange(50) / 0,
}


@pytest.mark.parametrize("word", BAD_WEIGHTS)
def test_bad_weights_are_refused_with_the_reason(word):
    assert word in checks.weights_refusal(BAD_WEIGHTS[word], LIKE, 30, 30)


@pytest.mark.parametrize("images", [0, -30, 30.0, 2.5, float("nan"), None, True, "30"])
def test_the_number_of_images_is_whole_and_what_was_reported(images):
    assert "whole and above 0" in checks.weights_refusal(torch.zeros(50), LIKE, images, 30)
    assert "reported 30" in checks.weights_refusal(torch.zeros(50), LIKE, 3000, 30)


# ---------------------------------------- one upload

ASKED = np.array([[5, 0], [0, 0], [3, 4]])


def upload(counts=ASKED, shape=SHAPE) -> dict:
    cells = torch.from_numpy(np.repeat(np.arange(counts.size), counts.ravel()))
    images = torch.full((len(cells), *shape), 90, dtype=torch.uint8)
    return {"pictures": sharing.packed(images), "labels": cells // 2, "device": cells % 2}


def refusal(**changes) -> str:
    opened, why = checks.opened(upload() | changes, ASKED, SHAPE)
    assert (opened is None) == bool(why)
    return why


def test_good_samples_pass():
    for counts in (ASKED, ASKED // 2, ASKED * 0):  # fewer than asked: a hospital may reject some of its own
        answer = upload(counts)
        (images, labels, device), why = checks.opened(answer, ASKED, SHAPE)
        assert why == "" and images.shape == (counts.sum(), *SHAPE) and images.dtype == torch.uint8
        assert torch.equal(labels, answer["labels"]) and torch.equal(device, answer["device"])


def picture(image: Image.Image, kind: str = "WEBP") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def noise(number: int, shape=SHAPE) -> torch.Tensor:
    return torch.from_numpy(rng(0, "noise").integers(0, 256, (number, *shape), dtype=np.uint8))


GOOD = upload()
LABELS, DEVICE, PICTURES = GOOD["labels"], GOOD["device"], GOOD["pictures"]
BAD = {
    "no pictures": (dict(pictures=None), "NoneType"),
    "a tensor": (dict(pictures=noise(12)), "uint8"),
    "a list of numbers": (dict(pictures=[1, 2]), "list of bytes"),
    "no picture": (dict(pictures=[b"RIFF and so on"]), "cannot be read"),
    "cut": (dict(pictures=[PICTURES[0][:30]]), "cannot be read"),
    "another kind of file": (dict(pictures=[picture(Image.new("RGB", (28, 336)), "PNG")]), "cannot be read"),
    "a huge picture": (dict(pictures=[picture(Image.new("RGB", (16383, 16383)))]), "cannot be read"),
    "a picture too many": (dict(pictures=PICTURES * 2), "24 images, 12 labels"),
    "smaller images": (dict(pictures=upload(shape=(3, 20, 20))["pictures"]), "cannot be read"),
    "no labels": (dict(labels=None), "NoneType for labels"),
    "labels as float": (dict(labels=LABELS.float()), "float32"),
    "labels one-hot": (dict(labels=torch.eye(12, 3, dtype=torch.int64)), "shape (12, 3)"),
    "devices as bytes": (dict(device=DEVICE.to(torch.uint8)), "uint8"),
    "a label short": (dict(labels=LABELS[1:]), "12 images, 11 labels"),
    "a label below": (dict(labels=LABELS - 1), "from -1 to 1"),
    "a label beyond": (dict(labels=LABELS + 1), "from 1 to 3"),
    "a device beyond": (dict(device=DEVICE + 1), "devices from 1 to 2"),
    "a class it does not own": (dict(labels=torch.ones_like(LABELS)), "0 were asked"),
    "too many of one": (dict(labels=LABELS * 0, device=DEVICE * 0), "12 samples of class 0 from"),
    "noise": (dict(pictures=sharing.packed(noise(12))), "bytes for 12 images"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_samples_are_refused_with_the_reason(fault):
    changes, word = BAD[fault]
    with pytest.MonkeyPatch.context() as patch:
        if fault == "a huge picture":  # so empty that it packs into few bytes
            patch.setattr(checks, "byte_budget", lambda *_: 1e9)
        why = refusal(**changes)
    assert word in why


def test_the_oracle_may_send_images_that_pack_badly():
    answer = upload() | {"pictures": sharing.packed(noise(12))}
    assert checks.opened(answer, ASKED, SHAPE, any_size=True)[1] == ""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", [1, 7, 100, 101])
def test_noise_exceeds_the_byte_budget_and_real_images_do_not(channels, number):
    shape = (channels, 28, 28)
    size = lambda images: sum(map(len, sharing.packed(images)))  # noqa: E731
    real = torch.from_numpy(runs.images_of("phantom").images[:number, :channels].copy())
    if number > 1:  # what one picture of noise takes more than its head is less than the room for heads
        assert size(noise(number, shape)) > checks.byte_budget(number, shape)
    assert size(real) < 0.9 * checks.byte_budget(number, shape)


# ---------------------------------------- implausible sources

HOW = Sharing(source=ClosedForm(latent=40), budget=Budget(receive=1500))  # many samples can be judged better


@pytest.fixture(scope="module")
def exchanged():
    """A federation and its honest exchange; the same uploads serve every further exchange of it."""
    federation, uploads, own = partition.federate(runs.images_of("phantom"), 0), {}, client.synthesise

    def once(hospital, wanted, k, *rest, **options):
        if hospital is not federation.clients[k]:
            return own(hospital, wanted, k, *rest, **options)
        if k not in uploads:
            uploads[k] = own(hospital, wanted, k, *rest, **options)
        return uploads[k]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "synthesise", once)
        yield federation, server.share(federation, HOW, 0)


def faulty(kind: str, images: torch.Tensor, labels: torch.Tensor, classes: int):
    """A hospital's images and labels, with a fault."""
    random = rng(0, f"tamper {kind}")
    if kind == "labels shifted":
        return images, (labels + 1) % classes
    if kind == "labels shuffled":
        return images, labels[random.permutation(len(labels))]
    if kind == "black":
        return torch.zeros_like(images), labels
    coarse = random.integers(0, 256, (len(images), 3, 7, 7)).repeat(4, 2).repeat(4, 3)
    strange = random.integers(0, 256, images.shape) if kind == "noise" else coarse
    return torch.from_numpy(strange.astype(np.uint8)), labels


def with_fault(pool: sharing.Pool, kind: str, sources, classes: int) -> sharing.Pool:
    images, labels = pool.images.clone(), pool.labels.clone()
    for k in sources:
        own = pool.source == k
        images[own], labels[own] = faulty(kind, images[own], labels[own], classes)
    return replace(pool, images=images, labels=labels)


def test_honest_hospitals_are_plausible(exchanged):
    federation, honest = exchanged
    oracle = server.share(federation, replace(HOW, source=RealImages()), 0)
    assert honest.refused == oracle.refused == checks.implausible_sources(oracle.pool, 6) == {}


def test_honest_hospitals_of_real_devices_are_plausible(shared_data):
    ham = runs.images_of("ham10000", str(shared_data))
    for seed, count in ((5, 0), (7, 0), (0, 10)):  # 5 and 7: where labels and images agree least
        assert server.share(partition.federate(ham, seed, count=count), Sharing(), seed).refused == {}


@pytest.mark.parametrize("kind", ["labels shuffled", "noise", "coarse noise", "black"])
def test_a_faulty_source_is_found_and_no_other(exchanged, kind):
    federation, shared = exchanged
    for k in (0, 4, 8):
        bad = with_fault(shared.pool, kind, [k], len(federation.classes))
        assert list(checks.implausible_sources(bad, len(federation.classes))) == [k], (kind, k)


def test_shifted_labels_are_found(exchanged):
    federation, shared = exchanged
    classes, found = len(federation.classes), 0
    for k in range(10):
        refused = checks.implausible_sources(with_fault(shared.pool, "labels shifted", [k], classes), classes)
        assert set(refused) <= {k}
        found += k in refused
    assert found >= 5  # the others send one class only or few samples, or are alone with their device
    both = checks.implausible_sources(with_fault(shared.pool, "labels shifted", [0, 4], classes), classes)
    assert sorted(both) == [0, 4] and all("labels do not go with" in reason for reason in both.values())


def test_two_sources_cannot_say_who_is_implausible(exchanged):
    pool = exchanged[1].pool
    two = pool.take((pool.source == 0) | (pool.source == 4))
    assert checks.implausible_sources(with_fault(two, "labels shifted", [0], 6), 6) == {}
    assert checks.implausible_sources(pool.take(slice(0)), 6) == {}


# ---------------------------------------- in the exchange


def tampered(bad: dict):
    """A `tamper`: for each hospital in `bad` a function of its images, labels and devices."""

    def tamper(question, k, content, answer):
        if question != "generate" or k not in bad:
            return answer
        images = sharing.unpacked(answer["pictures"], 3, 28)
        images, labels, device = bad[k](images, answer["labels"], answer["device"])
        pictures = sharing.packed(images) if isinstance(images, torch.Tensor) else images
        return answer | {"pictures": pictures, "labels": labels, "device": device}

    return tamper


def test_a_refused_upload_is_left_out_and_the_exchange_goes_on(exchanged):
    federation, honest = exchanged
    bad = {
        0: lambda i, c, d: (None, c, d),
        3: lambda i, c, d: (i, c + 9, d),
        8: lambda i, c, d: (255 - i, c.flip(0), d),
    }
    shared = server.share(federation, HOW, 0, tamper=tampered(bad))
    assert sorted(shared.refused) == [0, 3, 8]
    assert "NoneType" in shared.refused[0] and "labels from" in shared.refused[3]
    assert "agreement" in shared.refused[8]
    rest, gone = ~torch.isin(honest.pool.source, torch.tensor([0, 3, 8])), torch.tensor([0, 3, 8])
    for part, kept in zip(vars(shared.pool).values(), vars(honest.pool).values()):
        assert torch.equal(part, kept[rest])  # the others' samples, to the bit
    assert all(not torch.isin(shared.pool.source[rows], gone).any() for rows in shared.rows.values())
    assert len(shared.rows) == 10
    assert 0 < shared.costs["bytes_samples_up"] < honest.costs["bytes_samples_up"]


def test_neither_tampering_with_nothing_nor_the_checks_change_an_honest_exchange(exchanged, monkeypatch):
    federation, honest = exchanged
    monkeypatch.setattr(checks, "implausible_sources", lambda pool, classes: {})
    monkeypatch.setattr(checks, "byte_budget", lambda number, shape: np.inf)
    nothing = tampered({k: lambda *sent: sent for k in range(10)})
    again = server.share(federation, HOW, 0, tamper=nothing)
    assert again.refused == {} == honest.refused
    assert all(torch.equal(a, b) for a, b in zip(vars(again.pool).values(), vars(honest.pool).values()))
    assert all(torch.equal(again.rows[k], honest.rows[k]) for k in range(10))
    assert all(value == honest.costs[name] for name, value in again.costs.items() if "bytes" in name)


def test_everybody_refused_leaves_an_empty_pool(exchanged):
    federation, _ = exchanged
    bad = {k: lambda images, labels, device: (images, labels.float(), device) for k in range(10)}
    shared = server.share(federation, HOW, 0, tamper=tampered(bad))
    assert len(shared.refused) == 10 and len(shared.pool) == 0 and not any(map(len, shared.rows.values()))
    assert shared.costs["bytes_samples_up"] == shared.costs["bytes_samples_down"] == 0


def test_a_run_goes_on_with_what_is_left_and_reports(exchanged):
    federation, _ = exchanged
    bad = {k: lambda images, labels, device: (images, labels.float(), device) for k in range(1, 10)}
    method = Method(sharing=replace(HOW, pretrain_steps=4))
    run = server.run(federation, method, 0, rounds=1, tamper=tampered(bad))
    assert np.isfinite(run.weights).all() and run.took_part.all()
    assert [(r, k) for r, k, _ in run.missed] == [(0, k) for k in range(1, 10)]
    assert "float32" in run.missed[0][2]


@pytest.mark.parametrize("question", ["generate", "update", "test"])
@pytest.mark.parametrize("harm", ["left out", "text", "of another shape"])
def test_an_answer_that_lacks_a_part_is_left_out_and_the_run_goes_on(question, harm):
    part = {"generate": "rejected", "update": "seconds", "test": "confusions"}[question]
    wrong = {"text": "text", "of another shape": torch.zeros(1, dtype=torch.int64)}

    def tamper(asked, k, content, answer):
        if asked != question or k:
            return answer
        return {name: x for name, x in answer.items() if name != part} | (
            {part: wrong[harm]} if harm in wrong else {}
        )

    method = replace(small.SHARE, stays="norm")  # then every hospital tests a part
    run = server.run(small.federation(), method, 0, rounds=1, tamper=tamper)
    assert [k for _, k, why in run.missed if part in why] and {k for _, k, _ in run.missed} == {0}
    assert run.took_part[0, 1:].all()
