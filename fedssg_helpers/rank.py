"""Rank your own: a method, rule, generator or aggregate in a file of a few lines, against its control on paired seeds.

The file defines one of `KINDS`, and if it likes NAME and CONTROL (a name in `methods.METHODS`). A rule, a generator or an
aggregate takes the place of the control's own: all else is equal. Both sides are tuned alike, see `tuning`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import runpy
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import course, metrics, plots, runs, tuning
from .errors import require
from .methods import METHODS, Method, Sharing, describe
from .runs import Job

FIRST = 2000  # the first seed: no lesson and no other benchmark looks at these
KINDS = {  # what a file may define, in capitals or not: its default control, and with what it is called
    "method": ("fedavg+la", None),
    "rule": ("uniform_shuffle", ("have", "budget")),
    "source": ("fedssg", ("images", "labels", "cells", "random", "orientations")),
    "aggregate": ("fedavg", ("updates", "weights", "memory")),
}
COLUMNS = "name kind control dataset setting seeds rounds difference plain corrected digest".split()


@dataclass(frozen=True)
class Entry:
    """What a file says: its method, and the name of the control."""

    file: Path
    name: str
    kind: str
    control: str
    method: Method


def _fault(file: Path, error: BaseException) -> ValueError:
    """What went wrong, and in which line of the file, in one sentence."""
    trace = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in trace if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    said = str(getattr(error, "msg", error)).partition("\n")[0]
    return ValueError(f"{file}{f', line {line}' if line else ''}: {what}{said}")


def read(file: Path) -> Entry:
    """Execute the file, and say what it defines; a ValueError where it fails, or defines nothing, or two things."""
    require(file.is_file(), "the file to rank", str(file), "a Python file that is there")
    try:
        said = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        raise _fault(file, error) from error
    found = [(kind, said[n]) for kind in KINDS for n in (kind, kind.upper()) if n in said]
    names = "exactly one of METHOD, rule, SOURCE and aggregate"
    require(len(found) == 1, f"what {file} defines", " and ".join(dict(found)) or "nothing", names)
    kind, value = found[0]
    name, control = said.get("NAME", file.stem), said.get("CONTROL", KINDS[kind][0])
    require(control in METHODS, f"CONTROL of {file}", control, f"one of {', '.join(METHODS)}")
    require(name not in METHODS, f"NAME of {file}", name, "no name of the course's own methods")
    try:
        return Entry(file, name, kind, control, _with(kind, value, METHODS[control]))
    except ValueError as error:
        raise _fault(file, error) from error


def _with(kind: str, value, control: Method) -> Method:
    """The method to be ranked: `value` itself, or the control with it in the place of its own part."""
    if kind == "method":
        require(isinstance(value, Method), "METHOD", value, "a Method(...) of fedssg_helpers.methods")
        return value
    try:
        inspect.signature(value).bind(*KINDS[kind][1])
    except TypeError as error:
        needed = f"callable as {kind}({', '.join(KINDS[kind][1])})"
        raise ValueError(f"{kind} must be {needed}: {error}") from None
    if kind == "aggregate":
        return replace(control, server=value)
    require(isinstance(control.sharing, Sharing), "CONTROL", control, "a method that shares samples")
    return replace(control, sharing=replace(control.sharing, **{kind: value}))


def most_runs(entry: Entry, seeds: int) -> int:
    """How many runs `trial` and `compare` make, if none was made before."""
    budgets = [len(tuning.RECEIVE) - 1 if m.sharing else 0 for m in (entry.method, METHODS[entry.control])]
    return 2 + seeds * sum(len(tuning.RATES) + more + 1 for more in budgets)


def trial(entry: Entry, base: Job, out: str = "") -> None:
    """One round, then two, in this process: a ValueError says what is wrong with the file's code, and in which line."""
    base = replace(base, method=entry.name, seed=FIRST, validation=True, recipe=entry.method)
    federation = runs.federation_of(base)
    net = entry.method.network(federation.test.images.shape[1], len(federation.classes))
    try:
        for rounds in (1, 2):
            run = runs.run_many([replace(base, rounds=rounds)], out, workers=1)[0]
            found, needed = run.weights.shape, net.weights.shape
            require(found == needed, "the shape of the new weights", tuple(found), f"{tuple(needed)}")
            refused = [why for r, _, why in run.missed if r == 0]
            if len(refused) == len(federation.clients):
                raise ValueError(f"the server refused the samples of every hospital: {refused[0]}")
    except Exception as error:
        raise _fault(entry.file, error) from error


def compare(entry: Entry, base: Job, seeds: int, out: str = "", workers: int = 2) -> np.ndarray:
    """Balanced accuracy 0..1 on test images, float (2, seeds): of the file's method and of its control, both tuned."""
    methods = {entry.name: entry.method, entry.control: METHODS[entry.control]}
    grids = {name: tuning.grid(name, method) for name, method in methods.items()}
    every = range(FIRST, FIRST + seeds)

    def score(wanted: dict, **known) -> dict:
        jobs = [replace(base, method=n, seed=s, recipe=m, **known) for (n, s), m in wanted.items()]
        made = runs.run_many(jobs, out, workers)
        return {key: metrics.balanced_accuracy(run.confusions[-1].sum(0)) for key, run in zip(wanted, made)}

    found = tuning.search(grids, every, partial(score, validation=True))
    chosen = {(n, s): own[tuning.best_of(found, own, s)] for n, own in grids.items() for s in every}
    tested = score(chosen)
    return np.array([[tested[name, s] for s in every] for name in grids])


def row_of(entry: Entry, base: Job, scores: np.ndarray) -> dict:
    """A row of the table, from scores (2, seeds): the paired difference in points, and half the widths of two intervals.

    `plain` is about other splits of these images, `corrected` about other images of this kind (`metrics.interval`).
    """
    federation = runs.federation_of(replace(base, seed=FIRST))
    points, overlap = 100 * (scores[0] - scores[1]), len(federation.test) / sum(map(len, federation.clients))
    (mean, plain), (_, corrected) = metrics.interval(points), metrics.interval(points, overlap=overlap)
    digest = hashlib.sha256(json.dumps(describe(entry.method), sort_keys=True).encode()).hexdigest()[:16]
    where = runs.images_of(base.data, base.data_dir, base.size).name, federation.setting
    numbers = (float(f"{x:.4g}") for x in (mean, plain, corrected))
    known = entry.name, entry.kind, entry.control, *where, len(points), base.rounds, *numbers, digest
    return dict(zip(COLUMNS, known))


def verdict(row: dict) -> str:
    """What the plain interval says: helps, ties or hurts."""
    if abs(row["difference"]) <= row["plain"]:
        return "ties"
    return "helps" if row["difference"] > 0 else "hurts"


def words(row: dict, scores: np.ndarray) -> str:
    """A row in words, with the mean scores (2, seeds) that it comes from."""
    name, control, difference = row["name"], row["control"], f"{row['difference']:+.1f} points"
    mine, theirs = scores.mean(1)
    beyond = abs(row["difference"]) > row["corrected"]
    return f"""balanced accuracy, mean of {row["seeds"]} seeds: {name} {mine:.3f}, {control} {theirs:.3f}
difference: {difference} ± {row["plain"]:.1f} for other splits of these images (95 % t interval over seeds)
            {difference} ± {row["corrected"]:.1f} for other images of this kind (corrected for overlapping training sets)
{name} {verdict(row)}{"" if beyond or verdict(row) == "ties" else ", on these images: the corrected interval includes 0"}."""


def add(row: dict, folder: Path) -> pd.DataFrame:
    """The table ``ranking.csv`` of a folder with this row, in place of the same comparison's earlier one; and its picture."""
    file, same = folder / "ranking.csv", [*COLUMNS[:7], "digest"]
    table = pd.DataFrame([row], columns=COLUMNS)
    if file.exists():  # a name or digest may look like a number
        earlier = pd.read_csv(file, dtype={"name": str, "digest": str})
        table = pd.concat([earlier, table]).drop_duplicates(same, keep="last", ignore_index=True)
    course.save_text(file, table.to_csv(index=False))
    plots.theme()
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(table)))
    draw(figure.subplots(), table)
    file.with_suffix(".png").write_bytes(plots.png(figure))
    return table


def draw(axis, table: pd.DataFrame) -> None:
    """All rows of the table: the difference with its plain interval (thick) and the corrected one (thin)."""
    table = table.sort_values("difference", ignore_index=True)
    for y, row in table.iterrows():
        look = {"fmt": "D", "color": plots.method_colour(row["name"])}
        axis.errorbar(row.difference, y, xerr=row.corrected, capsize=4, elinewidth=1, **look)
        axis.errorbar(row.difference, y, xerr=row.plain, elinewidth=4, **look)
    axis.axvline(0, color="0.3", linewidth=1)
    labels = [f"{r['name']}\nagainst {r.control}, {r.dataset}, n = {r.seeds}" for _, r in table.iterrows()]
    axis.set_yticks(range(len(table)), labels, fontsize="small")
    axis.set(ylim=(-0.6, len(table) - 0.4), xlabel="difference in balanced accuracy (points)")
