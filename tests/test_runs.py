"""Many runs, remembered: equal whatever the number of workers, never computed twice, never lost, yours included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import equal, tiny_data
from test_data import medmnist_file

from fedssg_helpers import runs, server
from fedssg_helpers.described import describe
from fedssg_helpers.methods import METHODS, Method, Proximal
from fedssg_helpers.runs import Job

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Path of an own data set; it is the job's `data`."""
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture()
def jobs(tiny) -> list[Job]:
    return [Job(method, seed, 2, tiny) for seed in (0, 1) for method in ("fedavg", "fedavg+la")]


@pytest.fixture()
def computed(monkeypatch) -> list[tuple[int, int]]:
    """A record of what `server.run` is asked for in this process: (seed, rounds)."""
    record, real = [], server.run

    def run(federation, method, seed, **rest):
        record.append((seed, rest["rounds"]))
        return real(federation, method, seed, **rest)

    monkeypatch.setattr(server, "run", run)
    return record


# ---------------------------------------- never twice, never lost


def test_the_second_call_computes_nothing_and_a_changed_job_does(jobs, tmp_path, computed):
    first = runs.run_many(jobs, str(tmp_path), workers=1)
    assert len(computed) == 4 and not np.array_equal(first[0].weights, first[1].weights)
    again = runs.run_many(jobs + jobs[:1], str(tmp_path), workers=1)
    assert len(computed) == 4 and all(equal(a, b) for a, b in zip(first, again)) and equal(again[4], first[0])
    runs.run_many([replace(jobs[0], rounds=1), replace(jobs[0], seed=7), jobs[0]], str(tmp_path), workers=1)
    assert computed[4:] == [(0, 1), (7, 2)]
    runs.run_many([replace(jobs[0], hospitals=3)], str(tmp_path), workers=1)
    assert len(computed) == 7


def test_numbers_of_numpy_are_numbers(jobs, tmp_path, computed):
    same = replace(
        jobs[0], seed=np.int64(0), rounds=np.int32(2), alpha=np.float64(0.3), hospitals=np.int64(0)
    )
    assert runs.cache_file(same, tmp_path) == runs.cache_file(jobs[0], tmp_path)
    first, second = runs.run_many([same], str(tmp_path)), runs.run_many(jobs[:1], str(tmp_path))
    assert len(computed) == 1 and equal(first[0], second[0])


def test_an_interrupted_comparison_keeps_what_is_finished(jobs, tmp_path, monkeypatch):
    real, count = server.run, [0]

    def third_one_is_interrupted(*arguments, **options):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(server, "run", third_one_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.run_many(jobs, str(tmp_path), workers=1)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    runs.run_many(jobs, str(tmp_path), workers=1)
    assert count[0] == 5  # the interrupted one and the last


def test_workers_give_the_same_bits_and_tell_errors(jobs, tmp_path):
    alone = runs.run_many(jobs, str(tmp_path / "1"), workers=1)
    abreast = runs.run_many(jobs[::-1], str(tmp_path / "2"), workers=2)[::-1]
    assert all(equal(a, b) for a, b in zip(alone, abreast))
    only = runs.run_many(jobs[3:], str(tmp_path / "3"), workers=2)  # one job: its hospitals on two threads
    assert equal(only[0], alone[3])
    bad = [replace(jobs[0], rounds=0), replace(jobs[1], rounds=-1)]
    with pytest.raises(ValueError, match="rounds is"):
        runs.run_many(jobs + bad, str(tmp_path / "2"), workers=2)
    assert len(list((tmp_path / "2" / "cache").iterdir())) == 4  # the finished ones stay


def test_without_worker_processes_the_run_goes_on(jobs, tmp_path):
    """In a process of its own: a folder for temporary files whose name is too long for a socket."""
    (deep := tmp_path / ("deep" * 30)).mkdir()
    code = f"import test_runs as t; t.runs.run_many([t.Job('fedavg', s, 1, {jobs[0].data!r}) for s in (0, 1)], {str(tmp_path)!r})"
    known = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "notebooks"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(deep), "PYTHONPATH": paths}, **known
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert "cannot start worker processes" in result.stderr and "with the same numbers" in result.stderr
    done = [runs.cache_file(replace(job, rounds=1), tmp_path) for job in (jobs[0], jobs[2])]
    assert all(file.exists() for file in done)


def test_without_shared_memory_the_run_goes_on(jobs, tmp_path, monkeypatch):
    class Context:
        def Lock(self):
            raise FileNotFoundError(2, "No such file or directory")  # as sem_open says without /dev/shm

    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda name: Context())
    with pytest.warns(UserWarning, match="/dev/shm"):
        done = runs.run_many(jobs, str(tmp_path / "1"), workers=2)
    assert all(map(equal, done, runs.run_many(jobs, str(tmp_path / "2"), workers=1)))


def test_a_damaged_state_is_named_and_finished_runs_stay(jobs, tmp_path):
    runs.run_many(jobs[:1], str(tmp_path), workers=1)
    state = runs.cache_file(jobs[1], tmp_path).with_suffix(".state.npz")
    state.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="state.npz is damaged"):
        runs.run_many(jobs, str(tmp_path), workers=1)
    state.unlink()
    runs.run_many(jobs, str(tmp_path), workers=1)


@pytest.mark.parametrize(
    "change, workers, word", [({"method": "fedmagic"}, 1, "fedmagic"), ({}, 0, "workers is 0")], ids=str
)
def test_impossible_comparisons_are_named(jobs, tmp_path, change, workers, word):
    with pytest.raises(ValueError, match=word):
        runs.run_many([replace(jobs[0], **change)], str(tmp_path), workers=workers)


# ---------------------------------------- files


def small_run(value: float = 1.0) -> server.Run:
    arrays = np.full(3, value, np.float32), np.arange(2), np.ones((2, 1, 2, 2), int)
    took_part, memory = np.array([[True, False]]), {"0 own": torch.full((3,), value)}
    return server.Run(*arrays, {"bytes_up": 5.0}, took_part, [(1, 1, "dropped out")], memory)


def test_save_is_atomic_and_without_pickle(tmp_path, monkeypatch):
    run, file = small_run(), tmp_path / "deep" / "run.npz"
    runs.save(run, file)
    assert [f.name for f in file.parent.iterdir()] == ["run.npz"]
    back = runs.restore(file)
    assert equal(run, back) and torch.equal(back.memory["0 own"], run.memory["0 own"])

    def full(stream, **arrays):
        stream.write(b"the first bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match="run.npz: No space left.*Free space"):
        runs.save(small_run(2.0), file)
    assert equal(runs.restore(file), run) and len(list(file.parent.iterdir())) == 1  # the old one is whole


def test_out_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSSG_OUT", str(tmp_path / "a" / "b"))
    assert runs.out_folder() == tmp_path / "a" / "b" and runs.out_folder().is_dir()
    assert runs.out_folder(str(tmp_path / "c")) == tmp_path / "c"


def test_table(jobs, tmp_path):
    done = runs.run_many(jobs, str(tmp_path), workers=1)
    table = runs.table(jobs, done)
    assert list(table.columns) == ["dataset", "setting", "method", "seed", "metric", "value"]
    wanted = {"balanced_accuracy", "worst_device_balanced_accuracy", "rare_recall", "lr"}
    wanted |= {"train_seconds", "generator_seconds", "bytes_up", "bytes_down"}
    assert all(wanted <= set(part.metric) for _, part in table.groupby(["method", "seed"]))
    assert len(table.groupby(["method", "seed"])) == 4
    assert not table.duplicated(["method", "seed", "metric"]).any()
    own = (table.method == "fedavg+la") & (table.seed == 1) & (table.metric == "accuracy")
    last = done[3].confusions[-1].sum(0)
    assert table[own].value.item() == np.trace(last) / last.sum()
    assert set(table.setting) == {"by_device_16"}


# ---------------------------------------- sizes


def test_images_of_64_pixels(tmp_path):
    """Of a MedMNIST set that comes in several sizes, and your own: the size must then be the images' own."""
    medmnist_file(tmp_path / "breastmnist_64.npz", 64)
    images = np.random.default_rng(0).integers(0, 60, (60, 64, 64), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(60) % 2)
    jobs = [
        Job("fedavg", 0, 1, data, str(tmp_path), hospitals=2, size=64) for data in ("breastmnist", "own.npz")
    ]
    for job, run in zip(jobs, runs.run_many(jobs, str(tmp_path / "out"), workers=1)):
        assert runs.federation_of(job).test.images.shape[1:] == (1, 64, 64)
        assert np.isfinite(run.weights).all() and run.confusions[-1].sum() > 0
    with pytest.raises(ValueError, match="64 x 64 pixels, but size is 32"):
        runs.run_many([replace(jobs[1], size=32)], str(tmp_path / "out"))
    assert runs.cache_file(jobs[1], tmp_path) != runs.cache_file(replace(jobs[1], size=28), tmp_path)


def test_training_images_can_be_split_again_for_choosing_settings(tmp_path):
    """Also of a set whose publisher says what is for testing: none of that is seen."""
    medmnist_file(tmp_path / "breastmnist.npz")
    job = Job("fedavg", 0, 1, "breastmnist", str(tmp_path), hospitals=2, validation=True)
    images, hospitals = runs.images_of("breastmnist", str(tmp_path)), runs.federation_of(job)
    assert sum(map(len, hospitals.clients)) + len(hospitals.test) == (~images.official_test).sum() == 40
    assert 0 < len(hospitals.test) < 20
    run = runs.run_many([job], str(tmp_path / "out"))[0]
    assert run.confusions[-1].sum() == len(hospitals.test)


# ---------------------------------------- the key


def test_the_key_holds_data_and_recipe(jobs, tmp_path, monkeypatch):
    file = runs.cache_file(jobs[0], tmp_path)
    assert file == runs.cache_file(replace(jobs[0], data_dir="/elsewhere"), tmp_path)  # the data are the same
    assert file.stem.rpartition("-")[0] == "fedavg-0"
    same = replace(jobs[0], method="another name", recipe=Method())
    assert runs.cache_file(same, tmp_path).stem[-16:] == file.stem[-16:]
    monkeypatch.setitem(METHODS, "fedavg", Method(gradient=Proximal(0.5)))
    assert runs.cache_file(jobs[0], tmp_path) != file
    monkeypatch.undo()
    assert runs.cache_file(jobs[0], tmp_path) == file


@pytest.mark.parametrize(
    "change",
    [{"class_names": ["a", "b", "c", "nobody"]}, {"group": np.arange(160) // 2}, {"labels": 0}],
    ids=str,
)
def test_the_key_holds_all_of_the_data(tiny, tmp_path, change):
    with np.load(tiny) as file:
        arrays = dict(file)
    labels = arrays["labels"][::-1]
    np.savez(tmp_path / "other.npz", **arrays | change | ({"labels": labels} if "labels" in change else {}))
    files = [
        runs.cache_file(Job("fedavg", data=data), tmp_path) for data in (tiny, str(tmp_path / "other.npz"))
    ]
    assert files[0] != files[1]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The counted modules, copied; the key is of the copies."""
    files = [Path(shutil.copy(file, tmp_path)) for file, _ in runs._sources()]
    monkeypatch.setattr(runs, "_sources", lambda: tuple((file, file.stat().st_mtime_ns) for file in files))
    return {file.stem: file for file in files}


@pytest.mark.parametrize("name", ["data", "partition", "client"])
def test_a_changed_line_of_a_counted_module_is_another_key(name, copied, tiny, tmp_path):
    def key():
        return runs.cache_file(Job("fedavg", data=tiny), tmp_path)

    before, source = key(), copied[name].read_text()
    copied[name].write_text(source.replace('"""', '"""Reworded: ', 1) + "\n# a comment\n")
    assert key() == before
    copied[name].write_text(source + "\nNEW = 1\n")
    assert key() != before


# ---------------------------------------- parts of your own

OWN = """
import functools
import numpy as np
from fedssg_helpers.methods import Median, Plain
from fedssg_helpers.sharing import Budget

FACTOR, BUDGET = np.float64(2.0), Budget(fill=10)

def helper(x):
    return FACTOR * x

def rule(have, budget):
    def inner(h):
        return [helper(v) + BUDGET.fill for v in h if v not in {"a", "b"}]
    return np.array(inner(have))

def made(strength):
    def closure(have, budget):
        return strength * have
    return closure

def kept(have, budget, k=FACTOR):
    return k * have

class Base(Plain):
    sends = ()
    def pull(self, x):
        return helper(x)
    @property
    def half(self):
        return 0.5
    @staticmethod
    def third():
        return 3

class Pull(Base):
    def __call__(self, grad, weights, start, correction):
        grad.add_(self.pull(weights))

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

def doubled(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return 2 * function(*arguments)
    return wrapper

@doubled
def decorated(have, budget):
    return have

@functools.lru_cache
def cached(have, budget):
    return have

PARTS = dict(rule=rule, closure=made(1.5), kept=kept, pull=Pull(), recursive=even, decorated=decorated, cached=cached,
             partial=functools.partial(rule, budget=BUDGET), method=Pull().pull, lambda_=lambda h, b: h * 1)
"""
CHANGES = {  # old text, new text, and which parts it changes
    "a NumPy number": ("np.float64(2.0)", "np.float64(3.0)", "rule kept pull partial method"),
    "a part of the course": ("Budget(fill=10)", "Budget(fill=20)", "rule partial"),
    "a function that is used": ("FACTOR * x", "FACTOR + x", "rule pull partial method"),
    "an inner function": (".fill for v", ".cell for v", "rule partial"),
    "a set": ('{"a", "b"}', '{"a", "c"}', "rule partial"),
    "a closure variable": ("made(1.5)", "made(2.5)", "closure"),
    "a base class": ("return helper(x)", "return -helper(x)", "pull method"),
    "a class attribute": ("sends = ()", 'sends = ("x",)', "pull method"),
    "a property": ("return 0.5", "return 0.6", "pull method"),
    "a static method": ("return 3", "return 4", "pull method"),
    "a method": ("grad.add_", "grad.sub_", "pull method"),
    "the other of two": ("n != 0", "n != 5", "recursive"),
    "a decorator": ("2 * function", "3 * function", "decorated"),
    "a cached function": (
        "def cached(have, budget):\n    return",
        "def cached(have, budget):\n    return -",
        "cached",
    ),
    "an argument of partial": ("(rule, budget=BUDGET)", "(rule, budget=None)", "partial"),
    "a lambda": ("h * 1", "h * 2", "lambda_"),
    "nothing but lines and comments": ("def rule", "\n# moved\n\ndef rule", ""),
}


def described(source: str) -> dict[str, str]:
    """What parts of a notebook are known by; the notebook is new each time, and has no file."""
    namespace = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), namespace)  # noqa: S102
    return {name: json.dumps(describe(part), sort_keys=True) for name, part in namespace["PARTS"].items()}


@pytest.mark.parametrize("change", CHANGES)
def test_your_parts_are_known_by_all_that_they_consist_of(change):
    old, new, changed = CHANGES[change]
    assert OWN.count(old) == 1
    before, after = described(OWN), described(OWN.replace(old, new))
    assert sorted(changed.split()) == sorted(name for name in before if before[name] != after[name])


NOTEBOOK = """
import importlib, json, pathlib, sys
import numpy as np, torch
torch.set_num_threads(3), np.random.seed(0), torch.manual_seed(0)
from dataclasses import dataclass, replace
from fedssg_helpers import client, methods, runs, sharing
from fedssg_helpers.methods import METHODS, Method, Plain, Sharing
from fedssg_helpers.runs import Job

data, out, package, own = sys.argv[1:]
found = {"modules": [name for name in sys.modules if name.startswith("fedssg_helpers.")]}
found["drawn"] = np.random.random(), float(torch.rand(1))
exec(own)
found["described"] = {name: json.dumps(methods.describe(part), sort_keys=True) for name, part in PARTS.items()}
FACTOR, BUDGET = np.float64(0.5), sharing.Budget(fill=60, cell=10)

def rule(have, budget):
    wishes = np.array([np.full(h.shape, 8) for h in have])
    return wishes * (sharing.supply(have, budget) > 0)

@dataclass(frozen=True)
class Pull(Plain):
    mu: float = 1.0
    def __call__(self, grad, weights, start, correction):
        grad.add_(weights - start, alpha=self.mu * float(FACTOR))

def aggregate(updates, weights, memory):
    return torch.stack([update for update, _ in updates]).mean(0)

def source(images, labels, cells, random, orientations):
    def sample(cell, number, random):
        mean = images[cells == cell].float().mean(0)
        noise = torch.from_numpy(random.normal(0, 5, (number, *mean.shape)))
        return (mean + noise).clamp(0, 255).to(torch.uint8)
    return sample

def run(workers=2, folder=out):
    METHODS["of my own"] = Method(gradient=Pull())  # registered by name, with no recipe in the job
    recipes = {"rule": Method(sharing=Sharing(rule=rule)), "aggregate": Method(server=aggregate),
               "source": Method(sharing=Sharing(source=source, budget=BUDGET))}
    jobs = [Job("of my own", 0, 2, data)] + [Job(name, 0, 2, data, recipe=r) for name, r in recipes.items()]
    done = runs.run_many(jobs, folder, workers)
    return {job.method: run.weights.tolist()[:500] for job, run in zip(jobs, done)}

def files():
    return len(list(pathlib.Path(out, "cache").iterdir()))

def rule_2(have, budget):
    wishes = np.array([np.full(h.shape, 4) for h in have])
    return wishes * (sharing.supply(have, budget) > 0)

def aggregate_2(updates, weights, memory):
    return torch.stack([update for update, _ in updates]).median(0)[0]

found |= {"first": run(), "alone": run(1, out + "/alone"), "files": [files()]}
rule_2.__name__, aggregate_2.__name__ = "rule", "aggregate"
rule, aggregate, FACTOR = rule_2, aggregate_2, np.float64(8.0)
found["changed"] = run()
found["files"].append(files())
found["again"] = run()
found["files"].append(files())

file = pathlib.Path(package, "client.py")  # a copy of the helpers: edit one, and load it again
file.write_text(file.read_text().replace("0.9, 5e-4", "0.8, 5e-4"))
importlib.reload(client)
found["reloaded"] = run()
found["files"].append(files())
found["reloaded alone"] = run(1, out + "/reloaded")
found["threads"] = torch.get_num_threads()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def notebook(tiny, tmp_path_factory) -> dict:
    """What the notebook above found; like every notebook it has no file, and its helpers are a copy."""
    folder = tmp_path_factory.mktemp("notebook")
    package = folder / "code" / "fedssg_helpers"
    shutil.copytree(ROOT / "fedssg_helpers", package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", NOTEBOOK, tiny, str(folder / "out"), str(package), OWN]
    settings = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=settings, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_your_parts_run_in_workers(notebook):
    """A rule, a gradient part, an aggregate and a generator; then some of them are changed, under the same names."""
    names = {"of my own", "rule", "aggregate", "source"}
    assert set(notebook["first"]) == names and notebook["first"] == notebook["alone"]
    new = {name for name in names if notebook["first"][name] != notebook["changed"][name]}
    assert new == names - {"source"} and notebook["again"] == notebook["changed"]
    assert notebook["files"][:3] == [
        4,
        7,
        7,
    ]  # the source has its old file, and the second time all have theirs


def test_a_helper_that_is_edited_and_reloaded_makes_all_runs_anew(notebook):
    assert notebook["files"][3] == 11
    assert all(weights != notebook["changed"][name] for name, weights in notebook["reloaded"].items())
    assert notebook["reloaded"] == notebook["reloaded alone"]  # workers have the new helper, too


def test_your_parts_are_known_again_in_another_process(notebook):
    assert notebook["described"] == described(OWN)


def test_every_module_that_numbers_depend_on_is_counted(notebook):
    """All that `runs` imports, but for what only writes keys."""
    loaded = {name.removeprefix("fedssg_helpers.") for name in notebook["modules"]}
    assert loaded - {"described"} == set(runs.COUNTED.split())


def test_helpers_change_no_setting(notebook):
    """Neither the number of threads nor the state of the global generators."""
    assert notebook["threads"] == 3
    np.random.seed(0), torch.manual_seed(0)
    assert notebook["drawn"] == [np.random.random(), float(torch.rand(1))]
