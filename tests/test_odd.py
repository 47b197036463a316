"""Well-formed but odd image sets: lessons 00 and 03 run on each, or it is refused at the start, in our words."""

from __future__ import annotations

import os
import traceback
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from fedssg_helpers import explore, plots, runs

LESSONS = Path(__file__).parent.parent / "notebooks"
SETS = 300
EVERY = int(
    os.environ.get("FEDSSG_ODD", 20)
)  # lessons run on every 20th set; FEDSSG_ODD=1: on all, for a quarter of an hour
COARSE = {"figure.dpi": 30, "figure.constrained_layout.use": False}  # most of the time goes into the layout
NAMES = [
    "$", r"$\frac{$", "a_b^c", "{x}", r"back\slash", "%s", "<b>", "", " ", "a\nb", "ß", "皮膚", "nan", "None", "x" * 70,
    "'", '"', "#", "&", "🩺", "é", "0", "class 1", "~", "a|b", "[1]", "a, b", "recall[a]", "$5 or $10", "-",
]  # fmt: skip


def odd_set(number: int) -> dict[str, np.ndarray]:
    """Arrays of set `number`, as one would save them."""
    random = np.random.default_rng(number)
    n, classes, devices = (int(random.integers(1, most + 1)) for most in (60, 30, 20))
    side, channels = int(random.choice([16, 17, 28, 33])), int(random.choice([1, 3]))
    labels = random.integers(0, classes, n)
    images = random.integers(0, 256, (n, side, side, channels), dtype=np.uint8)
    if random.random() < 0.3:  # no noise, little contrast
        images = images // 32 + labels[:, None, None, None].astype(np.uint8)
    if random.random() < 0.3:  # pictures that are there twice
        images[: n // 3] = images[n - n // 3 :]
    if random.random() < 0.2:  # nothing to see
        images[random.random(n) < 0.5] = 255
    found = {
        "images": images,
        "labels": labels * int(random.choice([1, 1, 2, 7])) + int(random.choice([0, 0, 1])),
    }
    most = int(found["labels"].max()) + 1
    if random.random() < 0.6:
        found["class_names"] = np.array(
            [f"{NAMES[i % 30]}{i // 30 or ''}" for i in random.permutation(max(most, 30))]
        )
    if random.random() < 0.7:
        device = random.integers(0, devices, n)
        found["device"] = device if random.random() < 0.5 else np.array(NAMES)[device]
    if random.random() < 0.6:
        ids = random.integers(0, max(n // 2, 1), n)
        found["group"] = np.where(random.random(n) < 0.2, random.choice(["", "nan", "None"]), ids.astype(str))
    if random.random() < 0.2:
        found["patient_id"] = np.arange(n)
    return found


def in_our_words(error: Exception) -> bool:
    """Was it raised by a line of the helpers that says what is wrong, not somewhere below them?"""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        isinstance(error, ValueError) and "fedssg_helpers" in last.filename and last.line.startswith("raise")
    )


def federation(path: Path, hospitals: int):
    """Of the saved set; None where the course refuses it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return runs.federation(str(path), hospitals=hospitals)
    except Exception as error:
        assert in_our_words(error), "".join(traceback.format_exception(error))
        return None


def saved(number: int, folder: Path) -> tuple[Path, int]:
    """A set in a file, and how many hospitals share it."""
    path = folder / f"odd-{number}.npz"
    np.savez(path, **odd_set(number))
    return path, int(np.random.default_rng(number).choice([0, 0, 1, 2, 5]))


def test_every_odd_set_becomes_hospitals_or_is_refused(tmp_path):
    whole = sum(federation(*saved(number, tmp_path)) is not None for number in range(SETS))
    assert SETS / 2 < whole < SETS


def lesson(number: str) -> list[str]:
    """The code of a lesson's cells."""
    (path,) = LESSONS.glob(f"{number}_*.ipynb")
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.fixture
def quiet(monkeypatch):
    """No window, no worker processes, coarse pictures; widgets are made and not shown."""
    matplotlib.use("agg")
    theme = plots.theme
    monkeypatch.setattr(plots, "theme", lambda: (theme(), plt.rcParams.update(COARSE)))
    monkeypatch.setattr(
        plt, "show", lambda: ([f.canvas.draw() for f in map(plt.figure, plt.get_fignums())], plt.close("all"))
    )
    monkeypatch.setattr(explore, "display", lambda box: None)
    many = runs.run_many
    monkeypatch.setattr(runs, "run_many", lambda jobs, out="", workers=1: many(jobs, out, 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, SETS, EVERY))
def test_lessons_run_on_it(number, tmp_path, quiet):
    path, hospitals = saved(number, tmp_path)
    if federation(path, hospitals) is None:
        pytest.skip("refused, see above")
    for name in ("00", "03", "01")[: 3 if number % 40 == 0 else 2]:
        imports, *cells = lesson(name)
        known = {}
        with warnings.catch_warnings(action="ignore"):
            exec(imports, known)
            known |= {"data": str(path), "out": str(tmp_path), "hospitals": hospitals, "rounds": 2}
            for source in cells:
                exec(source, known)
            plt.show()


@pytest.mark.parametrize("name", ["02", "06", "09", "A5"])
def test_a_lesson_for_which_a_set_is_too_small_goes_on_with_the_phantoms(name, tmp_path, quiet, capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "thin.npz", images=images, labels=np.arange(60) % 30, device=np.arange(60) % 20)
    cells = lesson(name)
    (check,) = (i for i, source in enumerate(cells) if "goes on with the built-in phantoms" in source)
    known = {}
    for i in sorted({0, 1, check, check + 1}):
        with warnings.catch_warnings(action="ignore"):
            exec(cells[i], known)
        if i == 0:
            known |= {"data": str(tmp_path / "thin.npz"), "hospitals": 3, "seeds": 1, "workers": 1}
    assert "goes on with the built-in phantoms" in capsys.readouterr().out
    assert known["data"] == "phantom" and known["size"] == 28


def test_real_size_goes_on_with_the_phantoms_where_a_set_has_one_size_only(tmp_path, quiet, capsys):
    np.savez(tmp_path / "one.npz", images=np.zeros((60, 28, 28), np.uint8), labels=np.arange(60) % 3)
    known, cells = {}, lesson("08")
    (load,) = (i for i, source in enumerate(cells) if "goes on with the built-in phantoms" in source)
    with warnings.catch_warnings(action="ignore"):
        for source in cells[: load + 1]:
            exec(source, known)
            known |= {"data": str(tmp_path / "one.npz"), "number": 200} if source == cells[0] else {}
    said = capsys.readouterr().out
    assert (
        "images are 28 x 28 pixels, but size is 64" in said and "goes on with the built-in phantoms" in said
    )
    assert known["worlds"].keys() == {28, 64, 128} and known["worlds"][64].name == "phantom"
