"""The whole line, from a file on disk to scores: on unusual data, on real data, and the phantoms' difficulty."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedssg_helpers import __main__ as command
from fedssg_helpers import runs
from fedssg_helpers.methods import METHODS
from fedssg_helpers.runs import Job


def own_file(folder, **changes):
    """A grey set of 120 images of 16 pixels: two of its three named classes occur, through one device."""
    random = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = (random.integers(0, 80, (120, 16, 16)) + 120 * labels[:, None, None]).astype(np.uint8)
    arrays = dict(images=images, labels=labels, class_names=np.array(["dark", "bright", "never seen"]))
    np.savez(folder / "own.npz", **arrays | changes)
    return str(folder / "own.npz")


def scores(jobs, out):
    """Results in wide form: a row per run, a column per metric."""
    table = runs.table(jobs, runs.run_many(jobs, str(out), workers=1))
    return table.pivot(index=["method", "seed"], columns="metric", values="value")


def test_one_device_and_a_class_that_is_missing_everywhere(tmp_path):
    file, jobs = own_file(tmp_path), []
    for name, method in METHODS.items():  # with less pre-training than the course's
        if getattr(method.sharing, "pretrain_steps", 0):
            method = replace(method, sharing=replace(method.sharing, pretrain_steps=40))
        jobs.append(Job(name, 0, 3, file, hospitals=4, recipe=method))
    found = scores(jobs, tmp_path / "out")
    assert found.drop(columns="rare_recall").notna().all(axis=None)
    assert (found.balanced_accuracy == found.worst_device_balanced_accuracy).all()
    assert found.balanced_accuracy.max() > 0.9  # dark and bright are told apart, the third class is left out


def test_fewer_images_than_hospitals_is_one_sentence(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    file = own_file(tmp_path, images=images, labels=np.arange(8) % 2)
    assert command.main(["run", "--data", file, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "hospitals" in said and "Traceback" not in said and len(said.splitlines()) == 1
    assert "10" in said and ("fewer hospitals" in said or "for 1 to" in said)


def test_real_devices_as_clients(shared_data, tmp_path):
    jobs = [Job(m, 0, 2, "ham10000", str(shared_data)) for m in ("fedavg", "fedssg")]
    found = scores(jobs, tmp_path)
    hospitals = runs.federation_of(jobs[0])
    assert hospitals.setting == "by_device" and len(hospitals.clients) == 4
    assert found.balanced_accuracy["fedssg", 0] > found.balanced_accuracy["fedavg", 0] + 0.05


@pytest.mark.slow
def test_the_phantoms_are_neither_easy_nor_hopeless():
    """With the lessons' own jobs, so within `make test` lesson 04 finds these runs and they cost nothing more."""
    jobs = [Job(m, s) for m in ("centralised", "fedavg") for s in range(3)]
    table = runs.table(jobs, runs.run_many(jobs))
    mean = table[table.metric == "balanced_accuracy"].groupby("method").value.mean()
    assert 0.80 <= mean.centralised <= 0.95
    assert mean.fedavg <= mean.centralised - 0.15
