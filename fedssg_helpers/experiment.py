"""Many runs, side by side and remembered: methods x seeds, in parallel processes, cached on disk.

A finished run is a small ``.npz`` (arrays and JSON text, no pickle) named by a digest of everything it depends on:
the job, the data and the helpers' own source. So lessons find what an earlier lesson computed, an interrupted
comparison goes on where it stopped, in the very round, and a changed line of code never meets an old result.
"""
from __future__ import annotations

import ast
import functools
import hashlib
import json
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import data as sources
from . import metrics, partition, rounds
from .rounds import Method, Run

# Modules that change no number of a run (of this one, what counts is in the job: the method's own fields).
UNCOUNTED = ("experiment.py", "course.py", "pages.py", "__main__.py", "plots.py", "explore.py", "privacy.py",
             "flower.py")
# Every method at the default learning rate; appendix A1 lets each choose its own on validation images.
ADJUSTED = Method(logit_adjustment=True)
FEDSSG = replace(ADJUSTED, sharing="class_and_device", pretrain_steps=600)
METHODS = {
    "local_only": Method(at_home="all"),
    "fedavg": Method(),
    "fedprox": Method(mu=0.01),
    "scaffold": Method(scaffold=True),
    "fedavgm": Method(server_momentum=0.6),
    "local_normalisation": Method(at_home="norm"),
    "balanced_sampling": Method(balanced=True),
    "fedavg+la": ADJUSTED,
    "device_statistics": Method(device_statistics=True),
    "combined": replace(ADJUSTED, device_statistics=True),
    "duplication": replace(ADJUSTED, sharing="class_and_device", content="copies"),
    "uniform_shuffle": replace(FEDSSG, sharing="uniform"),
    "synthetic_only": replace(FEDSSG, trained_at="pool"),
    "server_pretraining": replace(FEDSSG, deal=False),
    "fedssg_no_pretrain": replace(FEDSSG, pretrain_steps=0),
    "fedssg": FEDSSG,
    "fedssg+combined": replace(FEDSSG, device_statistics=True),
    "oracle_real": replace(FEDSSG, content="real"),
    "centralised": replace(ADJUSTED, trained_at="centre"),
}
LESSON = ("fedavg", "fedprox", "balanced_sampling", "fedavg+la", "uniform_shuffle", "fedssg_no_pretrain", "fedssg",
          "centralised")  # the methods of lesson 04


@dataclass(frozen=True)
class Job:
    """One run to be made: which data, dealt how, which method and seed, how many rounds.

    ``recipe`` is the method itself where ``method`` is a name of your own; None: the one of `METHODS`. With
    ``validation`` the training images alone are split again and dealt: for choosing settings, away from test images.
    """

    method: str
    seed: int = 0
    rounds: int = 15
    data: str = "phantom"
    data_dir: str = ""
    hospitals: int = 0
    alpha: float = 0.3
    validation: bool = False
    recipe: Method | None = None


def out_folder(out: str = "") -> Path:
    """Where runs and results go: the argument, else the environment variable FEDSSG_OUT, else the project's out/."""
    project = Path(__file__).resolve().parent.parent
    folder = Path(out or os.environ.get("FEDSSG_OUT") or project / "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.lru_cache(maxsize=2)
def load(data: str, data_dir: str = "") -> sources.ImageSet:
    """`data.load`, kept in memory."""
    return sources.load(data, data_dir or None)


@functools.lru_cache(maxsize=4)
def federation(data: str, data_dir: str, hospitals: int, alpha: float, seed: int,
               validation: bool = False) -> partition.Federation:
    """The hospitals of a job, kept in memory: methods of one seed share them."""
    images = load(data, data_dir)
    if validation:
        images = images.subset(sources.split(images, seed=seed)[0])
    return partition.federation(images, seed, count=hospitals, alpha=alpha)


def hospitals_of(job: Job) -> partition.Federation:
    """`federation` of a job."""
    return federation(job.data, job.data_dir, job.hospitals, job.alpha, job.seed, job.validation)


def recipe(job: Job) -> Method:
    """What a job runs; a ValueError for a name that is not in `METHODS` and brings no recipe."""
    if job.recipe is None and job.method not in METHODS:
        raise ValueError(f"there is no method {job.method!r}; the methods are {', '.join(METHODS)}")
    return job.recipe or METHODS[job.method]


@functools.cache
def _fingerprint(data: str, data_dir: str) -> str:
    loaded = load(data, data_dir)
    digest = hashlib.sha256()
    for array in (loaded.images, loaded.labels, loaded.device, loaded.group):
        digest.update(np.ascontiguousarray(array))
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.name not in UNCOUNTED:
            digest.update(_code(source.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def _code(source: str) -> str:
    """A module's syntax tree without docstrings: rewording a comment makes no finished run invalid."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def cache_file(job: Job, out: Path) -> Path:
    """Where a job's run is kept; a ValueError for a method that is not known (see `recipe`)."""
    key = json.dumps(asdict(job) | {"data_dir": "", "data": _fingerprint(job.data, job.data_dir), "method": "",
                                    "recipe": asdict(recipe(job))}, sort_keys=True)
    name = "".join(c if c.isalnum() or c in "+_" else "-" for c in job.method)
    return out / "cache" / f"{name}-{job.seed}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def save(run: Run, file: Path, key: str = "") -> None:
    """Write a run atomically, plain arrays only: a reader sees all of it or nothing. `key` says whose run it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    arrays = {name: getattr(run, name) for name in ("weights", "rounds", "confusions", "took_part")}
    arrays |= {f"memory {name}": tensor.cpu().numpy() for name, tensor in run.memory.items()}
    arrays |= {"costs": np.array(json.dumps(run.costs)), "missed": np.array(json.dumps(run.missed)),
               "key": np.array(key)}
    try:
        with part.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"cannot write {file}: {error.strerror or error}. Free space there, or choose another folder; "
                         "what was saved before is still there") from error


def restore(file: Path, key: str = "") -> Run:
    """Read what `save` wrote.

    Raises
    ------
    ValueError
        The file is damaged, or belongs to a run with another `key`.
    """
    try:
        with np.load(file, allow_pickle=False) as z:
            memory = {name[7:]: torch.from_numpy(z[name]) for name in z.files if name.startswith("memory ")}
            missed = [tuple(entry) for entry in json.loads(str(z["missed"]))]
            run = Run(z["weights"], z["rounds"], z["confusions"], json.loads(str(z["costs"])), z["took_part"], missed,
                      memory)
            found = str(z["key"])
    except Exception as error:  # a crafted header makes NumPy raise whatever Python's own parser does
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); delete it, and its run is made "
                         "again") from error
    if found != key:
        raise ValueError(f"{file} belongs to another run (other parameters, data or helpers); delete it, or choose "
                         "another folder")
    return run


def execute(job: Job, out: Path, tick=lambda: None) -> Run:
    """One job, from the cache if it is there; `tick` is called after every round."""
    file = cache_file(job, out)
    if not file.exists():
        _compute(job, file, tick)
    return restore(file, file.stem)


def _compute(job: Job, file: Path, tick=lambda: None, workers: int = 1) -> None:
    """Make a run and save it; on the way its state after each round, so that one that was killed goes on from there."""
    state = file.with_suffix(".state.npz")

    def after_round(r: int, run: Run) -> None:
        save(run, state, file.stem)
        if r:
            tick()

    go_on = restore(state, file.stem) if state.exists() else None
    for _ in range(len(go_on.took_part) if go_on else 0):
        tick()
    run = rounds.run(hospitals_of(job), recipe(job), job.seed, rounds=job.rounds, workers=workers, go_on=go_on,
                     after_round=after_round)
    run.memory = {}
    save(run, file, file.stem)
    state.unlink(missing_ok=True)


def processes():
    """The multiprocessing context of worker processes: never forks of this one, whose threads a copy would lack."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # one clean process imports PyTorch, once; workers are its copies
    return context


def _start(counter) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # whoever asked for this work was killed; its state is on disk


def _tick() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _work(job: Job, file: Path) -> None:
    _compute(job, file, _tick)  # the file is named by the caller: helpers edited meanwhile would name another


def run_many(jobs: list[Job], out: str = "", workers: int = 2) -> list[Run]:
    """All jobs, in parallel processes, with one progress bar over their rounds.

    Each run is computed by one process, on one thread; a single one in this process, its hospitals on `workers`
    threads. Results do not depend on `workers`.

    Parameters
    ----------
    out : str
        See `out_folder`; finished runs are kept in its ``cache`` folder and found again.
    workers : int, >= 1
        Processes; 1 computes in this one.

    Raises
    ------
    ValueError
        Fewer than one worker, a method that is not in `METHODS`, or what `rounds.run` raises. Runs that are
        finished by then stay in the cache, so the next call goes on from there.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one process is needed")
    folder = out_folder(out)
    files = {job: cache_file(job, folder) for job in jobs}
    todo = [job for job, file in files.items() if not file.exists()]
    with tqdm(total=sum(job.rounds for job in todo), unit="round", leave=False, disable=not todo) as bar:
        if workers == 1 or len(todo) == 1:
            for job in todo:  # in this process, with hospitals side by side
                _compute(job, files[job], bar.update, workers)
        elif todo:
            context = processes()
            counter = context.Value("i", 0)
            with ProcessPoolExecutor(min(workers, len(todo)), context, _start, (counter,)) as pool:
                pending = {pool.submit(_work, job, files[job]) for job in todo}
                try:
                    while pending:
                        done, pending = wait(pending, timeout=0.5)
                        bar.update(counter.value - bar.n)
                        for future in done:
                            future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return [restore(files[job], files[job].stem) for job in jobs]


def table(jobs: list[Job], runs: list[Run], target: str = "fedavg+la", fine: bool = False) -> pd.DataFrame:
    """Results in long form: dataset, setting, method, seed, metric, value; scores of the last round, and costs.

    Where the `target` method is among the jobs, ``rounds_to_target`` and ``bytes_to_target`` say after how many rounds,
    and bytes up and down, a run first reached the final balanced accuracy of the target's run of the same seed (looked
    at in the tested rounds, see `rounds.Run`; infinite: never). With `fine`, also the scores behind the scores:
    ``recall[class]``, ``balanced_accuracy[device]``, ``recall[class|device]``, ``balanced_accuracy@round``.
    """
    goals = {replace(job, method="", recipe=None): metrics.balanced_accuracy(run.confusions[-1].sum(0))
             for job, run in zip(jobs, runs) if job.method == target}
    rows = []
    for job, run in zip(jobs, runs):
        hospitals = hospitals_of(job)
        counts = np.bincount(np.concatenate([c.labels for c in hospitals.clients]), minlength=len(hospitals.classes))
        curve = np.array([metrics.balanced_accuracy(c) for c in run.confusions.sum(1)])
        scores = metrics.summary(run.confusions[-1], counts) | run.costs | {"lr": recipe(job).lr}
        if (goal := goals.get(replace(job, method="", recipe=None))) is not None:
            reached = run.rounds[curve >= goal][0] if (curve >= goal).any() else np.inf
            samples = run.costs["bytes_samples_up"] + run.costs["bytes_samples_down"]
            weights = run.costs["bytes_up"] + run.costs["bytes_down"] - samples
            spent = samples + weights * reached / job.rounds if np.isfinite(reached) else np.inf
            scores |= {"rounds_to_target": reached, "bytes_to_target": spent}
        if fine:
            last = run.confusions[-1]
            scores |= {f"recall[{c}]": v for c, v in zip(hospitals.classes, metrics.recall(last.sum(0)))}
            scores |= {f"balanced_accuracy[{d}]": metrics.balanced_accuracy(m) for d, m in zip(hospitals.devices, last)}
            scores |= {f"recall[{c}|{d}]": v for d, m in zip(hospitals.devices, last)
                       for c, v in zip(hospitals.classes, metrics.recall(m)) if np.isfinite(v)}
            scores |= {f"balanced_accuracy@{r}": v for r, v in zip(run.rounds, curve)}
        rows += [(load(job.data, job.data_dir).name, hospitals.setting, job.method, job.seed, metric, value)
                 for metric, value in scores.items()]
    return pd.DataFrame(rows, columns=["dataset", "setting", "method", "seed", "metric", "value"])
