"""Nested tuning: each seed chooses a method's settings on validation images that come out of its own training images.

All methods try the same learning rates. A method that shares samples also tries three budgets, one after the other: the
rates first, at the middle budget, then the budgets at the best rate. Test images are never looked at.
"""

from __future__ import annotations

from dataclasses import replace

from .methods import Method

RATES, RECEIVE = (0.025, 0.07, 0.2, 0.5), (200, 500, 1500)
MIDDLE = f"receive={RECEIVE[1]}"


def receiving(method: Method, number: int) -> Method:
    """The method with another budget: samples that a hospital receives at most."""
    how = method.sharing
    return replace(method, sharing=replace(how, budget=replace(how.budget, receive=number)))


def grid(name: str, method: Method, own=None) -> dict[str, Method]:
    """All settings of a method, by their label. `own`: {label: fields} of a parameter of its own, tried with each rate."""
    found = {
        f"{name}: {label}lr={lr:g}": replace(method, lr=lr, **fields)
        for label, fields in (own or {"": {}}).items()
        for lr in RATES
    }
    if method.sharing:
        found = {f"{label}, receive={n}": receiving(m, n) for label, m in found.items() for n in RECEIVE}
    return found


def best_of(found: dict, settings: dict, seed: int) -> str:
    """The label of a grid that did best for this seed, by scores {(label, seed): score}; of equals the first."""
    known = {label: score for (label, at), score in found.items() if at == seed and label in settings}
    return max(known, key=known.get)


def search(grids: dict[str, dict], seeds, score) -> dict:
    """Validation scores {(label, seed): score}: of all rates, then of all budgets with the rate that did best.

    `grids` holds a `grid` per method. ``score({(label, seed): method})`` makes the runs and returns their scores.
    """
    first = {(label, s): m for s in seeds for settings in grids.values() for label, m in settings.items()}
    found = score({key: m for key, m in first.items() if key[0].endswith(MIDDLE) or not m.sharing})
    second = {}
    for s in seeds:
        for settings in grids.values():
            best = best_of(found, settings, s).removesuffix(MIDDLE)
            second |= {(label, s): m for label, m in settings.items() if label.startswith(best)}
    return found | score({key: m for key, m in second.items() if key not in found})
