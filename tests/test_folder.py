"""A folder of pictures as a data set: every kind of picture, every fault with its cure, prepared once, never all in memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import check, publisher

from fedssg_helpers import course, data, files, folder, partition, server, sharing
from fedssg_helpers.__main__ import main
from fedssg_helpers.data import DataError, load
from fedssg_helpers.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


def noise(number: int, width=40, height=30) -> Image.Image:
    """A colour picture, another one for each number."""
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def folders(place: Path, classes=("mel", "nv"), each=8) -> Path:
    """A folder of pictures per class."""
    for c, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for i in range(each):
            noise(each * c + i, 40 + i, 30 + 2 * i).save(place / name / f"{i}.png")
    return place


def table(place: Path, rows: str, header="file_name,label") -> Path:
    """A metadata.csv in a folder."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "metadata.csv").write_text(f"{header}\n{rows}\n", encoding="utf-8")
    return place


def quiet(*args, **options):
    """`load` without its warnings."""
    with warnings.catch_warnings(action="ignore"):
        return load(*args, **options)


# ---------------------------------------- kinds of pictures


HALVES = np.repeat([[20] * 30 + [220] * 30], 40, axis=0).astype(
    np.uint8
)  # the left half dark, the right one bright
GREY = Image.fromarray(HALVES)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be shown turned by a quarter, clockwise
KINDS = {
    "grey.png": (GREY, {}),
    "grey.jpg": (GREY, {}),
    "black and white.png": (GREY.convert("1", dither=Image.Dither.NONE), {}),
    "grey and alpha.png": (GREY.convert("LA"), {}),
    "colour.JPEG": (GREY.convert("RGB"), {}),
    "colour.webp": (GREY.convert("RGB"), {"lossless": True}),
    "colour.bmp": (GREY.convert("RGB"), {}),
    "alpha.png": (GREY.convert("RGBA"), {}),
    "palette.png": (GREY.convert("P"), {}),
    "palette and transparency.png": (GREY.convert("P"), {"transparency": b"\x00\x80"}),
    "palette.gif": (GREY.convert("P"), {}),
    "four inks.jpg": (GREY.convert("RGB").convert("CMYK"), {}),
    "four inks.tif": (GREY.convert("RGB").convert("CMYK"), {}),
    "16 bits.tif": (Image.fromarray(HALVES.astype(np.uint16) * 10 + 5000), {}),
    "16 bits.png": (Image.fromarray(HALVES.astype(np.uint16) * 10 + 5000), {}),
    "32 bits.tif": (Image.fromarray(HALVES.astype(np.int32) * 1000 - 90_000), {}),
    "fractions.tiff": (Image.fromarray(HALVES.astype(np.float32) / 1e4), {}),
    "turned.jpg": (GREY.rotate(90, expand=True), {"exif": TURNED}),
    "turned.png": (GREY.rotate(90, expand=True), {"exif": TURNED}),
}


@pytest.mark.parametrize("size", [16, 28])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(tmp_path, kind, size):
    image, options = KINDS[kind]
    image.save(tmp_path / kind, **options)
    for channels in (1, 3):
        seen = folder.square(tmp_path / kind, size, channels)
        assert seen.shape == (size, size, channels) and seen.dtype == np.uint8
        left, right = seen[:, : size // 2 - 2], seen[:, size // 2 + 2 :]
        assert left.max() < 50 and right.min() > 200, (left.max(), right.min())


def test_the_largest_centred_square_by_box_averages(tmp_path):
    """As the publisher's HAM10000 is prepared, so that both give the same numbers."""
    noise(0, 61, 44).save(tmp_path / "a.png")
    whole = np.asarray(noise(0, 61, 44))[:, 8:52].astype(float)
    expected = whole.reshape(22, 2, 22, 2, 3).mean((1, 3))
    assert np.abs(folder.square(tmp_path / "a.png", 22) - expected).max() <= 1


def test_a_set_of_grey_pictures_has_one_channel(tmp_path):
    place = folders(tmp_path / "xray")
    for path in place.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load(place).images.shape == (16, 1, 28, 28)
    noise(99).save(place / "nv" / "colour.png")
    assert load(place).images.shape == (17, 3, 28, 28)


def test_more_than_8_bits_are_scaled_and_this_is_said(tmp_path):
    place = folders(tmp_path / "a")
    ramp = np.arange(784, dtype=np.uint16).reshape(28, 28) + 30_000
    Image.fromarray(ramp).save(place / "mel" / "deep.tif")
    with pytest.warns(UserWarning, match="1 of more than 8 bits: each is scaled by its own range"):
        d = load(place)
    (deep,) = [image for image in d.images if (np.diff(image[0].ravel().astype(int)) >= 0).all()]
    assert deep.min() == 0 and deep.max() == 255


# ---------------------------------------- layouts


def test_a_folder_per_class(tmp_path):
    place = folders(tmp_path / "my pictures", ("nv", "mel", "bcc"))
    (place / ".hidden").mkdir()
    for name in ("nv/deep/er/x.png", ".hidden/x.png", "nv/.x.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        noise(77).save(place / name)
    (place / "nv" / "notes.txt").write_text("no picture")
    d = load(place)
    check(d)
    assert (d.name, d.classes, d.devices, d.simulated) == (
        "my pictures",
        ("bcc", "mel", "nv"),
        ("one device",),
        False,
    )
    np.testing.assert_array_equal(np.bincount(d.labels), [8, 8, 9])
    expected = [folder.square(place / name, 28).transpose(2, 0, 1) for name in folder.pictures(place)]
    np.testing.assert_array_equal(d.images, expected)
    d = load("my pictures", tmp_path, size=64)
    check(d)
    assert d.images.shape == (25, 3, 64, 64)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table(tmp_path, separator):
    place = folders(tmp_path / "a", ("one", "two"))
    rows = [
        f"{c}/{i}.png,{'ab'[i % 2]},{c},P{i // 2 if i < 6 else ''}" for c in ("two", "one") for i in range(8)
    ]
    rows = [row.removesuffix("P") for row in rows]
    header = "\ufefffile_name,label,device,group"
    table(place, "\n".join(rows).replace(",", separator), header.replace(",", separator))
    with pytest.warns(UserWarning, match="group is missing for 4 images"):
        d = load(place)
    check(d)
    assert (d.classes, d.devices) == (("a", "b"), ("one", "two"))
    np.testing.assert_array_equal(d.device, [1] * 8 + [0] * 8)
    np.testing.assert_array_equal(d.labels, np.arange(16) % 2)
    assert len(set(d.group)) == 3 + 4 and d.group[0] == d.group[1] == d.group[8]


def test_what_has_no_label_is_left_out_and_said(tmp_path):
    place = folders(tmp_path / "a")
    noise(50).save(place / "loose.png")
    with pytest.warns(UserWarning, match="left out are 1 pictures without a label"):
        assert len(load(place)) == 16
    table(place, "\n".join(f"{c}/{i}.png,{c}" for c in ("mel", "nv") for i in range(5)))
    with pytest.warns(UserWarning, match="left out are 7 pictures without a label"):
        assert len(load(place)) == 10


def test_copies_share_a_group(tmp_path):
    place = folders(tmp_path / "a")
    noise(0).save(place / "nv" / "copy.bmp")
    noise(0).save(place / "nv" / "again.png")
    with pytest.warns(UserWarning, match="2 images are copies of others"):
        assert len(set(load(place).group)) == 16


def test_the_publishers_folder_of_ham10000_is_known(tmp_path):
    publisher(tmp_path / "ham")
    d = load(tmp_path / "ham")
    assert d.name == "ham10000" and len(d.devices) == 2
    np.testing.assert_array_equal(load("ham10000", tmp_path / "ham").images, d.images)


def test_a_name_of_medmnist_is_never_a_folder(tmp_path, monkeypatch):
    for name in ("dermamnist", "ham10000", "phantom"):
        folders(tmp_path / name)
        assert data.own_path(name, tmp_path) is None
        assert data.own_path(str(tmp_path / name), tmp_path) == tmp_path / name
    assert data.own_path("", tmp_path) is None and data.own_path("nowhere", tmp_path) is None
    with pytest.raises(DataError, match="folder of pictures .is it right"):
        load(tmp_path / "nowhere")


def test_the_recipe_for_fed_isic2019_in_the_readme(tmp_path, monkeypatch):
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    (recipe,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "ISIC_2019" in code]
    (tmp_path / "isic" / "ISIC_2019_Training_Input").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "isic")
    lesions = ["HAM_0000001", "HAM_0000001", "BCN_0000002", "MSK4_0000003", ""]
    for i in range(5):
        noise(i).save(f"ISIC_2019_Training_Input/ISIC_{i}.jpg")
    rows = [f"ISIC_{i},50,back,{lesion},male" for i, lesion in enumerate(lesions)]
    Path("ISIC_2019_Training_Metadata.csv").write_text(
        "image,age_approx,anatom_site_general,lesion_id,sex\n" + "\n".join(rows)
    )
    rows = [f"ISIC_{i},{float(i % 2 == 0)},{float(i % 2)}" for i in range(5)]
    Path("ISIC_2019_Training_GroundTruth.csv").write_text("image,MEL,NV\n" + "\n".join(rows))
    Path("HAM10000_metadata").write_text("image_id,dataset\nISIC_0,rosendahl\nISIC_1,vidir_modern\n")
    exec(recipe, {})
    with pytest.warns(UserWarning, match="left out are 1 pictures without a label"):
        d = load(tmp_path / "isic")
    assert d.devices == ("BCN", "MSK", "rosendahl", "vidir_modern") and d.classes == ("MEL", "NV")
    np.testing.assert_array_equal(d.labels, [0, 1, 0, 1])
    assert d.group[0] == d.group[1] and len(set(d.group)) == 3


# ---------------------------------------- faults


def bomb(path: Path, side=50_000) -> None:
    """A PNG of a few bytes that says it is so many pixels high and wide: 7 GB when unpacked."""
    noise(0).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = 2 * side.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def no_picture(place):
    (place / "nv").mkdir(parents=True)
    (place / "nv" / "notes.txt").write_text("x")


def all_broken(place):
    folders(place)
    for path in place.rglob("*.png"):
        path.write_bytes(b"no picture")


def in_table(rows, header="file_name,label"):
    return lambda place: table(folders(place), rows, header)


FAULTS = {
    "no images": (no_picture, "holds no picture", "one folder of pictures per class"),
    "an empty folder": (lambda place: place.mkdir(), "holds no picture", "one folder of pictures per class"),
    "pictures without folders": (lambda place: folders(place.parent, (place.name,)), "has 0 classes", "per class"),
    "one class": (lambda place: folders(place, ("nv",)), "has 1 classes", "per class"),
    "300 classes": (lambda place: folders(place, map(str, range(300)), 1), "has 300 classes, not 2 to 256", "per class"),
    "names that differ by case": (lambda place: folders(place, ("NV", "nv", "mel")), "labels NV, nv differ", "one name"),
    "labels that differ by case": (in_table("mel/0.png,A\nnv/0.png,a"), "labels A, a differ", "one name"),
    "devices that differ by case": (
        in_table("mel/0.png,a,X\nnv/0.png,b,x", "file_name,label,device"), "devices X, x differ", "one name"),
    "parts of a split": (lambda place: folders(place, ("test", "train")), "parts of a split", "Give one of them"),
    "absent files": (in_table("mel/0.png,a\nnv/99.png,b\n../x.png,b"), "names 2 pictures that are not there, ['../x.png']", "Correct"),
    "a name in capitals": (in_table("mel/0.png,a\nnv/0.PNG,b"), "['nv/0.PNG']", "capitals count"),
    "labels missing for some": (in_table("mel/0.png,a\nnv/0.png,\nnv/1.png"), "no label for 2 pictures, ['nv/0.png']", "Fill it in"),
    "devices missing for some": (
        in_table("mel/0.png,a,X\nnv/0.png,b,", "file_name,label,device"), "no device for 1 pictures", "Fill it in"),
    "a picture twice": (in_table("mel/0.png,a\nmel/0.png,b"), "['mel/0.png'] more than once", "one row"),
    "no labels": (in_table("mel/0.png,a", "file_name,class"), "lacks the column(s) label", "file_name and label"),
    "an empty table": (in_table("", ""), "holds no row", "file_name and label"),
    "a table that is no text": (
        lambda place: (folders(place) / "metadata.csv").write_bytes(b"\xff\xfe\x80"), "not a table of text", "file_name"),
    "all broken": (all_broken, "no picture can be read, such as mel/0.png (cannot identify", "Save them again"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_with_its_cure(tmp_path, fault):
    make, cause, cure = FAULTS[fault]
    make(tmp_path / "bad one")
    with pytest.raises(DataError) as caught:
        quiet(tmp_path / "bad one")
    said = str(caught.value)
    assert said.startswith(str(tmp_path / "bad one")) and cause in said and cure in said and "\n" not in said
    assert not [*tmp_path.rglob("*.npy"), *tmp_path.rglob("tmp*")]


def test_broken_pictures_are_named_and_the_others_kept(tmp_path):
    place = folders(tmp_path / "a")
    noise(70, 300, 300).save(place / "mel" / "cut.jpg")
    (place / "mel" / "cut.jpg").write_bytes((place / "mel" / "cut.jpg").read_bytes()[:9000])
    (place / "nv" / "page.png").write_bytes(b"<!DOCTYPE html>")
    (place / "nv" / "empty.png").touch()
    (place / "nv" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    bomb(place / "nv" / "bomb.png")
    for _ in range(2):  # also when it is prepared already
        with pytest.warns(UserWarning, match="left out are 5 that cannot be read") as said:
            d = load(place)
        said = " ".join(str(warning.message) for warning in said)
        for name, why in (
            ("mel/cut.jpg", "truncated"),
            ("nv/page.png", "identify"),
            ("nv/bomb.png", "2500000000 pixels. exceeds limit"),
        ):
            assert re.search(rf"{name} \([^,]*{why}", said), said
        assert "nv/empty.png (" in said and "nv/gone.png (" in said
        check(d)
        assert len(d) == 16


def test_a_picture_that_runs_a_program_is_not_opened(tmp_path):
    place = folders(tmp_path / "a")
    (place / "nv" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n")
    with pytest.warns(UserWarning, match="nv/x.png .cannot identify"):
        assert len(load(place)) == 16


def test_damaged_pictures_raise_nothing_else(tmp_path):
    random, place = np.random.default_rng(0), folders(tmp_path / "a")
    for i in range(120):
        kind = ("png", "jpg", "tif", "webp", "gif", "bmp")[i % 6]
        path = place / "nv" / f"damaged{i}.{kind}"
        noise(i).save(path)
        content = bytearray(path.read_bytes())
        for at in random.integers(0, len(content) if i % 2 else 60, 6):
            content[at] ^= int(random.integers(1, 256))
        path.write_bytes(content[: int(random.integers(1, len(content)))] if i % 5 == 0 else content)
    assert 16 <= len(quiet(place)) < 136


def test_size(tmp_path):
    place = folders(tmp_path / "a")
    for size in (15, 257):
        with pytest.raises(DataError, match=f"size is {size}. Give 16 to 256"):
            load(place, size=size)
    for size in (16, 256):
        assert load(place, size=size).images.shape == (16, 3, size, size)


def test_blanks_and_other_letters(tmp_path):
    place = folders(tmp_path / "Aufnahmen für 皮膚 🩺", ("ńaevus b", "маланома"))
    d = load(place)
    assert (d.name, d.classes) == ("Aufnahmen für 皮膚 🩺", ("ńaevus b", "маланома"))


# ---------------------------------------- prepared once, mapped into memory


def made(tmp_path) -> list[Path]:
    return sorted(tmp_path.rglob("*.np[yz]"))


def test_prepared_once_and_again_where_something_changed(tmp_path, monkeypatch):
    place = folders(tmp_path / "a")
    d = load(place)
    assert isinstance(d.images, np.memmap) and not d.images.flags.writeable
    first, square = made(tmp_path), folder.square
    assert [path.suffix for path in first] == [".npy", ".npz"] and first[0].parent == tmp_path / "prepared"
    monkeypatch.setattr(folder, "square", None)
    np.testing.assert_array_equal(load(place).images, d.images)
    with pytest.raises(TypeError):
        load(place, size=32)
    monkeypatch.setattr(folder, "square", square)
    noise(99).save(place / "nv" / "0.png")
    assert (load(place).images != d.images).any() and len(made(tmp_path)) == 4
    table(place, "\n".join(f"{c}/{i}.png,{c}" for c in ("nv", "mel") for i in range(8)))
    assert load(place).labels[0] == 1 and len(made(tmp_path)) == 6


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    place, square = folders(tmp_path / "a"), folder.square
    left = iter(range(5))

    def stopped(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return square(*args)

    monkeypatch.setattr(folder, "square", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(place)
    assert not list((tmp_path / "prepared").iterdir())
    monkeypatch.setattr(folder, "square", square)
    check(load(place))


def test_a_damaged_preparation_is_named(tmp_path):
    place = folders(tmp_path / "a")
    load(place)
    images, labels = made(tmp_path)
    whole = images.read_bytes()
    for broken in (whole[:2000], b"", b"x" * len(whole)):
        images.write_bytes(broken)
        with pytest.raises(DataError, match="damaged.*Delete"):
            load(place)
    images.write_bytes(whole)
    labels.unlink()
    with pytest.raises(DataError, match="no such file. Delete .*made again"):
        load(place)
    images.unlink()
    check(load(place))


def test_a_read_only_folder(tmp_path, monkeypatch):
    place, access = folders(tmp_path / "source" / "a"), os.access
    locked = [place.parent]
    monkeypatch.setattr(
        folder.os, "access", lambda path, mode: Path(path) not in locked and access(path, mode)
    )
    (tmp_path / "mine").mkdir()
    check(load(place, tmp_path / "mine"))
    assert {path.parent for path in made(tmp_path)} == {tmp_path / "mine" / "prepared"}
    locked.append(tmp_path / "mine")
    check(load(place, tmp_path / "mine"))  # it is there already
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(data, "PROJECT_DATA", tmp_path / "project")
    check(load(place, tmp_path / "mine", size=32))
    assert list((tmp_path / "project" / "prepared").iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "PROJECT_DATA", tmp_path / "file")
    with pytest.raises(
        DataError, match="cannot be written .*set FEDSSG_DATA .or data_dir. to a folder that you may"
    ):
        load(place, tmp_path / "mine", size=40)


def test_many_images_lie_in_files_and_are_the_same(tmp_path, monkeypatch):
    d = load(folders(tmp_path / "a", ("a", "b", "c"), 20))
    assert not isinstance(files.room((3, 3)), np.memmap)
    runs_of = []
    for most in (files.IN_MEMORY, 1000):
        monkeypatch.setattr(files, "IN_MEMORY", most)
        subset = d.subset(np.arange(5, 50))
        assert isinstance(subset.images, np.memmap) == (most == 1000)
        np.testing.assert_array_equal(subset.images, d.images[5:50])
        federation = partition.federate(d, count=3)
        joined = partition.Client.joined(federation.clients)
        again = joined.take(torch.arange(len(joined)) % 2 == 0)
        assert torch.equal(again.images, joined.images[::2]) and torch.equal(again.labels, joined.labels[::2])
        assert torch.equal(joined.take([3]).images, joined.images[3:4])
        method = METHODS["fedssg"]
        with server.one_thread():
            runs_of.append(
                (server.run(federation, method, 0, rounds=1).weights, sharing.channel_sums(joined, 1))
            )
    np.testing.assert_array_equal(runs_of[0][0], runs_of[1][0])
    assert torch.equal(runs_of[0][1], runs_of[1][1])


def test_a_full_disk_is_named(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match="no room for 95 MiB of images .*FEDSSG_OUT"):
        files.room((100, 1000, 1000))


PEAK = """
import sys, threading, time
import numpy as np
from fedssg_helpers import data, models, partition, server
from fedssg_helpers.methods import METHODS
from fedssg_helpers.server import one_thread
n, file = int(sys.argv[1]), sys.argv[2]
images = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(n, 3, 224, 224))
images = np.load(file, mmap_mode="r")
random = np.random.default_rng(0)
labels, device = random.integers(0, 4, n), random.integers(0, 2, n)
peak = [0]
def now():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) >> 10
def watch():
    while True:
        peak[0] = max(peak[0], now())
        time.sleep(0.01)
base = now()
threading.Thread(target=watch, daemon=True).start()
d = data.ImageSet("made up", images, labels, device, np.arange(n), tuple("abcd"), ("x", "y"), "", False)
train = d.subset(partition.split(d)[0])
federation = partition.federate(d, count=4)
with server.in_process(federation, METHODS["fedavg"], 0) as channel, one_thread():
    for k, answer, why in channel.ask("report", dict.fromkeys(range(4), {"styles": True})):
        assert not why, why
    for hospital in channel.hospitals:
        hospital.orientations
        hospital.keep(hospital.data.take(slice(50)))
        hospital.training
    channel.hospitals[0].test = channel.hospitals[0].test.take(slice(60))
    content = {"weights": models.SmallCNN(3, 4).weights, "method": METHODS["fedavg"]}
    for k, answer, why in channel.ask("test", {0: content}):
        assert not why, why
print(peak[0] - base, n * 3 * 224 * 224 >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not say what memory is used for"
)
def test_a_federation_is_not_held_in_memory(tmp_path):
    command = [sys.executable, "-c", PEAK, "2000", str(tmp_path / "images.npy")]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"FEDSSG_OUT": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    peak, whole = map(int, result.stdout.split())
    print(f"\npeak {peak} MiB for {whole} MiB of images")
    assert peak < 500  # held in memory, these copies take a thousand


def test_what_is_wrong_with_a_folder_is_said_once_and_not_by_every_worker(tmp_path):
    place = folders(tmp_path / "skin")
    (place / "nv" / "torn.png").write_bytes(b"no picture")
    jobs = f"[runs.Job('fedavg', s, 1, {str(place)!r}, hospitals=2) for s in (0, 1, 2)]"
    code = f"from fedssg_helpers import runs; runs.run_many({jobs}, {str(tmp_path / 'out')!r}, workers=2)"
    known = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    result = subprocess.run([sys.executable, "-c", code], **known)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("left out are") == 1 and len(list((tmp_path / "out" / "cache").iterdir())) == 3


# ---------------------------------------- the command


def test_the_command_names_the_output_after_the_folder(tmp_path, monkeypatch, capsys):
    outs = []
    monkeypatch.setattr(
        course, "run", lambda paths, parameters, out, *_, **__: outs.append((out, parameters))
    )
    monkeypatch.setattr(course, "ROOT", tmp_path)
    folders(tmp_path / "x" / "skin.v2")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for words in (
        ["--data", str(tmp_path / "x" / "skin.v2")],
        ["--data", "../x/skin.v2"],
        ["--data", "skin.v2"],
    ):
        assert (
            main(["run", "--only", "00", "--data-dir", str(tmp_path / "x"), *words, "-p", "hospitals", "2"])
            == 0
        ), capsys.readouterr().err
    assert outs[0][0] == outs[1][0] and {out.name[:12] for out, _ in outs} == {"run-skin.v2-"}
    assert [next(iter(p.values()))["data"] for _, p in outs] == [
        *2 * [str(tmp_path / "x" / "skin.v2")],
        "skin.v2",
    ]
    assert main(["run", "--only", "00", "--data", str(tmp_path / "here")]) == 2
    assert "holds no picture" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("lesson", ["00", "03"])
def test_lessons_run_on_a_folder_of_all_kinds(tmp_path, lesson, capsys):
    place = folders(tmp_path / "Bilder ü", ("mel", "nv"), 40)
    for c in ("mel", "nv"):
        for kind, (image, options) in KINDS.items():
            image.save(place / c / kind, **options)
    (place / "nv" / "cut.png").write_bytes((place / "nv" / "0.png").read_bytes()[:500])
    words = ["--data", str(place), "--size", "32", "-p", "hospitals", "3", "--out", str(tmp_path / "out")]
    assert main(["run", "--only", lesson, *words]) == 0, capsys.readouterr().err
    assert list((tmp_path / "out" / "notebooks").glob(f"{lesson}_*.ipynb"))
