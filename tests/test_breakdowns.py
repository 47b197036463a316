"""Broken disks, downloads and files, and two runs at once: a clear error, and nothing lost."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_course import PHANTOM, PICTURE, log, write
from test_data import medmnist_file, publisher

from fedssg_helpers import __main__ as command
from fedssg_helpers import course, data, runs
from fedssg_helpers.__main__ import main


@pytest.fixture
def folder(tmp_path):
    """Two lessons that note in log.txt that they ran."""
    lessons = tmp_path / "lessons"
    lessons.mkdir()
    write(lessons / "00_first.ipynb", log("first"), PICTURE, title="First")
    write(lessons / "01_second.ipynb", log("second"), PICTURE, title="Second")
    return lessons


@pytest.fixture(autouse=True)
def phantom(monkeypatch):
    load = data.load
    monkeypatch.setattr(data, "load", lambda name, *rest: PHANTOM if name == "phantom" else load(name, *rest))
    monkeypatch.setattr(command, "step_seconds", lambda *_: command.STEP)
    runs.images_of.cache_clear()


def start(lessons: Path, out: Path, *words: str) -> int:
    return main(["run", "--lessons", str(lessons), "--out", str(out), *words])


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------- disk full, read-only


def test_a_full_disk_is_named_and_the_run_goes_on_later(folder, tmp_path, capsys, request):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a small file system")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(disk)]))
    write(folder / "01_second.ipynb", log("second"), "print('x' * 9_000_000)", PICTURE, title="Second")
    assert start(folder, disk / "out") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(disk / "out") in said and "--resume" in said
    assert "Traceback" not in said
    assert "First" in (disk / "out" / "notebooks" / "00_first.ipynb").read_text()
    assert not list((disk / "out").glob("*.part"))
    assert subprocess.run(["mount", "-o", "remount,size=90m", str(disk)]).returncode == 0
    assert start(folder, disk / "out", "--resume") == 0
    assert (folder / "log.txt").read_text().split()[::3] == ["first", "second", "second"]
    assert course.read(disk / "out" / "notebooks" / "01_second.ipynb").metadata.papermill.made_from


def test_no_space_for_a_file_keeps_the_old_one(tmp_path, monkeypatch):
    course.save_text(tmp_path / "file.txt", "old")

    def half(path, text, encoding):
        with path.open("w") as stream:
            stream.write(text[:2])
        full()

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        course.save_text(tmp_path / "file.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_no_space_for_the_prepared_ham10000(tmp_path, monkeypatch, capsys):
    publisher(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full)
        assert main(["run", "--only", "00", "--data", "ham10000", "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "ham10000_28.npz: cannot be written" in said and "No space left on device" in said
    assert "Traceback" not in said and not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob("tmp*"))
    assert len(data.load("ham10000", tmp_path)) == 24


def test_an_output_folder_that_cannot_be_written(folder, tmp_path, monkeypatch, capsys):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)  # root, who may write anywhere, runs this test too
    assert start(folder, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"cannot read or write {tmp_path / 'out'}: Permission denied" in said and "Traceback" not in said
    assert not (folder / "log.txt").exists()


# ---------------------------------------- two runs at once


SLOW = "import time, pathlib\npathlib.Path('running').touch()\ntime.sleep(60)"


def background(folder: Path, out: Path) -> subprocess.Popen:
    """A run of a lesson that takes a minute, in a process of its own; returned once the lesson is running."""
    write(folder / "00_first.ipynb", SLOW, PICTURE, title="Slow")
    words = ["run", "--lessons", str(folder), "--out", str(out), "--only", "00"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedssg_helpers", *words],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=course.ROOT,
    )
    for _ in range(600):
        if (folder / "running").exists():
            return process
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("the run in the background did not start in a minute")


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_blocks_nobody(folder, tmp_path, capsys):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    process = background(folder, out)
    try:
        before = (out / course.LOCK).read_text()
        for words in ([], ["--resume"], ["--only", "01"]):
            assert start(folder, out, *words) == 2
            said = capsys.readouterr().err
            assert f"another run (process {process.pid}) is writing to {out}: " in said
            assert "another --out" in said
        assert (out / course.LOCK).read_text() == before and not (folder / "log.txt").exists()
        assert process.poll() is None
        assert start(folder, tmp_path / "other", "--only", "01") == 0  # another folder is free
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    write(folder / "00_first.ipynb", log("first"), PICTURE, title="First")
    assert start(folder, out, "--only", "00") == 0
    assert (folder / "log.txt").read_text().split()[::3] == ["second", "first"]


def test_the_lock_goes_with_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), course.alone(tmp_path / "out"):
        raise KeyboardInterrupt
    with course.alone(tmp_path / "out"):
        pass


# ---------------------------------------- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of MedMNIST's; `serve` says what it answers for breastmnist.npz."""
    import medmnist

    medmnist_file(tmp_path / "good.npz")
    good, answer = (tmp_path / "good.npz").read_bytes(), {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, promised, status = answer["is"]
            self.send_response(status)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    def serve(content: bytes, promised: int = 0, status: int = 200):
        answer["is"] = content, promised or len(content), status

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        info = medmnist.INFO["breastmnist"]
        monkeypatch.setitem(info, "url", f"http://127.0.0.1:{http_server.server_port}/breastmnist.npz")
        monkeypatch.setitem(info, "MD5", hashlib.md5(good).hexdigest())
        yield serve, good
        http_server.shutdown()


@pytest.mark.parametrize("fault", ["wrong checksum", "interrupted", "a web page", "not found", "nothing"])
def test_a_bad_download_is_named_and_leaves_nothing(server, tmp_path, capsys, fault):
    serve, good = server
    flipped = good[:100] + bytes([good[100] ^ 1]) + good[101:]
    serve(
        *{
            "wrong checksum": (flipped,),
            "interrupted": (good[: len(good) // 2], len(good)),
            "nothing": (b"",),
            "a web page": (b"<html>sign in</html>",),
            "not found": (b"gone", 4, 404),
        }[fault]
    )
    folder = tmp_path / "data"
    assert main(["run", "--only", "00", "--data", "breastmnist", "--data-dir", str(folder)]) == 2
    said = capsys.readouterr().err
    said = said[said.index("error: ") :]
    assert "breastmnist.npz: not there, and downloading it failed" in said and "By hand: download" in said
    assert "Traceback" not in said and list(folder.iterdir()) == []
    serve(good)  # and the next try is not in the way of the last
    assert len(data.load("breastmnist", folder)) == 60


def test_a_download_stopped_by_hand_leaves_nothing(server, tmp_path, monkeypatch, capsys):
    from torchvision.datasets import utils

    def stopped(url, root, filename, md5):
        Path(root, filename).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "download_url", stopped)
        folder = tmp_path / "data"
        assert main(["run", "--only", "00", "--data", "breastmnist", "--data-dir", str(folder)]) == 130
    assert list(folder.iterdir()) == []
    server[0](server[1])
    assert len(data.load("breastmnist", folder)) == 60


# ---------------------------------------- damaged results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    job = runs.Job("fedavg", rounds=1, hospitals=3)
    return job, runs.execute(job, out), runs.cache_file(job, out).read_bytes()


@pytest.mark.parametrize("fault", ["cut", "flipped", "empty", "text", "another run's", "pickled"])
def test_a_damaged_run_in_the_cache_is_named_with_the_cure_and_its_deletion_mends_it(
    finished, tmp_path, fault
):
    job, run, good = finished
    file = runs.cache_file(job, tmp_path)
    file.parent.mkdir()
    if fault == "another run's":
        runs.save(run, file, "something else")
    elif fault == "pickled":
        with file.open("wb") as stream:
            np.savez(stream, weights=np.array([{}], object))
    else:
        middle = len(good) // 2
        file.write_bytes(
            {
                "cut": good[:middle],
                "empty": b"",
                "text": b"no run" * 99,
                "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
            }[fault]
        )
    with pytest.raises(ValueError) as caught:
        runs.execute(job, tmp_path)
    assert str(file) in str(caught.value) and "delete it" in str(caught.value)
    file.unlink()
    assert np.array_equal(runs.execute(job, tmp_path).weights, run.weights)
