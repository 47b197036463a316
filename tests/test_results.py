"""The committed benchmark file: complete, in range, tuned as it says, and the README quotes nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedssg_helpers import metrics
from fedssg_helpers.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
KEY = ["dataset", "setting", "method", "seed", "metric"]
NAMED = {
    "fedavg",
    "fedavg+la",
    "balanced_sampling",
    "uniform_shuffle",
    "duplication",
    "oracle_real",
    "centralised",
    "fedssg",
}
SETTINGS = [("ham10000", "by_device"), ("ham10000", "ten_hospitals"), ("dermamnist", "by_device")]
SETTINGS += [("phantom", "ten_hospitals")]
RULES = ("fedssg", "uniform_shuffle", "class_only", "device_only", "oracle_real", "duplication")
BUDGETS = (25, 50, 100, 200, 500, 1500)


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    return pd.read_csv(ROOT / "data" / "results" / "accuracy.csv")


def test_columns_and_no_line_twice(results):
    assert list(results.columns) == [*KEY, "value"]
    assert not results.duplicated(KEY).any() and results.value.notna().all()


def scores_of(results, dataset="ham10000", setting="by_device"):
    """Balanced accuracy of a setting: a row per seed, a column per method."""
    rows = results[(results.dataset == dataset) & (results.setting == setting)]
    return rows[rows.metric == "balanced_accuracy"].pivot(index="seed", columns="method", values="value")


def test_only_seeds_that_nobody_looked_at_before(results):
    assert results.seed.min() >= 1000


@pytest.mark.parametrize(("dataset", "setting"), SETTINGS)
def test_enough_seeds_of_methods_and_of_rules_at_each_budget(results, dataset, setting):
    seeds = scores_of(results, dataset, setting).count()
    assert all(seeds[name] >= 10 for name in NAMED)
    for rule in RULES:
        least = 10 if (dataset, setting) == SETTINGS[0] or rule in ("fedssg", "uniform_shuffle") else 5
        assert min(seeds[f"{rule}: receive={n}"] for n in BUDGETS) >= least, rule


def test_real_devices_have_ten_seeds_of_all_methods_and_twenty_of_some(results):
    seeds = scores_of(results).count()
    assert all(seeds[name] >= 10 for name in METHODS)
    some = ("fedssg", "uniform_shuffle", "fedavg+la", "oracle_real", "centralised")
    assert all(seeds[name] >= 20 for name in some)


def test_each_reported_seed_chose_on_validation_images_of_its_own(results):
    for dataset, setting in SETTINGS:
        here, grid = (
            results[(results.dataset == dataset) & (results.setting == name)]
            for name in (setting, f"{setting}_validation")
        )
        scores = grid[grid.metric == "balanced_accuracy"].set_index(["method", "seed"]).value
        chosen, rates = (
            grid[grid.metric == "chosen"],
            here[here.metric == "lr"].set_index(["method", "seed"]).value,
        )
        assert len(chosen) >= 3 * 4
        for label, seed in zip(chosen.method, chosen.seed):
            name = label.split(":")[0]
            own = scores[
                [(other, s) for other, s in scores.index if s == seed and other.split(":")[0] == name]
            ]
            assert scores[label, seed] >= own.max() - 1e-4 and len(own) >= 3, (label, seed)
            assert rates[name, seed] == float(re.search(r"lr=([.\d]+)", label)[1]), (label, seed)


def test_scores_are_parts_and_costs_are_not_negative(results):
    scores = results[results.metric.str.contains("recall|accuracy|macro_f1")]
    assert scores.value.between(0, 1).all()
    assert (results.value >= 0).all()


def test_balanced_accuracy_is_the_mean_recall(results):
    here = (results.dataset == "ham10000") & (results.setting == "by_device")
    rows = results[here & ~results.method.str.contains("receive=")]
    wide = rows.pivot(index=["method", "seed"], columns="metric", values="value")
    classes = [name for name in wide if re.fullmatch(r"recall\[[^|]*\]", name)]
    whole = wide.dropna(subset=classes)
    assert len(whole) >= 5 * len(METHODS)
    assert np.allclose(whole[classes].mean(axis=1), whole.balanced_accuracy, atol=1e-4)


def test_readme_quotes_the_file(results):
    """Each line of the README's table: a method, its mean and interval, and how far FedSSG is above it (both intervals)."""
    before, table = re.search(
        r"other lesions\.(.*)<!-- results -->(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.S
    ).groups()
    number = r"([+-]?[.\d]+)"
    lines = re.findall(
        rf"^\| `([^`]+)` \| {number} ± {number} \| (?:{number} ± {number} \({number}\)|) \|", table, re.M
    )
    scores = scores_of(results)
    assert {line[0] for line in lines} == NAMED
    few, seeds, more = re.search(r"(`.*`)\s+have (\d+) seeds, the others (\d+)", before, re.S).groups()
    for method, *quoted in lines:
        assert scores[method].count() == int(seeds if f"`{method}`" in few else more), method
        gains = 100 * (scores.fedssg - scores[method]).dropna()
        said = [*metrics.interval(scores[method].dropna()), *metrics.interval(gains)]
        said.append(metrics.interval(gains, overlap=1 / 3)[1])
        rounded = [float(text) for text in quoted if text]
        assert np.allclose(rounded[:2], said[:2], atol=6e-4), method
        assert np.allclose(rounded[2:], said[2 : len(rounded)], atol=6e-2), method


def test_readme_and_lesson_say_what_the_file_shows_of_rules(results):
    """FedSSG minus another rule, seed by seed: at which budgets does the plain interval exclude 0?"""
    scores = scores_of(results)
    better = {}
    for rule in RULES[1:]:
        better[rule] = []
        for n in BUDGETS:
            gains = 100 * (scores[f"fedssg: receive={n}"] - scores[f"{rule}: receive={n}"]).dropna()
            mean, half = metrics.interval(gains)
            assert len(gains) >= 10, (rule, n)
            assert (mean < -half) == ((rule, n) == ("oracle_real", 1500)), (rule, n)
            better[rule] += [n] * (mean > half)
    assert not (better["uniform_shuffle"] or better["class_only"] or better["oracle_real"])
    assert better["device_only"] == [50, 100, 200] and better["duplication"] == [50, 100, 200, 500, 1500]
    ten = scores_of(results, "ham10000", "ten_hospitals")
    gains = {
        n: 100 * (ten[f"fedssg: receive={n}"] - ten[f"class_only: receive={n}"]).dropna() for n in BUDGETS
    }
    assert [n for n in BUDGETS if gains[n].mean() < -metrics.interval(gains[n])[1]] == [25, 50, 100]
    readme, lesson = ((ROOT / name).read_text() for name in ("README.md", "notebooks/05_did_it_help.ipynb"))
    assert "looks only at\ndevices, with 50 to 200 samples" in readme
    assert "with ten hospitals and 25 to 100 samples it is worse" in readme
    assert "FedSSG is *worse*: at 25, 50 and 100 samples on HAM10000" in lesson
    assert "`device_only`: FedSSG is better at 50, 100 and 200 samples" in lesson
    assert "`duplication`: copies are worse from 50 samples on" in lesson


# --- data/results/trust.csv ---


@pytest.fixture(scope="module")
def trust() -> pd.Series:
    table = pd.read_csv(ROOT / "data" / "results" / "trust.csv")
    assert list(table.columns) == ["check", "value"] and not table.check.duplicated().any()
    return table.set_index("check").value


def test_trust_holds_the_named_checks_in_range(trust):
    named = [
        "attack_auc",
        "attack_auc_small_classes",
        "canaries_recovered",
        "rejection_cost",
        "poisoned_drop",
    ]
    assert set(named) <= set(trust.index) and trust.notna().all()
    rates = trust[trust.index.str.match(r"attack_(auc|tpr)|dp_") & ~trust.index.str.endswith("interval")]
    assert rates.between(0, 1).all()
    assert set(trust[trust.index.str.startswith("canaries")]) <= set(range(11))
    assert trust.attack_seeds >= 3 and trust.poisoned_seeds >= 3
    assert trust.kills_resumed_equal == 20 and trust.damaged_files_named == 300


def test_trust_reports_the_stronger_attack(trust):
    """A single attack that fails is no audit: the headline may not be below any of the attacks made."""
    for check in ("attack_auc", "attack_auc_small_classes", "attack_tpr", "attack_tpr_small_classes"):
        attacks = [f"{check}_{attack}" for attack in ("nearest", "span", "subspace")]
        assert trust[check] == max(trust[name] for name in attacks if name in trust)


def test_trust_reports_the_worst_attack_on_the_server(trust):
    attacks = ["not_a_number", "step_x_100", "labels_shuffled", "noise"]
    assert trust.poisoned_drop == max(trust[f"poisoned_drop_{attack}"] for attack in attacks)


# --- data/results/speed.csv ---


def test_speed_has_every_comparison_five_times():
    table = pd.read_csv(ROOT / "data" / "results" / "speed.csv")
    assert list(table.columns) == ["comparison", "clients", "ratio"] and (table.ratio > 0).all()
    count = table.groupby(["comparison", "clients"]).size()
    once = ("memory_vs_bytes_of_pictures", 20_000)  # a quarter of an hour, and no timing
    assert count[once] == 1 and count.drop(once).min() >= 5
    growth = {4, 16, 64, 256, 1000}
    assert set(count["seconds_per_image_vs_4_clients"].index) == growth
    flower = {(f"flower_simulation{part}", n) for part in ("", "_per_round") for n in (10, 1000)}
    assert {("plain_loop", 10), ("memory_vs_10_clients", 1000)} | flower <= set(count.index)
    pfl = {f"pfl{workers}{part}" for workers in ("", "_one_worker") for part in ("", "_per_round")}
    assert {"share_of_matmul_rate", "generator_vs_train"} | pfl <= set(table.comparison)
