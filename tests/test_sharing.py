"""The sharing strategy: its invariants hold for any counts, any budget and any rule."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedssg_helpers import generator, sharing
from fedssg_helpers.partition import Client, Federation
from fedssg_helpers.sharing import Budget

SOME = generator.MINIMUM


def random_case(number: int):
    """Counts (K, C, D) of every kind, from empty to lopsided, and a budget."""
    random = np.random.default_rng(number)
    shape = random.integers(1, 7), random.integers(1, 6), random.integers(1, 5)
    have = np.floor(10 ** random.uniform(-1, 3, shape)) * (random.random(shape) < random.uniform(0.2, 1))
    budget = Budget(fill=int(random.integers(0, 400)), cell=int(random.integers(0, 60)),
                    offer=int(random.integers(0, 200)), receive=int(random.integers(0, 2000)),
                    power=float(random.random()), silent=(0,) if number % 3 == 0 else ())
    return have.astype(np.int64), budget


def pool_for(offer: np.ndarray) -> sharing.Pool:
    """The pool of an offer (K, C, D), with blank images."""
    devices, uploads = offer.shape[2], []
    for numbers in offer:
        cells = torch.from_numpy(np.repeat(np.arange(numbers.size), numbers.ravel()))
        uploads.append((torch.zeros(len(cells), 1, 2, 2, dtype=torch.uint8), cells // devices, cells % devices))
    return sharing.pool_of(uploads)


def counted(pool: sharing.Pool, rows: torch.Tensor, shape) -> np.ndarray:
    cells = (pool.labels[rows] * shape[1] + pool.device[rows]).numpy()
    return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)


def hospital(counts, seed: int = 0) -> Client:
    """A hospital with noise images, `counts` (C, D) of each cell."""
    counts = np.asarray(counts)
    cells = np.repeat(np.arange(counts.size), counts.ravel())
    images = np.random.default_rng(seed).integers(0, 256, (len(cells), 1, 16, 16), dtype=np.uint8)
    cells = torch.from_numpy(cells)
    return Client(torch.from_numpy(images), cells // counts.shape[1], cells % counts.shape[1])


def federation_of(have) -> Federation:
    have = np.asarray(have)
    clients = [hospital(counts, k) for k, counts in enumerate(have)]
    names = tuple(map(str, range(have.shape[1]))), tuple(map(str, range(have.shape[2])))
    return Federation(clients, clients[0], *names, "test")


def shared(have, **options) -> sharing.Shared:
    federation = federation_of(have)
    return sharing.share(federation.clients, federation, "class_and_device", 0, latent=8, **options)


@pytest.fixture
def wild_rule():
    """A rule that asks everybody for far too much of everything."""
    sharing.RULES["wild"] = lambda have, budget: np.full(have.shape, 1e4 / 3)
    yield "wild"
    del sharing.RULES["wild"]


# ---------------------------------------------------------------------------------------------- any counts


@pytest.mark.parametrize("number", range(60))
@pytest.mark.parametrize("rule", ["class_and_device", "uniform", "wild"])
def test_a_plan_keeps_every_bound(rule, number, wild_rule):
    have, budget = random_case(number)
    plan = sharing.plan(have, rule, budget)
    assert plan.want.dtype == plan.offer.dtype == np.int64
    assert plan.want.min() >= 0 and plan.offer.min() >= 0
    assert plan.want.sum((1, 2)).max() <= budget.receive
    assert plan.offer.max() <= budget.offer
    assert not plan.offer[have < SOME].any()  # nothing is generated from too few images
    assert not plan.offer[list(budget.silent)].any()
    assert not plan.want[sharing.supply(have, budget) == 0].any()
    others = plan.offer.sum(0) - plan.offer
    assert (plan.want <= others).all()  # every wish is served by somebody else
    assert (plan.offer.sum(0) <= plan.want.sum(0) + len(have)).all()  # nothing is generated in vain but by rounding


@pytest.mark.parametrize("number", range(20))
def test_what_is_dealt_is_the_plan_and_nobody_gets_his_own(number, wild_rule):
    have, budget = random_case(number)
    for rule in ("class_and_device", "uniform", "wild"):
        plan = sharing.plan(have, rule, budget)
        pool = pool_for(plan.offer)
        flow = np.zeros((len(have), len(have)))
        for k in range(len(have)):
            rows = sharing.deal(plan.want[k], pool, k, number)
            assert len(torch.unique(rows)) == len(rows)
            assert not (pool.source[rows] == k).any()
            np.testing.assert_array_equal(counted(pool, rows, have.shape[1:]), plan.want[k])
            flow[:, k] = np.bincount(pool.source[rows], minlength=len(have))
        expected = sharing.flows(plan)
        np.testing.assert_allclose(expected.sum(0), flow.sum(0))
        assert not np.diag(expected).any()


@pytest.mark.parametrize("number", range(60))
def test_the_control_deals_every_hospital_exactly_as_many(number):
    have, budget = random_case(number)
    ours, control = (sharing.plan(have, rule, budget).want.sum((1, 2)) for rule in ("class_and_device", "uniform"))
    np.testing.assert_array_equal(ours, control)


def test_a_short_pool_deals_what_there_is():
    have = np.array([[[0, 0]], [[50, 20]]])
    plan = sharing.plan(have, "class_and_device")
    pool = pool_for(plan.offer // 3)
    rows = sharing.deal(plan.want[0], pool, 0, 0)
    np.testing.assert_array_equal(counted(pool, rows, (1, 2)), (plan.offer // 3).sum(0))


def test_hospitals_may_be_listed_in_any_order():
    have, budget = random_case(7)
    budget, order = replace(budget, silent=()), np.random.default_rng(0).permutation(len(have))
    for rule in sharing.RULES:
        plan, shuffled = sharing.plan(have, rule, budget), sharing.plan(have[order], rule, budget)
        np.testing.assert_array_equal(plan.want[order], shuffled.want)
        np.testing.assert_array_equal(plan.offer[order], shuffled.offer)


# ---------------------------------------------------------------------------------------------- the rule itself


def test_the_rule_is_its_formula():
    have = np.array([[[0, 0], [300, 0]], [[64, 0], [90, 0]], [[0, 16], [0, 7]]])
    want = sharing.class_and_device(have, Budget(fill=120, cell=20, power=0.5, worth=100))
    np.testing.assert_allclose(want[0, 0], [120 * 8 / (8 + 4), 120 * 4 / (8 + 4)])  # gap 120, shares sqrt 64, sqrt 16
    np.testing.assert_allclose(want[0, 1], [0, 0])  # no gap; 7 images of device 1 are too few to generate from
    np.testing.assert_allclose(want[1, 0], [0, 56])  # gap 56 from the only other source
    np.testing.assert_allclose(want[2, 0], [104, 0])
    np.testing.assert_allclose(want[1, 1], [30, 0])
    modest = sharing.class_and_device(have, Budget(fill=120, cell=20, power=0.5, worth=0.5))
    np.testing.assert_allclose(modest, np.minimum(want, 0.5 * sharing.supply(have)))


def test_the_floor_reaches_a_class_that_needs_no_filling():
    have = np.array([[[500, 0]], [[0, 40]]])
    np.testing.assert_array_equal(sharing.plan(have, "class_and_device", Budget(cell=15)).want[0], [[0, 15]])


def test_nobody_asks_for_more_than_the_sources_are_worth():
    have = np.array([[[0, 0]], [[40, 10]]])
    for worth, wanted in ((0.0, [0, 0]), (0.5, [20, 5]), (2.0, [80, 20])):
        np.testing.assert_array_equal(sharing.plan(have, "class_and_device", Budget(worth=worth)).want[0, 0], wanted)


def test_the_neediest_customer_sets_the_upload():
    have = np.array([[[100]], [[90]], [[0]], [[0]]])
    plan = sharing.plan(have, "class_and_device", Budget(fill=200, cell=20, worth=10, power=1.0, offer=1000))
    np.testing.assert_array_equal(plan.want.ravel(), [100, 110, 200, 200])
    np.testing.assert_array_equal(plan.offer.ravel(), [110, 100, 0, 0])  # 200 * 100/190 = 105.3, but hospital 1: 110


def test_what_one_source_may_not_upload_another_takes_over():
    have = np.array([[[1000]], [[10]], [[0]]])
    plan = sharing.plan(have, "class_and_device", Budget(fill=100, cell=20, worth=10, offer=60))
    assert plan.want[2, 0, 0] == 100
    assert plan.offer[:2, 0, 0].tolist() == [60, 40]


def test_a_silent_hospital_receives_but_does_not_supply():
    have = np.array([[[50]], [[60]], [[0]]])
    plan = sharing.plan(have, "class_and_device", Budget(cell=20, worth=10, offer=150, silent=(0,)))
    assert plan.offer[:, 0, 0].tolist() == [0, 150, 0]
    assert plan.want[0, 0, 0] == 150 and plan.want[1, 0, 0] == 0


# ---------------------------------------------------------------------------------------------- at the edge


@pytest.mark.parametrize("have", [
    np.full((1, 3, 2), 50),  # a single hospital
    np.full((4, 3, 2), SOME - 1),  # nobody has enough of anything
    np.zeros((3, 2, 1), int),  # nothing at all
])
def test_where_nobody_can_supply_nothing_is_planned(have):
    for rule in sharing.RULES:
        plan = sharing.plan(have, rule)
        assert not plan.want.any() and not plan.offer.any() and not sharing.flows(plan).any()


def test_one_device_a_class_of_nobody_and_a_class_of_one():
    have = np.array([[[60], [0], [30]], [[40], [0], [0]], [[9], [0], [3]]])
    plan = sharing.plan(have, "class_and_device", Budget(cell=20, worth=10, offer=150))
    assert not plan.want[:, 1].any() and not plan.offer[:, 1].any()  # absent everywhere
    assert plan.want[0, 2, 0] == 0  # the only owner gets none of its own
    assert plan.want[1, 2, 0] == 150 and plan.want[2, 2, 0] == 150  # the cap of the one source
    assert plan.offer[:, 2, 0].tolist() == [150, 0, 0]


def test_a_single_hospital_shares_nothing():
    result = shared(np.full((1, 2, 2), 20))
    assert len(result.pool) == 0 and [len(r) for r in result.rows] == [0]
    assert result.pool.images.shape == (0, 1, 16, 16)
    assert result.costs["bytes_up"] == result.costs["bytes_down"] == 0


@pytest.mark.parametrize("have, part", [
    (np.zeros((2, 3), int), "hospitals, classes, devices"), (np.zeros((2, 3, 1)), "whole numbers"),
    (-np.ones((2, 3, 1), int), "whole numbers"), (np.zeros((0, 3, 1), int), "hospitals, classes, devices")])
def test_reports_that_are_no_counts(have, part):
    with pytest.raises(ValueError, match=part):
        sharing.plan(have, "uniform")


@pytest.mark.parametrize("field, value", [
    ("fill", -1), ("cell", 2.5), ("offer", float("nan")), ("receive", float("inf")), ("worth", -1), ("worth", float("inf")), ("power", 1.5), ("power", -0.1)])
def test_a_budget_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        Budget(**{field: value})


@pytest.mark.parametrize("silent", [(3,), (-1,)])
def test_silencing_a_hospital_that_is_not_there(silent):
    with pytest.raises(ValueError, match="0 to 2"):
        sharing.plan(np.full((3, 1, 1), 20), "uniform", Budget(silent=silent))


@pytest.mark.parametrize("answer", [np.zeros((3, 1)), np.full((3, 1, 1), np.nan), -np.ones((3, 1, 1)), None])
def test_an_own_rule_that_returns_no_wishes(answer, monkeypatch):
    monkeypatch.setitem(sharing.RULES, "mine", lambda have, budget: answer)
    with pytest.raises(ValueError, match="'mine' must return"):
        sharing.plan(np.full((3, 1, 1), 20), "mine")


def test_an_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match="class_and_device, uniform"):
        sharing.plan(np.full((3, 1, 1), 20), "fair")


def test_a_report_beyond_the_agreed_names():
    with pytest.raises(ValueError, match="hospital 1"):
        sharing.reports([hospital([[2]]), hospital([[2], [2]])], 1, 1)
    with pytest.raises(ValueError, match="no hospital"):
        sharing.reports([], 1, 1)


def test_a_hospital_refuses_a_cell_that_is_too_small():
    with pytest.raises(ValueError, match="refuses"):
        sharing.offer_of(hospital([[20], [SOME - 1]]), np.array([[5], [1]]), 0, 0)


def test_uploads_that_do_not_fit_together():
    empty = torch.zeros(0, dtype=torch.int64)
    good = torch.zeros(0, 1, 16, 16, dtype=torch.uint8), empty, empty
    for images in (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 1, 16, 16)):
        with pytest.raises(ValueError, match="uint8"):
            sharing.pool_of([good, (images, empty, empty)])


# ---------------------------------------------------------------------------------------------- the whole exchange

HAVE = np.array([[[30, 0], [12, 0]], [[0, 25], [0, 3]], [[0, 20], [0, 15]]])
SMALL = Budget(fill=40, cell=10, worth=10, offer=30)


def test_the_exchange_deals_the_plan_and_counts_its_bytes():
    result = shared(HAVE, budget=SMALL)
    assert result.pool.images.dtype == torch.uint8
    np.testing.assert_array_equal(sharing.reports(federation_of(HAVE).clients, 2, 2), HAVE)
    for k, rows in enumerate(result.rows):
        np.testing.assert_array_equal(counted(result.pool, rows, (2, 2)), result.plan.want[k])
        assert not (result.pool.source[rows] == k).any()
    sent = [result.pool.images[result.pool.source == k] for k in range(3)]
    assert result.costs["bytes_up"] == sum(map(sharing.size_of, sent)) > 0
    assert result.costs["bytes_down"] == sum(sharing.size_of(result.pool.images[rows]) for rows in result.rows)


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 28), (3, 17), (1, 128)])
@pytest.mark.parametrize("number", [0, 1, 100, 101])
def test_images_travel_without_loss(channels, size, number):
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (number, channels, size, size), dtype=np.uint8))
    assert torch.equal(sharing.unpacked(sharing.packed(images), channels, size), images)
    flat = torch.full_like(images, 7)
    assert number == 0 or sharing.size_of(flat) < flat.numel() / 2
    assert sharing.size_of(images[:0]) == 0


def test_two_exchanges_agree_to_the_last_bit():
    one, two = shared(HAVE, budget=SMALL), shared(HAVE, budget=SMALL)
    assert torch.equal(one.pool.images, two.pool.images)
    assert all(torch.equal(a, b) for a, b in zip(one.rows, two.rows))
    federation = federation_of(HAVE)
    other = sharing.share(federation.clients, federation, "class_and_device", 1, budget=SMALL, latent=8)
    assert not torch.equal(one.pool.images, other.pool.images)


def test_it_does_not_matter_who_is_called_first():
    federation, whole = federation_of(HAVE), shared(HAVE, budget=SMALL)
    offers = {k: sharing.offer_of(federation.clients[k], whole.plan.offer[k], k, 0, latent=8) for k in (2, 0, 1)}
    pool = sharing.pool_of([offers[k] for k in range(3)])
    assert torch.equal(pool.images, whole.pool.images) and torch.equal(pool.source, whole.pool.source)
    for k in (1, 2, 0):
        assert torch.equal(sharing.deal(whole.plan.want[k], pool, k, 0), whole.rows[k])


# ---------------------------------------------------------------------------------------------- variants and controls


def test_class_only_fills_classes_in_the_others_mix_of_devices():
    have = np.array([[[0, 0], [300, 0]], [[64, 0], [90, 0]], [[0, 16], [0, 9]]])
    want = sharing.class_only(have, Budget(fill=120, cell=20, worth=10))
    np.testing.assert_allclose(want[0, 0], [120 * 64 / 80, 120 * 16 / 80])
    np.testing.assert_allclose(want[0, 1], [0, 0])  # enough of the class, though none from device 1
    assert sharing.class_and_device(have, Budget(fill=120, cell=20, worth=10))[0, 1, 1] == 20


def test_device_only_fills_devices_in_the_others_mix_of_classes():
    have = np.array([[[100, 0], [300, 0]], [[0, 60], [0, 20]]])
    want = sharing.device_only(have, Budget(fill=120, worth=10))
    np.testing.assert_allclose(want[0, :, 1], [120 * 60 / 80, 120 * 20 / 80])
    np.testing.assert_allclose(want[0, :, 0], [0, 0])
    np.testing.assert_allclose(want[1, :, 1], [0, 0])  # it lacks 40 of its own device, but nobody else has any


def test_restyled_samples_fill_what_nobody_owns():
    have = np.array([[[40, 0], [30, 0]], [[0, 0], [0, 50]]])  # nobody has class 0 on device 1
    federation = federation_of(have)
    dark = replace(federation.clients[0], images=federation.clients[0].images // 4)
    federation = replace(federation, clients=[dark, federation.clients[1]])
    plain, styled = (sharing.share(federation.clients, federation, "class_and_device", 0, budget=SMALL, latent=8,
                                   restyled=on) for on in (False, True))
    empty = (styled.pool.labels == 0) & (styled.pool.device == 1)
    assert int(empty.sum()) >= SMALL.cell and not ((plain.pool.labels == 0) & (plain.pool.device == 1)).any()
    assert torch.equal(styled.pool.images[:len(plain.pool)], plain.pool.images)
    got = counted(styled.pool, styled.rows[1], (2, 2))
    assert got[0, 1] == SMALL.cell and not (styled.pool.source[styled.rows[1]] == 1).any()
    source = (plain.pool.labels == 0) & (plain.pool.device == 0)
    bright = sharing.styles(federation.clients, 2)[:, 0, 0]
    assert plain.pool.images[source].float().mean() < styled.pool.images[empty].float().mean()
    assert bright[0] < bright[1]
    assert styled.costs["bytes_up"] == plain.costs["bytes_up"] < styled.costs["bytes_down"]


def test_real_uploads_are_the_hospitals_own_images_each_once():
    client = hospital([[20, 0], [12, 5]])
    images, labels, device = sharing.real_offer_of(client, np.array([[15, 4], [30, 2]]), 0, 0)
    own = {bytes(i.numpy()): (int(a), int(b)) for i, a, b in zip(client.images, client.labels, client.device)}
    sent = [bytes(i.numpy()) for i in images]
    assert len(set(sent)) == len(sent) == 15 + 0 + 12 + 2
    assert [own[i] for i in sent] == list(zip(labels.tolist(), device.tolist()))


def test_copies_come_from_the_classes_that_are_there():
    labels = torch.tensor([0, 0, 2, 2, 2])
    rows = sharing.copies(labels, np.array([[3, 1], [5, 0], [0, 6]]), np.random.default_rng(0))
    assert torch.bincount(labels[rows], minlength=3).tolist() == [4, 0, 6]
    assert len(sharing.copies(labels, np.zeros((3, 2), int), np.random.default_rng(0))) == 0


def test_another_draw_is_another_pool_of_the_same_size():
    first, second = shared(HAVE, budget=SMALL), shared(HAVE, budget=SMALL, draw=1)
    assert first.pool.images.shape == second.pool.images.shape and not torch.equal(first.pool.images, second.pool.images)
    assert [len(r) for r in first.rows] == [len(r) for r in second.rows]
