"""Data files damaged on purpose: tests and the trust appendix feed them to the command, which must name the cause.

Every file starts as a good one of a few images and is broken in one way. The damage is real: a flipped byte that
leaves all arrays as they were (the time stamp of a packed array, say) is drawn again.
"""

from __future__ import annotations

import csv
import io
import runpy
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from fedssg_helpers.data import HAM_SCRIPT
from fedssg_helpers.keys import rng

HAM_CLASSES, HAM_DEVICES = map(runpy.run_path(str(HAM_SCRIPT)).get, ("CLASSES", "DEVICES"))
KINDS = (
    "own",
    "ham10000",
    "medmnist",
    "table",
)  # your own .npz, ready HAM10000, a MedMNIST set, HAM10000's table
N = 48


def _arrays(kind: str) -> dict[str, np.ndarray]:
    """The arrays of a good file."""
    images = np.arange(N * 28 * 28 * 3, dtype=np.uint32).reshape(N, 28, 28, 3).astype(np.uint8)
    labels = np.arange(N) % (8 if kind == "medmnist" else 7)
    if kind == "medmnist":  # bloodmnist, eight classes: three parts of 16
        parts = dict(images=images, labels=labels[:, None].astype(np.uint8))
        return {
            f"{side}_{key}": part[16 * i : 16 * i + 16]
            for i, side in enumerate(("train", "val", "test"))
            for key, part in parts.items()
        }
    group = np.char.add("HAM_", (np.arange(N) // 2).astype(str))
    return {
        "images": images,
        "labels": labels,
        "class_names": np.array(HAM_CLASSES),
        "device": np.array(HAM_DEVICES)[labels % 4],
        "group" if kind == "own" else "lesion_id": group,
    }


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(
        file, **arrays
    )  # arrays of Python objects are pickled here; the loader must refuse them
    return file.getvalue()


def _members(content: bytes, change) -> bytes:
    """The zip file again, with `change` (name, bytes) -> bytes applied to what it holds; its checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def _same(content: bytes, arrays: dict[str, np.ndarray]) -> bool:
    """Does the file still hold exactly these arrays?"""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return sorted(file.files) == sorted(arrays) and all(
                np.array_equal(file[k], arrays[k]) for k in arrays
            )
    except Exception:  # whatever a broken file makes NumPy raise: it is broken
        return False


# ---------------------------------------- ways to damage

# Bytes of a whole file: (content, random) -> content.


def _flipped(content, random):
    broken = np.frombuffer(content, np.uint8).copy()
    broken[random.integers(len(broken), size=random.integers(1, 40))] ^= random.integers(
        1, 256, dtype=np.uint8
    )
    return broken.tobytes()


def _blank(content, random):
    start = random.integers(len(content))
    return content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]


def _lost(content, random):
    start = random.integers(len(content))
    return content[:start] + content[start + random.integers(1, 200) :]


def _huge(content, random):
    """The directory at the end of the file claims 4 GiB for every array."""
    broken, at = bytearray(content), content.find(b"PK\x01\x02")
    while at >= 0:
        broken[at + 24 : at + 28] = b"\xfd\xff\xff\xff"
        at = content.find(b"PK\x01\x02", at + 1)
    return bytes(broken)


def _header(content, random):
    """Every array's header says something else than its bytes."""
    shapes = (
        "(10**9, 999, 999)",
        "(1000000000000,)",
        "(-5,)",
        "('a',)",
        "__import__('os')",
        "(" * 300,
        "(2, 2)",
        "",
    )
    shape = shapes[random.integers(len(shapes))]
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
    start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    return _members(content, lambda name, old: start + old[128:])


BYTES = {
    "cut short": lambda content, random: content[: random.integers(len(content))],
    "bytes flipped": _flipped,
    "a part blank": _blank,
    "a part lost": _lost,
    "claims 4 GiB per array": _huge,
    "wrong array headers": _header,
    "arrays of text": lambda content, random: _members(content, lambda name, old: b"no array, but words"),
    "random bytes": lambda content, random: random.bytes(len(content)),
    "empty": lambda content, random: b"",
    "a web page": lambda content, random: b"<!DOCTYPE html><html>404: not found</html>",
    "a single array": lambda content, random: b"\x93NUMPY" + content,
}

BY_CHANCE = ("bytes flipped", "a part blank", "a part lost")  # may hit nothing that counts

# Arrays of the file: (images or labels or ..., random) -> what stands in their place; None: the array is missing.
OBJECTS = np.array([None, {"a": 1}, "x"] * 16, object)
IMAGES = {
    "images as fractions": lambda x, random: x / 255,
    "images of NaN": lambda x, random: np.where(x > 9, np.nan, x),
    "images as int32": lambda x, random: x.astype(np.int32),
    "complex images": lambda x, random: x * 1j,
    "images as flags": lambda x, random: x > 99,
    "images as text": lambda x, random: x[:, :2, :2].astype(str),
    "flat images": lambda x, random: x.reshape(len(x), -1),
    "no images": lambda x, random: x[:0],
    "oblong images": lambda x, random: x[:, :20],
    "tiny images": lambda x, random: x[:, ::3, ::3],
    "two channels": lambda x, random: x[..., :2],
    "channels first": lambda x, random: x.transpose(0, 3, 1, 2),
    "images too few": lambda x, random: x[: -1 - random.integers(len(x) - 2)],
    "images pickled": lambda x, random: OBJECTS,
    "images missing": lambda x, random: None,
    "one number for images": lambda x, random: np.uint8(3),
}
LABELS = {
    "labels NaN": lambda y, random: np.where(random.random(y.shape) < 0.3, np.nan, y),
    "labels all NaN": lambda y, random: np.full(y.shape, np.nan),
    "labels as fractions": lambda y, random: y + 0.5,
    "a label below 0": lambda y, random: y.astype(int) - 1,
    "a label too high": lambda y, random: y + 1,
    "an absurd label": lambda y, random: y.astype(int) + 10 ** int(random.integers(3, 18)),
    "labels one-hot": lambda y, random: np.eye(8, dtype=int)[y.ravel()],
    "labels as text": lambda y, random: y.astype(str),
    "labels as dates": lambda y, random: y.astype("M8[D]"),
    "all labels alike": lambda y, random: np.where(y < 0, y, 8),
    "labels pickled": lambda y, random: OBJECTS,
    "labels too few": lambda y, random: y[: random.integers(len(y))],
    "labels missing": lambda y, random: None,
    "labels infinite": lambda y, random: np.full(y.shape, np.inf),
}
DEVICE = {
    "devices too few": lambda d, random: d[1:],
    "devices NaN": lambda d, random: np.full(len(d), np.nan),
    "devices pickled": lambda d, random: OBJECTS,
    "devices in two columns": lambda d, random: np.stack([d, d], 1),
    "one device for all": lambda d, random: d[0],
}
NAMES = {
    "class names too few": lambda n, random: n[: random.integers(len(n))],
    "class names as numbers": lambda n, random: np.arange(len(n)),
    "class names pickled": lambda n, random: OBJECTS,
    "class names in a square": lambda n, random: np.stack([n, n]),
    "one class name": lambda n, random: n[0],
}
GROUP = {"groups " + name.split(" ", 1)[1]: way for name, way in DEVICE.items() if name.startswith("devices")}

# The publisher's table: (text, random) -> bytes. A row lost as a whole leaves a good table behind: not among these.


def _rows(change):
    """Applies `change` (fields of a row) to one row in three, the first one always."""

    def way(text, random):
        lines = list(csv.reader(io.StringIO(text)))
        chosen = [0] + [i for i in range(1, len(lines) - 1) if random.random() < 0.3]
        for i in chosen:
            lines[1 + i] = change(lines[1 + i])
        return "\n".join(map(",".join, lines)).encode()

    return way


def _cut(text, random):
    end = random.integers(1, len(text) - 2)
    while text[end - 1] == "\n" or text[end] == "\n":  # at the end of a row: cut into it
        end = random.integers(1, len(text) - 2)
    return text[:end].encode()


def _not_text(text, random):
    at = random.integers(len(text))
    return text[:at].encode() + b"\xff\xfe\x80" + text[at:].encode()


TABLE = {
    "table cut short": _cut,
    "table not UTF-8": _not_text,
    "table empty": lambda text, random: b"",
    "table of zeros": lambda text, random: bytes(len(text)),
    "only a header": lambda text, random: text.split("\n")[0].encode(),
    "no header": lambda text, random: text.split("\n", 1)[1].encode(),
    "another separator": lambda text, random: text.replace(",", "|").encode(),
    "a quote never closed": lambda text, random: text.replace(",", ',"', 9).encode(),
    "a column renamed": lambda text, random: text.replace(
        ("lesion_id", "image_id", "dx", "dataset")[random.integers(4)], "column", 1
    ).encode(),
    "a field of a million letters": lambda text, random: (text + "x" * 10**6).encode(),
    "fields lost": _rows(lambda row: row[:-1]),
    "no diagnosis": _rows(lambda row: row[:2] + [""] + row[3:]),
    "unknown diagnosis": _rows(lambda row: row[:2] + ["cold"] + row[3:]),
    "unknown device": _rows(lambda row: row[:-1] + ["phone"]),
    "no lesion": _rows(lambda row: [""] + row[1:]),
    "an image that is not there": _rows(lambda row: [row[0], row[1] + "0"] + row[2:]),
    "a zero byte in a row": _rows(lambda row: row[:2] + [row[2] + "\0"] + row[3:]),
    "a picture": lambda text, random: b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "the same image twice": lambda text, random: (text + "\n" + text.split("\n")[1]).encode(),
}


# ---------------------------------------- the files


def _npz(kind: str, i: int, random: np.random.Generator) -> tuple[str, bytes]:
    """One damaged .npz: what was done to it, and its bytes. Every second one is damaged in its bytes."""
    arrays = _arrays(kind)
    if i % 2:
        way = list(BYTES)[i // 2 % len(BYTES)]
        content = BYTES[way](_packed(arrays), random)
        while way in BY_CHANCE and _same(content, arrays):
            content = BYTES[way](_packed(arrays), random)
        return way, content
    side = "" if kind != "medmnist" else ("train_", "val_", "test_")[random.integers(3)]
    keys = {side + "images": IMAGES, side + "labels": LABELS}
    if kind != "medmnist":
        keys |= {"device": DEVICE, "class_names": NAMES, "group" if kind == "own" else "lesion_id": GROUP}
    ways = [(way, key, change) for key, changes in keys.items() for way, change in changes.items()]
    way, key, change = ways[i // 2 % len(ways)]
    changed = {name: change(part, random) if name == key else part for name, part in arrays.items()}
    return way, _packed({name: part for name, part in changed.items() if part is not None})


def _table(folder: Path, i: int, random: np.random.Generator) -> tuple[str, bytes]:
    """One damaged table of the publisher's, and the good images that belong to it."""
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"]
    folder.joinpath("images").mkdir()
    for k in range(14):
        Image.new("RGB", (40, 30), (10 * k, 90, 50)).save(folder / "images" / f"ISIC_{k:07d}.jpg")
        rows.append(
            f"HAM_{k // 2:07d},ISIC_{k:07d},{HAM_CLASSES[k // 2]},histo,50,male,back,{HAM_DEVICES[k % 4]}"
        )
    way = list(TABLE)[i % len(TABLE)]
    return way, TABLE[way]("\n".join(rows), random)


def files(folder, number: int = 300, seed: int = 0):
    """Write `number` damaged data files below `folder`, all four `KINDS` one after the other, and yield each one.

    Yields
    ------
    way, data, data_dir, file : str, str, Path, Path
        What was done to it; what `--data` and `--data-dir` (or `data.load`) take to read it; the damaged file.
    """
    for i in range(number):
        kind, random = KINDS[i % len(KINDS)], rng(seed, "damage", round=i)
        place = Path(folder, f"{i:03d}")
        place.mkdir(parents=True)
        if kind == "table":
            (way, content), file = _table(place, i // len(KINDS), random), place / "HAM10000_metadata.csv"
        else:
            name = {"own": "mine.npz", "ham10000": "ham10000_28.npz", "medmnist": "bloodmnist.npz"}[kind]
            (way, content), file = _npz(kind, i // len(KINDS), random), place / name
        file.write_bytes(content)
        yield way, {"own": str(file), "medmnist": "bloodmnist"}.get(kind, "ham10000"), place, file
