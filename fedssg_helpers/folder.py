"""A folder of pictures as data: any kind that Pillow reads, of any size, decoded once into a file.

That file is mapped into memory: what is not needed stays on disk. The layout is that of torchvision's ``ImageFolder``, a
folder per class, or a ``metadata.csv`` as Hugging Face's image folders have it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .files import DataError, read_npz, read_table, replacing, require

MOST_CLASSES, DEEP = 256, ("I", "F")  # Pillow's modes of more than 8 bits start so
TABLE, PARTS = "metadata.csv", {"train", "training", "val", "valid", "validation", "test", "testing"}
LAYOUT = f"Needed: one folder of pictures per class, or a {TABLE} with file_name and label (data/README.md)."


@cache
def formats() -> tuple[list[str], set[str]]:
    """The formats that Pillow reads, and the ends of their files; not EPS, which is a program that would be run."""
    ends = Image.registered_extensions()
    return [kind for kind in Image.OPEN if kind != "EPS"], {end for end in ends if ends[end] in Image.OPEN}


@contextmanager
def opened(path: Path, cure: str):
    """A picture, not decoded yet; a `DataError` for whatever is wrong with it, also while it is decoded."""
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats()[0]) as image:
                yield image
    except Exception as error:  # of the disk, memory, and whatever Pillow's readers raise on damaged files
        raise DataError(f"{path}: not a readable image ({error}). {cure}") from error


def mode_of(path: Path) -> str:
    """Grey or colour, with 8 bits or more: Pillow's mode of a picture, "" where it cannot be read."""
    try:
        with opened(path, "") as image:
            return image.mode
    except DataError:
        return ""


def square(path: Path, size: int, channels: int = 3, cure="Save it again, or remove it.") -> np.ndarray:
    """The largest centred square of a picture, by box averages: uint8 (size, size, channels), 1 for grey or 3.

    It is turned as its EXIF note says, transparency is dropped, and more than 8 bits are scaled by its own range.
    """
    with opened(path, cure) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(DEEP):
            values = np.nan_to_num(np.asarray(image, float))
            values -= values.min()
            image = Image.fromarray((values * (255 / max(values.max(), 1e-9))).round().astype(np.uint8))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.convert("L" if channels == 1 else "RGB")
        return np.asarray(image.resize((size, size), Image.Resampling.BOX, box)).reshape(size, size, channels)


def pictures(folder: Path) -> list[str]:
    """The paths of all pictures in a folder and below it, sorted; no hidden ones."""
    found = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        files = [Path(where, name) for name in names if name[0] != "."]
        found += [path for path in files if path.suffix.lower() in formats()[1]]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _by_table(table: Path, found: list[str]) -> list[dict[str, str]]:
    """The rows of metadata.csv, each of one of the pictures `found`."""
    rows = read_table(table, {"file_name", "label"}, LAYOUT)
    rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in rows]
    numbers = Counter(row["file_name"] for row in rows)
    absent, twice = sorted(numbers.keys() - found), [name for name, number in numbers.items() if number > 1]
    cause = f"names {len(absent)} pictures that are not there, {absent[:1]} among them"
    require(not absent, table, f"{cause}. Correct these names (capitals count), or remove the rows.")
    require(not twice, table, f"names {twice[:1]} more than once. Keep one row of each picture.")
    for key in sorted({"label", "device"} & set(rows[0])):
        empty = [row["file_name"] for row in rows if not row[key]]
        cause = f"says no {key} for {len(empty)} pictures, {empty[:1]} among them"
        require(not empty, table, f"{cause}. Fill it in, or remove these rows (or the column).")
    return rows


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Of each picture file_name and label, perhaps device and group, as metadata.csv or else the class folders say."""
    found, table = pictures(folder), folder / TABLE
    require(len(found) > 0, folder, f"holds no picture that Pillow reads. {LAYOUT}")
    rows = [{"file_name": name, "label": name.split("/")[0]} for name in found if "/" in name]
    if table.is_file():
        rows = _by_table(table, found)
    split = rows and {row["label"] for row in rows} <= PARTS
    require(not split, folder, f"its folders are parts of a split, not classes. Give one of them. {LAYOUT}")
    for key in ("label", "device"):
        names = {row.get(key, "") for row in rows}
        alike = Counter(name.casefold() for name in names)
        alike = ", ".join(sorted(name for name in names if alike[name.casefold()] > 1))
        require(not alike, folder, f"the {key}s {alike} differ in capitals only. Give them one name.")
    number = len({row["label"] for row in rows})
    require(2 <= number <= MOST_CLASSES, folder, f"has {number} classes, not 2 to {MOST_CLASSES}. {LAYOUT}")
    if left := len(found) - len(rows):
        warnings.warn(f"{folder}: left out are {left} pictures without a label.", stacklevel=2)
    return rows


def _decoded(folder: Path, rows: list[dict[str, str]], size: int, file: Path) -> dict[str, np.ndarray]:
    """Writes the pictures to an ``.npy`` (N, C, size, size), uint8; returns all that is known of those that are readable."""
    paths = [folder / row["file_name"] for row in rows]
    modes = [mode_of(path) for path in paths]
    channels = 1 if all(mode in ("", "1", "L", "LA") or mode.startswith(DEEP) for mode in modes) else 3
    kept, digests, bad = [], [], []
    with file.open("wb") as out:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), channels, size, size)}
        np.lib.format.write_array_header_1_0(out, header)
        for i, path in enumerate(tqdm(paths, f"preparing {folder.name}", unit="image")):
            try:
                image = square(path, size, channels).transpose(2, 0, 1).tobytes()
            except DataError as error:
                bad.append(f"{rows[i]['file_name']} ({error.__cause__})")
                continue
            out.write(image)
            digests.append(hashlib.blake2b(image, digest_size=16).hexdigest())
            kept.append(i)
        cause = f"no picture can be read, such as {''.join(bad[:1])}. Save them again."
        require(len(kept) > 0, folder, cause)
        out.seek(0)  # NumPy leaves room for another number in the header
        np.lib.format.write_array_header_1_0(out, header | {"shape": (len(kept), *header["shape"][1:])})
    names, labels = np.unique([row["label"] for row in rows], return_inverse=True)
    cure = "save them again, smaller where they are too large, or remove them"
    said = [f"left out are {len(bad)} that cannot be read ({cure}): {', '.join(bad)}"] if bad else []
    if wide := sum(mode.startswith(DEEP) for mode in modes):
        said.append(f"{wide} of more than 8 bits: each is scaled by its own range")
    arrays = {"class_names": names, "digests": np.array(digests), "said": np.array(said, str)}
    optional = {key: np.array([rows[i][key] for i in kept]) for key in ("device", "group") if key in rows[0]}
    return arrays | optional | {"labels": labels[kept]}


def read_folder(folder: Path, size: int, places) -> dict[str, np.ndarray]:
    """A folder of pictures as arrays: images uint8 (N, C, size, size), mapped into memory, and what is known of each.

    Pictures are decoded once; the result lies in ``prepared/`` in the first of the `places` where it can be written, and is
    named by the pictures' sizes and times. A `DataError` names the fault and its cure; unreadable pictures are left out.
    """
    rows, digest = rows_of(folder), hashlib.blake2b(digest_size=6)
    for row in rows:
        path = folder / row["file_name"]
        about = path.stat() if path.exists() else path.lstat()
        digest.update(repr((row, about.st_size, about.st_mtime_ns)).encode())
    name = f"prepared/{folder.name}_{size}_{digest.hexdigest()}.npy"
    targets = [Path(place, name) for place in places]
    able = [target for target in targets if os.access(target.parent.parent, os.W_OK)]
    target = next((target for target in targets if target.exists()), [*able, targets[-1]][0])
    labels = target.with_suffix(".npz")
    if not target.exists():
        cure = "Free space there, or set FEDSSG_DATA (or data_dir) to a folder that you may write to."
        with replacing(target, cure) as images_file, replacing(labels, cure) as labels_file:
            np.savez(labels_file, **_decoded(folder, rows, size, images_file))
    cure = f"Delete {target}, and it is made again."
    arrays = read_npz(labels, cure)
    try:
        images = np.load(target, mmap_mode="r", allow_pickle=False)
        require(len(images) == len(arrays["labels"]) and images.dtype == np.uint8, target, "of another size")
    except Exception as error:
        raise DataError(f"{target}: damaged ({error}). {cure}") from error
    return arrays | {"images": images}
