"""Many runs, side by side and remembered: methods x seeds, in parallel processes, cached on disk.

A finished run is a small ``.npz`` (arrays and JSON text, no pickle) named by a digest of everything it depends on:
the job, the data and the helpers' own source. So lessons find what an earlier lesson computed, an interrupted
comparison goes on where it stopped, and a changed line of code never meets an old result.
"""
from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from . import data as sources
from . import metrics, partition, rounds
from .rounds import Method, Run

METHODS = {
    "fedavg": Method(),
    "fedprox": Method(mu=0.01),
    "balanced_sampling": Method(balanced=True),
    "fedavg+la": Method(logit_adjustment=True),
    "uniform_shuffle": Method(logit_adjustment=True, sharing="uniform", pretrain_steps=600),
    "fedssg_no_pretrain": Method(logit_adjustment=True, sharing="class_and_device"),
    "fedssg": Method(logit_adjustment=True, sharing="class_and_device", pretrain_steps=600),
    "centralised": Method(logit_adjustment=True, centralised=True),
}


@dataclass(frozen=True)
class Job:
    """One run to be made: which data, dealt how, which method and seed, how many rounds."""

    method: str
    seed: int = 0
    rounds: int = 15
    data: str = "phantom"
    data_dir: str = ""
    hospitals: int = 0
    alpha: float = 0.3


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
def federation(data: str, data_dir: str, hospitals: int, alpha: float, seed: int) -> partition.Federation:
    """The hospitals of a job, kept in memory: methods of one seed share them."""
    return partition.federation(load(data, data_dir), seed, count=hospitals, alpha=alpha)


@functools.cache
def _fingerprint(data: str, data_dir: str) -> str:
    loaded = load(data, data_dir)
    digest = hashlib.sha256()
    for array in (loaded.images, loaded.labels, loaded.device, loaded.group):
        digest.update(np.ascontiguousarray(array))
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.name not in ("course.py", "pages.py", "__main__.py", "plots.py", "explore.py"):  # these change no number
            digest.update(source.read_bytes())
    return digest.hexdigest()


def cache_file(job: Job, out: Path) -> Path:
    """Where a job's run is kept; a ValueError for a method that is not in `METHODS`."""
    if job.method not in METHODS:
        raise ValueError(f"there is no method {job.method!r}; the methods are {', '.join(METHODS)}")
    key = json.dumps(asdict(job) | {"data_dir": "", "data": _fingerprint(job.data, job.data_dir),
                                    "recipe": asdict(METHODS[job.method])}, sort_keys=True)
    return out / "cache" / f"{job.method}-{job.seed}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def save(run: Run, file: Path) -> None:
    """Write a run atomically: a reader sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as stream:
        np.savez_compressed(stream, weights=run.weights, rounds=run.rounds, confusions=run.confusions,
                            costs=np.array(json.dumps(run.costs)))
    os.replace(part, file)


def restore(file: Path) -> Run:
    """Read what `save` wrote."""
    with np.load(file, allow_pickle=False) as z:
        return Run(z["weights"], z["rounds"], z["confusions"], json.loads(str(z["costs"])))


def execute(job: Job, out: Path, tick=lambda: None) -> Run:
    """One job, from the cache if it is there; `tick` is called after every round."""
    file = cache_file(job, out)
    if not file.exists():
        _compute(job, file, tick)
    return restore(file)


def _compute(job: Job, file: Path, tick) -> None:
    hospitals = federation(job.data, job.data_dir, job.hospitals, job.alpha, job.seed)
    save(rounds.run(hospitals, METHODS[job.method], job.seed, rounds=job.rounds,
                    after_round=lambda r, run: tick()), file)


def _start(counter) -> None:
    global _counter
    _counter = counter


def _tick() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _work(job: Job, file: Path) -> None:
    _compute(job, file, _tick)  # the file is named by the caller: helpers edited meanwhile would name another


def run_many(jobs: list[Job], out: str = "", workers: int = 2) -> list[Run]:
    """All jobs, in parallel processes, with one progress bar over their rounds.

    Each run is computed by one process on one thread, so results do not depend on `workers`.

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
            for job in todo:
                _compute(job, files[job], bar.update)
        elif todo:
            context = multiprocessing.get_context("spawn")
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
    return [restore(files[job]) for job in jobs]


def table(jobs: list[Job], runs: list[Run]) -> pd.DataFrame:
    """Results in long form: dataset, setting, method, seed, metric, value; scores of the last round, and costs."""
    rows = []
    for job, run in zip(jobs, runs):
        hospitals = federation(job.data, job.data_dir, job.hospitals, job.alpha, job.seed)
        counts = np.bincount(np.concatenate([c.labels for c in hospitals.clients]), minlength=len(hospitals.classes))
        scores = metrics.summary(run.confusions[-1], counts) | run.costs
        rows += [(load(job.data, job.data_dir).name, hospitals.setting, job.method, job.seed, metric, value)
                 for metric, value in scores.items()]
    return pd.DataFrame(rows, columns=["dataset", "setting", "method", "seed", "metric", "value"])
