"""Every data set as one plain in-memory type, checked on loading.

Built-in phantoms, any two-dimensional single-label MedMNIST set, HAM10000 and your own ``.npz`` all become an
`ImageSet`. `data/README.md` says how to get the files. Whatever is wrong with one is a `DataError` that names
the file, the cause and the cure.
"""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from . import devices as simulation
from .keys import rng

PROJECT_DATA = Path(__file__).resolve().parent.parent / "data"
SMALLEST, LARGEST = 16, 128  # image sides in pixels that the course's networks take
MOST_CLASSES = 256
MOST_BYTES = 8 * 2**30  # of one .npz once unpacked: a larger one is damaged or does not belong here
HAM_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
HAM_DEVICES = ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias")
HAM_LICENCE = "CC BY-NC 4.0 (HAM10000, Tschandl et al. 2018, doi:10.7910/DVN/DBW86T)"
HAM_CURE = (
    "Get HAM10000_metadata and both image archives from Harvard Dataverse, doi:10.7910/DVN/DBW86T, and unpack"
    " them in one folder; data/README.md lists the steps. Then set FEDSSG_DATA (or data_dir) to that folder."
)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the cause and the cure."""


@dataclass(frozen=True)
class ImageSet:
    """Images with everything the course needs to know about them.

    Attributes
    ----------
    name : str
    images : uint8 (N, C, H, W), C in {1, 3}, H = W
    labels : int64 (N,), 0..len(classes)-1
    device : int64 (N,), 0..len(devices)-1
    group : int64 (N,)
        Lesion or patient: images of one group never fall on both sides of a split.
    classes, devices : tuples of str
    licence : str
    simulated : bool
        Are the devices simulated?
    official_test : bool (N,) or None
        The publisher's test split, kept where groups are unknown.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    device: np.ndarray
    group: np.ndarray
    classes: tuple[str, ...]
    devices: tuple[str, ...]
    licence: str
    simulated: bool
    official_test: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index) -> ImageSet:
        """The images at `index` (positions or a mask); names of classes and devices stay."""
        official = None if self.official_test is None else self.official_test[index]
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            device=self.device[index],
            group=self.group[index],
            official_test=official,
        )


def data_folder(folder=None) -> Path:
    """The folder with data files: `folder`, else $FEDSSG_DATA, else the project's own data/."""
    return Path(folder or os.environ.get("FEDSSG_DATA") or PROJECT_DATA).expanduser()


def load(name="phantom", folder=None, size: int = 28) -> ImageSet:
    """Load a data set by name.

    Parameters
    ----------
    name : str or Path
        ``"phantom"`` (built in), ``"ham10000"``, a MedMNIST name such as ``"dermamnist"``, or a path that
        ends in ``.npz`` (as it is, else inside the data folder).
    folder : str or Path, optional
        The data folder; see `data_folder`. The phantoms always come from the project's own data/.
    size : int
        Image side in pixels, where the source offers several (MedMNIST: 28, 64, 128; HAM10000: 16 to 128).

    Raises
    ------
    DataError
        For anything missing, damaged or out of range.
    """
    name, folder = str(name), data_folder(folder)
    if name == "phantom":
        return _phantom(PROJECT_DATA / "phantom.npz")
    if name == "ham10000":
        return _ham10000(folder, size)
    if name.endswith(".npz"):
        path = Path(name).expanduser()
        return _own(path if path.exists() or path.is_absolute() else folder / path)
    return _medmnist(name, folder, size)


# ---------------------------------------- reading and checks


def _read(path: Path, missing: str) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``; `missing` is the cure where there is no such file."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. {missing}")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_BYTES:
            raise DataError(
                f"{path}: unpacks to {unpacked / 2**30:.1f} GiB, more than {MOST_BYTES // 2**30}. "
                "Store fewer or smaller images."
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except DataError:
        raise
    except ValueError as error:
        if "pickle" in str(error):
            raise DataError(
                f"{path}: holds an array of Python objects, which is never loaded (a pickle can run code). "
                "Save plain arrays: np.asarray(names, dtype=str), np.stack(images)."
            ) from error
        raise DataError(
            f"{path}: not a readable .npz ({error}). Save it with np.savez_compressed."
        ) from error
    except Exception as error:  # zip, zlib, tokenizer, memory: a damaged file may make NumPy raise anything
        raise DataError(
            f"{path}: truncated, damaged or not an .npz ({type(error).__name__}: {error}). "
            "Delete it, then copy or download it again."
        ) from error
    strange = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise DataError(
            f"{path}: damaged or not an .npz: what it calls {strange[0]} is no array. "
            "Delete it, then copy or download it again, or save it with np.savez_compressed."
        )
    return arrays


def _need(arrays: dict, keys, path: Path) -> None:
    lacking = [key for key in keys if key not in arrays]
    if lacking:
        raise DataError(
            f"{path}: lacks {', '.join(lacking)} (it holds {', '.join(arrays) or 'nothing'}). "
            "data/README.md lists the arrays that are needed."
        )


def _check_images(images: np.ndarray, path: Path) -> np.ndarray:
    """Images (N, H, W[, C]) checked and turned to (N, C, H, W)."""
    if images.dtype != np.uint8:
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise DataError(
                f"{path}: images hold NaN or infinite values. Repair or drop those images, then scale "
                "to 0..255 and save as uint8."
            )
        raise DataError(
            f"{path}: images are {images.dtype}, not uint8. Scale them to 0..255 and convert: "
            "(255 * (x - x.min()) / (x.max() - x.min())).round().astype(np.uint8)."
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise DataError(
            f"{path}: images have shape {images.shape}; channels come last here. "
            "Use images.transpose(0, 2, 3, 1)."
        )
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(
            f"{path}: images have shape {images.shape}; needed is (N, H, W) for grey or (N, H, W, 3) for "
            "colour. Drop an alpha channel with images[..., :3]; 3-D volumes are not supported."
        )
    if len(images) == 0:
        raise DataError(f"{path}: holds no images. Save at least a few per class.")
    height, width = images.shape[1:3]
    if height != width or not SMALLEST <= height <= LARGEST:
        raise DataError(
            f"{path}: images are {height} x {width} pixels; needed are squares from {SMALLEST} to {LARGEST} "
            "pixels. Crop and resize them, with Pillow for example."
        )
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _check_labels(labels: np.ndarray, n: int, classes: int | None, path: Path) -> np.ndarray:
    """Labels (N,) or (N, 1) checked and turned to int64 (N,); `classes` None: as many as the labels say."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            f"{path}: labels have shape {labels.shape}: one class per image is needed, not several labels "
            "or one-hot rows. Use labels.argmax(1) for one-hot rows."
        )
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"{path}: labels are {labels.dtype}, not whole numbers. Use names, labels = "
            "np.unique(labels, return_inverse=True), and save names as class_names."
        )
    _same_length("labels", labels, n, path)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= (classes or MOST_CLASSES):
        allowed = f"0 to {classes - 1}, one per class name" if classes else f"0 to at most {MOST_CLASSES - 1}"
        raise DataError(
            f"{path}: labels run from {low} to {high}, out of the range {allowed}. "
            "Renumber them from 0: np.unique(labels, return_inverse=True)[1]."
        )
    if low == high:
        raise DataError(
            f"{path}: all labels are {low}. At least two classes are needed to classify anything."
        )
    return labels.astype(np.int64)


def _same_length(key: str, array: np.ndarray, n: int, path: Path) -> None:
    if array.shape != (n,):
        raise DataError(
            f"{path}: {key} has shape {array.shape} for {n} images. Save one value per image, shape ({n},)."
        )


def _codes(key: str, array: np.ndarray, n: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of an array of strings or whole numbers, and each entry's place among them."""
    _same_length(key, array, n, path)
    if array.dtype.kind not in "iubUS":
        raise DataError(
            f"{path}: {key} is {array.dtype}; needed are strings or whole numbers. "
            "Fill in missing values and convert: .astype(str) or .astype(int)."
        )
    names, code = np.unique(array, return_inverse=True)
    return (names.astype(str) if names.dtype.kind == "S" else names), code.astype(np.int64)


def _names(arrays: dict, path: Path) -> tuple[str, ...] | None:
    """Class names, or None where the file gives none."""
    if "class_names" not in arrays:
        return None
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind not in "US" or not 2 <= len(names) <= MOST_CLASSES:
        raise DataError(
            f"{path}: class_names has shape {names.shape} and type {names.dtype}; needed are 2 to "
            f"{MOST_CLASSES} strings: np.array(['first', 'second'])."
        )
    return tuple(str(name) for name in names.astype(str))


# ---------------------------------------- the sources


def _own(path: Path) -> ImageSet:
    """Your own ``.npz``: images, labels, optional device, group and class_names."""
    arrays = _read(
        path, "Check the path; a relative one is also looked up in the data folder (FEDSSG_DATA or data_dir)."
    )
    _need(arrays, ("images", "labels"), path)
    images = _check_images(arrays["images"], path)
    n, classes = len(images), _names(arrays, path)
    labels = _check_labels(arrays["labels"], n, classes and len(classes), path)
    if classes is None:
        classes = tuple(f"class {i}" for i in range(int(labels.max()) + 1))
    names, device = np.array(["one device"]), np.zeros(n, np.int64)
    if "device" in arrays:
        names, device = _codes("device", arrays["device"], n, path)
        names = names if names.dtype.kind == "U" else [f"device {i}" for i in names]
    group = _codes("group", arrays["group"], n, path)[1] if "group" in arrays else np.arange(n)
    return ImageSet(
        path.stem,
        images,
        labels,
        device,
        group,
        classes,
        tuple(str(i) for i in names),
        "not stated (your own data)",
        simulated=False,
    )


def _phantom(path: Path) -> ImageSet:
    """The drawn phantoms: the file holds clean drawings (they pack well); the devices are applied here."""
    data = _own(path)
    table = simulation.profiles(3)
    return replace(
        data,
        images=simulation.apply(data.images, data.device),
        devices=tuple(p.name for p in table),
        licence="as the project's own code (drawn by data/draw_phantom.py)",
        simulated=True,
    )


def _medmnist(flag: str, folder: Path, size: int) -> ImageSet:
    """A two-dimensional single-label MedMNIST set, its devices simulated."""
    try:
        import medmnist  # here, because importing it makes a folder in the user's home
    except ImportError as error:
        raise DataError(
            f"{flag!r} is not phantom, ham10000 or a path to an .npz; MedMNIST names need the package "
            "medmnist. Install it: pip install medmnist."
        ) from error
    usable = [
        key for key, info in medmnist.INFO.items() if "3d" not in key and "multi-label" not in info["task"]
    ]
    if flag not in medmnist.INFO:
        raise DataError(
            f"{flag!r} is no data set of this course. Use phantom, ham10000, a path that ends in .npz, or "
            f"one of MedMNIST's {', '.join(usable)}."
        )
    if flag not in usable:
        why = "three-dimensional" if "3d" in flag else "multi-label (several findings per image)"
        raise DataError(
            f"{flag} is {why}; this course needs flat images with one class each. "
            f"Use one of {', '.join(usable)}."
        )
    if size not in (28, 64, 128):
        raise DataError(
            f"{flag} has no images of {size} pixels that fit this course. Use size 28, 64 or 128."
        )
    info = medmnist.INFO[flag]
    path = folder / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    if not path.exists():
        _download(medmnist, info, path, size)
    arrays = _read(path, "Download it again.")
    sides = ("train", "val", "test")
    _need(arrays, [f"{side}_{what}" for side in sides for what in ("images", "labels")], path)
    parts = [arrays[f"{side}_images"] for side in sides]
    for what in ("images", "labels", "lesion_id"):
        found = [arrays[f"{side}_{what}"] for side in sides if f"{side}_{what}" in arrays]
        if len({(part.shape[1:], part.dtype.kind) for part in found}) > 1 or not all(part.ndim for part in found):
            raise DataError(
                f"{path}: its train, val and test {what} differ in shape or type, or are single numbers. "
                "Delete it, then download again."
            )
    images = _check_images(np.concatenate(parts), path)
    if images.shape[1:] != (info["n_channels"], size, size):
        raise DataError(
            f"{path}: images have shape (C, H, W) = {images.shape[1:]}; {flag} at size {size} has "
            f"{(info['n_channels'], size, size)}. The file is another set's, or misnamed: download it again."
        )
    n, classes = len(images), tuple(info["label"][str(i)] for i in range(len(info["label"])))
    for side, part in zip(sides, parts):
        if len(arrays[f"{side}_labels"]) != len(part):
            raise DataError(
                f"{path}: {len(arrays[f'{side}_labels'])} {side}_labels for {len(part)} {side}_images. "
                "Delete it, then download again."
            )
    labels = _check_labels(
        np.concatenate([arrays[f"{side}_labels"] for side in sides]), n, len(classes), path
    )
    lesions = [arrays.get(f"{side}_lesion_id") for side in sides]
    if all(part is not None for part in lesions):
        # the official DermaMNIST split shows the same lesion on both sides: where lesions are known, split
        # by them
        group, official = _codes("lesion_id", np.concatenate(lesions), n, path)[1], None
    else:
        group, official = np.arange(n), np.repeat([False, False, True], [len(part) for part in parts])
    device = simulation.assign(labels, group)
    return ImageSet(
        flag,
        simulation.apply(images, device),
        labels,
        device,
        group,
        classes,
        tuple(p.name for p in simulation.profiles(images.shape[1])),
        f"{info['license']} (MedMNIST, Yang et al. 2023, doi:10.1038/s41597-022-01721-8)",
        True,
        official,
    )


def _download(medmnist, info: dict, path: Path, size: int) -> None:
    """Fetch one MedMNIST file with its checksum; nothing is left behind where that fails."""
    suffix = "" if size == 28 else f"_{size}"
    by_hand = (
        f"By hand: download {info['url' + suffix]} (MD5 {info['MD5' + suffix]}), name it {path.name} and put"
        f" it into {path.parent}, or set FEDSSG_DATA (or data_dir) to the folder that has it."
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            getattr(medmnist, info["python_class"])(split="test", download=True, root=folder, size=size)
            os.replace(Path(folder) / path.name, path)
    except Exception as error:  # medmnist hides the network's own error behind a bare except: bring it back
        cause = error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        raise DataError(
            f"{path}: not there, and downloading it failed ({type(cause).__name__}: {cause}). {by_hand}"
        ) from error


def _ham10000(folder: Path, size: int) -> ImageSet:
    """HAM10000 from a ready ``.npz``, else from the publisher's own files (prepared once)."""
    ready = folder / f"ham10000_{size}.npz"
    if not ready.exists() and _metadata(folder):
        ready = _prepared(folder, size)
        if not ready.exists():
            prepare_ham10000(folder, ready, size)
    arrays = _read(ready, HAM_CURE)
    _need(arrays, ("images", "labels", "device", "lesion_id", "class_names"), ready)
    images = _check_images(arrays["images"], ready)
    n, classes = len(images), _names(arrays, ready)
    devices, device = _codes("device", arrays["device"], n, ready)
    return ImageSet(
        "ham10000",
        images,
        _check_labels(arrays["labels"], n, len(classes), ready),
        device,
        _codes("lesion_id", arrays["lesion_id"], n, ready)[1],
        classes,
        tuple(str(name) for name in devices),
        HAM_LICENCE,
        simulated=False,
    )


def _metadata(source: Path) -> Path | None:
    """The publisher's table: a .csv, or .tab as Dataverse sometimes serves it."""
    found = [source / f"HAM10000_metadata{suffix}" for suffix in (".csv", ".tab", "")]
    return next((path for path in found if path.is_file()), None)


def _prepared(source: Path, size: int) -> Path:
    """Where the prepared file goes: beside the publisher's files, or into the project's data/ where that is
    read-only."""
    if os.access(source, os.W_OK):
        return source / f"ham10000_{size}.npz"
    digest = hashlib.blake2b(_metadata(source).read_bytes(), digest_size=4).hexdigest()
    return PROJECT_DATA / f"ham10000_{size}_{digest}.npz"


def prepare_ham10000(source, target, size: int = 28) -> Path:
    """Turn the publisher's files into one ``.npz``: centre square crops, `size` x `size` RGB, with a
    progress bar.

    Parameters
    ----------
    source : str or Path
        Folder with ``HAM10000_metadata.csv`` (with its ``dataset`` column: the device) and the ``.jpg``
        images, in it or in folders directly below it (``HAM10000_images_part_1``,
        ``HAM10000_images_part_2``, ``images``).
    target : str or Path
        The ``.npz`` to write; it appears complete or not at all.
    size : int
        Image side in pixels.

    Raises
    ------
    DataError
        If the table or images are missing or damaged, or a class or device is unknown.
    """
    source, target = Path(source), Path(target)
    table = _metadata(source)
    if table is None:
        raise DataError(f"{source / 'HAM10000_metadata.csv'}: there is no such file. {HAM_CURE}")
    if not SMALLEST <= size <= LARGEST:
        raise DataError(f"size {size} is out of range. Use {SMALLEST} to {LARGEST} pixels.")
    try:
        text = table.read_text(encoding="utf-8-sig")
        separator = "\t" if "\t" in text.partition("\n")[0] else ","
        rows = list(csv.DictReader(text.splitlines(), delimiter=separator))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: damaged, or not a table of text ({error}). {HAM_CURE}") from error
    if not rows:
        raise DataError(f"{table}: holds no row: empty or cut short. {HAM_CURE}")
    lacking = {"lesion_id", "image_id", "dx", "dataset"} - set(rows[0])
    if lacking:
        raise DataError(
            f"{table}: lacks the column(s) {', '.join(sorted(lacking))}. Copies elsewhere leave `dataset`"
            f" out, which names the device. {HAM_CURE}"
        )
    for what, column, known in (("diagnosis", "dx", HAM_CLASSES), ("device", "dataset", HAM_DEVICES)):
        strange = sorted({str(row[column]) for row in rows} - set(known))
        if strange:
            raise DataError(
                f"{table}: unknown {what} {strange[0]!r} in column {column}, where {', '.join(known)} are known: "
                f"cut short or damaged. {HAM_CURE}"
            )
    if not all(row["lesion_id"] for row in rows) or len({row["image_id"] for row in rows}) < len(rows):
        raise DataError(f"{table}: an image without a lesion, or twice in the table: damaged. {HAM_CURE}")
    found = {path.stem: path for pattern in ("*.jpg", "*/*.jpg") for path in source.glob(pattern)}
    absent = [row["image_id"] for row in rows if row["image_id"] not in found]
    if absent:
        raise DataError(
            f"{source}: {len(absent)} of the {len(rows)} images in {table.name} are missing, {absent[0]}.jpg "
            f"among them. Unpack both image archives into this folder. {HAM_CURE}"
        )
    rows.sort(key=lambda row: row["image_id"])
    images = np.stack(
        [_square(found[row["image_id"]], size) for row in tqdm(rows, "preparing HAM10000", unit="image")]
    )
    arrays = dict(
        images=images,
        labels=np.array([HAM_CLASSES.index(row["dx"]) for row in rows], np.uint8),
        class_names=np.array(HAM_CLASSES),
        device=np.array([row["dataset"] for row in rows]),
        lesion_id=np.array([row["lesion_id"] for row in rows]),
        image_id=np.array([row["image_id"] for row in rows]),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            np.savez_compressed(Path(folder) / "part.npz", **arrays)
            os.replace(Path(folder) / "part.npz", target)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error}). Copy the publisher's files to a folder you may write to,"
            " and set FEDSSG_DATA (or data_dir) to it."
        ) from error
    return target


def _square(path: Path, size: int) -> np.ndarray:
    """The largest centred square of one image, uint8 (size, size, 3)."""
    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            return np.asarray(
                image.convert("RGB").resize(
                    (size, size), Image.Resampling.BOX, (left, top, left + side, top + side)
                )
            )
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable image ({error}). Unpack it again from the publisher's archive."
        ) from error


# ---------------------------------------- the split


def split(data: ImageSet, test: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the test images.

    Whole groups go to one side. Groups are laid out by class, then device, then at random, and every (1 /
    test)-th goes to the test side (systematic sampling), so each (class, device) cell is split in nearly the
    same proportion. A class with two groups or more is present on both sides. Where the publisher's test
    split is the only guard against leaks (`official_test`), it is kept, and `test` and `seed` do not matter.

    Parameters
    ----------
    data : ImageSet
    test : float, between 0 and 1
        Part of the groups that goes to the test side.
    seed : int

    Returns
    -------
    train, test : int64 arrays, sorted

    Raises
    ------
    DataError
        If a side would be empty.
    """
    if not 0 < test < 1:
        raise DataError(f"test = {test}: the test part must lie between 0 and 1, for example 0.25.")
    side = data.official_test
    if side is None:
        _, first, group = np.unique(data.group, return_index=True, return_inverse=True)
        if len(first) < 2:
            raise DataError(
                f"{data.name}: all images are of one group (lesion or patient), so no test set can be held "
                "out. Give at least two groups per class."
            )
        order = np.lexsort((rng(seed, "split").random(len(first)), data.device[first], data.labels[first]))
        step = np.floor(np.arange(len(first) + 1) * test + rng(seed, "split start").random())
        held = np.zeros(len(first), bool)
        held[order] = np.diff(step) > 0
        side = _cover(held, group, data.labels, order)[group]
    if side.all() or not side.any():
        raise DataError(
            f"{data.name}: one side of the split is empty. Give more images, or another test part."
        )
    return np.flatnonzero(~side), np.flatnonzero(side)


def _cover(held: np.ndarray, group: np.ndarray, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Move single groups across until each class with two groups or more is present on both sides, if that
    can be.

    `held` bool (G,) says which groups are test groups; `order` (G,) is the order in which to try them.
    """
    has = np.zeros((len(held), labels.max() + 1), bool)
    has[group, labels] = True
    held = held.copy()
    for label in np.flatnonzero(has.sum(0) >= 2):
        for side in (True, False):
            if has[held == side, label].any():
                continue
            donor = has[held != side].sum(0)
            for g in order[has[order, label]]:
                if (donor[has[g]] >= 2).all():  # no other class may vanish from the side that gives
                    held[g] = side
                    break
    return held
