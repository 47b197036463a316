"""The command line: `python -m fedssg_helpers run | rank | doctor` (--help explains it)."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import time
import timeit
import tomllib
import zlib
from importlib import metadata
from pathlib import Path

from . import course

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
INSTALL = "run 'make course' or, in your own environment, pip install -e ."
CURES = {
    "torch pair": "pip install --force-reinstall torch torchvision (both in one call)",
    "kernel": "python -m ipykernel install --sys-prefix; jupyter kernelspec remove the other",
    "widgets": "pip install ipywidgets jupyterlab_widgets into the server's environment",
    "files": "git checkout data notebooks",
    "disk": "free at least 1 GB",
    "time": INSTALL,
}
# Seconds of each lesson on two cores of which each trains on a batch of 32 images in STEP seconds: what it takes in any case,
# what grows with the seconds of a batch, and what grows with seeds, rounds and images, too (here 3, 15 and the phantoms').
STEP, PHANTOMS = 0.0015, 4482
TAKES = {
    "00": (9, 2, 14),
    "01": (9, 0, 0),
    "02": (11, 33, 0),
    "03": (15, 10, 0),
    "04": (15, 14, 67),
    "05": (9, 0, 0),
}
TAKES |= {"06": (5, 55, 5), "07": (15, 5, 0), "08": (15, 15, 0), "09": (7, 5, 30)}


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The parsed command line; argparse ends the program with status 2 on a bad one."""
    parser = argparse.ArgumentParser(prog="python -m fedssg_helpers", description="The FedSSG course.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="is this machine ready for class?")
    run = commands.add_parser("run", help="run the lessons in order; they and their results go to one folder")
    add = run.add_argument
    add("--only", action="append", metavar="03", help="only this lesson (repeatable)")
    add("--lessons", type=Path, default=course.LESSONS, help=argparse.SUPPRESS)
    add("--profile", choices=course.PROFILES, default="quick", help="full: with more rounds and seeds")
    add("-p", nargs=2, action="append", metavar=("NAME", "VALUE"), help="set a lesson's parameter")
    add("--out", type=Path, metavar="DIR", help="where results go (default: out/run-DATA-PROFILE)")
    add("--resume", action="store_true", help="skip the lessons that an earlier run finished")
    own = "a method, rule, generator or aggregate of your own against its control, on paired seeds"
    about = f"Rank {own}. The file is Python code, and it is executed: rank only code that you trust."
    rank = commands.add_parser("rank", help=f"rank {own}", description=about)
    rank.add_argument("file", type=Path, help="defines METHOD, rule(have, budget), SOURCE or aggregate(...)")
    rank.add_argument("--seeds", type=int, default=10, help="paired seeds, 2 or more (default: 10)")
    rank.add_argument("--rounds", type=int, default=15, help="rounds of every run (default: 15)")
    rank.add_argument("--out", default="", metavar="DIR", help="for table, picture and runs (default: out/)")
    for add in (run.add_argument, rank.add_argument):
        add(
            "--data",
            default="phantom",
            help="phantom (built in), ham10000, a MedMNIST name, your own .npz or folder",
        )
        add("--data-dir", metavar="DIR", help="folder with the data (default: $FEDSSG_DATA, else data/)")
        add("--size", type=int, default=28, metavar="PIXELS", help="side of an image (default: 28)")
    # Before Python 3.14 -1e-3 is no number for argparse, unless a blank is in front.
    words = [re.sub(r"^(-[\d.]+e.*)", r" \1", word) for word in (sys.argv[1:] if words is None else words)]
    return parser.parse_args(words)


def step_seconds(channels: int, size: int) -> float:
    """Seconds in which one core, now, trains on a batch of 32 images."""
    import torch

    from .keys import one_thread
    from .models import SmallCNN

    with one_thread():  # as the lessons do
        net, batch = SmallCNN(channels, classes=7), torch.rand(32, channels, size, size)
        return min(timeit.repeat(lambda: net(batch).sum().backward(), number=20, repeat=5)) / 20


def seconds_of(parameters: dict[Path, dict], images=PHANTOMS, channels=3, size=28) -> float:
    """What these lessons will take here, for so many images: an estimate from one measured step."""
    seconds, slow = 0.0, step_seconds(channels, size) / STEP
    for path, own in parameters.items():
        fixed, steps, runs = TAKES.get(path.name[:2], (0, 0, 0))
        rounds = 0.4 + 0.6 * own.get("rounds", 15) / 15 * images / PHANTOMS  # 0.4: what is done once
        seconds += fixed + slow * (steps + runs * rounds * own.get("seeds", 3) / 3)
    return seconds * 2 / min(CORES, 2)


def data_of(options: argparse.Namespace) -> tuple[str, str, bool]:
    """The name for `data.load`, the data's folder, both as full paths where there are such, and: are they your own?"""
    from . import data

    folder = options.data_dir or os.environ.get("FEDSSG_DATA", "")
    folder = str(Path(folder).expanduser().resolve()) if folder else ""
    file, own = Path(options.data).expanduser(), data.own_path(options.data, data.data_folder(folder))
    return str(file.resolve()) if own and file.exists() else options.data, folder, bool(own)


def run(options: argparse.Namespace) -> None:
    """Check everything that can be checked beforehand, then run the lessons."""
    from . import partition, runs

    name, folder, own = data_of(options)
    label = Path(name).name.removesuffix(".npz") + (f"-{options.size}" if options.size != 28 else "")
    if own:  # two folders may hold an images.npz
        label += f"-{zlib.crc32(f'{folder}/{name}'.encode()):08x}"
    out = options.out or course.ROOT / "out" / f"run-{label}-{options.profile}"
    out = options.out = out.expanduser().resolve()
    paths = course.lessons(options.lessons, options.only)
    common = {"data": name, "data_dir": folder, "size": options.size, "out": str(out)}
    parameters = course.chosen(paths, common | course.PROFILES[options.profile], dict(options.p or ()))
    start = time.perf_counter()
    try:
        images = runs.images_of(name, folder, options.size)
        for own in parameters.values():  # impossible values (alpha <= 0, too many hospitals) fail here
            known = {"count": own.get("hospitals", 0), "alpha": own.get("alpha", 0.3)}
            partition.federate(images, own.get("seed", 0), **known)
    except ValueError as error:
        raise course.CourseError(str(error)) from None
    loading = (time.perf_counter() - start) * len(paths)  # every lesson does it again
    fewer = {path: own | {"rounds": 5} for path, own in parameters.items()}
    seconds = (loading + seconds_of(p, len(images), *images.images.shape[1:3]) for p in (parameters, fewer))
    about, less = (max(1, round(s / 60)) for s in seconds)
    more = f"; -p rounds 5 makes it {less}" if less < about > 15 else ""
    more += "; appendices are not counted" if any(path.name[:2] not in TAKES for path in paths) else ""
    print(f"About {about} minute{'s' * (about > 1)} on this machine{more}.", flush=True)
    made_from = runs.data_digest(name, folder, options.size)[:16] + runs.code_digest()[:16]
    del images  # the lessons load them again, in processes of their own
    runs.images_of.cache_clear()
    course.run(paths, parameters, out, made_from, options.resume, everything=not options.only)
    print(f"{len(paths)} done in {time.perf_counter() - start:.0f} s: {out / 'notebooks'}. Pages: make book")


def rank(options: argparse.Namespace) -> None:
    """Rank the method in a file: runs, numbers in words, a row and a picture."""
    from . import rank as ranking
    from . import runs
    from .errors import require

    start, (data, folder, _) = time.perf_counter(), data_of(options)
    seeds, rounds, size, out = options.seeds, options.rounds, options.size, options.out
    try:
        require(seeds >= 2, "--seeds", seeds, "2 or more")
        require(rounds >= 1, "--rounds", rounds, "1 or more")
        entry, images = ranking.read(options.file), runs.images_of(data, folder, size)
        number = ranking.most_runs(entry, seeds)
        runs_of_04 = {Path("04"): {"rounds": rounds, "seeds": number / 8}}  # eight methods a seed
        minutes = max(1, round(seconds_of(runs_of_04, len(images), *images.images.shape[1:3]) / 60))
        print(f"{entry.name} ({entry.kind}) against {entry.control}: at most {number} runs, about")
        print(f"{minutes} min on this machine. Runs that were made before are not made again.", flush=True)
        base = runs.Job(entry.name, ranking.FIRST, rounds, data, folder, size=size)
        ranking.trial(entry, base, out)
        scores = ranking.compare(entry, base, seeds, out, min(CORES, 2))
        row = ranking.row_of(entry, base, scores)
    except ValueError as error:
        raise course.CourseError(str(error)) from None
    where = runs.out_folder(out)
    ranking.add(row, where)
    print(ranking.words(row, scores))
    print(f"{time.perf_counter() - start:.0f} s; row and picture: ranking.csv, ranking.png in {where}")


def check(what: str) -> tuple[bool, str]:
    """(ready, finding) of an entry of CURES, or of a package with its range; may raise if not ready."""
    match what:
        case "torch pair":
            import torchvision

            return hasattr(torchvision, "ops"), "torch and torchvision fit together"
        case "kernel":
            from jupyter_client.kernelspec import get_kernel_spec

            program = Path(get_kernel_spec("python3").argv[0])
            return program.parent in (Path(), Path(sys.executable).parent), f"python3 starts {program}"
        case "widgets":
            folder = Path(sys.prefix, "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager")
            return folder.is_dir(), f"{folder}, beside the Jupyter server"
        case "files":
            folders = {course.ROOT / "data", Path(os.environ.get("FEDSSG_DATA") or course.ROOT / "data")}
            found = sorted(path.stem for folder in folders for path in folder.glob("*.npz"))
            return "phantom" in found, f"{len(course.lessons())} lessons; data sets: {', '.join(found)}"
        case "disk":
            free = shutil.disk_usage(course.ROOT).free / 1e9
            return free >= 1, f"{free:.0f} GB free"
        case "time":
            took = seconds_of(dict.fromkeys(course.lessons(), {})) / 60
            return True, f"'make course' takes about {took:.0f} min here, on {CORES} cores"
    from packaging.requirements import Requirement

    version = metadata.version(Requirement(what).name)
    return Requirement(what).specifier.contains(version, prereleases=True), version


def doctor(_) -> None:
    """Print one line per check; CourseError (status 1) unless this machine is ready."""
    project, missing = tomllib.loads((course.ROOT / "pyproject.toml").read_text(encoding="utf-8")), 0
    packages = dict.fromkeys(project["project"]["dependencies"], INSTALL)
    for what, cure in (packages | CURES).items():
        try:
            ready, finding = check(what)
        except Exception as error:
            ready, finding = False, str(error)
        missing += not ready
        print(f"{'OK' if ready else 'MISSING':8} {what:20} {finding if ready else f'{finding}; {cure}'}")
    if missing:
        raise course.CourseError(f"not ready for class: {missing} of the lines above need a cure", code=1)
    print("Ready for class.")


def main(words: list[str] | None = None) -> int:
    """Run one command. Status: 0 done, 1 a lesson failed or not ready, 2 wrong input, 130 stopped by Ctrl-C."""
    options = arguments(words)
    again = {"run": "the same command and --resume.", "rank": "the same command."}.get(options.command)
    kept = f"\nWhat ran is kept. Go on with {again}" if again else ""
    try:
        {"run": run, "rank": rank, "doctor": doctor}[options.command](options)
        return 0
    except course.CourseError as error:
        said, status = f"error: {error}" + kept * (error.code == 1), error.code
    except ModuleNotFoundError as error:
        said, status = f"error: {error}; {INSTALL}", 2
    except OSError as error:
        where = error.filename or getattr(options, "out", None) or "a file"
        said, status = f"error: cannot read or write {where}: {error.strerror or error}{kept}", 2
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # nobody waits for the stopped cell's answer
        said, status = f"\nStopped.{kept}", 130
    print(said, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
