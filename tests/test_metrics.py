"""Scores against scikit-learn, and what they do where there is nothing to score."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from fedssg_helpers import metrics


def answers(seed: int, n: int = 300, classes: int = 5, devices: int = 3, missing: bool = False):
    random = np.random.default_rng(seed)
    labels = random.choice(classes - missing, n)  # with `missing`, the last class has no test image
    predicted = np.where(random.random(n) < 0.5, labels, random.integers(classes, size=n))
    return labels, predicted, random.choice(devices, n, p=[0.7, 0.2, 0.1])


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed, missing):
    labels, predicted, device = answers(seed, missing=missing)
    each = metrics.confusions(labels, predicted, device, 5, 3)
    pooled = each.sum(0)
    for d in range(3):
        here = device == d
        assert np.array_equal(each[d], sk.confusion_matrix(labels[here], predicted[here], labels=range(5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn notes that a class occurs in predictions only
        assert metrics.balanced_accuracy(pooled) == pytest.approx(
            sk.balanced_accuracy_score(labels, predicted)
        )
        wanted = sk.recall_score(labels, predicted, labels=range(5), average=None, zero_division=np.nan)
    assert np.allclose(metrics.recall(pooled), wanted, equal_nan=True)
    assert metrics.macro_f1(pooled) == pytest.approx(sk.f1_score(labels, predicted, average="macro"))


def test_summary():
    labels, predicted, device = answers(0, classes=6)
    each = metrics.confusions(labels, predicted, device, 6, 3)
    scores = metrics.summary(each, [900, 10, 500, 30, 20, 700])
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert scores["rare_recall"] == pytest.approx(metrics.recall(each.sum(0))[[1, 3, 4]].mean())
    worst = min(sk.balanced_accuracy_score(labels[device == d], predicted[device == d]) for d in range(3))
    assert scores["worst_device_balanced_accuracy"] == pytest.approx(worst)


def test_two_classes_have_one_rare_class():
    each = np.array([[[8, 2], [1, 3]]])
    assert metrics.summary(each, [100, 5])["rare_recall"] == pytest.approx(0.75)


def test_a_class_that_nobody_has_is_not_rare():
    """Labels 0, 5 and 9 score as 0, 1 and 2 do."""
    labels, predicted = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 2, 2, 0])
    names, counts = np.array([0, 5, 9]), np.zeros(10, int)
    counts[names] = 60, 3, 20
    plain = metrics.confusions(labels, predicted, 0 * labels, 3, 1)
    gaps = metrics.confusions(names[labels], names[predicted], 0 * labels, 10, 1)
    both = [metrics.summary(gaps, counts), metrics.summary(plain, [60, 3, 20])]
    np.testing.assert_equal(*both)
    assert metrics.summary(plain, [60, 3, 20])["rare_recall"] == 0.5


def test_empty_cells_are_left_out_and_never_zero():
    each = np.zeros((2, 3, 3), int)
    each[0, 0, 0], each[0, 1, 1] = 4, 2  # device 0 lacks class 2, device 1 has no test image at all
    assert np.isnan(metrics.recall(each)[0, 2]) and np.isnan(metrics.balanced_accuracy(each[1]))
    scores = metrics.summary(each, [5, 5, 5])
    assert scores["balanced_accuracy"] == 1 and scores["worst_device_balanced_accuracy"] == 1
    assert np.isnan(metrics.macro_f1(each[1])) and np.isnan(metrics.balanced_accuracy(each[1]))


def test_scores_of_summed_matrices_are_not_means_of_scores():
    each = np.array([[[90, 10], [0, 0]], [[1, 1], [5, 5]]])
    assert metrics.balanced_accuracy(each.sum(0)) == pytest.approx((91 / 102 + 0.5) / 2)
    assert np.mean([metrics.balanced_accuracy(m) for m in each]) == pytest.approx((0.9 + 0.5) / 2)


@pytest.mark.parametrize("column, name", [(0, "label"), (1, "prediction"), (2, "device")])
@pytest.mark.parametrize("bad", [-1, 9])
def test_out_of_range_is_named(column, name, bad):
    columns = [np.zeros(4, int) for _ in range(3)]
    columns[column][2] = bad
    with pytest.raises(ValueError, match=name):
        metrics.confusions(*columns, classes=2, devices=1)


def test_interval():
    mean, half = metrics.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(
        4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    )  # t table: 0.975, 2 degrees
    assert np.isnan(metrics.interval([0.5])[1])
    assert metrics.interval([0.5, 0.5]) == (0.5, 0)
    with pytest.raises(ValueError, match="score"):
        metrics.interval([])


def test_the_corrected_interval_is_wider_by_the_overlap():
    values = [1.0, 2.0, 4.0, 5.0]
    (mean, plain), (again, corrected) = (metrics.interval(values, overlap=o) for o in (0.0, 1 / 3))
    assert mean == again == 3 and np.isclose(corrected / plain, np.sqrt((1 / 4 + 1 / 3) / (1 / 4)))


def test_the_worst_device_counts_common_classes_only():
    confusion = np.zeros((2, 2, 2), int)
    confusion[0] = [[9, 1], [0, 10]]  # device 0: recalls 0.9 and 1
    confusion[1] = [[12, 4], [1, 0]]  # device 1: 0.75, and a class with one image
    assert metrics.worst_device(confusion) == 0.75
    assert metrics.summary(confusion, [5, 5])["worst_device_balanced_accuracy"] == 0.375
    assert np.isnan(metrics.worst_device(confusion // 10))


def test_calibration_and_its_temperature():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (4000, 3))
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (random.random((4000, 1)) > chance.cumsum(1)).sum(
        1
    )  # drawn from the stated probabilities: calibrated
    assert metrics.calibration_error(logits, labels) < 0.03
    assert metrics.calibration_error(3 * logits, labels) > 0.08, "too sure"
    temperature = metrics.best_temperature(3 * logits, labels)
    assert np.isclose(temperature, 3, rtol=0.1)
    assert metrics.calibration_error(3 * logits, labels, temperature) < 0.03
    assert metrics.calibration_error([[9.0, -9.0]], [1]) > 0.99


def test_sensitivity_at_a_specificity():
    scores = np.array([*range(10), 8.5, 9.5, 20, 3])
    positive = np.arange(14) >= 10
    assert metrics.sensitivity(scores, positive, 0.9) == 0.5  # threshold 9: nobody else is above
    assert metrics.sensitivity(scores, positive, 0.5) == 0.75  # threshold 5
    assert np.isnan(metrics.sensitivity(scores, positive | True))
