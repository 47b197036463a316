"""Prepare HAM10000 (Tschandl et al. 2018): the publisher's table and photographs as one .npz.

    python data/prepare_ham10000.py SOURCE TARGET [SIZE]

SOURCE is the folder with HAM10000_metadata.csv (with its column `dataset`, which names the device) and the
images, as .jpg or any other kind that Pillow reads, in it or in any folder below it. TARGET is the .npz to write,
for example ham10000_28.npz. SIZE is the image side in pixels, 28 by default. Loading "ham10000" does the same
the first time, and again when the table has changed.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from fedssg_helpers.data import LARGEST, SMALLEST
from fedssg_helpers.files import DataError, read_table, replacing, require
from fedssg_helpers.folder import pictures, square

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
DEVICES = ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias")
CURE = (
    "Get HAM10000_metadata and both image archives from Harvard Dataverse, doi:10.7910/DVN/DBW86T, and unpack"
    " them in one folder; data/README.md lists the steps. Then set FEDSSG_DATA (or data_dir) to that folder."
    " Copies elsewhere leave the column `dataset` out, which names the device."
)


def find_table(source: Path) -> Path:
    """The publisher's table: a .csv, or .tab as Dataverse sometimes serves it."""
    found = [source / f"HAM10000_metadata{suffix}" for suffix in (".csv", ".tab", "")]
    table = next((path for path in found if path.is_file()), found[0])
    require(table.is_file(), table, f"there is no such file, nor a prepared one. {CURE}")
    return table


def rows_of(table: Path) -> list[dict[str, str]]:
    """The rows of the publisher's table, checked, in the order of the image ids."""
    rows = read_table(table, {"lesion_id", "image_id", "dx", "dataset"}, CURE)
    for what, column, known in (("diagnosis", "dx", CLASSES), ("device", "dataset", DEVICES)):
        strange = sorted({str(row[column]) for row in rows} - set(known))
        cause = f"unknown {what} {strange[:1]} in column {column}, where {', '.join(known)} are known"
        require(not strange, table, f"{cause}: cut short or damaged. {CURE}")
    good = all(row["lesion_id"] for row in rows) and len({row["image_id"] for row in rows}) == len(rows)
    require(good, table, f"an image without a lesion, or twice in the table: damaged. {CURE}")
    return sorted(rows, key=lambda row: row["image_id"])


def prepare(source, target, size: int = 28) -> Path:
    """Write the .npz `target`: centre square crops of `size` x `size` pixels; a `DataError` if it cannot."""
    source, target = Path(source), Path(target)
    require(SMALLEST <= size <= LARGEST, f"size {size}", f"out of range. Use {SMALLEST} to {LARGEST} pixels.")
    table = find_table(source)
    rows, again = rows_of(table), "Unpack it again from the publisher's archive."
    found = {Path(name).stem: source / name for name in pictures(source)}
    absent = [f"{row['image_id']}.jpg" for row in rows if row["image_id"] not in found]
    cause = f"{len(absent)} of the {len(rows)} images in {table.name} are missing, {absent[:1]} among them"
    require(not absent, source, f"{cause}. Unpack both image archives into this folder. {CURE}")
    progress = tqdm(rows, "preparing HAM10000", unit="image")
    arrays = dict(
        images=np.stack([square(found[row["image_id"]], size, cure=again) for row in progress]),
        labels=np.array([CLASSES.index(row["dx"]) for row in rows], np.uint8),
        class_names=np.array(CLASSES),
        device=np.array([row["dataset"] for row in rows]),
        lesion_id=np.array([row["lesion_id"] for row in rows]),
        image_id=np.array([row["image_id"] for row in rows]),
        table=np.array(digest(table)),
    )
    cure = "Copy the publisher's files to where you may write, and point FEDSSG_DATA (data_dir) there."
    with replacing(target, cure) as part:
        np.savez_compressed(part, **arrays)
    return target


def digest(table: Path) -> str:
    """Eight letters and digits that stand for a table's content."""
    return hashlib.blake2b(table.read_bytes(), digest_size=4).hexdigest()


def outdated(target: Path, source: Path) -> bool:
    """Was the prepared file made from another table than the one that is in `source` now?"""
    try:
        with np.load(target, allow_pickle=False) as made:
            return "table" in made and str(made["table"]) != digest(find_table(source))
    except Exception:  # no table there, or a damaged file, which whoever reads it will name
        return False


def prepare_once(source: Path, size: int, elsewhere: Path) -> Path:
    """The prepared file, in `source` or, where that is read-only, in `elsewhere`; made where it is not there, or old."""
    target = source / f"ham10000_{size}.npz"
    if not target.exists() and not os.access(source, os.W_OK):
        target = elsewhere / f"ham10000_{size}_{digest(find_table(source))}.npz"
    return target if target.exists() and not outdated(target, source) else prepare(source, target, size)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not "".join(sys.argv[3:] or "1").isdecimal():
        sys.exit(__doc__)
    try:
        print(prepare(*sys.argv[1:3], *map(int, sys.argv[3:])))
    except DataError as problem:
        sys.exit(f"error: {problem}")
