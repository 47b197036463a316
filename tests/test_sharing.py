"""The sharing strategy, and the whole exchange; what holds for any counts and budgets is in test_properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import federation_of, noise

from fedssg_helpers import client, generator, server, sharing
from fedssg_helpers.methods import Method, Sharing
from fedssg_helpers.partition import Client
from fedssg_helpers.sharing import Budget

SOME = generator.MINIMUM
RULE = sharing.class_and_device


def pool_for(upload: np.ndarray) -> sharing.Pool:
    """The pool of uploads (K, C, D), with blank images."""
    devices, uploads = upload.shape[2], []
    for numbers in upload:
        cells = torch.from_numpy(np.repeat(np.arange(numbers.size), numbers.ravel()))
        images = torch.zeros(len(cells), 1, 2, 2, dtype=torch.uint8)
        uploads.append((images, cells // devices, cells % devices))
    return sharing.Pool.of(uploads)


def counted(pool: sharing.Pool, rows: torch.Tensor, shape) -> np.ndarray:
    cells = (pool.labels[rows] * shape[1] + pool.device[rows]).numpy()
    return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)


def test_a_short_pool_distributes_what_there_is():
    have = np.array([[[0, 0]], [[50, 20]]])
    plan = sharing.plan(have)
    pool = pool_for(plan.upload // 3)
    rows = sharing.distribute(plan.want[0], pool, 0, 0)
    np.testing.assert_array_equal(counted(pool, rows, (1, 2)), (plan.upload // 3).sum(0))


def test_hospitals_may_be_listed_in_any_order():
    random = np.random.default_rng(7)
    have, order = np.floor(10 ** random.uniform(-1, 3, (6, 4, 3))).astype(np.int64), random.permutation(6)
    for rule in sharing.RULES.values():
        plan, shuffled = sharing.plan(have, rule), sharing.plan(have[order], rule)
        np.testing.assert_array_equal(plan.want[order], shuffled.want)
        np.testing.assert_array_equal(plan.upload[order], shuffled.upload)


# ---------------------------------------- the rules themselves


def test_the_rule_is_its_formula():
    have = np.array([[[0, 0], [300, 0]], [[64, 0], [90, 0]], [[0, 16], [0, 7]]])
    want = RULE(have, Budget(fill=120, cell=20, power=0.5, per_image=100))
    np.testing.assert_allclose(
        want[0, 0], [120 * 8 / (8 + 4), 120 * 4 / (8 + 4)]
    )  # gap 120, shares sqrt 64, 16
    np.testing.assert_allclose(
        want[0, 1], [0, 0]
    )  # no gap; 7 images of device 1 are too few to generate from
    np.testing.assert_allclose(want[1, 0], [0, 56])  # gap 56 from the only other source
    np.testing.assert_allclose(want[2, 0], [104, 0])
    np.testing.assert_allclose(want[1, 1], [30, 0])
    modest = RULE(have, Budget(fill=120, cell=20, power=0.5, per_image=0.5))
    np.testing.assert_allclose(modest, np.minimum(want, 0.5 * sharing.supply(have)))


def test_the_floor_reaches_a_class_that_needs_no_filling():
    have = np.array([[[500, 0]], [[0, 40]]])
    np.testing.assert_array_equal(sharing.plan(have, RULE, Budget(cell=15)).want[0], [[0, 15]])


def test_nobody_asks_for_more_than_the_sources_images_allow():
    have = np.array([[[0, 0]], [[40, 10]]])
    for per_image, wanted in ((0.0, [0, 0]), (0.5, [20, 5]), (2.0, [80, 20])):
        plan = sharing.plan(have, RULE, Budget(per_image=per_image))
        np.testing.assert_array_equal(plan.want[0, 0], wanted)


def test_class_only_fills_classes_in_the_others_mix_of_devices():
    have = np.array([[[0, 0], [300, 0]], [[64, 0], [90, 0]], [[0, 16], [0, 9]]])
    budget = Budget(fill=120, cell=20, per_image=10)
    want = sharing.class_only(have, budget)
    np.testing.assert_allclose(want[0, 0], [120 * 64 / 80, 120 * 16 / 80])
    np.testing.assert_allclose(want[0, 1], [0, 0])  # enough of the class, though none from device 1
    assert RULE(have, budget)[0, 1, 1] == 20


def test_device_only_fills_devices_in_the_others_mix_of_classes():
    have = np.array([[[100, 0], [300, 0]], [[0, 60], [0, 20]]])
    want = sharing.device_only(have, Budget(fill=120, per_image=10))
    np.testing.assert_allclose(want[0, :, 1], [120 * 60 / 80, 120 * 20 / 80])
    np.testing.assert_allclose(want[0, :, 0], [0, 0])
    np.testing.assert_allclose(
        want[1, :, 1], [0, 0]
    )  # it lacks 40 of its own device, but nobody else has any


def test_the_neediest_hospital_sets_the_upload():
    have = np.array([[[100]], [[90]], [[0]], [[0]]])
    plan = sharing.plan(have, RULE, Budget(fill=200, cell=20, per_image=10, power=1.0, upload=1000))
    np.testing.assert_array_equal(plan.want.ravel(), [100, 110, 200, 200])
    np.testing.assert_array_equal(
        plan.upload.ravel(), [110, 100, 0, 0]
    )  # 200 * 100/190 = 105.3, but hospital 1: 110


def test_what_one_source_may_not_upload_another_takes_over():
    have = np.array([[[1000]], [[10]], [[0]]])
    plan = sharing.plan(have, RULE, Budget(fill=100, cell=20, per_image=10, upload=60))
    assert plan.want[2, 0, 0] == 100
    assert plan.upload[:2, 0, 0].tolist() == [60, 40]


def test_a_silent_hospital_receives_but_does_not_supply():
    have = np.array([[[50]], [[60]], [[0]]])
    plan = sharing.plan(have, RULE, Budget(cell=20, per_image=10, upload=150, silent=(0,)))
    assert plan.upload[:, 0, 0].tolist() == [0, 150, 0]
    assert plan.want[0, 0, 0] == 150 and plan.want[1, 0, 0] == 0


# ---------------------------------------- at the edge


@pytest.mark.parametrize(
    "have",
    [
        np.full((1, 3, 2), 50),  # a single hospital
        np.full((4, 3, 2), SOME - 1),  # nobody has enough of anything
        np.zeros((3, 2, 1), int),  # nothing at all
    ],
    ids=["single", "few", "nothing"],
)
def test_where_nobody_can_supply_nothing_is_planned(have):
    for rule in sharing.RULES.values():
        plan = sharing.plan(have, rule)
        assert not plan.want.any() and not plan.upload.any()


def test_one_device_a_class_of_nobody_and_a_class_of_one():
    have = np.array([[[60], [0], [30]], [[40], [0], [0]], [[9], [0], [3]]])
    plan = sharing.plan(have, RULE, Budget(cell=20, per_image=10, upload=150))
    assert not plan.want[:, 1].any() and not plan.upload[:, 1].any()  # absent everywhere
    assert plan.want[0, 2, 0] == 0  # the only owner gets none of its own
    assert plan.want[1, 2, 0] == 150 and plan.want[2, 2, 0] == 150  # the cap of the one source
    assert plan.upload[:, 2, 0].tolist() == [150, 0, 0]


NO_COUNTS = {
    "hospitals, classes, devices": [np.zeros((2, 3), int), np.zeros((0, 3, 1), int)],
    "whole numbers": [np.zeros((2, 3, 1)), -np.ones((2, 3, 1), int)],
}


@pytest.mark.parametrize("word", NO_COUNTS)
def test_reports_that_are_no_counts(word):
    for have in NO_COUNTS[word]:
        with pytest.raises(ValueError, match=word):
            sharing.plan(have)


@pytest.mark.parametrize(
    "field, value",
    [
        ("fill", -1),
        ("cell", 2.5),
        ("upload", float("nan")),
        ("receive", float("inf")),
        ("per_image", -1),
        ("per_image", float("inf")),
        ("power", 1.5),
        ("power", -0.1),
        ("minimum", SOME - 1),
    ],
)
def test_a_budget_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}.* is {value}"):
        Budget(**{field: value})


@pytest.mark.parametrize("silent", [(3,), (-1,)])
def test_silencing_a_hospital_that_is_not_there(silent):
    with pytest.raises(ValueError, match="0 to 2"):
        sharing.plan(np.full((3, 1, 1), 20), sharing.uniform, Budget(silent=silent))


@pytest.mark.parametrize("answer", [np.zeros((3, 1)), np.full((3, 1, 1), np.nan), -np.ones((3, 1, 1)), None])
def test_an_own_rule_that_returns_no_wishes(answer):
    def mine(have, budget):
        return answer

    with pytest.raises(ValueError, match="mine.* must (return|be)"):
        sharing.plan(np.full((3, 1, 1), 20), mine)


def test_a_report_beyond_the_agreed_names():
    with pytest.raises(ValueError, match="hospital 1"):
        sharing.reports([noise([[2]]), noise([[2], [2]])], 1, 1)


# ---------------------------------------- the whole exchange

HAVE = np.array([[[30, 0], [12, 0]], [[0, 25], [0, 3]], [[0, 20], [0, 15]]])
SMALL = Sharing(budget=Budget(fill=40, cell=10, per_image=10, upload=30))


@pytest.fixture(scope="module")
def shared():
    """The exchange of hospitals that have `HAVE`."""
    return server.share(federation_of(HAVE), SMALL, 0)


def size_of(images: torch.Tensor) -> int:
    return sum(map(len, sharing.packed(images)))


def test_the_exchange_distributes_the_plan_and_counts_its_bytes(shared):
    assert shared.pool.images.dtype == torch.uint8 and shared.refused == {} and not shared.rejected.any()
    np.testing.assert_array_equal(sharing.reports(federation_of(HAVE).clients, 2, 2), HAVE)
    for k, rows in shared.rows.items():
        np.testing.assert_array_equal(counted(shared.pool, rows, (2, 2)), shared.plan.want[k])
        assert not (shared.pool.source[rows] == k).any()
    sent = [shared.pool.images[shared.pool.source == k] for k in range(3)]
    assert shared.costs["bytes_samples_up"] == sum(map(size_of, sent)) > 0
    run = server.run(federation_of(HAVE), Method(sharing=SMALL), 0, rounds=1)
    down = sum(size_of(shared.pool.images[rows]) for rows in shared.rows.values())
    assert run.costs["bytes_samples_down"] == down > 0


def test_it_does_not_matter_who_is_called_first(shared):
    hospitals, uploads = federation_of(HAVE).clients, {}
    for k in (2, 0, 1):
        uploads[k] = client.synthesise(hospitals[k], shared.plan.upload[k], k, 0, SMALL)[0]
    pool = sharing.Pool.of([(u.images, u.labels, u.device) for _, u in sorted(uploads.items())])
    assert torch.equal(pool.images, shared.pool.images) and torch.equal(pool.source, shared.pool.source)
    for k in (1, 2, 0):
        assert torch.equal(sharing.distribute(shared.plan.want[k], pool, k, 0), shared.rows[k])


def test_the_seed_names_the_samples(shared):
    again, other = (server.share(federation_of(HAVE), SMALL, seed) for seed in (0, 1))
    assert torch.equal(shared.pool.images, again.pool.images)
    assert all(torch.equal(rows, again.rows[k]) for k, rows in shared.rows.items())
    assert not torch.equal(shared.pool.images, other.pool.images)


def test_a_single_hospital_shares_nothing():
    result = server.share(federation_of(np.full((1, 2, 2), 20)), SMALL, 0)
    assert len(result.pool) == 0 and [len(rows) for rows in result.rows.values()] == [0]
    assert result.pool.images.shape == (0, 1, 16, 16)
    assert result.costs["bytes_samples_up"] == result.costs["bytes_samples_down"] == 0


def test_an_edit_changes_pool_and_wishes_before_they_are_distributed(shared):
    """As A1 restyles: here, samples of class 0 become samples of class 1, and hospital 0 gets none."""
    seen = []

    def edit(pool, wishes, have, styles):
        seen.append((have, styles))
        wishes = wishes.copy()
        wishes[0] = 0
        return replace(pool, labels=torch.ones_like(pool.labels)), wishes

    edited = server.share(federation_of(HAVE), replace(SMALL, edit=edit), 0)
    assert np.array_equal(seen[0][0], HAVE) and seen[0][1].shape == (2, 2, 1)
    assert torch.equal(edited.pool.images, shared.pool.images) and edited.pool.labels.all()
    assert len(edited.rows[0]) == 0 and len(edited.rows[1]) > 0
    assert edited.costs["bytes_samples_up"] == shared.costs["bytes_samples_up"]


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 28), (3, 17), (1, 128)])
@pytest.mark.parametrize("number", [0, 1, 100, 101])
def test_images_travel_without_loss(channels, size, number):
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (number, channels, size, size), dtype=np.uint8))
    assert torch.equal(sharing.unpacked(sharing.packed(images), channels, size), images)
    same = torch.full_like(images, 7)
    assert number == 0 or size_of(same) < same.numel() / 2
    assert size_of(images[:0]) == 0


def test_channel_sums_give_the_styles_of_devices():
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    device = torch.arange(40) % 2
    parts = [Client(images[k::2], torch.zeros(20, dtype=torch.long), device[k::2]) for k in (0, 1)]
    have = sharing.reports(parts, 1, 2)
    found = sharing.styles(have, torch.stack([sharing.channel_sums(part, 2) for part in parts]), 64)
    x = (images.double() - 127.5) / 63.75
    for d in (0, 1):
        own = x[device == d].transpose(0, 1).flatten(1)
        expected = torch.stack([own.mean(1), own.std(1, correction=0)])
        assert torch.allclose(found[d].double(), expected, atol=1e-5)
