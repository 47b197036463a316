"""The runner, on throw-away lessons of a few lines."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fedssg_helpers import __main__ as command
from fedssg_helpers import course, data, runs
from fedssg_helpers.__main__ import main

PARAMETERS = """data: str = "phantom"  # data set
data_dir: str = ""  # its folder
out: str = ""  # folder
size: int = 28  # pixels
seed: int = 0  # first seed (0 or more)
alpha: float = 0.3  # skew (above 0)
rounds: int = 2  # rounds (1 to 500)"""
PICTURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
SPEC = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def write(path: Path, *sources: str, title: str = "A lesson") -> None:
    """A lesson: introduction, parameters, one cell per source; the last is the headline."""
    notebook = new_notebook(metadata={"kernelspec": SPEC})
    cells = [
        new_markdown_cell(f"# {title}\n\nA sentence."),
        new_code_cell(PARAMETERS),
        *map(new_code_cell, sources),
    ]
    cells[1].metadata.tags = ["parameters"]
    cells[-1].metadata.tags = ["headline"]
    for number, cell in enumerate(cells):
        cell.id = f"{path.stem}-{number}"
    notebook.cells = cells
    nbformat.write(notebook, path)


def log(word: str) -> str:
    return f"print(word := {word!r} + f' {{rounds}} {{alpha}}', file=open('log.txt', 'a'))"


PHANTOM = data.load("phantom")  # once: the tests below are about running, not about loading


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two lessons that note in log.txt that they ran; the second fails where a file `broken` exists."""
    monkeypatch.setattr(data, "load", lambda *a, **k: PHANTOM)
    monkeypatch.setattr(command, "step_seconds", lambda *_: command.STEP)  # `doctor`'s test measures it
    monkeypatch.setenv("FEDSSG_DATA", "")
    lessons = tmp_path / "lessons {seed} {x}"  # braces mean nothing to us, but to papermill
    lessons.mkdir()
    write(lessons / "00_first.ipynb", log("first"), PICTURE, title="Start & go")
    check = "# does it hold?\nimport os\nassert not os.path.exists('broken'), 'told to fail'"
    results = "open(f'{out}/results.csv', 'w').write('dataset,setting,method,seed,metric,value');"
    write(lessons / "01_second.ipynb", log("second"), check, results, PICTURE, title="Second")
    write(lessons / "explorer.ipynb", "raise SystemError('not a lesson')")
    return lessons


@pytest.fixture
def quick(folder, monkeypatch):
    """The two lessons, executed without a kernel: each notes in log.txt that it ran, and fails as it would."""

    def execute(path, target, parameters, title):
        notebook = nbformat.read(path, 4)
        failed = path.stem == "01_second" and (folder / "broken").exists()
        notebook.metadata.papermill = {"parameters": parameters, "exception": failed, "duration": 1.0}
        nbformat.write(notebook, target)
        with (folder / "log.txt").open("a") as file:
            file.write(f"{path.stem}\n")
        if failed:
            raise course.CourseError("told to fail", code=1)

    monkeypatch.setattr(course, "execute", execute)
    return folder


def start(folder: Path, out: Path, *words: str) -> int:
    return main(["run", "--lessons", str(folder), "--out", str(out), *words])


def test_a_run_with_a_failing_cell_and_its_resumption(folder, tmp_path, monkeypatch, capsys):
    # A kernel of the same name elsewhere and another plotting back end must not get in the way.
    foreign = tmp_path / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    (folder / "broken").touch()
    out = tmp_path / "out {data} {"
    words = ["-p", "rounds", "7", "-p", "alpha", "1"]

    assert start(folder, out, *words) == 1
    said = capsys.readouterr().err
    assert "00_first (1 of 2)" in said and "5/5 cells" in said
    assert "01_second.ipynb, cell 4 of 6 (In [4]) failed" in said
    assert "# does it hold?" in said and "AssertionError: told to fail" in said
    assert "--resume" in said and "Traceback" not in said and "WARNING" not in said
    kept = out / "notebooks" / "01_second.ipynb"
    assert f"as far as it ran: {kept}" in said and "told to fail" in kept.read_text()

    (folder / "broken").unlink()
    assert start(folder, out, *words, "--resume") == 0
    said = capsys.readouterr().out
    assert "00_first: done before" in said and f"{out / 'notebooks'}. Pages: make book" in said
    assert (folder / "log.txt").read_text() == "first 7 1.0\nsecond 7 1.0\nsecond 7 1.0\n"
    assert {path.name for path in out.iterdir()} == {"results.csv", "notebooks", course.LOCK}
    assert {path.stem for path in (out / "notebooks").iterdir()} == {"00_first", "01_second"}
    ran = nbformat.read(out / "notebooks" / "00_first.ipynb", as_version=4).metadata.papermill
    assert ran.parameters == {
        "data": "phantom",
        "data_dir": "",
        "out": str(out),
        "size": 28,
        "rounds": 7,
        "alpha": 1.0,
    }


def test_what_is_done_is_skipped_only_if_nothing_changed(quick, tmp_path, monkeypatch):
    def ran(*words):
        (quick / "log.txt").write_text("")
        assert start(quick, tmp_path / "out", *words) == 0
        return (quick / "log.txt").read_text().split()

    both = ["00_first", "01_second"]
    assert ran() == both and ran() == both and ran("--resume") == []
    assert ran("--resume", "-p", "seed", "5", "--only", "00") == ["00_first"], "other parameters"
    assert ran("--resume", "-p", "seed", "5") == ["01_second"]
    write(quick / "00_first.ipynb", "1 + 1")
    assert ran("--resume", "-p", "seed", "5") == ["00_first"], "another source"
    for digest in ("data_digest", "code_digest"):
        monkeypatch.setattr(runs, digest, lambda *_: "another")
        assert ran("--resume", "-p", "seed", "5") == both, digest
        assert ran("--resume", "-p", "seed", "5") == []
    assert ran("--only", "01") == ["01_second"], "chosen by name: runs again, and leaves the rest alone"
    assert {path.stem for path in (tmp_path / "out" / "notebooks").iterdir()} == set(both)


def test_a_fresh_run_clears_only_what_a_run_made(quick, tmp_path):
    out = tmp_path / "out"
    made = ["cache/x.npz", "notebooks/02_c.ipynb", "results.csv"]

    def left(*words):
        assert start(quick, out, *words) == 0
        return {name for name in [*made, "notes.txt"] if (out / name).exists()}

    assert left() == set()
    (out / "cache").mkdir()
    for name in [*made, "notes.txt"]:
        (out / name).touch()
    nbformat.write(nbformat.read(out / "notebooks" / "00_first.ipynb", 4), out / "notebooks" / "02_c.ipynb")
    assert left("--resume") == left("--only", "00") == {*made, "notes.txt"}
    assert left() == {"notes.txt"}


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "-p round 3",
            "no lesson has a parameter 'round'; known here: alpha, data, data_dir, out, rounds, seed, size",
        ),
        ("-p rounds many", "parameter 'rounds' must be a whole number, not 'many'"),
        ("-p data ham10000", "set 'data' with --data"),
        ("--only 07", "no lesson starts with '07' in "),
        ("--only=", "no lesson starts with '' in "),
        ("-p alpha -1", "parameter 'alpha' is -1; it must be above 0"),
        ("-p alpha -1e-3", "parameter 'alpha' is -1e-3; it must be above 0"),
        ("-p alpha 0", "parameter 'alpha' is 0; it must be above 0"),
        ("-p alpha inf", "parameter 'alpha' is inf; it must be above 0"),
        ("-p alpha nan", "parameter 'alpha' is nan; it must be above 0"),
        ("-p rounds -3", "parameter 'rounds' is -3; it must be 1 to 500"),
        ("-p rounds 501", "parameter 'rounds' is 501; it must be 1 to 500"),
        ("-p seed -1", "parameter 'seed' is -1; it must be 0 or more"),
    ],
)
def test_wrong_words_stop_before_anything_runs(folder, tmp_path, capsys, words, said):
    assert start(folder, tmp_path / "out", *words.split()) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not (folder / "log.txt").exists()


def test_bad_data_is_one_sentence(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the real data.load
    assert start(folder, tmp_path / "out", "--data", str(tmp_path / "missing.npz")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "missing.npz" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not (folder / "log.txt").exists()


def test_foreign_or_unwritable_output_folder_is_refused(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert start(folder, tmp_path) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert start(folder, tmp_path / "mine.txt" / "out") == 2
    assert "cannot read or write" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me" and not (folder / "log.txt").exists()


def test_a_dead_kernel_is_named_and_not_taken_for_done(folder, tmp_path, capsys):
    write(folder / "00_first.ipynb", "import os\nos._exit(9)")
    assert start(folder, tmp_path / "out", "--only", "00") == 1
    assert "00_first.ipynb, cell 3 of 3: the kernel died" in capsys.readouterr().err
    kept = nbformat.read(tmp_path / "out" / "notebooks" / "00_first.ipynb", as_version=4)
    assert kept.metadata.papermill.exception
    parameters = course.chosen([folder / "00_first.ipynb"], {"data": "phantom"}, {})
    assert not course.done(folder / "00_first.ipynb", tmp_path / "out", *parameters.values(), "")


def test_keyboard_stop_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "run", stopped)
    assert start(folder, tmp_path / "out") == 130
    assert "--resume" in capsys.readouterr().err


def test_after_a_keyboard_stop_nothing_more_is_said(folder, tmp_path):
    """As in a terminal: the signal reaches all processes of the group, in the middle of a comparison."""
    code = """
from fedssg_helpers import runs
runs.run_many([runs.Job('fedavg', s, 500) for s in (0, 1)], out)
"""
    write(folder / "00_first.ipynb", code)
    words = ["run", "--lessons", str(folder), "--out", str(tmp_path / "out"), "--only", "00"]
    command = [sys.executable, "-m", "fedssg_helpers", *words]
    with (tmp_path / "said").open("w") as file:
        known = {"cwd": course.ROOT, "stdout": file, "stderr": file}
        # A shell starts what runs in the background deaf to Ctrl-C: here it listens, as in a terminal.
        known |= {
            "start_new_session": True,
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        }
        process = subprocess.Popen(command, **known)
        while not list((tmp_path / "out").glob("cache/*.state.npz")):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    said = (tmp_path / "said").read_text()
    assert process.returncode == 130 and "Traceback" not in said
    assert said.split("Stopped.")[1].strip().endswith("--resume.") and len(said.split("Stopped.")[1]) < 100


def test_an_appendix_runs_only_where_it_is_named(folder):
    write(folder / "A1_more.ipynb", PICTURE)
    assert [path.stem for path in course.lessons(folder)] == ["00_first", "01_second"]
    assert [path.stem for path in course.lessons(folder, ["A1"])] == ["A1_more"]
    assert [path.stem for path in course.lessons(folder, ["A1", "01"])] == ["01_second", "A1_more"]
    assert [path.stem for path in course.lessons(folder, ["explorer"])] == ["explorer"]
    with pytest.raises(course.CourseError, match="A1_more"):
        course.lessons(folder, ["A1", "07"])


def test_parameters_go_only_where_they_are_declared(folder):
    first, second = course.lessons(folder)
    notebook = nbformat.read(second, as_version=4)
    notebook.cells[1].source = "rounds: int = 1\nshow: bool = True\nname: str = 'x'"
    nbformat.write(notebook, second)
    common = {"data": "phantom", "size": 64} | course.PROFILES["full"]
    parameters = course.chosen([first, second], common, {"show": "false", "alpha": "2", "name": "1"})
    assert parameters[first] == {"data": "phantom", "size": 64, "rounds": 40, "alpha": 2.0}
    assert parameters[second] == {"rounds": 40, "show": False, "name": "1"}


def test_refresh_rewrites_in_place_without_traces(folder, monkeypatch):
    monkeypatch.setenv("FEDSSG_DATA", "/nowhere")
    noisy = "import sys, ipywidgets\nprint('numbers')\nprint('noise', file=sys.stderr)\nipywidgets.Button()"
    fresh = "import os\nassert os.path.isdir(os.environ['FEDSSG_OUT']) and not os.environ['FEDSSG_DATA']"
    path = folder / "00_first.ipynb"
    write(path, noisy, fresh, "", PICTURE)
    refresh = runpy.run_path(str(course.ROOT / ".ci" / "refresh.py"))["refresh"]
    refresh([path])
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [cell.id for cell in notebook.cells] == [f"00_first-{n}" for n in range(6)]
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, 2, 3, None, 4]
    assert [output.get("text") for output in notebook.cells[2].outputs] == ["numbers\n"]
    assert notebook.cells[5].metadata == {"tags": ["headline"]}
    picture = base64.b64encode((folder / "images" / "00_first.png").read_bytes()).decode()
    assert picture == course.headline(notebook)
    before = path.read_bytes()
    monkeypatch.setattr(course, "execute", lambda *a: (_ for _ in ()).throw(course.CourseError("no", 1)))
    with pytest.raises(course.CourseError):
        refresh([path])
    assert path.read_bytes() == before


def test_stripped():
    button = {"text/plain": "Button()", "application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
    cell = new_code_cell("show()", execution_count=1, metadata={"papermill": {}, "tags": ["headline"]})
    cell.outputs = [
        new_output("stream", name="stderr", text="bar"),
        new_output("display_data", button),
        new_output("execute_result", {"text/plain": "7"}, execution_count=1),
    ]
    notebook = new_notebook(cells=[cell], metadata={"widgets": {"state": {}}, "papermill": {}})
    committed = runpy.run_path(str(course.ROOT / ".ci" / "refresh.py"))["stripped"](notebook)
    assert [output.data for output in committed.cells[0].outputs] == [{"text/plain": "7"}]
    assert committed.cells[0].metadata == {"tags": ["headline"]}
    assert set(committed.metadata) == {"kernelspec", "language_info"}


def test_doctor_answers_fast():
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-m", "fedssg_helpers", "doctor"], cwd=course.ROOT, capture_output=True, text=True
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 10, "seconds of work; a clock on the wall would measure the machine's other business"
    assert "Traceback" not in result.stderr
    lines = {line[9:29].strip(): line.split()[0] for line in result.stdout.splitlines() if line[:1] in "OM"}
    assert {"torch pair", "kernel", "widgets", "files", "disk", "time"} <= set(lines)
    assert any(name.startswith("torch>=") for name in lines)
    assert result.returncode == int("MISSING" in lines.values())
    assert "'make course' takes about" in result.stdout


def test_two_files_of_one_name_write_to_two_folders(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "ROOT", tmp_path)
    outs = []
    monkeypatch.setattr(course, "run", lambda paths, parameters, out, *_, **__: outs.append(out))
    for place in ("a", "b", "a"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "images.npz").touch()
        assert main(["run", "--lessons", str(folder), "--data", str(tmp_path / place / "images.npz")]) == 0
    assert outs[0] == outs[2] != outs[1] and outs[0].name.startswith("run-images-")


def test_a_relative_name_is_looked_up_in_the_data_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    images = np.random.default_rng(0).integers(0, 255, (40, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "own" / "x.npz", images=images, labels=np.arange(40) % 2)
    write(
        folder / "00_first.ipynb",
        "from fedssg_helpers import runs\nassert len(runs.images_of(data, data_dir)) == 40",
    )
    words = ["--only", "00", "--data", "x.npz"]
    assert start(folder, tmp_path / "out", *words) == 2
    assert "no such file" in capsys.readouterr().err
    assert start(folder, tmp_path / "out", *words, "--data-dir", "own") == 0


def test_the_time_is_said_beforehand(quick, tmp_path, capsys, monkeypatch):
    for name in ("00_first", "01_second"):
        (quick / f"{name}.ipynb").rename(quick / f"{name.replace('01', '04')}.ipynb")
    assert start(quick, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert re.match(r"About \d+ minutes? on this machine\.\n", said), "before anything else"
    monkeypatch.setattr(command, "step_seconds", lambda channels, size: 30 * command.STEP)
    assert start(quick, tmp_path / "out", "-p", "rounds", "30") == 0
    long, short = map(
        int, re.match(r"About (\d+) .*; -p rounds 5 makes it (\d+)\.", capsys.readouterr().out).groups()
    )
    assert 15 < short < 0.7 * long
    (quick / "04_second.ipynb").rename(quick / "A1_second.ipynb")
    assert start(quick, tmp_path / "out", "--only", "A1") == 0
    assert "on this machine; appendices are not counted.\n" in capsys.readouterr().out


def test_the_estimate_follows_what_takes_time(monkeypatch):
    monkeypatch.setattr(command, "step_seconds", lambda channels, size: command.STEP * (size / 28) ** 2)
    every = dict.fromkeys(course.lessons(), {})
    plain = command.seconds_of(every)
    assert 200 < plain < 600, "of the quick profile"
    assert set(command.TAKES) == {path.name[:2] for path in every}, "each lesson has its place"
    longer = {path: {"rounds": 40, "seeds": 3} for path in every}
    assert command.seconds_of(longer) > 1.2 * plain
    assert (
        command.seconds_of(every, images=20_000) > 1.4 * plain
        and command.seconds_of(every, size=64) > 2 * plain
    )
    assert command.seconds_of(dict(list(every.items())[:1])) < plain / 3
