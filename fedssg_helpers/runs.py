"""Many runs, side by side and remembered: methods x seeds, in parallel processes, cached on disk.

A finished run is a small ``.npz`` (arrays and JSON text, no pickle) named by a digest of everything it depends on: the
job with its method's parts, your own parts' source, the data, and the helpers' source. An interrupted comparison goes on
where it stopped, in the very round, and a changed line of code never meets an old result.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing.connection import Listener
from pathlib import Path

import cloudpickle
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import data as sources
from . import metrics, partition, server
from .errors import require
from .files import out_folder
from .methods import METHODS, Method, describe
from .models import Backbone, compute_device
from .server import Run

COUNTED = """errors keys metrics devices files folder data partition models generator protection dpsgd dpmeans sharing methods client
checks exchange server runs"""  # the modules that a run's numbers depend on


@dataclass(frozen=True)
class Job:
    """One run to be made. With `validation`, the training images alone are split again: for choosing settings."""

    method: str  # a name in `methods.METHODS`, or any other name with a recipe
    seed: int = 0
    rounds: int = 15
    data: str = "phantom"
    data_dir: str = ""
    hospitals: int = 0
    alpha: float = 0.3
    validation: bool = False
    recipe: Method | None = None
    size: int = 28
    network: str = "smallcnn"  # see `models.Backbone`
    compute: str = "cpu"  # see `models.compute_device`


@functools.lru_cache(maxsize=2)
def images_of(data: str, data_dir: str = "", size: int = 28) -> sources.ImageSet:
    """`data.load`, kept in memory; what it warns of is said once, not by every worker process too."""
    with warnings.catch_warnings(action="ignore" if multiprocessing.parent_process() else None):
        return sources.load(data, data_dir or None, size)


@functools.lru_cache(maxsize=4)
def federation(data, data_dir="", hospitals=0, alpha=0.3, seed=0, validation=False, size=28):
    """The hospitals of a data set, kept in memory: methods of one seed share them."""
    images = images_of(data, data_dir, size)
    if validation:
        images = images.subset(partition.split(images, seed=seed)[0])
    return partition.federate(images, seed, count=hospitals, alpha=alpha)


def federation_of(job: Job) -> partition.Federation:
    """`federation` of a job."""
    return federation(job.data, job.data_dir, job.hospitals, job.alpha, job.seed, job.validation, job.size)


def recipe(job: Job) -> Method:
    """What a job runs; a ValueError for a name that is not in `METHODS` and brings no recipe."""
    if job.recipe is None and job.method not in METHODS:
        raise ValueError(f"there is no method {job.method!r}; the methods are {', '.join(METHODS)}")
    method = job.recipe or METHODS[job.method]
    return method if job.network == "smallcnn" else replace(method, network=Backbone(job.network))


@functools.lru_cache(maxsize=2)
def data_digest(data: str, data_dir: str, size: int) -> str:
    """SHA-256 of all that a data set holds."""
    images, digest = images_of(data, data_dir, size), hashlib.sha256()
    for array in (images.images, images.labels, images.device, images.group, images.official_test):
        digest.update(np.ascontiguousarray(array if array is not None else ()))
    digest.update(repr((images.classes, images.devices, images.simulated)).encode())
    return digest.hexdigest()


def _sources() -> tuple[tuple[Path, int], ...]:
    """The counted modules' files, and when each was changed."""
    files = [Path(__file__).with_name(f"{name}.py") for name in COUNTED.split()]
    return tuple((file, file.stat().st_mtime_ns) for file in files)


LOADED = globals().get("LOADED") or _sources()  # as this process first had them, also after a reload


@functools.lru_cache(maxsize=2)
def _code_digest(files: tuple[tuple[Path, int], ...]) -> str:
    """Of syntax trees without docstrings: rewording a comment makes no finished run invalid."""
    digest, documented = hashlib.sha256(), ast.Module | ast.ClassDef | ast.FunctionDef
    for file, _ in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def code_digest() -> str:
    """SHA-256 of the counted modules' code as it is now."""
    return _code_digest(_sources())


def cache_file(job: Job, out: Path) -> Path:
    """Where a job's run is kept; a ValueError for a method that is not known (see `recipe`)."""
    key = {name: describe(value) for name, value in vars(job).items() if name not in ("data_dir", "method")}
    key |= {"recipe": describe(recipe(job)), "code": code_digest()}
    key |= {"data": data_digest(job.data, job.data_dir, job.size)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = "".join(c if c.isalnum() or c in "+_" else "-" for c in job.method)
    return out / "cache" / f"{name}-{int(job.seed)}-{digest[:16]}.npz"


def save(run: Run, file: Path, key: str = "") -> None:
    """Write a run, plain arrays only: a reader sees all of it or nothing. `key` says whose run it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    arrays = {name: getattr(run, name) for name in ("weights", "rounds", "confusions", "took_part")}
    arrays |= {f"memory {name}": tensor.cpu().numpy() for name, tensor in run.memory.items()}
    arrays |= {name: np.array(json.dumps(getattr(run, name))) for name in ("costs", "missed")}
    try:
        with part.open("wb") as stream:
            np.savez(stream, key=np.array(key), **arrays)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        cure = "Free space there, or choose another folder; what was saved before is still there"
        raise ValueError(f"cannot write {file}: {error.strerror or error}. {cure}") from error


def restore(file: Path, key: str = "") -> Run:
    """Read what `save` wrote; a ValueError where it is damaged, or belongs to a run with another `key`."""
    try:
        with np.load(file, allow_pickle=False) as z:
            memory = {name[7:]: torch.from_numpy(z[name]) for name in z.files if name.startswith("memory ")}
            missed = [tuple(entry) for entry in json.loads(str(z["missed"]))]
            costs, found = json.loads(str(z["costs"])), str(z["key"])
            run = Run(z["weights"], z["rounds"], z["confusions"], costs, z["took_part"], missed, memory)
    except Exception as error:  # a crafted header makes NumPy raise whatever Python's own parser does
        why = f"({type(error).__name__}: {error})"
        raise ValueError(f"{file} is damaged {why}; delete it, and its run is made again") from error
    if found != key:
        why = "belongs to another run (other parameters, data or helpers)"
        raise ValueError(f"{file} {why}; delete it, or choose another folder")
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
    known = {"compute": compute_device(job.compute), "rounds": job.rounds, "workers": workers}
    known |= {"go_on": go_on, "after_round": after_round}
    run = server.run(federation_of(job), recipe(job), job.seed, **known)
    run.memory = {}
    save(run, file, file.stem)
    state.unlink(missing_ok=True)


def processes():
    """The multiprocessing context of worker processes: never forks of this one, whose threads a copy would lack."""
    edited = _sources() != LOADED  # then workers import the helpers anew
    if edited or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # one clean process imports PyTorch; workers are its copies
    return context


def possible(workers: int) -> int:
    """So many worker processes; 1, with a warning, where this machine cannot start any."""
    try:
        multiprocessing.get_context("spawn").Lock()  # needs /dev/shm
        Listener().close()  # needs a short name for a socket
    except (ImportError, OSError) as error:
        cause = f"this machine cannot start worker processes ({error}): no /dev/shm, or TMPDIR is too long."
        warnings.warn(f"{cause} All is computed in one process, slower, with the same numbers.", stacklevel=3)
        return 1
    return workers


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


def _work(job: bytes, file: Path) -> None:
    if not file.exists():  # else somebody else has made it in the meantime
        _compute(pickle.loads(job), file, _tick)  # from the parent process; the file is named there, too


def run_many(jobs: list[Job], out: str = "", workers: int = 2) -> list[Run]:
    """All jobs, in parallel processes, with one progress bar over their rounds.

    Each run is computed by one process on one thread; a single one in this process, its hospitals on `workers`
    threads. Results do not depend on `workers`. Methods may have parts of your own, from a notebook too. Finished runs
    are kept in the ``cache`` folder of `out_folder`, also where a later one raises a ValueError (see `server.run`).
    """
    require(workers >= 1, "workers", workers, "at least 1")
    folder = out_folder(out)
    files = [cache_file(job, folder) for job in jobs]
    todo = {file: replace(job, recipe=recipe(job)) for job, file in zip(jobs, files) if not file.exists()}
    total = sum(job.rounds for job in todo.values())
    with tqdm(total=total, unit="round", leave=False, disable=not todo) as bar:
        if workers == 1 or len(todo) < 2 or possible(workers) == 1:
            for file, job in todo.items():  # in this process, with hospitals side by side
                _compute(job, file, bar.update, workers)
        else:
            _side_by_side(todo, min(workers, len(todo)), bar)
    return [restore(file, file.stem) for file in files]


def _side_by_side(todo: dict[Path, Job], workers: int, bar) -> None:
    context = processes()
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, _start, (counter,)) as pool:
        pending = {pool.submit(_work, cloudpickle.dumps(job), file) for file, job in todo.items()}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5)
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def table(jobs: list[Job], runs: list[Run]) -> pd.DataFrame:
    """Results in long form: dataset, setting, method, seed, metric, value; scores of the last round, and costs."""
    rows = []
    for job, run in zip(jobs, runs):
        hospitals, name = federation_of(job), images_of(job.data, job.data_dir, job.size).name
        counts = sum(np.bincount(c.labels, minlength=len(hospitals.classes)) for c in hospitals.clients)
        scores = metrics.summary(run.confusions[-1], counts) | run.costs | {"lr": recipe(job).lr}
        run_of = name, hospitals.setting, job.method, job.seed
        rows += [(*run_of, metric, value) for metric, value in scores.items()]
    return pd.DataFrame(rows, columns=["dataset", "setting", "method", "seed", "metric", "value"])
