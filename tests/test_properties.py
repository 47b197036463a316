"""What must hold for any data, any counts and any updates: hypothesis looks for a case in which it does not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics as sk

from fedssg_helpers import checks, generator, metrics, partition, sharing
from fedssg_helpers.data import ImageSet
from fedssg_helpers.methods import Clipped, Mean, Median

settings.register_profile("course", derandomize=True, deadline=None, max_examples=300, database=None)
settings.load_profile("course")


# ---------------------------------------- partition


@st.composite
def image_sets(draw):
    """Image sets with groups of 1 to 4 images; each image carries its own number in its first two pixels."""
    groups, classes, devices = draw(st.integers(12, 60)), draw(st.integers(2, 5)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lesions = draw(st.sampled_from([1, 4]))
    group = np.repeat(np.arange(groups), random.integers(1, lesions + 1, groups))
    rare = random.dirichlet(np.full(classes, draw(st.sampled_from([0.3, 1.0, 20.0]))))
    labels = random.choice(classes, groups, p=rare)[group]
    labels[:2] = 0, 1  # at least two classes
    images = np.zeros((len(group), 1, 16, 16), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(len(group)) % 256, np.arange(len(group)) // 256
    device = random.integers(devices, size=groups)[group]
    names = tuple("abcde"[:classes]), tuple("wxyz"[:devices])
    return ImageSet(
        "made",
        images,
        labels.astype(np.int64),
        device.astype(np.int64),
        group,
        *names,
        "none",
        simulated=draw(st.booleans()),
    )


def numbers_of(client: partition.Client) -> np.ndarray:
    """Which images these are, by what they carry."""
    return (client.images[:, 0, 0, 0].long() + 256 * client.images[:, 0, 0, 1].long()).numpy()


@given(
    image_sets(),
    st.integers(0, 6),
    st.floats(0.05, 100),
    st.floats(0, 1),
    st.floats(0, 2),
    st.floats(1, 20),
    st.integers(0, 9),
)
def test_every_image_goes_to_one_place_and_no_lesion_is_split(data, count, alpha, mix, skew, tail, seed):
    devices = np.unique(data.device)
    try:
        wishes = dict(alpha=alpha, device_mix=mix, size_skew=skew, tail=tail)
        if count == 0:
            wishes = {} if len(devices) > 1 and not data.simulated else {"alpha": alpha}
        federation = partition.federate(data, seed, count=count, **wishes)
    except ValueError as error:  # ten hospitals for twelve lesions, or nearly one class each: said, not done
        assert "hospital" in str(error)
        event("refused")
        return
    places = [numbers_of(client) for client in federation.clients]
    test, train = numbers_of(federation.test), np.concatenate(places)
    everything = np.concatenate([train, test])
    assert len(np.unique(everything)) == len(everything)  # nothing twice
    if count == 0 or tail == 1:
        assert len(everything) == len(data)  # nothing lost
    assert min(map(len, places)) > 0 and len(test) > 0
    owners = [set(data.group[place]) for place in (*places, test)]
    assert sum(map(len, owners)) == len(set().union(*owners))  # no lesion in two places, test side included
    for place, client in zip((*places, test), (*federation.clients, federation.test)):
        np.testing.assert_array_equal(client.labels.numpy(), data.labels[place])
        np.testing.assert_array_equal(client.device.numpy(), data.device[place])


# ---------------------------------------- sharing


reported = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: arrays.arrays(
        np.int64,
        shape,
        elements=st.one_of(st.just(0), st.integers(1, generator.MINIMUM), st.integers(0, 2000)),
    )
)
budgets = st.builds(
    sharing.Budget,
    fill=st.integers(0, 400),
    cell=st.integers(0, 200),
    per_image=st.floats(0, 20),
    upload=st.integers(0, 400),
    receive=st.integers(0, 3000),
    power=st.floats(0, 1),
    silent=st.sampled_from([(), (0,)]),
)


def wild(have, budget):
    """A rule that asks everybody for far too much of everything."""
    return np.full(have.shape, 1e4 / 3)


@given(reported, budgets, st.sampled_from([*sharing.RULES.values(), wild]), st.integers(0, 9))
def test_no_budget_is_exceeded_and_nobody_gets_his_own(have, budget, rule, seed):
    plan = sharing.plan(have, rule, budget)
    assert plan.want.dtype == plan.upload.dtype == np.int64
    assert plan.want.min() >= 0 <= plan.upload.min()
    assert plan.want.sum((1, 2)).max() <= budget.receive and plan.upload.max() <= budget.upload
    assert not plan.upload[have < generator.MINIMUM].any()  # nothing is generated from too few images
    assert not plan.upload[list(budget.silent)].any()
    assert not plan.want[
        sharing.supply(have, budget) == 0
    ].any()  # nothing is promised that nobody else can make
    assert (plan.want <= plan.upload.sum(0) - plan.upload).all()  # every wish is served by somebody else
    assert (plan.upload.sum(0) <= plan.want.sum(0) + len(have)).all()  # nothing in vain but by rounding
    if rule is sharing.uniform:  # the control: every hospital gets exactly as many
        ours = sharing.plan(have, sharing.class_and_device, budget)
        np.testing.assert_array_equal(plan.want.sum((1, 2)), ours.want.sum((1, 2)))

    uploads = []
    for numbers in plan.upload:
        cells = torch.from_numpy(np.repeat(np.arange(numbers.size), numbers.ravel()))
        images = torch.zeros(len(cells), 1, 2, 2, dtype=torch.uint8)
        uploads.append((images, cells // have.shape[2], cells % have.shape[2]))
    pool = sharing.Pool.of(uploads)
    for k in range(len(have)):
        rows = sharing.distribute(plan.want[k], pool, k, seed)
        assert len(rows) <= budget.receive and len(rows.unique()) == len(rows)
        assert not (pool.source[rows] == k).any()
        cells = pool.labels[rows] * have.shape[2] + pool.device[rows]
        got = torch.bincount(cells, minlength=plan.want[k].size).numpy()
        np.testing.assert_array_equal(got, plan.want[k].ravel())


# ---------------------------------------- aggregation


@st.composite
def update_lists(draw, fewest: int = 1):
    size, number = draw(st.integers(1, 8)), draw(st.integers(fewest, 8))
    weights = draw(arrays.arrays(np.float32, (number, size), elements=st.floats(-1e3, 1e3, width=32)))
    images = draw(st.lists(st.integers(1, 10_000), min_size=number, max_size=number))
    return weights, images


def sent(weights, images, order=None):
    order = range(len(images)) if order is None else order
    return [(torch.from_numpy(weights[k]), images[k]) for k in order]


def mean_of(updates) -> np.ndarray:
    return Mean()(updates, None, {}).numpy()


@given(update_lists(), st.randoms(use_true_random=False), st.integers(2, 1000))
def test_the_average_is_its_closed_form_in_any_order(updates, random, factor):
    weights, images = updates
    order = random.sample(range(len(images)), len(images))
    mean = mean_of(sent(weights, images))
    share = np.array(images) / np.sum(images)
    closed = (share[:, None] * weights.astype(float)).sum(0)
    np.testing.assert_allclose(mean, closed, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(mean_of(sent(weights, images, order)), mean, rtol=1e-6, atol=1e-6)
    many = mean_of(sent(weights, [factor * n for n in images]))  # only shares count
    np.testing.assert_allclose(many, mean, rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=50))
def test_the_averages_weights_sum_to_one(images):
    one_hot = torch.eye(len(images))
    each = [
        mean_of((one_hot[k, j : j + 1], n) for j, n in enumerate(images)).item() for k in range(len(images))
    ]
    np.testing.assert_allclose(each, np.array(images) / sum(images), rtol=1e-6)
    assert sum(each) == pytest.approx(1, abs=1e-6)
    assert mean_of((torch.full((3,), 7.5), n) for n in images).tolist() == [7.5] * 3


@given(update_lists(fewest=3), st.randoms(use_true_random=False), st.sampled_from([np.nan, np.inf]))
def test_robust_aggregates_do_not_ask_for_the_order_and_a_far_client_moves_them_little(updates, random, bad):
    weights, images = updates
    order, start = random.sample(range(len(images)), len(images)), torch.zeros(weights.shape[1])
    for part in (Median(), Clipped()):
        here = part(sent(weights, images), start, {}).numpy()
        there = part(sent(weights, images, order), start, {}).numpy()
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-3)
    middle = Median()(sent(weights, images), start, {}).numpy()
    assert (weights.min(0) <= middle).all() and (middle <= weights.max(0)).all()
    length = np.linalg.norm(weights.astype(float), axis=1)
    step = np.linalg.norm(Clipped()(sent(weights, images), start, {}).numpy())
    assert step <= np.median(length) * 1.001 + 1e-3
    with pytest.raises(ValueError, match="update 1 .*finite"):
        one_bad = np.where(np.arange(len(images))[:, None] == 1, bad, weights).astype(np.float32)
        mean_of(sent(one_bad, images))


# ---------------------------------------- checks


junk = st.one_of(
    st.none(),
    st.integers(-5, 5),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=4),
    st.builds(
        lambda shape, kind, fill: torch.full(shape, fill).to(kind),
        st.lists(st.integers(0, 5), max_size=4),
        st.sampled_from(
            [torch.uint8, torch.int64, torch.float32, torch.float64, torch.bool, torch.complex64]
        ),
        st.integers(-3, 300),
    ),
)


@given(junk, junk, junk)
def test_whatever_a_hospital_sends_no_check_falls_over(one, two, three):
    asked, good = np.array([[2, 0], [1, 3]]), sharing.packed(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    for pictures, labels, device in ((one, two, three), (good, one, two), ([one, two], three, three)):
        answer = {"pictures": pictures, "labels": labels, "device": device}
        upload, reason = checks.opened(answer, asked, (1, 4, 4))
        if upload is None:
            assert len(reason) > 20
            continue
        images, labels, device = upload
        assert images.shape == (len(labels), 1, 4, 4) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 == device.dtype and len(device) == len(labels)
    reason = checks.weights_refusal(one, torch.zeros(3), two, 5)
    assert len(reason) > 20 or (one.shape == (3,) and one.dtype == torch.float32 and two == 5)


# ---------------------------------------- metrics


@st.composite
def answers(draw):
    number, classes, devices = draw(st.integers(1, 60)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    part = [
        arrays.arrays(np.int64, number, elements=st.integers(0, top - 1))
        for top in (classes, classes, devices)
    ]
    return (*map(draw, part), classes, devices)


@given(answers())
def test_metrics_agree_with_scikit_learn(case):
    labels, predicted, device, classes, devices = case
    each = metrics.confusions(labels, predicted, device, classes, devices)
    pooled = each.sum(0)
    assert each.sum() == len(labels)
    for d in range(devices):
        here = device == d
        if here.any():
            assert np.array_equal(
                each[d], sk.confusion_matrix(labels[here], predicted[here], labels=range(classes))
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn notes classes that are only predicted, or a single one
        assert metrics.balanced_accuracy(pooled) == pytest.approx(
            sk.balanced_accuracy_score(labels, predicted)
        )
        assert metrics.macro_f1(pooled) == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
        wanted = sk.recall_score(labels, predicted, labels=range(classes), average=None, zero_division=np.nan)
        by_device = [
            sk.balanced_accuracy_score(labels[device == d], predicted[device == d])
            for d in range(devices)
            if (device == d).any()
        ]
    assert np.allclose(metrics.recall(pooled), wanted, equal_nan=True)
    scores = metrics.summary(each, np.bincount(labels, minlength=classes))
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert scores["worst_device_balanced_accuracy"] == pytest.approx(min(by_device))


@given(answers(), st.randoms(use_true_random=False))
def test_metrics_do_not_ask_for_the_order_of_images_or_the_names_of_classes(case, random):
    labels, predicted, device, classes, devices = case
    order, name = (np.array(random.sample(range(n), n)) for n in (len(labels), classes))
    one = metrics.confusions(labels, predicted, device, classes, devices)
    two = metrics.confusions(name[labels[order]], name[predicted[order]], device[order], classes, devices)
    assert np.array_equal(one, two[:, name][:, :, name])
    for score in (metrics.balanced_accuracy, metrics.macro_f1):
        assert score(one.sum(0)) == pytest.approx(score(two.sum(0)))
