"""What is left of data/results/accuracy.csv, made in order of importance: python .ci/results.py [minutes].

Seeds come before settings, settings before methods. One call of A1 is one seed, so that an interruption loses little.
With `minutes`, no new seed is begun after so many minutes. It never makes a row again that the file has.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fedssg_helpers.__main__ import step_seconds
from fedssg_helpers.files import data_folder
from fedssg_helpers.methods import METHODS
from fedssg_helpers.tuning import RATES

FILE = ROOT / "data" / "results" / "accuracy.csv"
FIRST, BUDGETS = 1000, 6
MAIN = "fedavg+la,fedssg,uniform_shuffle,oracle_real,centralised"
CORE = f"{MAIN},fedavg,balanced_sampling,duplication"
TEN = {"data": "ham10000", "hospitals": 10, "rounds": 40, "setting": "ten_hospitals", "images": 7500}
HAM = TEN | {"hospitals": 0, "setting": "by_device"}
DERMA = HAM | {"data": "dermamnist", "rounds": 15}
PHANTOM = {"data": "phantom", "hospitals": 0, "rounds": 15, "setting": "ten_hospitals", "images": 3365}
RULES = "fedssg,uniform_shuffle"
OTHERS = "class_only,device_only,oracle_real,duplication"
PLAN = [  # what, seeds, methods, rules whose budget is varied
    (HAM, 10, CORE, RULES),
    (PHANTOM, 10, CORE, RULES),
    (HAM | {"generators": "true"}, 5, "", ""),
    (TEN, 10, CORE, RULES),
    (HAM, 20, MAIN, ""),
    (DERMA, 10, CORE, RULES),
    (HAM, 10, "", OTHERS),
    *((setting, 5, "", OTHERS) for setting in (DERMA, PHANTOM, TEN)),
    (HAM, 10, ",".join(METHODS), ""),
    (HAM | {"ablations": "true"}, 10, "", ""),
    (PHANTOM | {"size": 64, "setting": "ten_hospitals_64"}, 5, CORE, ""),
    (HAM | {"size": 64, "setting": "by_device_64"}, 5, CORE, ""),
]


def possible(what: dict) -> bool:
    """Are the images there? HAM10000 at 64 pixels needs the publisher's own files."""
    files = ("ham10000_64.npz", "HAM10000_metadata*")
    return what["setting"] != "by_device_64" or any(any(data_folder().glob(name)) for name in files)


def missing(what: dict, seed: int, methods: str, rules: str) -> tuple[list[str], list[str], float]:
    """Methods and rules that the file lacks for a seed, and all the work, in whole runs of this setting."""
    here = (made.dataset == what["data"]) & (made.setting == what["setting"]) & (made.seed == seed)
    there = set(made.method[here])
    lacking = [name for name in filter(None, methods.split(",")) if name not in there]
    varied = [name for name in filter(None, rules.split(",")) if f"{name}: receive=25" not in there]
    trials = sum(
        len(RATES) * (3 if name in ("fedprox", "fedavgm") else 1) + 2 * bool(METHODS[name].sharing)
        for name in lacking
    )
    others = 16 if "generators" in what and "vae from scratch: receive=500" not in there else 0
    others += 5 if "ablations" in what and "fedssg: temperature=0.7" not in there else 0
    return (
        lacking,
        varied,
        others + len(lacking) + trials * 0.75 * 10 / what["rounds"] + BUDGETS * len(varied),
    )


def cost(what: dict, runs: float) -> float:
    """Processor seconds of the training steps alone: one takes as much longer as an image has more pixels."""
    pixels = (what.get("size", 28) / 28) ** 2
    return runs * pixels * what["rounds"] * what["images"] / 32 * step


def command(what: dict, seed: int, methods: list[str], rules: list[str]) -> list[str]:
    """The call of A1."""
    options = {name: what[name] for name in ("rounds", "hospitals")}
    options |= {"seed": seed, "seeds": 1, "tuning": 10}
    options |= {name: what.get(name, "false") for name in ("generators", "ablations")}
    options |= {"only_missing": "true", "results": FILE}
    options |= {"methods": ",".join(methods) or "none", "budgets": ",".join(rules)}
    words = [word for name, value in options.items() for word in ("-p", name, str(value))]
    side = str(what.get("size", 28))
    where = ["--data", what["data"], "--size", side, "--out", "out/results"]
    return [sys.executable, "-m", "fedssg_helpers", "run", "--only", "A1", *where, *words]


if __name__ == "__main__":
    start = time.monotonic()
    end = start + 60 * float(sys.argv[1] if len(sys.argv) > 1 else "inf")
    todo = [(what, FIRST + s, *rest) for what, seeds, *rest in PLAN if possible(what) for s in range(seeds)]
    step, done = step_seconds(3, 28), 0.0
    while time.monotonic() < end:
        made = pd.read_csv(FILE)
        left = [(what, seed, *missing(what, seed, *rest)) for what, seed, *rest in todo]
        left = [entry for entry in left if entry[-1]]
        # what the calls so far took, for each second of steps; a guess before the first
        longer = (time.monotonic() - start) / done if done else 1.0
        minutes = sum(cost(what, runs) for what, *_, runs in left) * longer / 60
        print(
            f"left: {len(left)} calls, {sum(entry[-1] for entry in left):.0f} whole runs, about {minutes:.0f} minutes"
        )
        if not left:
            break
        what, seed, methods, rules, runs = left[0]
        print(
            f"{what['data']}, {what['setting']}, seed {seed}: {', '.join(methods)}; budgets: {', '.join(rules)}",
            flush=True,
        )
        if subprocess.run(command(what, seed, methods, rules), cwd=ROOT).returncode:
            sys.exit("this call failed; its words are above")
        done += cost(what, runs)
