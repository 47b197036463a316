"""Runs the lessons through papermill: in order, into a folder of results."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ROOT / "notebooks"
# The lessons' own defaults are the quick profile; the full one overrides these where a lesson declares them.
PROFILES = {"quick": {}, "full": {"rounds": 40, "seeds": 3}}
LOCK = ".lock"  # marks an output folder as one of ours; held by the run that is writing to it
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # tags of the cells that papermill adds


class CourseError(Exception):
    """A fault that the user can mend: the message says how; `code` is the exit status."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def lessons(folder: Path = LESSONS, only: list[str] | None = None) -> list[Path]:
    """The numbered notebooks of `folder` in order; with `only`, all that start with one of its entries."""
    every = sorted(Path(folder).glob("*.ipynb"))
    if not every:
        raise CourseError(f"no lessons in {folder}: get a clone of the course, and pip install -e . there")
    found = [path for path in every if path.name.startswith(tuple(only or "0123456789"))]
    lost = [start for start in only or () if not (start and any(p.name.startswith(start) for p in every))]
    if lost or not found:
        known = ", ".join(path.stem for path in every)
        raise CourseError(f"no lesson starts with '{lost[0] if lost else 0}' in {folder}; there are: {known}")
    return found


def convert(name: str, text: str, kind: str, about: str = "") -> int | float | bool | str:
    """The value that `text` means for a parameter of this type; CourseError where it means none.

    What a lesson says `about` the parameter may end in its range: (1 or more), (0 to 0.99), (above 0).
    """
    readers = {"int": int, "float": float, "bool": {"true": True, "false": False}.__getitem__}
    try:
        value = readers.get(kind, str)(text)
    except (KeyError, ValueError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise CourseError(f"parameter '{name}' must be {wanted}, not '{text}'") from None
    if span := re.search(r"\((above )?(-?[\d.]+)(?: or more| to ([\d.]+))?\)$", about):
        above, low, high = span[1], float(span[2]), float(span[3] or sys.float_info.max)
        if not low <= value <= high or (above and value == low):
            raise CourseError(f"parameter '{name}' is {text.strip()}; it must be {span[0][1:-1]}")
    return value


def literal(path: Path) -> str:
    """A path for papermill, which would fill parameters into braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def chosen(paths: list[Path], common: dict, given: dict[str, str]) -> dict[Path, dict]:
    """Parameters of each lesson: those of `common` that it declares, then the user's `given`, checked."""
    import papermill

    found = {path: papermill.inspect_notebook(literal(path)).values() for path in paths}
    kinds = {
        path: {p["name"]: (p["inferred_type_name"], p["help"]) for p in cell} for path, cell in found.items()
    }
    names = sorted(set().union(*kinds.values()))
    for name in given:
        if name in ("data", "data_dir", "size", "out"):
            raise CourseError(f"set '{name}' with --{name.replace('_', '-')}, not with -p")
        if name not in names:
            raise CourseError(f"no lesson has a parameter '{name}'; known here: {', '.join(names)}")
    return {
        path: {name: value for name, value in common.items() if name in own}
        | {name: convert(name, text, *own[name]) for name, text in given.items() if name in own}
        for path, own in kinds.items()
    }


def kernel_here(**variables: str):
    """A context in which notebooks run in this interpreter; `variables` of the environment reach them too."""
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # The first kernel to be found is the one beside this interpreter.
    kernel = {"JUPYTER_PATH": "", "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": places}
    # With another plotting back end than the notebooks' own, lessons come out without figures.
    return patch.dict(os.environ, kernel | {"MPLBACKEND": ""} | variables)


def read(path: Path):
    """The notebook in a file."""
    import nbformat  # here: it takes seconds

    return nbformat.read(path, as_version=4)


def write(notebook, path: Path) -> None:
    """The notebook into a file."""
    import nbformat

    save_text(path, nbformat.writes(notebook) + "\n")


def own(notebook) -> list:
    """The notebook's cells, without those that papermill adds."""
    return [cell for cell in notebook.cells if not ADDED & set(cell.metadata.get("tags", []))]


def execute(path: Path, target: Path, parameters: dict, title: str) -> None:
    """Run one lesson in its own folder, saved as it goes; CourseError (status 1) where a cell fails."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    bar = {"desc": title, "bar_format": "{desc} |{bar:20}| {n_fmt}/{total_fmt} cells, {elapsed}"}
    quiet = ["--log-level=CRITICAL"]  # a kernel's own trouble after a failed cell is nobody's business
    engine = {"kernel_name": "python3", "language": "python", "cwd": path.parent, "extra_arguments": quiet}
    try:
        papermill.execute_notebook(literal(path), literal(target), parameters, progress_bar=bar, **engine)
        return
    except PapermillExecutionError as error:
        line = next((text.strip() for text in error.source.splitlines() if text.strip()), "")
        fault = f" (In [{error.exec_count}]) failed at: {line}\n  {error.ename}: {error.evalue}"
    except DeadKernelError:
        fault = ": the kernel died, perhaps for want of memory"
    notebook = read(target)
    notebook.metadata.papermill.exception = True  # papermill does not note that a kernel died
    write(notebook, target)
    started = [bool(cell.metadata.papermill.start_time) for cell in own(notebook)]
    where = f"{path.name}, cell {sum(started)} of {len(started)}"
    raise CourseError(f"{where}{fault}\nThe lesson as far as it ran: {target}", code=1)


@contextmanager
def alone(out: Path):
    """Within it, the output folder is there, is ours, and no other run writes to it; else a CourseError."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / LOCK).exists():
        raise CourseError(f"{out} holds files that no run of this course made: choose another --out")
    with (out / LOCK).open("a") as file:
        try:  # the system's lock goes with its process, however that ends: a dead run blocks nobody
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = f"another run (process {(out / LOCK).read_text() or 'unknown'}) is writing to {out}"
            raise CourseError(f"{other}: wait for it, or choose another --out") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks: nothing is checked
        (out / LOCK).write_text(str(os.getpid()))
        yield


def done(path: Path, out: Path, parameters: dict, made_from: str) -> bool:
    """Did an earlier run finish this lesson, from the same source with the same parameters, data and helpers?"""
    try:
        earlier, sources = read(out / "notebooks" / path.name), read(path)
    except (OSError, ValueError):  # none, or only a part of it: the disk was full
        return False
    unchanged = [cell.source for cell in own(earlier)] == [cell.source for cell in sources.cells]
    ran = earlier.metadata.papermill  # papermill's own record; made_from: only where the lesson ended well
    return unchanged and ran.parameters == parameters and ran.get("made_from") == made_from


def run(
    paths: list[Path], parameters: dict[Path, dict], out: Path, made_from="", resume=False, everything=True
):
    """Execute the lessons in order into `out`: notebooks and `results.csv`.

    With `resume`, lessons that are done are skipped (`made_from`: digest of data and helpers); else, if all are run,
    what an earlier run left goes. Raises CourseError at the first cell that fails.
    """
    with alone(out), kernel_here():
        if everything and not resume:
            for name in ("cache", "notebooks"):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / "results.csv").unlink(missing_ok=True)
        (out / "notebooks").mkdir(exist_ok=True)
        for number, path in enumerate(paths, 1):
            if resume and done(path, out, parameters[path], made_from):
                print(f"{path.stem}: done before")
                continue
            target = out / "notebooks" / path.name
            execute(path, target, parameters[path], f"{path.stem} ({number} of {len(paths)})")
            notebook = read(target)
            notebook.metadata.papermill.made_from = made_from
            write(notebook, target)


def save_text(path: Path, text: str) -> None:
    """Write a text file so that a reader meets either the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:  # no space, perhaps: leave the old one, and no part of the new one
        part.unlink(missing_ok=True)
        raise


def headline(notebook) -> str | None:
    """The PNG (base64) of the cell tagged `headline`; where there is none, the first picture."""
    cells = sorted(notebook.cells, key=lambda cell: "headline" not in cell.metadata.get("tags", []))
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return next((found["image/png"].replace("\n", "") for found in data if "image/png" in found), None)
