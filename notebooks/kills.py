"""kill -9 at a random moment, and going on: tests and the trust appendix use it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from fedssg_helpers import runs
from fedssg_helpers.keys import rng
from fedssg_helpers.runs import Job
from fedssg_helpers.server import Run


def tiny_data(folder) -> str:
    """Writes an own data set, 160 grey images of 16 pixels, three classes, two devices; gives its path."""
    random = np.random.default_rng(0)
    labels = random.choice(3, 160, p=[0.6, 0.3, 0.1])
    labels[:6] = [0, 1, 2] * 2
    images = random.integers(0, 180, (160, 16, 16), dtype=np.uint8)
    images += (labels * 30).astype(np.uint8)[:, None, None]
    path = Path(folder) / "tiny.npz"
    np.savez(path, images=images, labels=labels, device=np.arange(160) % 2)
    return str(path)


def rounds_done(state: Path) -> int:
    """How many rounds a checkpoint holds; 0 where there is none (any more)."""
    try:
        return len(runs.restore(state, state.name.removesuffix(".state.npz")).took_part)
    except ValueError:
        return 0


def killed_and_resumed(job: Job, out: Path, trial: int) -> tuple[bool, Run]:
    """Kill -9 a process that makes a run, in or after a random round, then go on here.

    Returns whether the killed process had left a checkpoint (else it was through already), and the run.
    """
    state = runs.cache_file(job, out).with_suffix(".state.npz")
    random = rng(0, "kill", trial)
    process = runs.processes().Process(target=runs.execute, args=(job, out))
    wanted = int(random.integers(job.rounds - 3))
    process.start()
    while process.is_alive() and not (state.exists() and rounds_done(state) >= wanted):
        time.sleep(0.002)
    time.sleep(0.02 * random.random())
    process.kill()
    process.join()
    return state.exists(), runs.execute(job, out)


def equal(a: Run, b: Run) -> bool:
    """Are two runs the same to the last bit, seconds aside?"""
    costs = [{k: v for k, v in run.costs.items() if "seconds" not in k} for run in (a, b)]
    arrays = ("weights", "rounds", "confusions", "took_part")
    same = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
    return same and costs[0] == costs[1] and a.missed == b.missed
