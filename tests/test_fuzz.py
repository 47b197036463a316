"""Damaged data files: the command never hangs, shows no traceback, and names the file and the cause every time."""

from __future__ import annotations

import signal

import damage
import numpy as np
import pytest

from fedssg_helpers import course, data, files
from fedssg_helpers.__main__ import main

WAYS = damage.BYTES, damage.IMAGES, damage.LABELS, damage.DEVICE, damage.NAMES, damage.GROUP, damage.TABLE


class Hang(BaseException):
    """No Exception: nothing on the way may catch it."""


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """`python -m fedssg_helpers run` on a data set, until the lessons would start; gives (status, stderr)."""

    def start(*args, **options):
        raise AssertionError("the lessons would have run on damaged data")

    monkeypatch.setattr(course, "run", start)

    def alarm(*args):
        raise Hang("one file took more than a minute")

    before = signal.signal(signal.SIGALRM, alarm)

    def run(name: str, folder) -> tuple[int, str]:
        signal.alarm(60)
        out = tmp_path / "out"
        status = main(["run", "--only", "00", "--data", name, "--data-dir", str(folder), "--out", str(out)])
        signal.alarm(0)
        return status, capsys.readouterr().err

    yield run
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_every_damaged_file_is_named_with_the_cause(command, tmp_path):
    ways, named = set(), 0
    for way, name, folder, file in damage.files(tmp_path / "data"):
        status, error = command(name, folder)
        error = error[error.index("error: ") :]  # before it, a progress bar may have started
        assert status == 2 and str(folder) in error and file.name in error, (way, error)
        assert "Traceback" not in error and len(error.splitlines()) == 1 and len(error) < 2000, (way, error)
        cause = error.partition(str(folder))[2]
        assert len(cause) > 40, (way, error)
        ways.add(way)
        named += 1
    assert named == 300
    assert not (tmp_path / "out").exists() and len(ways) > 0.9 * sum(map(len, WAYS))


def test_the_same_files_undamaged_are_good(command, tmp_path, monkeypatch):
    """Otherwise the test above would pass on anything."""
    for group in WAYS:
        for way in group:
            same = (
                (lambda good, random: good.encode()) if group is damage.TABLE else lambda good, random: good
            )
            monkeypatch.setitem(group, way, same)
    monkeypatch.setattr(damage, "BY_CHANCE", ())
    for _, name, folder, _ in damage.files(tmp_path / "data", 8):
        assert len(data.load(name, folder)) in (damage.N, 14)
        with pytest.raises(AssertionError, match="would have run"):
            command(name, folder)


def test_the_damage_is_the_same_every_time(tmp_path):
    one, two = (
        [(way, file.read_bytes()) for way, _, _, file in damage.files(tmp_path / name, 24)] for name in "ab"
    )
    assert one == two
    other = [(way, file.read_bytes()) for way, _, _, file in damage.files(tmp_path / "c", 24, seed=1)]
    assert one != other


def test_a_folder_in_place_of_a_file(command, tmp_path):
    (tmp_path / "mine.npz").mkdir()
    status, error = command(str(tmp_path / "mine.npz"), tmp_path)
    assert status == 2 and "mine.npz: there is no such file" in error


class Trap:
    """Unpickled, it leaves a mark: proof that code of the data has run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("key", ["images", "labels", "device", "group", "class_names", "extra"])
def test_no_code_in_data_is_ever_run(command, tmp_path, key):
    trap = np.empty(3, object)
    trap[:] = Trap(tmp_path / "mark")
    np.savez(tmp_path / "trap.npz", **damage._arrays("own") | {key: trap})
    status, error = command(str(tmp_path / "trap.npz"), tmp_path)
    assert status == 2 and "never loaded" in error and not (tmp_path / "mark").exists()
    with np.load(tmp_path / "trap.npz", allow_pickle=True) as file:
        file[key]
    assert (tmp_path / "mark").exists()  # the trap works


def test_a_bomb_is_refused_before_it_is_unpacked(command, tmp_path, monkeypatch):
    np.savez_compressed(
        tmp_path / "bomb.npz", images=np.zeros((40_000, 28, 28), np.uint8), labels=np.zeros(40_000)
    )
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    monkeypatch.setattr(files, "MOST_BYTES", 2**20)
    monkeypatch.setattr(np, "load", None)
    status, error = command(str(tmp_path / "bomb.npz"), tmp_path)
    assert status == 2 and "unpacks to" in error
