"""Scores of a classifier, all computed from confusion matrices that were summed first.

A mean of per-hospital scores would weigh ten test images like a thousand. A class without test images has no
recall: it is left out, never counted as 0.
"""

import numpy as np
from scipy.special import log_softmax, softmax

from .errors import require


def confusions(labels, predicted, device, classes: int, devices: int) -> np.ndarray:
    """Test images (N,), counted in a matrix per device: int64 (D, C, C), ``[d, i, j]`` of class i called j.

    A ValueError where a label, prediction or device is out of range: it would be counted in another cell.
    """
    labels, predicted, device = (np.asarray(a) for a in (labels, predicted, device))
    ends = {"label": (labels, classes), "prediction": (predicted, classes), "device": (device, devices)}
    for name, (values, end) in ends.items():
        if len(values) and not 0 <= values.min() <= values.max() < end:
            seen = f"they run from {values.min()} to {values.max()}"
            raise ValueError(f"a {name} lies outside 0..{end - 1}: {seen}")
    cell = (device * classes + labels) * classes + predicted
    return np.bincount(cell, minlength=devices * classes * classes).reshape(devices, classes, classes)


def recall(confusion: np.ndarray) -> np.ndarray:
    """Recall of each class, 0..1, from matrices (..., C, C); NaN for a class without test images."""
    total = confusion.sum(-1)
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.divide(hit, total, out=np.full(total.shape, np.nan), where=total > 0)


def balanced_accuracy(confusion: np.ndarray) -> float:
    """Mean recall over the classes of the test set, 0..1, from one matrix (C, C); NaN if it is empty."""
    rates = recall(confusion)
    return float(np.nanmean(rates)) if np.isfinite(rates).any() else float("nan")


def macro_f1(confusion: np.ndarray) -> float:
    """Mean F1 score, 0..1, over the classes that occur in the test set or in the predictions, from (C, C)."""
    hit = np.diagonal(confusion)
    size = confusion.sum(0) + confusion.sum(1)
    return float(np.mean(2 * hit[size > 0] / size[size > 0])) if (size > 0).any() else float("nan")


def worst_device(confusion: np.ndarray, least: int = 10) -> float:
    """The lowest device's mean recall over its classes of `least` test images or more, from (D, C, C); NaN if none has such.

    A class with one test image on a device has a recall of 0 or 1 there: a coin toss, which this score leaves out.
    """
    rates = np.where(confusion.sum(-1) >= least, recall(confusion), np.nan)
    known = rates[np.isfinite(rates).any(1)]
    return float(np.nanmean(known, axis=1).min()) if len(known) else float("nan")


def calibration_error(logits, labels, temperature: float = 1.0, bins: int = 15) -> float:
    """Expected calibration error, 0..1 (Guo et al. 2017, arXiv 1706.04599, equation 3), of logits (N, C) over a temperature.

    Predictions are sorted into `bins` by their probability; averaged is the distance of mean probability and accuracy.
    """
    require(len(labels) > 0, "the number of test images", 0, "at least 1")
    chance = softmax(np.asarray(logits, float) / temperature, axis=1)
    sure, right = chance.max(1), chance.argmax(1) == np.asarray(labels)
    which = np.minimum((sure * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(which, sure - right, minlength=bins)).sum() / len(sure))


def best_temperature(logits, labels) -> float:
    """The temperature, 0.05..20, with the least cross-entropy on these images: logits (N, C), labels (N,)."""
    from scipy.optimize import minimize_scalar  # here, because most processes start without it

    require(len(labels) > 0, "the number of validation images", 0, "at least 1")
    logits, labels = np.asarray(logits, float), np.asarray(labels)

    def loss(log_t: float) -> float:
        return -log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def sensitivity(scores, positive, specificity: float = 0.9) -> float:
    """Fraction of the `positive` (N,), bool, found at this specificity, 0..1, by scores (N,); NaN where one kind lacks.

    The threshold is the score that this fraction of the negatives does not exceed.
    """
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return float("nan")
    return float((scores[positive] > np.quantile(scores[~positive], specificity, method="higher")).mean())


def summary(confusion: np.ndarray, train_counts) -> dict[str, float]:
    """The course's scores, 0..1, from matrices (D, C, C), all but the worst device's on the pooled test set.

    Rare are the three classes with the fewest of `train_counts` (C,), of fewer than six the rarer half; a class that
    nobody has is none of them.
    """
    pooled, counts = confusion.sum(0), np.asarray(train_counts)
    occur = np.flatnonzero(counts)
    rare = occur[np.argsort(counts[occur], kind="stable")][: max(1, min(3, len(occur) // 2))]
    rare_rates = recall(pooled)[rare]
    return {
        "balanced_accuracy": balanced_accuracy(pooled),
        "macro_f1": macro_f1(pooled),
        "accuracy": float(np.trace(pooled) / max(pooled.sum(), 1)),
        "worst_device_balanced_accuracy": float(np.nanmin([balanced_accuracy(c) for c in confusion])),
        "worst_device_common_classes": worst_device(confusion),
        "rare_recall": float(np.nanmean(rare_rates)) if np.isfinite(rare_rates).any() else float("nan"),
    }


def interval(values, level: float = 0.95, overlap: float = 0.0) -> tuple[float, float]:
    """Mean, and half the width of its t interval, of scores (n,); a single one has width NaN.

    Give it one score per seed or, to compare two methods, one *difference* per seed: both share data,
    hospitals and first weights, so what these contribute cancels. With `overlap` 0 it answers: what would other splits
    of these images give? Training sets of seeds overlap, though. With `overlap` the number of test images over that of
    training images it answers: what would other images of this kind give (Nadeau & Bengio 2003, corrected resampled
    t)? A ValueError where there is no score.
    """
    from scipy import stats  # here, because most processes start without it

    values = np.asarray(values, float)
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one score")
    error = values.std(ddof=1) * np.sqrt(1 / n + overlap) if n > 1 else np.nan
    return float(values.mean()), float(stats.t.ppf(0.5 + level / 2, max(n - 1, 1)) * error)
