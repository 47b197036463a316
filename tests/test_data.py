"""Loading and checking data sets: every source, and every fault with its cure."""

import csv
import re
import runpy
import shutil
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import utils

from fedssg_helpers import data, files, partition
from fedssg_helpers.data import DataError, ImageSet, load

N = 60
HAM = runpy.run_path(str(data.HAM_SCRIPT))


def arrays(**changes):
    """A good own .npz as a dict, with changes; None leaves an array out."""
    random = np.random.default_rng(0)
    good = dict(images=random.integers(0, 256, (N, 28, 28, 3), dtype=np.uint8), labels=np.arange(N) % 3)
    return {key: value for key, value in (good | changes).items() if value is not None}


def saved(path, **changes):
    np.savez_compressed(path, **arrays(**changes))
    return path


def check(d: ImageSet):
    assert d.images.dtype == np.uint8 and d.images.ndim == 4 and d.images.shape[1] in (1, 3)
    assert d.images.shape[2] == d.images.shape[3] and d.images.flags["C_CONTIGUOUS"]
    for values, top in ((d.labels, len(d.classes)), (d.device, len(d.devices)), (d.group, None)):
        assert values.dtype == np.int64 and values.shape == (len(d),) and values.min() >= 0
        assert top is None or values.max() < top
    assert d.licence and all(type(name) is str for name in d.classes + d.devices)


# ---------------------------------------- own files


def test_own_file_with_everything(tmp_path):
    path = saved(
        tmp_path / "mine.npz",
        device=np.where(np.arange(N) % 2, "b", "a"),
        group=np.arange(N) // 2,
        class_names=["x", "y", "z"],
    )
    d = load(path)
    check(d)
    assert (d.name, d.classes, d.devices, d.simulated) == ("mine", ("x", "y", "z"), ("a", "b"), False)
    np.testing.assert_array_equal(d.images, arrays()["images"].transpose(0, 3, 1, 2))
    part = d.subset(d.labels == 1)
    check(part)
    assert len(part) == N // 3 and part.classes == d.classes


def test_own_file_with_the_least(tmp_path):
    d = load("mine.npz", saved(tmp_path / "mine.npz", images=arrays()["images"][..., 0]).parent)
    check(d)
    assert d.images.shape == (N, 1, 28, 28) and d.devices == ("one device",) and d.classes[0] == "class 0"
    assert len(set(d.group)) == N and not d.simulated


def test_whole_numbers_as_devices_and_a_column_of_labels(tmp_path):
    d = load(saved(tmp_path / "a.npz", device=np.arange(N) % 2 * 7, labels=(np.arange(N) % 3)[:, None]))
    check(d)
    assert d.devices == ("device 0", "device 7")


@pytest.mark.parametrize("size", [16, 128])
def test_own_images_have_one_size(tmp_path, size):
    """The default size takes the images as they are; another size must be theirs."""
    path = saved(tmp_path / "a.npz", images=np.zeros((N, size, size, 3), np.uint8))
    for d in (load(path), load(path, size=size)):
        check(d)
        assert d.images.shape[2:] == (size, size)
    with pytest.raises(
        DataError, match=f"a.npz: images are {size} x {size} pixels, but size is 64. Give size {size}"
    ):
        load(path, size=64)


def test_a_class_without_images_passes(tmp_path):
    d = load(saved(tmp_path / "a.npz", labels=np.arange(N) % 2 * 2, class_names=["a", "nobody", "b"]))
    check(d)
    assert set(d.labels) == {0, 2} and d.classes == ("a", "nobody", "b")


def test_a_subset_keeps_the_official_split_only_while_it_has_both_sides(tmp_path):
    medmnist_file(tmp_path / "breastmnist.npz")
    d = load("breastmnist", tmp_path)
    np.testing.assert_array_equal(d.subset(np.arange(30, 50)).official_test, np.arange(30, 50) >= 40)
    for side in (~d.official_test, np.flatnonzero(d.official_test), []):
        assert d.subset(side).official_test is None
    check(d.subset(~d.official_test))


IMAGES = arrays()["images"]
FAULTS = {
    "float images": (dict(images=IMAGES / 255), "float64, not uint8", "np.interp"),
    "NaN images": (dict(images=np.full((N, 28, 28), np.nan)), "float64, not uint8", "nan_to_num"),
    "wider whole numbers": (dict(images=IMAGES.astype(np.int32)), "int32, not uint8", "np.interp"),
    "channels first": (dict(images=IMAGES.transpose(0, 3, 1, 2)), "(60, 3, 28, 28)", "transpose(0, 2, 3, 1)"),
    "alpha channel": (dict(images=np.zeros((N, 28, 28, 4), np.uint8)), "(60, 28, 28, 4)", "images[..., :3]"),
    "volumes": (dict(images=np.zeros((N, 8, 28, 28, 1), np.uint8)), "shape", "3-D volumes"),
    "one flat row each": (dict(images=np.zeros((N, 784), np.uint8)), "shape", "(N, H, W)"),
    "no images": (dict(images=IMAGES[:0], labels=np.zeros(0, int)), "no images", "Save"),
    "tiny images": (dict(images=np.zeros((N, 7, 7), np.uint8)), "7 x 7", "resize"),
    "huge images": (dict(images=np.zeros((2, 600, 600), np.uint8)), "600 x 600", "resize"),
    "not square": (dict(images=np.zeros((N, 28, 40), np.uint8)), "28 x 40", "Crop"),
    "labels too high": (
        dict(class_names=["a", "b"]),
        "run from 0 to 2, out of the range 0 to 1",
        "name them all",
    ),
    "absurd label": (dict(labels=np.r_[10**9, np.zeros(N - 1, int)]), "out of the range", "Renumber"),
    "negative label": (dict(labels=np.arange(N) % 3 - 1), "run from -1", "Renumber"),
    "fractional labels": (dict(labels=np.arange(N) / 7), "not whole numbers", "np.unique"),
    "names as labels": (
        dict(labels=np.where(np.arange(N) % 2, "a", "b")),
        "not whole numbers",
        "class_names",
    ),
    "one-hot labels": (dict(labels=np.eye(3)[np.arange(N) % 3]), "shape", "argmax"),
    "too few labels": (
        dict(labels=np.arange(N - 1) % 3),
        f"({N - 1},) for {N} images",
        "one value per image",
    ),
    "one class": (dict(labels=np.ones(N, int)), "all labels are 1", "two classes"),
    "device too short": (dict(device=np.zeros(3, int)), "device has shape (3,)", "one value per image"),
    "group too long": (dict(group=np.zeros(N + 1, int)), "group has shape", "one value per image"),
    "device not a name": (dict(device=np.full(N, np.nan)), "device is float64", "device.astype(str)"),
    "class names as numbers": (dict(class_names=np.arange(3)), "class_names", "strings"),
    "no class names": (dict(class_names=np.array([], str)), "class_names has shape (0,)", "2 to 256"),
    "no labels": (dict(labels=None), "lacks labels", "data/README.md"),
    "nothing known": (dict(images=None, labels=None, x=np.zeros(3)), "lacks images, labels", "it holds x"),
    "Python objects": (dict(class_names=np.array(["a", None, 3], object)), "Python objects", "dtype=str"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_with_its_cure(tmp_path, fault):
    changes, cause, cure = FAULTS[fault]
    path = saved(tmp_path / "bad.npz", **changes)
    with pytest.raises(DataError) as caught:
        load(path)
    for part in (str(path), cause, cure):
        assert part in str(caught.value)


def cures(error) -> list[str]:
    """The statements that a message prints, between backticks."""
    return re.findall(r"`([^`]+)`", str(error))


RAMP = np.linspace(0, 1, N * 784).reshape(N, 28, 28)
CURED = {  # what is wrong, and which of the printed statements mend it
    "float images": (dict(images=RAMP), [0, 1]),
    "NaN images": (dict(images=np.where(RAMP < 0.1, np.nan, RAMP)), [0, 1]),
    "16 bits": (dict(images=(65535 * RAMP).astype(np.uint16)), [0, 1]),
    "16 bits with sign": (dict(images=(65535 * RAMP - 32768).astype(np.int16)), [0, 1]),
    "8 bits with sign": (dict(images=(255 * RAMP - 128).astype(np.int8)), [0, 1]),
    "black and white": (dict(images=RAMP > 0.5), [0, 1]),
    "all alike": (dict(images=np.full((N, 28, 28), 7, np.int32)), [0, 1]),
    "channels first": (dict(images=IMAGES.transpose(0, 3, 1, 2)), [0]),
    "transparency": (dict(images=np.concatenate([IMAGES, IMAGES[..., :1]], 3)), [1]),
    "one-hot": (dict(labels=np.eye(3)[np.arange(N) % 3]), [0]),
    "names for labels": (dict(labels=np.where(np.arange(N) % 2, "a", "b")), [0]),
    "fractions for labels": (dict(labels=np.arange(N) % 3 / 2), [0]),
    "labels from -1": (dict(labels=np.arange(N) % 3 - 1), [0]),
    "an absurd label": (dict(labels=np.r_[10**9, np.zeros(N - 1, int)]), [0]),
    "missing devices": (dict(device=np.where(np.arange(N) % 2, np.nan, 1.0)), [0]),
    "missing groups": (dict(group=np.where(np.arange(N) % 2, np.nan, np.arange(N) // 6)), [0]),
    "numbers for class names": (dict(class_names=np.arange(3)), [0]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", CURED)
def test_every_printed_cure_gives_usable_data(tmp_path, fault):
    changes, which = CURED[fault]
    with pytest.raises(DataError) as caught:
        load(saved(tmp_path / "a.npz", **changes))
    names = arrays(**changes) | {"np": np}
    for i in which:
        exec(cures(caught.value)[i], names)
    mended = {
        key: names[key] for key in ("images", "labels", "device", "group", "class_names") if key in names
    }
    d = load(saved(tmp_path / "b.npz", **mended))
    check(d)
    if d.images.shape[1] == 1:  # a ramp keeps its order, and all its steps
        assert (np.diff(d.images.ravel().astype(int)) >= 0).all()
        steps = {"black and white": 2, "all alike": 1, "NaN images": 231}.get(fault, 256)
        assert abs(len(np.unique(d.images)) - steps) <= 1


def test_names_that_occur_twice_are_refused(tmp_path):
    with pytest.raises(DataError, match="class_names has 'nevus' more than once"):
        load(saved(tmp_path / "a.npz", class_names=["nevus", "melanoma", "nevus"]))


def test_what_is_not_used_and_who_does_not_occur_is_said(tmp_path):
    path = saved(tmp_path / "a.npz", patient_id=np.arange(N), Group=np.arange(N), labels=np.arange(N) % 2 * 4)
    with pytest.warns(UserWarning) as said:
        d = load(path)
    said = [str(warning.message) for warning in said]
    assert any("not used: Group, patient_id (patients or lesions belong in group" in text for text in said)
    assert any("no image of class 1, class 2, class 3" in text for text in said)
    assert len(set(d.group)) == N


def test_a_missing_id_is_a_group_of_its_own(tmp_path):
    group = np.where(np.arange(N) < 9, "nan", (np.arange(N) // 3).astype(str))
    with pytest.warns(UserWarning, match="group is missing for 9 images"):
        d = load(saved(tmp_path / "a.npz", group=group))
    assert len(set(d.group[:9])) == 9 and len(set(d.group)) == 9 + (N - 9) // 3
    assert not set(d.group[:9]) & set(d.group[9:])


def test_copies_share_a_group(tmp_path):
    """Also through other copies, and with groups of their own."""
    images, group = IMAGES.copy(), np.arange(N)
    images[1], images[2], group[3] = images[0], images[0], group[2]
    with pytest.warns(UserWarning, match="2 images are copies of others"):
        d = load(saved(tmp_path / "a.npz", images=images, group=group))
    assert len(set(d.group[:4])) == 1 and len(set(d.group)) == N - 3
    train, test = partition.split(d, seed=0)
    seen = {image.tobytes() for image in d.images[train]}
    assert not any(image.tobytes() in seen for image in d.images[test])


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.98])
def test_a_truncated_file(tmp_path, keep):
    path = saved(tmp_path / "cut.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(DataError, match="cut.npz: truncated"):
        load(path)


@pytest.mark.parametrize("where", [60, 0.3, 0.6])
def test_a_damaged_file(tmp_path, where):
    path = saved(tmp_path / "bad.npz")
    content = bytearray(path.read_bytes())
    start = int(where * len(content)) if where < 1 else where
    content[start : start + 40] = bytes(b ^ 0xFF for b in content[start : start + 40])
    path.write_bytes(content)
    with pytest.raises(DataError, match="bad.npz"):
        load(path)


def test_other_files_that_are_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("images", "hello")
    for name in ("a.npz", "text.npz"):
        with pytest.raises(DataError, match=name):
            load(tmp_path / name)


def test_absurd_size_is_refused_before_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to"):
        load(saved(tmp_path / "big.npz"))


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="nowhere.npz: there is no such file. Check the path"):
        load("nowhere.npz", tmp_path)
    with pytest.raises(DataError, match="HAM10000_metadata.csv: there is no such file.*DBW86T"):
        load("ham10000", tmp_path)


def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSSG_DATA", str(tmp_path))
    assert data.data_folder() == tmp_path and data.data_folder("x").name == "x"
    monkeypatch.delenv("FEDSSG_DATA")
    assert data.data_folder() == data.data_folder("") == data.PROJECT_DATA


# ---------------------------------------- phantoms


@pytest.fixture(scope="module")
def phantom():
    return load("phantom", folder="/nowhere")


def test_phantom(phantom):
    check(phantom)
    with pytest.raises(DataError, match="size is 300. Give 16 to 256 pixels"):
        load("phantom", size=300)
    larger = data.phantom(64, first=20)
    assert larger.images.shape == (20, 3, 64, 64) and larger.classes == phantom.classes
    np.testing.assert_array_equal(larger.labels, phantom.labels[:20])
    np.testing.assert_array_equal(larger.device, phantom.device[:20])
    small = (
        larger.images.reshape(20, 3, 16, 4, 16, 4).mean((3, 5)),
        phantom.images[:20].reshape(20, 3, 14, 2, 14, 2).mean((3, 5)),
    )
    assert np.corrcoef(small[0].mean((2, 3)).ravel(), small[1].mean((2, 3)).ravel())[0, 1] > 0.9, (
        "the same lesions"
    )
    assert phantom.simulated and len(phantom.devices) == 4 and phantom.images.shape[1:] == (3, 28, 28)
    assert (data.PROJECT_DATA / "phantom.npz").stat().st_size <= 4_000_000
    share = np.bincount(phantom.labels) / len(phantom)
    assert 0.57 < share.max() < 0.63 and 0.007 < share.min() < 0.015
    cells = np.zeros((len(phantom.classes), 4), int)
    np.add.at(cells, (phantom.labels, phantom.device), 1)
    assert (cells == 0).sum() >= 2 and ((cells > 0) & (cells <= 5)).sum() >= 2
    views = np.bincount(phantom.group)
    assert set(views) == {1, 2, 3}
    for constant in (phantom.labels, phantom.device):
        np.testing.assert_array_equal(
            constant, constant[np.unique(phantom.group, return_index=True)[1]][phantom.group]
        )


def test_redrawing_the_phantoms_gives_the_same_bytes(tmp_path):
    again = runpy.run_path(str(data.PROJECT_DATA / "draw_phantom.py"))["draw_all"]()
    stored = data.PROJECT_DATA / "phantom.npz"
    with np.load(stored, allow_pickle=False) as file:
        assert sorted(file.files) == sorted(again)
        for key in file.files:
            np.testing.assert_array_equal(file[key], again[key])
            assert file[key].dtype == again[key].dtype
    np.savez_compressed(tmp_path / "again.npz", **again)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(tmp_path / "again.npz") as new:
        packed = [[entry.compress_size for entry in archive.infolist()] for archive in (old, new)]
    if packed[0] == packed[1]:  # another zlib may pack the same arrays differently
        assert stored.read_bytes() == (tmp_path / "again.npz").read_bytes()


# ---------------------------------------- MedMNIST


def medmnist_file(path, size=28, channels=(), n=(30, 10, 20), **extra):
    random, parts = np.random.default_rng(0), {}
    for side, number in zip(("train", "val", "test"), n):
        parts[f"{side}_images"] = random.integers(0, 256, (number, size, size, *channels), dtype=np.uint8)
        parts[f"{side}_labels"] = (np.arange(number) % 2)[:, None].astype(np.uint8)
    np.savez_compressed(path, **parts | extra)


@pytest.mark.parametrize("size, name", [(28, "breastmnist.npz"), (64, "breastmnist_64.npz")])
def test_medmnist_from_a_local_file(tmp_path, size, name):
    medmnist_file(tmp_path / name, size)
    d = load("breastmnist", tmp_path, size)
    check(d)
    assert d.images.shape == (60, 1, size, size) and d.simulated and len(d.devices) == 4
    assert d.classes == ("malignant", "normal, benign") and "CC BY 4.0" in d.licence
    np.testing.assert_array_equal(d.official_test, np.arange(60) >= 40)


MEDMNIST_FAULTS = [
    ("chestmnist", dict(), "multi-label"),
    ("organmnist3d", dict(), "three-dimensional"),
    ("mnist", dict(), "unknown and no data set.*Use phantom, ham10000"),
    ("pathmnist", dict(), "another set's"),
    (
        "breastmnist",
        dict(test_labels=np.zeros((3, 1), np.uint8)),
        "labels differ in .* or are not one per image",
    ),
    ("breastmnist", dict(val_images=np.zeros((10, 20, 20), np.uint8)), "images differ in shape"),
    ("breastmnist", dict(val_images=np.uint8(3)), "images differ in shape"),
    ("breastmnist", dict(test_labels=np.full((20, 1), 9, np.uint8)), "out of the range 0 to 1"),
]


@pytest.mark.parametrize("name, changes, cause", MEDMNIST_FAULTS)
def test_medmnist_faults(tmp_path, name, changes, cause):
    medmnist_file(tmp_path / f"{name}.npz", **changes)
    with pytest.raises(DataError, match=cause):
        load(name, tmp_path)
    with pytest.raises(DataError, match="size 28, 64, 128 or 224"):
        load("breastmnist", tmp_path, 32)


def test_a_failed_download_says_what_failed_and_leaves_nothing(tmp_path, monkeypatch):
    def offline(url, root, filename, md5):
        (tmp_path / root / filename).write_bytes(b"half")
        raise OSError("network is unreachable")

    monkeypatch.setattr(utils, "download_url", offline)
    with pytest.raises(DataError, match="network is unreachable.*By hand.*zenodo.*MD5") as caught:
        load("bloodmnist", tmp_path / "new")
    assert "bloodmnist.npz" in str(caught.value) and list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("size, name", [(28, "breastmnist.npz"), (64, "breastmnist_64.npz")])
def test_a_download_is_kept(tmp_path, monkeypatch, size, name):
    def online(url, root, filename, md5):
        assert filename in url and len(md5) == 32
        medmnist_file(f"{root}/{filename}", size)

    monkeypatch.setattr(utils, "download_url", online)
    check(load("breastmnist", tmp_path, size))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_dermamnist_has_lesions(shared_data):
    d = load("dermamnist", shared_data)
    check(d)
    assert len(d) == 10015 and d.official_test is None and len(np.unique(d.group)) == 7452
    assert d.devices == ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias") and not d.simulated
    ham = load("ham10000", shared_data)  # the same images, in another order
    count = [np.bincount(s.labels * 4 + s.device, minlength=28) for s in (d, ham)]
    np.testing.assert_array_equal(*count)


def test_dermamnist_with_simulated_devices(shared_data):
    real, d = load("dermamnist", shared_data), load("dermamnist-simulated", shared_data)
    check(d)
    assert d.simulated and len(d.devices) == 4 and d.devices != real.devices
    np.testing.assert_array_equal(d.group, real.group)
    np.testing.assert_array_equal(d.labels, real.labels)
    assert (d.images != real.images).any((1, 2, 3)).all()


def test_dermamnist_with_other_labels_or_images_is_refused(shared_data, tmp_path):
    with np.load(shared_data / "dermamnist.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    arrays["val_labels"] = (arrays["val_labels"] + 1) % 7
    np.savez(tmp_path / "dermamnist.npz", **arrays)
    with pytest.raises(
        DataError, match="has 1003 other labels than the table of its sources.*Download it again"
    ):
        load("dermamnist", tmp_path)
    medmnist_file(tmp_path / "dermamnist.npz", channels=(3,))
    with pytest.raises(DataError, match="has another number of images than the table"):
        load("dermamnist", tmp_path)


def test_the_tables_of_ham10000_come_with_their_licence():
    text = (data.PROJECT_DATA / "LICENCE-HAM10000-tables.txt").read_text()
    tables = {path.name for path in data.PROJECT_DATA.iterdir() if ".csv" in path.suffixes}
    assert len(tables) == 2 and all(name in text for name in tables) and "CC BY-NC 4.0" in text


def test_pneumoniamnist_has_its_official_split(shared_data):
    d = load("pneumoniamnist", shared_data)
    check(d)
    assert d.images.shape == (5856, 1, 28, 28) and d.official_test.sum() == 624


# ---------------------------------------- HAM10000


FOLDERS = "HAM10000_images_part_1", "HAM10000_images_part_2"


def publisher(folder, parts=FOLDERS, lesions=24, absent=(), **changes):
    """The publisher's layout in small; returns the rows of its table."""
    rows = []
    for i in range(lesions):
        image = f"ISIC_{i:07d}"
        rows.append(
            dict(
                lesion_id=f"HAM_{i // 2:07d}",
                image_id=image,
                dx=HAM["CLASSES"][i // 2 % 7],
                dx_type="histo",
                age="50",
                sex="male",
                localization="back",
                dataset=("rosendahl", "vidir_modern")[i % 2],
            )
            | changes
        )
        (folder / parts[i % len(parts)]).mkdir(parents=True, exist_ok=True)
        if i not in absent:
            Image.new("RGB", (60, 45), (10 * i, 100, 50)).save(
                folder / parts[i % len(parts)] / f"{image}.jpg"
            )
    with open(folder / "HAM10000_metadata.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return rows


def test_ham10000_is_prepared_once(tmp_path):
    rows = publisher(tmp_path)
    d = load("ham10000", tmp_path)
    check(d)
    assert (len(d), d.simulated, d.devices) == (24, False, ("rosendahl", "vidir_modern"))
    assert d.classes == HAM["CLASSES"] and "CC BY-NC" in d.licence and len(set(d.group)) == 12
    assert [d.devices[i] for i in d.device] == [row["dataset"] for row in rows]
    assert abs(int(d.images[7, 0, 14, 14]) - 70) < 4
    made = (tmp_path / "ham10000_28.npz").stat().st_mtime_ns
    np.testing.assert_array_equal(load("ham10000", tmp_path).images, d.images)
    assert (tmp_path / "ham10000_28.npz").stat().st_mtime_ns == made
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
    table = tmp_path / "HAM10000_metadata.csv"
    table.write_text(
        table.read_text().replace("HAM_0000001", "HAM_0000000")
    )  # a corrected table is read again
    assert len(set(load("ham10000", tmp_path).group)) == 11
    table.unlink()
    assert len(set(load("ham10000", tmp_path).group)) == 11


def test_a_read_only_folder_falls_back_to_the_projects_own(tmp_path, monkeypatch):
    publisher(tmp_path / "source", parts=("images",))
    (tmp_path / "project").mkdir()
    shutil.copy(data.PROJECT_DATA / "ham10000_duplicates.csv", tmp_path / "project")
    monkeypatch.setattr(data, "PROJECT_DATA", tmp_path / "project")
    monkeypatch.setattr(data.os, "access", lambda path, mode: False)
    check(load("ham10000", tmp_path / "source"))
    assert [path.name[:12] for path in (tmp_path / "project").glob("*.npz")] == ["ham10000_28_"]
    assert not list((tmp_path / "source").glob("*.npz"))


def test_ham10000_faults(tmp_path):
    publisher(tmp_path / "a", absent=(3,))
    with pytest.raises(DataError, match="1 of the 24 images .* missing, .*ISIC_0000003.jpg"):
        load("ham10000", tmp_path / "a")
    publisher(tmp_path / "b", dx="cold")
    with pytest.raises(DataError, match="unknown diagnosis .*'cold'"):
        load("ham10000", tmp_path / "b")
    publisher(tmp_path / "c")
    table = tmp_path / "c" / "HAM10000_metadata.csv"
    table.write_text(table.read_text().replace("dataset", "origin"))
    with pytest.raises(DataError, match="lacks the column.*dataset"):
        load("ham10000", tmp_path / "c")
    publisher(tmp_path / "d")
    (tmp_path / "d" / "HAM10000_images_part_1" / "ISIC_0000000.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        load("ham10000", tmp_path / "d")
    assert not list((tmp_path / "d").glob("*.npz"))


@pytest.mark.parametrize("suffix, separator", [(".tab", "\t"), (".csv", ";"), (".tab", ",")])
def test_ham10000_with_other_separators(tmp_path, suffix, separator):
    publisher(tmp_path)
    table = tmp_path / "HAM10000_metadata.csv"
    text = table.read_text().replace(",", separator)
    table.unlink()
    table.with_suffix(suffix).write_text(text)
    check(load("ham10000", tmp_path))


def test_ham10000_with_images_of_other_names_and_depths(tmp_path):
    publisher(tmp_path, parts=("deep/in/folders", "one"))
    for path, suffix in zip(sorted(tmp_path.rglob("*.jpg")), (".JPG", ".jpeg", ".png", ".PNG")):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    check(load("ham10000", tmp_path))


@pytest.mark.parametrize("size", [[], ["16"]])
def test_the_preparation_is_a_script(tmp_path, monkeypatch, capsys, size):
    publisher(tmp_path / "source")
    target = tmp_path / "there" / "ham.npz"
    monkeypatch.setattr(sys, "argv", ["prepare_ham10000.py", str(tmp_path / "source"), str(target), *size])
    runpy.run_path(str(data.HAM_SCRIPT), run_name="__main__")
    assert str(target) in capsys.readouterr().out
    assert load(target).images.shape == (24, 3, *2 * [int(size[0]) if size else 28])
    for arguments, said in (
        ([tmp_path, target], "error: .*DBW86T"),
        ([tmp_path], "SOURCE TARGET"),
        ([], "SOURCE"),
    ):
        monkeypatch.setattr(sys, "argv", ["prepare_ham10000.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match=said):
            runpy.run_path(str(data.HAM_SCRIPT), run_name="__main__")
    with pytest.raises(DataError, match="size 300: out of range"):
        HAM["prepare"](tmp_path / "source", target, 300)


def test_ham10000_ready_file(shared_data):
    d = load("ham10000", shared_data)
    check(d)
    assert len(d) == 10015 and not d.simulated
    assert set(d.devices) == {"rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias"}
    cells = np.zeros((7, 4), int)
    np.add.at(cells, (d.labels, d.device), 1)
    assert (cells == 0).sum() == 2 and len(np.unique(d.group)) == 7452


def test_ham10000_publishers_sample(shared_data, tmp_path):
    source = shared_data / "ham10000_raw_sample"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    HAM["prepare"](source, tmp_path / "ham10000_28.npz")
    d = load("ham10000", tmp_path)
    check(d)
    assert len(d) == 143 and d.devices == load("ham10000", shared_data).devices
