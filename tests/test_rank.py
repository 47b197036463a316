"""Ranking a method of one's own: both sides tuned alike, paired seeds, nothing computed twice, clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from kills import tiny_data

from fedssg_helpers import __main__ as command
from fedssg_helpers import rank, runs, server, tuning
from fedssg_helpers.methods import METHODS
from fedssg_helpers.runs import Job

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "notebooks" / "examples").glob("*.py"))
METHOD = "from fedssg_helpers.methods import Method\nMETHOD = Method()\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Of less contrast than elsewhere: samples of pure noise would be larger than a server accepts."""
    path = tiny_data(tmp_path_factory.mktemp("data"))
    with np.load(path) as arrays:
        np.savez(path, **(dict(arrays) | {"images": arrays["images"] // 2}))
    return path


@pytest.fixture()
def made(monkeypatch) -> list:
    """(seed, rounds, method) of each run that is computed; all in this process, with little pre-training."""
    record, real = [], server.run

    def run(federation, method, seed, **rest):
        record.append((seed, rest["rounds"], method))
        return real(federation, method, seed, **rest)

    monkeypatch.setattr(server, "run", run)
    monkeypatch.setattr(command, "CORES", 1)
    monkeypatch.setattr(command, "step_seconds", lambda *_: command.STEP)
    for name in ("fedssg", "uniform_shuffle"):
        how = replace(METHODS[name].sharing, pretrain_steps=4)
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], sharing=how))
    return record


@pytest.fixture()
def ranked(tiny, tmp_path, made, capsys):
    """A call of the command, with two seeds and two rounds: its status, and what it printed."""

    def call(file, *words):
        known = ["--seeds", "2", "--rounds", "2", "--data", tiny, "--out", str(tmp_path)]
        status = command.main(["rank", str(file), *known, *words])
        return status, "".join(capsys.readouterr())

    return call


def rank_twice(file, ranked, made, folder) -> None:
    """Rank an example into a folder, look at all that it leaves there, and do it again: nothing is computed."""
    status, said = ranked(file)
    assert status == 0, said
    entry = rank.read(file)
    table = pd.read_csv(folder / "ranking.csv", dtype={"digest": str})
    assert list(table.columns) == rank.COLUMNS and len(table) == 1
    row = table.iloc[0]
    assert (row["name"], row.kind, row.control) == (entry.name, entry.kind, entry.control)
    assert (row.dataset, row.seeds, row.rounds, len(row.digest)) == ("tiny", 2, 2, 16)
    assert row.corrected > row.plain or row.plain == 0
    assert (folder / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert f"{entry.name} {rank.verdict(row)}" in said and f"at most {rank.most_runs(entry, 2)} runs" in said
    assert 0 < len(made) <= rank.most_runs(entry, 2) and {seed for seed, *_ in made} == {2000, 2001}
    number = len(made)
    assert ranked(file)[0] == 0 and len(made) == number, "all runs were kept"
    pd.testing.assert_frame_equal(pd.read_csv(folder / "ranking.csv", dtype={"digest": str}), table)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_ranked_once_and_never_computed_again(file, ranked, made, tmp_path):
    rank_twice(file, ranked, made, tmp_path)


def test_both_sides_of_the_rule_are_tuned_over_the_same_grid_on_the_same_seeds(ranked, made, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from fedssg_helpers.sharing import class_only as rule\nNAME = 'by class'\n")
    rank_twice(file, ranked, made, tmp_path)
    for seed in (2000, 2001):
        tried = {"mine": set(), "control": set()}
        for _, _, method in [run for run in made[2:] if run[0] == seed]:
            side = "control" if method.sharing.rule is METHODS["uniform_shuffle"].sharing.rule else "mine"
            tried[side].add((method.lr, method.sharing.budget.receive))
        for settings in tried.values():
            assert {(lr, 500) for lr in tuning.RATES} <= settings and len(settings) == len(tuning.RATES) + 2
            assert {number for _, number in settings} == set(tuning.RECEIVE)


def test_the_examples_have_a_few_lines():
    assert len(EXAMPLES) >= 3
    assert all(10 <= len(file.read_text(encoding="utf-8").splitlines()) <= 25 for file in EXAMPLES)


def test_rates_come_first_then_budgets_at_the_best_rate():
    grids = {name: tuning.grid(name, METHODS[name]) for name in ("fedssg", "fedavg")}
    asked = []

    def score(wanted):
        asked.append(list(wanted))
        return {key: method.lr + (method.sharing is not None and method.sharing.budget.receive == 1500)
                for key, method in wanted.items()}  # fmt: skip

    found = tuning.search(grids, [7], score)
    rates = [f"lr={lr:g}" for lr in tuning.RATES]
    first = [f"fedssg: {lr}, receive=500" for lr in rates] + [f"fedavg: {lr}" for lr in rates]
    assert asked[0] == [(label, 7) for label in first]
    best = rates[-1]
    assert asked[1] == [(f"fedssg: {best}, receive=200", 7), (f"fedssg: {best}, receive=1500", 7)]
    assert tuning.best_of(found, grids["fedssg"], 7) == f"fedssg: {best}, receive=1500"
    assert tuning.best_of(found, grids["fedavg"], 7) == f"fedavg: {best}"


def test_intervals_by_hand(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(METHOD)
    entry, base = rank.read(tmp_path / "mine.py"), Job("mine", rank.FIRST, 2, tiny)
    row = rank.row_of(entry, base, np.array([[0.52, 0.54, 0.56], [0.50, 0.51, 0.52]]))
    federation = runs.federation_of(base)
    overlap = len(federation.test) / sum(map(len, federation.clients))
    t = 4.302653  # two degrees of freedom, 95 %; the differences are 2, 3 and 4 points, their deviation is 1
    assert row["difference"] == pytest.approx(3)
    assert row["plain"] == pytest.approx(t * (1 / 3) ** 0.5, abs=1e-3)
    assert row["corrected"] == pytest.approx(t * (1 / 3 + overlap) ** 0.5, abs=1e-3)
    assert rank.verdict(row) == "helps" and rank.verdict(row | {"difference": -3}) == "hurts"
    assert rank.verdict(row | {"plain": 3.1}) == "ties"
    assert "corrected interval includes 0" in rank.words(row | {"corrected": 3.1}, np.ones((2, 3)))


def test_rows_of_other_comparisons_stay(tmp_path):
    row = dict(
        zip(rank.COLUMNS, ("1", "rule", "fedssg", "set", "by_device", 2, 2, 1.5, 0.5, 0.9, "123e4567"))
    )
    for number in (1.5, -2.0):
        table = rank.add(row | {"difference": number}, tmp_path)
        assert list(table.difference) == [number], "the same comparison again"
    table = rank.add(row | {"rounds": 3}, tmp_path)
    assert list(table.rounds) == [2, 3] and not list(tmp_path.glob("*.part"))
    _, axis = plt.subplots()
    rank.draw(axis, table)
    assert "1" in axis.get_yticklabels()[0].get_text() and len(axis.containers) == 4
    plt.close()


RULE = "def rule(have, budget):\n    "
AGGREGATE = "def aggregate(updates, weights, memory):\n    "
SOURCE = "def source(images, labels, cells, random, orientations):\n    return lambda cell, number, random: "
WRONG = {
    "METHOD = (": "line 1: SyntaxError",
    "x = 1\nx / 0": "line 2: ZeroDivisionError: division by zero",
    "import nothing_of_this_name": "No module named 'nothing_of_this_name'",
    "x = 1": "defines is 'nothing'",
    METHOD + RULE + "return have": "defines is 'method and rule'",
    "METHOD = 3": "METHOD is 3",
    METHOD + "CONTROL = 'fedavgg'": "is 'fedavgg'; it must be one of local_only, fedavg",
    METHOD + "NAME = 'fedssg'": "it must be no name of the course's own methods",
    "def rule(have):\n    return have": "rule must be callable as rule(have, budget)",
    "rule = 3": "rule must be callable",
    RULE + "return have\nCONTROL = 'fedavg'": "a method that shares samples",
    RULE + "return have[0]": "the result of rule 'rule' is 'of shape",
    RULE + "return have / none": "line 2: NameError",
    AGGREGATE + "return weights.mean()": "the shape of the new weights",
    SOURCE + "images[:1]": "the server refused the samples of every hospital",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_told_in_one_sentence(text, ranked, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    status, said = ranked(file)
    assert status == 2 and WRONG[text] in said and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ") and "mine.py" in said.splitlines()[-1]


def test_missing_files_and_numbers_out_of_range(ranked, tmp_path):
    assert ranked(tmp_path / "none.py")[0] == 2
    (tmp_path / "mine.py").write_text(METHOD)
    for words in (("--seeds", "1"), ("--rounds", "0")):
        status, said = ranked(tmp_path / "mine.py", *words)
        assert status == 2 and f"{words[0]} is {words[1]}; it must be" in said


def test_committed_rows_are_of_the_examples_and_say_what_their_first_line_says():
    table = pd.read_csv(ROOT / "data" / "results" / "ranking.csv", dtype={"digest": str})
    assert list(table.columns) == rank.COLUMNS and not table.duplicated("name").any()
    assert len(table.groupby(["dataset", "setting", "seeds", "rounds"])) == 1, "make ranking"
    rows = {row["name"]: row for _, row in table.iterrows()}
    assert set(rows) == {file.stem for file in EXAMPLES}
    for file in EXAMPLES:
        entry, row = rank.read(file), rows[file.stem]
        assert (row.kind, row.control) == (entry.kind, entry.control) and row.corrected > row.plain > 0
        assert rank.verdict(row) in file.read_text(encoding="utf-8").splitlines()[0].split(": ")[0]
