"""Scores of a classifier, all computed from confusion matrices that were summed first.

A mean of per-hospital scores would weigh ten test images like a thousand. A class without test images has no
recall: it is left out, never counted as 0.
"""

import numpy as np


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
        "rare_recall": float(np.nanmean(rare_rates)) if np.isfinite(rare_rates).any() else float("nan"),
    }


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its t interval, of independent scores (n,); a single one has width NaN.

    Give it one score per seed or, to compare two methods, one *difference* per seed: both share data,
    hospitals and first weights, so what these contribute cancels. A ValueError where there is no score.
    """
    from scipy import stats  # here, because most processes start without it

    values = np.asarray(values, float)
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one score")
    half = stats.t.ppf(0.5 + level / 2, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return float(values.mean()), float(half)
