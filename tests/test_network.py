"""Safe to open at a school: nothing leaves this machine unless a data set is asked for, and no data is ever code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest

from fedssg_helpers import course

# Loaded by every Python process of a test, the notebooks' kernels too: a word to anybody but this machine itself is
# noted and fails. (Kernels talk to the command over loopback.)
GUARD = """
import os, sys

def guard(event, args):
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = args
    elif event == "urllib.Request":
        address = (args[0].split("//")[-1].split("/")[0].split(":")[0],)
    else:
        return
    host = address[0] if isinstance(address, tuple) else ""  # a path: a socket of this machine
    host = host.decode() if isinstance(host, bytes) else host
    if host and host not in ("localhost", "::1", "0.0.0.0", "::") and not host.startswith("127."):
        with open(os.environ["GUARD_LOG"], "a") as log:
            log.write(f"{event} {host}\\n")
        raise ConnectionError(f"no network in this test: {event} {host}")

sys.addaudithook(guard)
"""


@pytest.fixture
def guarded(tmp_path):
    """Runs Python with the guard; gives (finished process, what was noted)."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    log = tmp_path / "log.txt"

    def run(*words: str):
        places = [str(tmp_path / "guard"), str(course.ROOT), os.environ.get("PYTHONPATH", "")]
        setting = {
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
            "GUARD_LOG": str(log),
            "FEDSSG_DATA": "",
            "HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, *words], env=os.environ | setting, capture_output=True, text=True, cwd=tmp_path
        )
        return done, log.read_text() if log.exists() else ""

    return run


def test_the_guard_works(guarded):
    done, noted = guarded("-c", "import urllib.request as u; u.urlopen('http://192.0.2.1/x')")
    assert done.returncode == 1 and "no network in this test" in done.stderr and "192.0.2.1" in noted
    done, noted = guarded("-c", "import socket; socket.create_connection(('example.org', 80))")
    assert done.returncode == 1 and "getaddrinfo example.org" in noted


def test_importing_loading_and_training_stay_on_this_machine(guarded):
    modules = sorted(path.stem for path in (course.ROOT / "fedssg_helpers").glob("[a-z]*.py"))
    assert len(modules) >= 16
    work = f"""
import importlib
for name in {modules}:
    importlib.import_module("fedssg_helpers." + name)
from fedssg_helpers import data, methods, partition, server
federation = partition.federate(data.load("phantom").subset(range(400)), 0, count=3)
server.run(federation, methods.Method(sharing=methods.Sharing(pretrain_steps=4)), 0, rounds=1)
print("done")
"""
    done, noted = guarded("-c", work)
    assert done.stdout.endswith("done\n"), done.stderr
    assert noted == ""


def test_a_lesson_stays_on_this_machine(guarded, tmp_path):
    done, noted = guarded("-m", "fedssg_helpers", "run", "--only", "01", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert noted == ""


def test_only_a_data_set_that_is_asked_for_is_fetched(guarded, tmp_path):
    done, noted = guarded(
        "-m",
        "fedssg_helpers",
        "run",
        "--only",
        "01",
        "--data",
        "breastmnist",
        "--data-dir",
        str(tmp_path / "data"),
    )
    assert done.returncode == 2 and "downloading it failed" in done.stderr and "Traceback" not in done.stderr
    assert {line.split()[1] for line in noted.splitlines()} == {"zenodo.org"}


# --- data are never code ---


def sources():
    """Every Python source of the course: (where, text)."""
    for path in [*(course.ROOT / "fedssg_helpers").glob("*.py"), *(course.ROOT / "data").glob("*.py")]:
        yield path.name, path.read_text(encoding="utf-8")
    for path in (course.ROOT / "notebooks").rglob("*.py"):
        yield path.name, path.read_text(encoding="utf-8")
    for path in (course.ROOT / "notebooks").glob("*.ipynb"):
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                yield f"{path.name}, cell {number}", re.sub(r"^[%!].*", "pass", cell.source, flags=re.M)


UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}  # modules that turn data into code
CALLS = {"eval", "exec", "compile", "__import__"}  # Python's own; a network's eval() is another
# Where jobs are packed for worker processes of the same user, and how often each is unpacked: never from a file.
WORKERS = {"runs.py": 1, "privacy.py": 1, "described.py": 0}


def test_no_source_turns_data_into_code():
    loads, unpacked = 0, dict.fromkeys(WORKERS, 0)
    for where, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                unsafe = {name.split(".")[0] for name in names} & UNSAFE
                assert not unsafe or where in WORKERS and isinstance(node, ast.Import), (
                    f"{where}: imports {names}"
                )
            if isinstance(node, ast.Call):
                owner = getattr(getattr(node.func, "value", None), "id", "")
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                assert not (isinstance(node.func, ast.Name) and name in CALLS), f"{where}: calls {name}"
                assert name != "read_pickle", f"{where}: calls {name}"
                assert (owner, name) != ("torch", "load") or given.get("weights_only") is True, (
                    f"{where}: torch.load"
                )
                if owner in UNSAFE and name != "dumps":
                    assert name == "loads", f"{where}: {owner}.{name}"
                    unpacked[where] += 1
                if (owner, name) in (("np", "load"), ("numpy", "load")):
                    assert given.get("allow_pickle") is False, f"{where}: np.load without allow_pickle=False"
                    loads += 1
    assert loads >= 2 and unpacked == WORKERS  # the search finds what it looks for
