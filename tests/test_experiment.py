"""Many runs, remembered: equal whatever the number of workers, never computed twice, never lost."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kills import tiny_data

from fedssg_helpers import experiment, rounds
from fedssg_helpers.experiment import Job


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Path of an own data set; it is the job's `data`."""
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture()
def jobs(tiny) -> list[Job]:
    return [Job(method, seed, 2, tiny) for seed in (0, 1) for method in ("fedavg", "fedavg+la")]


@pytest.fixture()
def computed(monkeypatch) -> list[tuple[int, int]]:
    """A record of what `rounds.run` is asked for in this process: (seed, rounds)."""
    record, real = [], rounds.run
    monkeypatch.setattr(rounds, "run", lambda federation, method, seed, **rest: (
        record.append((seed, rest["rounds"])), real(federation, method, seed, **rest))[1])
    return record


def same(a: rounds.Run, b: rounds.Run) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("weights", "rounds", "confusions"))


def test_number_of_workers_does_not_matter(jobs, tmp_path):
    alone = experiment.run_many(jobs, str(tmp_path / "1"), workers=1)
    abreast = experiment.run_many(jobs[::-1], str(tmp_path / "2"), workers=2)[::-1]
    assert all(same(a, b) for a, b in zip(alone, abreast))
    only = experiment.run_many(jobs[3:], str(tmp_path / "3"), workers=1)  # no matter what ran before
    assert same(only[0], alone[3]) and not same(alone[0], alone[1])


def test_second_call_computes_nothing_and_a_changed_job_does(jobs, tmp_path, computed):
    first = experiment.run_many(jobs, str(tmp_path), workers=1)
    assert len(computed) == 4
    again = experiment.run_many(jobs + jobs[:1], str(tmp_path), workers=1)
    assert len(computed) == 4 and all(same(a, b) for a, b in zip(first, again)) and same(again[4], first[0])
    experiment.run_many([replace(jobs[0], rounds=1), replace(jobs[0], seed=7), jobs[0]], str(tmp_path), workers=1)
    assert computed[4:] == [(0, 1), (7, 2)]
    experiment.run_many([replace(jobs[0], hospitals=3)], str(tmp_path), workers=1)
    assert len(computed) == 7


def test_the_key_holds_data_recipe_and_source(jobs, tiny, tmp_path, monkeypatch):
    file = experiment.cache_file(jobs[0], tmp_path)
    assert file == experiment.cache_file(replace(jobs[0], data_dir="/elsewhere"), tmp_path)  # the data are the same
    monkeypatch.setitem(experiment.METHODS, "fedavg", rounds.Method(mu=0.5))
    assert experiment.cache_file(jobs[0], tmp_path) != file
    monkeypatch.undo()
    assert experiment.cache_file(jobs[0], tmp_path) == file
    monkeypatch.setattr(experiment, "_fingerprint", lambda *data: "other data or other source")
    assert experiment.cache_file(jobs[0], tmp_path) != file


def test_an_interrupted_comparison_keeps_what_is_finished(jobs, tmp_path, monkeypatch):
    real, count = rounds.run, [0]

    def third_one_is_interrupted(*arguments, **options):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(rounds, "run", third_one_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.run_many(jobs, str(tmp_path), workers=1)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    experiment.run_many(jobs, str(tmp_path), workers=1)
    assert count[0] == 5  # the interrupted one and the last


def test_an_error_in_a_worker_is_told_and_finished_runs_stay(jobs, tmp_path):
    good, bad = jobs[:1], [replace(jobs[0], rounds=0), replace(jobs[1], rounds=-1)]
    experiment.run_many(good, str(tmp_path), workers=1)
    with pytest.raises(ValueError, match="rounds is"):
        experiment.run_many(good + bad, str(tmp_path), workers=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def small_run(value: float = 1.0) -> rounds.Run:
    return rounds.Run(np.full(3, value, np.float32), np.arange(2), np.ones((2, 1, 2, 2), int), {"bytes_up": 5.0},
                      np.array([[True, False]]), [(1, 1, "dropped out")], {"speed": torch.full((3,), value)})


def test_save_is_atomic_and_without_pickle(tmp_path, monkeypatch):
    run, file = small_run(), tmp_path / "deep" / "run.npz"
    experiment.save(run, file)
    assert [f.name for f in file.parent.iterdir()] == ["run.npz"]
    back = experiment.restore(file)
    assert same(run, back) and back.costs == run.costs and np.array_equal(back.took_part, run.took_part)
    assert back.missed == run.missed and torch.equal(back.memory["speed"], run.memory["speed"])

    def full(stream, **arrays):
        stream.write(b"the first bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match="run.npz: No space left.*Free space"):
        experiment.save(small_run(2.0), file)
    assert same(experiment.restore(file), run) and len(list(file.parent.iterdir())) == 1  # the old one is whole


def test_a_file_of_other_parameters_or_a_damaged_one_is_refused(tmp_path):
    file = tmp_path / "run.npz"
    experiment.save(small_run(), file, "one")
    assert same(experiment.restore(file, "one"), small_run())
    with pytest.raises(ValueError, match="run.npz belongs to another run"):
        experiment.restore(file, "two")
    whole = file.read_bytes()
    for damaged in (b"", whole[:200], whole[:len(whole) // 2] + b"x" * 40 + whole[len(whole) // 2 + 40:], b"no archive"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="run.npz is damaged.*delete it"):
            experiment.restore(file, "one")


def test_a_damaged_state_is_named_and_finished_runs_stay(jobs, tmp_path):
    experiment.run_many(jobs[:1], str(tmp_path), workers=1)
    state = experiment.cache_file(jobs[1], tmp_path).with_suffix(".state.npz")
    state.write_bytes(b"half a file")
    for workers in (1, 2):
        with pytest.raises(ValueError, match="state.npz is damaged"):
            experiment.run_many(jobs, str(tmp_path), workers=workers)
    state.unlink()
    experiment.run_many(jobs, str(tmp_path), workers=1)


def test_table(jobs, tmp_path):
    runs = experiment.run_many(jobs, str(tmp_path), workers=1)
    table = experiment.table(jobs, runs)
    assert list(table.columns) == ["dataset", "setting", "method", "seed", "metric", "value"]
    wanted = {"balanced_accuracy", "worst_device_balanced_accuracy", "rare_recall", "train_seconds",
              "generator_seconds", "bytes_up", "bytes_down"}
    assert all(wanted <= set(part.metric) for _, part in table.groupby(["method", "seed"]))
    assert len(table.groupby(["method", "seed"])) == 4 and not table.duplicated(["method", "seed", "metric"]).any()
    pick = table[(table.method == "fedavg+la") & (table.seed == 1) & (table.metric == "accuracy")].value.item()
    last = runs[3].confusions[-1].sum(0)
    assert pick == np.trace(last) / last.sum()
    assert set(table.setting) == {"by_device"}


def test_methods_named_in_the_results():
    assert {"fedavg", "fedavg+la", "fedssg"} <= set(experiment.METHODS)
    assert experiment.METHODS["fedavg"] == rounds.Method()


@pytest.mark.parametrize("change, workers, word", [({"method": "fedmagic"}, 1, "no method 'fedmagic'"), ({}, 0, "workers")])
def test_impossible_comparisons_are_named(jobs, tmp_path, change, workers, word):
    with pytest.raises(ValueError, match=word):
        experiment.run_many([replace(jobs[0], **change)], str(tmp_path), workers=workers)


def test_out_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSSG_OUT", str(tmp_path / "a" / "b"))
    assert experiment.out_folder() == tmp_path / "a" / "b" and experiment.out_folder().is_dir()
    assert experiment.out_folder(str(tmp_path / "c")) == tmp_path / "c"
