"""Every data set as one plain in-memory type, checked on loading.

Built-in phantoms, any two-dimensional single-label MedMNIST set, HAM10000, your own ``.npz`` and a folder of pictures all
become an `ImageSet`. `data/README.md` says how to get the files. Whatever is wrong with a file is a `DataError` that names
the file, the cause and the cure.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from . import devices as simulation
from .files import PROJECT_DATA, DataError, data_folder, need, pick, read_npz, read_table, require
from .folder import MOST_CLASSES, TABLE, read_folder

HAM_SCRIPT = PROJECT_DATA / "prepare_ham10000.py"
NO_CLONE = "The course runs from a clone: get one, and pip install -e . there (not: pip install .)."
SMALLEST, LARGEST = 16, 256  # image sides in pixels that the course's networks take
DERMA, SIMULATED = "dermamnist", "-simulated"
HAM = "(HAM10000, Tschandl et al. 2018, doi:10.7910/DVN/DBW86T)"


@dataclass(frozen=True)
class ImageSet:
    """Images with everything that the course needs to know about them."""

    name: str
    images: np.ndarray  # uint8 (N, C, H, W), C in {1, 3}, H = W; read only where they are mapped into memory
    labels: np.ndarray  # int64 (N,), positions in `classes`
    device: np.ndarray  # int64 (N,), positions in `devices`
    group: np.ndarray  # int64 (N,), lesion or patient: a group never falls on both sides of a split
    classes: tuple[str, ...]
    devices: tuple[str, ...]
    licence: str
    simulated: bool  # are the devices simulated?
    official_test: np.ndarray | None = None  # bool (N,): the publisher's test split, where groups are unknown

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index) -> ImageSet:
        """The images at `index` (positions or a mask); no `official_test` where one of its sides is empty."""
        arrays = {name: getattr(self, name)[index] for name in ("labels", "device", "group")}
        arrays["images"] = pick(self.images, index)
        official = None if self.official_test is None else self.official_test[index]
        both = official is not None and official.any() and not official.all()
        return replace(self, **arrays, official_test=official if both else None)


def load(name="phantom", folder=None, size: int = 28) -> ImageSet:
    """Load a data set by name, checked; a `DataError` for anything that is missing, damaged or out of range.

    `name`: ``"phantom"`` (built in, always from the project's own data/), ``"ham10000"``, a MedMNIST name such as
    ``"dermamnist"`` (``"dermamnist-simulated"``: with simulated devices in place of its real ones), a path that ends in
    ``.npz`` or that of a folder of pictures (as it is, else inside the data folder). `folder`: the data folder, see
    `data_folder`. `size`: image side in pixels, 28, 64, 128 or 224 for MedMNIST, 16 to 256 for HAM10000, folders and
    the phantoms; images of an ``.npz`` have one size: 28 takes any, another number must be theirs.
    """
    name, folder = str(name), data_folder(folder)
    if name == "phantom":
        return phantom(size)
    if name == "ham10000":
        return _ham10000(folder, size)
    if path := own_path(name, folder):
        cure = "Check the path. A relative one may also start in the data folder (FEDSSG_DATA or data_dir)."
        if path.suffix != ".npz":
            return _pictures(path, folder, size)
        return _own(read_npz(path, cure), path, size)
    return _medmnist(name, folder, size)


def own_path(name: str, folder: Path) -> Path | None:
    """Where your own data of this name lie, as it is or inside the data folder; None for a set with a name of its own."""
    path = Path(name).expanduser()
    path = path if path.exists() or path.is_absolute() else folder / path
    known = not name or Path(name).name == name and (name in ("phantom", "ham10000") or "mnist" in name)
    return path if name.endswith(".npz") or path.is_dir() and not known else None


def _check_images(images: np.ndarray, path: Path) -> np.ndarray:
    """Images (N, H, W[, C]), checked, as (N, C, H, W)."""
    cure = "`x = np.nan_to_num(images.astype(float)); images = np.interp(x, (x.min(), x.max()), (0, 255))`, then "
    cure += "`images = images.round().astype(np.uint8)`."
    require(images.dtype == np.uint8, path, f"images are {images.dtype}, not uint8. {cure}")
    needed = "needed is (N, H, W) for grey or (N, H, W, 3) for colour; 3-D volumes are not supported"
    cure = "`images = images.transpose(0, 2, 3, 1)` if channels come first, `images = images[..., :3]` to remove "
    cure += "transparency."
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[3] in (1, 3)
    require(grey or colour, path, f"images have shape {images.shape}; {needed}. {cure}")
    require(len(images) > 0, path, "holds no images. Save at least a few per class.")
    height, width = images.shape[1:3]
    needed = f"needed are squares from {SMALLEST} to {LARGEST}. Crop and resize them (with Pillow)."
    good = height == width and SMALLEST <= height <= LARGEST
    require(good, path, f"images are {height} x {width} pixels; {needed}")
    return np.ascontiguousarray(images[:, None] if grey else images.transpose(0, 3, 1, 2))


def _check_labels(labels: np.ndarray, n: int, classes: int, path: Path) -> np.ndarray:
    """Labels (N,) or (N, 1), checked, as int64 (N,)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    cure = f"Save one value per image, shape ({n},). For one-hot rows: `labels = labels.argmax(1)`."
    require(labels.shape == (n,), path, f"labels have shape {labels.shape} for {n} images. {cure}")
    cure = "Save `class_names, labels = np.unique(labels.astype(str), return_inverse=True)`."
    require(labels.dtype.kind in "iub", path, f"labels are {labels.dtype}, not whole numbers. {cure}")
    low, high, most = int(labels.min()), int(labels.max()), classes - 1
    cause = f"labels run from {low} to {high}, out of the range 0 to {most}"
    cure = "Renumber them from 0: `labels = np.unique(labels, return_inverse=True)[1]`."
    if low >= 0 and classes < min(MOST_CLASSES, len(np.unique(labels))):
        cure = "There are more classes than class_names: name them all."
    require(0 <= low and high <= most, path, f"{cause}. {cure}")
    require(low < high, path, f"all labels are {low}. At least two classes are needed to classify anything.")
    return labels.astype(np.int64)


def _codes(key: str, array: np.ndarray, n: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of an array of strings or whole numbers, and each entry's place among them."""
    require(array.shape == (n,), path, f"{key} has shape {array.shape}. Save one value per image, ({n},).")
    cure = f"`{key} = {key}.astype(str)`."
    cause = f"{key} is {array.dtype}; needed are strings or whole numbers"
    require(array.dtype.kind in "iubU", path, f"{cause}. {cure}")
    names, code = np.unique(array, return_inverse=True)
    return names, code.astype(np.int64)


def _image_set(arrays: dict, path: Path, size: int, group_key: str = "group") -> ImageSet:
    """Images, labels, and where they are given class_names, device and groups, checked, as an `ImageSet`."""
    need(arrays, ("images", "labels"), path)
    images = arrays["images"]
    if not isinstance(images, np.memmap):  # else they are of a folder, and as they have to be
        images = _check_images(images, path)
    n, side = len(images), images.shape[-1]
    cause = f"images are {side} x {side} pixels, but size is {size}"
    require(size in (28, side), path, f"{cause}. Give size {side}, or resize the images.")
    classes = arrays.get("class_names", np.array([f"class {i}" for i in range(MOST_CLASSES)]))
    cause = f"class_names has shape {classes.shape} and type {classes.dtype}"
    good = classes.ndim == 1 and classes.dtype.kind == "U" and 2 <= len(classes) <= MOST_CLASSES
    cure = "`class_names = class_names.astype(str)`, or leave them out."
    require(good, path, f"{cause}; needed are 2 to {MOST_CLASSES} strings. {cure}")
    names, number = np.unique(classes, return_counts=True)
    twice = ", ".join(names[number > 1])
    require(not twice, path, f"class_names has {twice!r} more than once. Give every class a name of its own.")
    labels = _check_labels(arrays["labels"], n, len(classes), path)
    if "class_names" not in arrays:
        classes = classes[: labels.max() + 1]
    devices, device, group = np.array(["one device"]), np.zeros(n, np.int64), np.arange(n)
    if "device" in arrays:
        devices, device = _codes("device", arrays["device"], n, path)
    if group_key in arrays:
        group = _codes(group_key, arrays[group_key], n, path)[1]
    names = tuple(name if isinstance(name, str) else f"device {name}" for name in devices.tolist())
    licence = "not stated (your own data)"
    return ImageSet(path.stem, images, labels, device, group, tuple(classes.tolist()), names, licence, False)


def joined(group: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Groups, int64 (N,), of which `one` and `other` (L,) name pairs that are the same."""
    last = max(map(np.max, filter(len, (group, one, other)))) + 1
    graph = coo_array((np.ones(len(one)), (one, other)), (last, last))
    return connected_components(graph, directed=False)[1][group].astype(np.int64)


def _own(arrays: dict, path: Path, size: int, digests=None, said=()) -> ImageSet:
    """Your own images. What could make a score wrong is mended, and a warning says so, and what was `said` before.

    `digests`: of each image, where they are known; equal ones are of copies.
    """
    found, said = _image_set(arrays, path, size), list(said)
    unused = sorted(set(arrays) - {"images", "labels", "class_names", "device", "group"})
    if unused:
        known = "patients or lesions belong in group, scanners in device, names in class_names"
        said.append(f"not used: {', '.join(unused)} ({known})")
    lacking = [name for c, name in enumerate(found.classes) if not (found.labels == c).any()]
    if lacking:
        said.append(f"no image of {', '.join(lacking)}: the score leaves these classes out")
    group = found.group.copy()
    missing = np.char.lower(arrays["group"].astype(str)) if "group" in arrays else np.empty(0)
    missing = np.flatnonzero(np.isin(missing, ("", "nan", "none", "na", "<na>", "nat")))
    if len(missing):
        group[missing] = group.max() + 1 + np.arange(len(missing))
        said.append(f"group is missing for {len(missing)} images: each is a group of its own")
    if digests is None:
        digests = [hashlib.blake2b(image.tobytes()).digest() for image in found.images]
    picture = np.unique(digests, return_inverse=True)[1]
    if (copies := len(found) - picture.max() - 1) > 0:
        said.append(f"{copies} images are copies of others: copies share a group")
        group = joined(group, group, group.max() + 1 + picture)
    for text in said:
        warnings.warn(f"{path}: {text}.", stacklevel=3)
    return replace(found, group=group)


def _pictures(path: Path, folder: Path, size: int) -> ImageSet:
    """A folder of pictures: one of your own, or the publisher's of HAM10000."""
    require(SMALLEST <= size <= LARGEST, path, f"size is {size}. Give {SMALLEST} to {LARGEST} pixels.")
    if list(path.glob("HAM10000_metadata*")) and not (path / TABLE).exists():
        return _ham10000(path, size)
    path = Path(os.path.abspath(path))
    arrays = read_folder(path, size, (path.parent, folder, PROJECT_DATA))
    known = [arrays.pop(key) for key in ("digests", "said")]
    return replace(_own(arrays, path, size, *known), name=path.name)


def same_lesions(lesions: np.ndarray) -> np.ndarray:
    """HAM10000's lesion ids, str (N,), as groups, int64 (N,): 18 lesions were published under two ids (see data/README.md)."""
    names, group = np.unique(lesions, return_inverse=True)
    both = ("lesion_id", "other_lesion_id")
    pairs = read_table(PROJECT_DATA / "ham10000_duplicates.csv", set(both), NO_CLONE)
    pairs = [[row[key] for key in both] for row in pairs]
    pairs = np.array([np.searchsorted(names, pair) for pair in pairs if np.isin(pair, names).all()], int)
    return joined(group, *pairs.reshape(-1, 2).T)


def _simulated(clean: ImageSet, device: np.ndarray, **changes) -> ImageSet:
    """The same images as four simulated devices would have taken them, `device` (N,) each."""
    images = simulation.apply(clean.images, device)
    names = tuple(profile.name for profile in simulation.profiles(images.shape[1]))
    return replace(clean, images=images, device=device, devices=names, simulated=True, **changes)


def phantom(size: int = 28, first: int | None = None) -> ImageSet:
    """The built-in phantoms: a file holds them at 28 pixels; they are drawn anew at others (all: a minute), or the `first`."""
    path, script = PROJECT_DATA / "phantom.npz", PROJECT_DATA / "draw_phantom.py"
    require(SMALLEST <= size <= LARGEST, path, f"size is {size}. Give {SMALLEST} to {LARGEST} pixels.")
    if size == 28:
        arrays = read_npz(path, NO_CLONE)
        arrays |= {name: part[:first] for name, part in arrays.items() if name != "class_names"}
    else:
        arrays = runpy.run_path(str(script))["draw_all"](size=size, first=first)
    clean = _image_set(arrays, path, size)
    clean = replace(clean, licence="as the project's own code (drawn by data/draw_phantom.py)")
    return _simulated(clean, clean.device)


def _ham10000(folder: Path, size: int) -> ImageSet:
    """HAM10000 from a ready ``.npz``, else from the publisher's own files (prepared once)."""
    require(HAM_SCRIPT.is_file(), HAM_SCRIPT, f"there is no such file. {NO_CLONE}")
    path = runpy.run_path(str(HAM_SCRIPT))["prepare_once"](folder, size, PROJECT_DATA)
    arrays = read_npz(path, "Prepare it again.")
    need(arrays, ("device", "lesion_id", "class_names"), path)
    licence, images = f"CC BY-NC 4.0 {HAM}", _image_set(arrays, path, size, "lesion_id")
    return replace(
        images, name="ham10000", licence=licence, group=same_lesions(arrays["lesion_id"].astype(str))
    )


def _medmnist(name: str, folder: Path, size: int) -> ImageSet:
    """A two-dimensional single-label MedMNIST set: its devices are simulated, but for DermaMNIST, where they are known."""
    flag = name.removesuffix(SIMULATED) if name == DERMA + SIMULATED else name
    info, sides = _medmnist_info(flag, size), ("train", "val", "test")
    path = folder / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    if not path.exists():
        _download(path, *(info[key if size == 28 else f"{key}_{size}"] for key in ("url", "MD5")))
    arrays = read_npz(path, "Download it again.")
    need(arrays, [f"{side}_{key}" for side in sides for key in ("images", "labels")], path)
    whole = {"class_names": np.array([info["label"][str(i)] for i in range(len(info["label"]))])}
    rows = [arrays[f"{side}_images"].shape[:1] for side in sides]
    for key in ("images", "labels"):
        parts = [np.atleast_1d(arrays[f"{side}_{key}"]) for side in sides]
        kinds = {(part.shape[1:], part.dtype.kind) for part in parts}
        alike = len(kinds) == 1 and [part.shape[:1] for part in parts] == rows
        cause = f"its train, val and test {key} differ in shape or type, or are not one per image"
        require(alike, path, f"{cause}. Delete it, then download it again.")
        whole[key] = np.concatenate(parts)
    clean = _image_set(whole, path, size)
    wanted, shape = (info["n_channels"], size, size), clean.images.shape[1:]
    cause = f"images have shape (C, H, W) = {shape}; {flag} at size {size} has {wanted}"
    require(shape == wanted, path, f"{cause}. It is another set's file, or misnamed: download it again.")
    official = np.repeat([False, False, True], np.ravel(rows))
    licence = f"{info['license']} (MedMNIST, Yang et al. 2023, doi:10.1038/s41597-022-01721-8)"
    clean = replace(clean, name=name, licence=licence, official_test=official)
    if flag == DERMA:
        clean = _with_sources(clean, path)
    return clean if name == DERMA else _simulated(clean, simulation.assign(clean.labels, clean.group))


def _with_sources(images: ImageSet, path: Path) -> ImageSet:
    """DermaMNIST with lesion and real device of each image, as HAM10000's table has them; not its official split.

    DermaMNIST is HAM10000, and its official split has 1,006 lesions on more than one side.
    """
    columns = {"label", "device", "lesion_id"}
    rows = read_table(PROJECT_DATA / f"{DERMA}_sources.csv.gz", columns, NO_CLONE)
    differ = "another number of images"
    if len(rows) == len(images):
        differ = sum(row["label"] != str(label) for row, label in zip(rows, images.labels))
        differ = differ and f"{differ} other labels"
    cure = "Download it again."
    require(not differ, path, f"has {differ} than the table of its sources, so devices are not known. {cure}")
    names, device = np.unique([row["device"] for row in rows], return_inverse=True)
    group = same_lesions(np.array([row["lesion_id"] for row in rows]))
    licence = f"{images.licence}; devices and lesions {HAM}"
    return replace(
        images, device=device, group=group, devices=tuple(names.tolist()), licence=licence, official_test=None
    )


def _medmnist_info(flag: str, size: int) -> dict:
    """What the package medmnist says of the set `flag`, if this course can use it."""
    from medmnist import INFO  # here, because importing it makes a folder in the user's home

    kinds = {name: "three-dimensional" if "3d" in name else info["task"] for name, info in INFO.items()}
    usable = [name for name, kind in kinds.items() if "three" not in kind and "multi-label" not in kind]
    cause = f"{kinds.get(flag, 'unknown')} and no data set of this course"
    own = "the path of an .npz or of a folder of pictures (is it right?)"
    cure = f"Use phantom, ham10000, {own}, or one of MedMNIST's {', '.join(usable)}."
    require(flag in usable, flag, f"{cause}. {cure}")
    require(size in (28, 64, 128, 224), flag, f"has no images of {size} pixels. Use size 28, 64, 128 or 224.")
    return INFO[flag]


def _download(path: Path, url: str, md5: str) -> None:
    """Fetch one file and verify its checksum; nothing is left behind where that fails."""
    from torchvision.datasets import utils  # here, because it takes as long to import as PyTorch itself

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            utils.download_url(url, folder, path.name, md5)
            os.replace(Path(folder) / path.name, path)
    except Exception as error:  # of the network, the disk, the checksum
        cause = f"not there, and downloading it failed ({type(error).__name__}: {error})"
        cure = f"By hand: download {url} (MD5 {md5}) as {path.name}, and set FEDSSG_DATA (or data_dir) to its"
        raise DataError(f"{path}: {cause}. {cure} folder.") from error
