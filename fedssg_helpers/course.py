"""Runs the lessons through papermill: in order into a folder of results, or in place for the repository."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from .pages import headline, page, save_index, save_text, stripped

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ROOT / "notebooks"
# The lessons' own defaults are the quick profile; the full one overrides these where a lesson declares them.
PROFILES = {"quick": {}, "full": {"rounds": 40, "seeds": 3}}
RECORD = "run.json"  # marks a folder as ours, and says which lesson was run with what
LOCK = ".lock"  # held by the run that is writing to a folder


class CourseError(Exception):
    """A fault that the user can mend: the message says how; `code` is the exit status."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


# --- which lessons, with which parameters ---


def lessons(folder: Path = LESSONS, only: list[str] | None = None) -> list[Path]:
    """The numbered notebooks of `folder` in order; `only` keeps those that start with one of its entries.

    Appendices (A1_….ipynb) and the explorer page are no lessons: they run only where `only` names them.
    """
    found = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    named = tuple(prefix for prefix in only or [] if prefix.startswith(("A", "explorer")))
    others = [path for kind in ("A[0-9]_*.ipynb", "explorer.ipynb") for path in sorted(Path(folder).glob(kind))]
    found += [path for path in others if path.name.startswith(named)]
    if not found:
        raise CourseError(f"no lessons (00_….ipynb) in {folder}")
    for prefix in only or []:
        if not any(path.name.startswith(prefix) for path in found):
            raise CourseError(
                f"no lesson starts with '{prefix}'; there are: {', '.join(p.stem for p in found)}"
            )
    return [path for path in found if not only or path.name.startswith(tuple(only))]


def declared(path: Path) -> dict[str, str]:
    """Names and types ('int', 'float', 'bool', 'str') in the cell tagged `parameters` of one notebook."""
    import papermill

    def kind(entry: dict) -> str:
        hint = str(entry["inferred_type_name"])
        return hint if hint != "None" else type(ast.literal_eval(entry["default"])).__name__

    return {name: kind(entry) for name, entry in papermill.inspect_notebook(path).items()}


def convert(name: str, text: str, kind: str) -> int | float | bool | str:
    """The value that `text` means for a parameter of this type; CourseError where it means none."""
    try:
        if kind == "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (KeyError, ValueError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise CourseError(f"parameter '{name}' must be {wanted}, not '{text}'") from None


def chosen(paths: list[Path], common: dict, given: dict[str, str]) -> dict[Path, dict]:
    """Parameters of each lesson: those of `common` that it declares, then the user's `given`, converted.

    Checked before anything runs: papermill itself only warns of a name that no lesson knows.
    """
    known = {path: declared(path) for path in paths}
    names = sorted(set().union(*known.values()))
    for name in given:
        if name in ("data", "data_dir", "out"):
            raise CourseError(f"set '{name}' with --{name.replace('_', '-')}, not with -p")
        if name not in names:
            raise CourseError(f"no lesson has a parameter '{name}'; known here: {', '.join(names)}")
    return {
        path: {name: value for name, value in common.items() if name in kinds}
        | {name: convert(name, text, kinds[name]) for name, text in given.items() if name in kinds}
        for path, kinds in known.items()
    }


# --- executing ---


@contextmanager
def kernel_here(**variables: str):
    """Within it the kernel `python3` is this very interpreter, whatever kernels or settings the user has.

    `variables` are set for the kernels too; one with the value "" is taken away.
    """
    from ipykernel.kernelspec import get_kernel_dict

    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "kernels", "python3", "kernel.json")
        spec.parent.mkdir(parents=True)
        # Quiet: a kernel that is ended after a failed cell would print its own trouble between ours.
        spec.write_text(json.dumps(get_kernel_dict(extra_arguments=["--log-level=CRITICAL"])))
        python_path = os.pathsep.join(filter(None, [str(ROOT), before.get("PYTHONPATH")]))
        # MPLBACKEND: with another back end than the notebooks' own, lessons come out without figures.
        settings = {"JUPYTER_PATH": folder, "PYTHONPATH": python_path, "MPLBACKEND": ""} | variables
        os.environ.update(settings)
        for name in [name for name, value in settings.items() if value == ""]:
            del os.environ[name]
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def progress(total: int):
    """One bar over all lessons (total in cells); its clock ticks during long cells too."""
    from tqdm import tqdm

    screen = sys.stderr.isatty()
    shape = "{desc} |{bar:20}| {percentage:3.0f} % {elapsed}"
    with tqdm(total=total, bar_format=shape, dynamic_ncols=screen) as bar:
        stop = threading.Event()

        def tick():
            while not stop.wait(1.0):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        if screen:
            clock.start()
        try:
            yield bar
        finally:
            stop.set()
            if screen:
                clock.join()


def execute(path: Path, target: Path, parameters: dict, bar) -> None:
    """Run one lesson beside its source and save it, cell by cell, at `target`.

    Raises CourseError (exit status 1) that names notebook, cell and error where a cell fails.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    count = len(nbformat.read(path, as_version=4).cells)
    done = bar.n
    now = 0

    def on_cell_start(cell, cell_index):
        nonlocal now
        if "injected-parameters" in cell.metadata.get("tags", []):
            return  # papermill's own cell: the number shown is that of the source
        now += 1
        bar.n = done + now - 1
        bar.set_description_str(f"{path.stem}, cell {now}/{count}")

    try:
        papermill.execute_notebook(
            path,
            target,
            parameters,
            kernel_name="python3",
            language="python",
            cwd=path.parent,
            progress_bar=False,
            on_cell_start=on_cell_start,
        )
    except PapermillExecutionError as error:
        line = next((text for text in error.source.splitlines() if text.strip()), "")
        raise CourseError(
            f"{path.name}, cell {now} of {count} (In [{error.exec_count}]) failed\n"
            f"  its first line: {line.strip()}\n  {error.ename}: {error.evalue}",
            code=1,
        ) from None
    except DeadKernelError:
        message = f"{path.name}, cell {now} of {count}: the kernel died, perhaps for want of memory"
        raise CourseError(message, code=1) from None
    bar.n = done + count
    bar.refresh()


# --- the two commands ---


@contextmanager
def alone(out: Path):
    """Within it, the output folder is there, is ours, and no other run writes to it; else a CourseError.

    The lock is the operating system's: it goes with its process, however that ends, so a dead run blocks nobody.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / RECORD).exists() and {path.name for path in out.iterdir()} - {LOCK}:
        raise CourseError(f"{out} holds files that no run of this course made: choose another --out")
    with (out / LOCK).open("a+") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CourseError(
                f"another run (process {file.read() or 'unknown'}) is writing to {out}: wait for it, or choose "
                "another --out"
            ) from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks: nothing is checked
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def prepare(out: Path, paths: list[Path], resume: bool, everything: bool) -> dict:
    """The record of the output folder, made ready: what an earlier run left goes, unless resumed.

    A run of chosen lessons (`everything` false) clears only their own, so that the others' pages stay.
    Raises CourseError where the record is damaged.
    """
    record = {"made_by": "python -m fedssg_helpers run", "lessons": {}}
    if (out / RECORD).exists():
        try:
            record = json.loads((out / RECORD).read_text(encoding="utf-8"))
            record["lessons"].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CourseError(
                f"{out / RECORD} is damaged: choose another --out, or remove the folder"
            ) from None
        if everything and not resume:
            for name in ("cache", "notebooks"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in [f"{stem}.html" for stem in record["lessons"]] + ["index.html", "results.csv"]:
                (out / name).unlink(missing_ok=True)
            record["lessons"] = {}
        elif not resume:
            record["lessons"] = {
                k: v for k, v in record["lessons"].items() if k not in {p.stem for p in paths}
            }
    (out / "notebooks").mkdir(exist_ok=True)
    save_text(out / RECORD, json.dumps(record, indent=1))
    return record


def run(
    paths: list[Path],
    parameters: dict[Path, dict],
    out: Path,
    data: str,
    profile: str,
    resume: bool = False,
    everything: bool = True,
) -> None:
    """Execute the lessons in order into `out`: notebooks, a page of each, `index.html`, `results.csv`.

    With `resume`, a lesson that was finished before, from the same source with the same parameters, is
    skipped.
    Raises CourseError at the first failing cell, after the page of the part that ran is written.
    """
    import nbformat

    total = sum(len(nbformat.read(p, as_version=4).cells) for p in paths)
    with alone(out), kernel_here(), progress(total) as bar:
        record = prepare(out, paths, resume, everything)
        for path in paths:
            target = out / "notebooks" / path.name
            entry = {
                "parameters": parameters[path],
                "source": hashlib.sha256(path.read_bytes()).hexdigest(),
                "data": data,
                "profile": profile,
                "status": "done",
            }
            earlier = record["lessons"].get(path.stem, {})
            if resume and target.exists() and entry.items() <= earlier.items():
                bar.update(len(nbformat.read(path, as_version=4).cells))
                bar.write(f"{path.stem}: done before", file=sys.stdout)
                continue
            start = time.perf_counter()
            failure = None
            try:
                execute(path, target, parameters[path], bar)
            except CourseError as error:
                failure = error
                entry["status"] = "failed"
            record["lessons"][path.stem] = entry | {"seconds": round(time.perf_counter() - start, 1)}
            save_text(out / f"{path.stem}.html", page(target, path.parent))
            save_index(out, record)
            save_text(out / RECORD, json.dumps(record, indent=1))
            if failure:
                raise failure


def refresh(paths: list[Path]) -> None:
    """Execute the committed lessons as they stand (built-in data, own defaults) and rewrite them, stripped.

    The headline figure of each goes to `images/` beside them, for the README. A lesson that fails is left untouched.
    Runs are cached in a fresh folder: nothing old is shown.
    """
    import nbformat

    total = sum(len(nbformat.read(path, as_version=4).cells) for path in paths)
    with tempfile.TemporaryDirectory() as folder:
        with kernel_here(FEDSSG_OUT=folder, FEDSSG_DATA=""), progress(total) as bar:
            for path in paths:
                target = Path(folder, path.name)
                execute(path, target, {}, bar)
                notebook = stripped(nbformat.read(target, as_version=4))
                save_text(path, nbformat.writes(notebook) + "\n")
                if png := headline(notebook):
                    path.parent.joinpath("images").mkdir(exist_ok=True)
                    path.parent.joinpath("images", f"{path.stem}.png").write_bytes(base64.b64decode(png))
