"""Files: where data and results lie, ``.npz`` archives, tables of text, and images that are too many for memory."""

from __future__ import annotations

import csv
import gzip
import math
import os
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PROJECT_DATA = Path(__file__).resolve().parent.parent / "data"
MOST_BYTES = 8 * 2**30  # of one .npz after unpacking: a larger one is damaged or does not belong here
IN_MEMORY = 2**25  # bytes: selected images that take more lie in a file of their own, mapped into memory


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the cause and the cure."""


def require(good: bool, where, message: str) -> None:
    """A `DataError` that names the file `where` and gives `message` (cause, then cure), unless `good`."""
    if not good:
        raise DataError(f"{where}: {message}")


def data_folder(folder=None) -> Path:
    """The folder with data files: `folder`, else $FEDSSG_DATA, else the project's own data/."""
    return Path(folder or os.environ.get("FEDSSG_DATA") or PROJECT_DATA).expanduser()


def out_folder(out: str = "") -> Path:
    """Where runs and results go: the argument, else $FEDSSG_OUT, else out/ of the clone or (there is none) of this folder."""
    project = PROJECT_DATA.parent if PROJECT_DATA.is_dir() else Path.cwd()
    folder = Path(out or os.environ.get("FEDSSG_OUT") or project / "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def replacing(target: Path, cure: str):
    """Gives a path to write to. Its file becomes `target` when all went well; else nothing is left, and nothing changes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            yield Path(folder) / target.name
            os.replace(Path(folder) / target.name, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error}). {cure}") from error


def read_npz(path: Path, missing_cure: str) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``; `missing_cure` says what to do where there is no such file."""
    require(path.is_file(), path, f"there is no such file. {missing_cure}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        require(size <= MOST_BYTES, path, f"unpacks to {size >> 20} MiB. Store fewer or smaller images.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        strange = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]
        require(not strange, path, f"damaged: {strange} are no arrays. Save it with np.savez_compressed.")
    except DataError:
        raise
    except Exception as error:  # zip, zlib, tokenizer, memory: a damaged file may make NumPy raise anything
        cause = f"truncated, damaged or not an .npz ({type(error).__name__}: {error})"
        cure = "Delete it, then copy or download it again, or save it with np.savez_compressed."
        if isinstance(error, ValueError) and "pickle" in str(error):
            cause = "holds an array of Python objects, which is never loaded (a pickle can run code)"
            cure = "Save plain arrays: np.asarray(names, dtype=str), np.stack(images)."
        raise DataError(f"{path}: {cause}. {cure}") from error
    return arrays


def need(arrays: dict, keys, path: Path) -> None:
    """A `DataError` unless the `arrays` read from `path` have all `keys`."""
    lacking, held = ", ".join(key for key in keys if key not in arrays), ", ".join(arrays) or "nothing"
    require(not lacking, path, f"lacks {lacking} (it holds {held}). data/README.md says what is needed.")


def read_table(path: Path, columns: set[str], cure: str) -> list[dict[str, str]]:
    """The rows of a table of text (commas, semicolons or tabs; ``.gz`` packed) that has these columns at least."""
    require(path.is_file(), path, f"there is no such file. {cure}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
        separator = max("\t;,", key=lines[0].count) if lines else ","
        rows = list(csv.DictReader(lines, delimiter=separator))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: damaged, or not a table of text ({error}). {cure}") from error
    require(len(rows) > 0, path, f"holds no row: empty or cut short. {cure}")
    lacking = ", ".join(sorted(columns - set(rows[0])))
    require(not lacking, path, f"lacks the column(s) {lacking}. {cure}")
    return rows


def room(shape) -> np.ndarray:
    """Place for uint8 images of this shape: in memory, or where they are many in a file without a name, mapped into it."""
    number = math.prod(shape)
    if number <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    folder = out_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, number)  # fails here, not later
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        cure = "Free space there, or set FEDSSG_OUT to another folder."
        raise DataError(f"{folder}: no room for {number >> 20} MiB of images ({error}). {cure}") from error


def pick(images: np.ndarray, rows) -> np.ndarray:
    """The images at `rows` (positions, a mask or a slice), copied to a `room`."""
    rows = np.arange(len(images))[rows if isinstance(rows, slice | list) else np.asarray(rows)]
    found = room((len(rows), *images.shape[1:]))
    for start in range(0, len(rows), 256):
        found[start : start + 256] = images[rows[start : start + 256]]
    return found
