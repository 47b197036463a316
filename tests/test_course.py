"""The runner, on throw-away lessons of a few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fedssg_helpers import course, data, pages
from fedssg_helpers.__main__ import main

PARAMETERS = """data: str = "phantom"  # data set
out: str = ""  # folder
seed: int = 0  # first seed
alpha: float = 0.3  # skew
rounds: int = 2  # rounds"""
PICTURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
SPEC = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def write(path: Path, *sources: str, title: str = "A lesson") -> None:
    """A lesson: introduction, parameters, one cell per source; the last is the headline."""
    notebook = new_notebook(metadata={"kernelspec": SPEC})
    intro = f"# {title}\n\nIt has a **first** sentence. And more: [next](01_second.ipynb)."
    cells = [new_markdown_cell(intro), new_code_cell(PARAMETERS), *map(new_code_cell, sources)]
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
    lessons = tmp_path / "lessons"
    lessons.mkdir()
    write(lessons / "00_first.ipynb", log("first"), PICTURE, title="Start & go")
    check = "# does it hold?\nimport os\nassert not os.path.exists('broken'), 'told to fail'"
    results = "open(f'{out}/results.csv', 'w').write('dataset,setting,method,seed,metric,value');"
    write(lessons / "01_second.ipynb", log("second"), check, results, PICTURE, title="Second")
    write(lessons / "explorer.ipynb", "raise SystemError('not a lesson')")
    return lessons


def start(folder: Path, out: Path, *words: str) -> int:
    return main(["run", "--lessons", str(folder), "--out", str(out), *words])


def test_run_in_order_with_pages_and_index(folder, tmp_path, monkeypatch, capsys):
    # A kernel of the same name elsewhere and another plotting back end must not get in the way.
    foreign = tmp_path / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    out = tmp_path / "out"
    assert start(folder, out, "-p", "rounds", "7", "-p", "alpha", "1") == 0
    assert (folder / "log.txt").read_text() == "first 7 1.0\nsecond 7 1.0\n"
    assert {"00_first.html", "01_second.html", "index.html", "results.csv", "notebooks"} <= {
        path.name for path in out.iterdir()
    }
    ran = nbformat.read(out / "notebooks" / "00_first.ipynb", as_version=4)
    assert ran.metadata.papermill.parameters == {
        "data": "phantom",
        "out": str(out),
        "rounds": 7,
        "alpha": 1.0,
    }
    index = (out / "index.html").read_text()
    assert index.index("Start &amp; go") < index.index("Second")
    assert index.count("data:image/png;base64,") == 2
    assert "<p>It has a first sentence.</p>" in index and 'href="results.csv"' in index
    assert "phantom · quick profile" in index and "Not for clinical use" in index
    page = (out / "00_first.html").read_text()
    assert 'href="01_second.html"' in page and "data:image/png;base64," in page
    assert 'src=""' not in page and "require.min.js" not in page
    assert "cell 6/6" in capsys.readouterr().err


def test_failing_cell_is_named_and_resume_goes_on_there(folder, tmp_path, capsys):
    (folder / "broken").touch()
    out = tmp_path / "out"
    assert start(folder, out) == 1
    said = capsys.readouterr().err
    assert "01_second.ipynb, cell 4 of 6 (In [4]) failed" in said
    assert "# does it hold?" in said and "AssertionError: told to fail" in said
    assert "--resume" in said and "Traceback" not in said
    assert "told to fail" in (out / "01_second.html").read_text(), "the part that ran is kept"
    assert "stopped at an error" in (out / "index.html").read_text()
    (folder / "broken").unlink()
    assert start(folder, out, "--resume") == 0
    assert (folder / "log.txt").read_text().split()[::3] == ["first", "second", "second"]
    assert "stopped at an error" not in (out / "index.html").read_text()
    # Other parameters are another run, resumed or not; what is chosen by --only leaves the rest alone.
    assert start(folder, out, "--resume", "-p", "seed", "5", "--only", "00") == 0
    assert (folder / "log.txt").read_text().split()[::3] == ["first", "second", "second", "first"]
    assert set(json.loads((out / course.RECORD).read_text())["lessons"]) == {"00_first", "01_second"}


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["-p", "round", "3"],
            "no lesson has a parameter 'round'; known here: alpha, data, out, rounds, seed",
        ),
        (["-p", "rounds", "many"], "parameter 'rounds' must be a whole number, not 'many'"),
        (["-p", "data", "ham10000"], "set 'data' with --data"),
        (["--only", "07"], "no lesson starts with '07'; there are: 00_first, 01_second"),
    ],
)
def test_wrong_words_stop_before_anything_runs(folder, tmp_path, capsys, words, said):
    assert start(folder, tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_impossible_dial_is_one_sentence_before_anything_runs(folder, tmp_path, capsys):
    assert start(folder, tmp_path / "out", "-p", "alpha", "-1") == 2
    said = capsys.readouterr().err
    assert "alpha is -1.0" in said and "Traceback" not in said
    assert not (folder / "log.txt").exists()


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


def test_a_fresh_run_clears_only_what_a_run_made(tmp_path):
    paths = [Path("00_a.ipynb"), Path("01_b.ipynb")]
    made = ["cache/x.npz", "notebooks/00_a.ipynb", "00_a.html", "index.html", "results.csv"]

    def fill():
        for name in [*made, "notes.txt"]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        record = {"lessons": {"00_a": {"status": "done"}, "01_b": {"status": "done"}}}
        (tmp_path / course.RECORD).write_text(json.dumps(record))

    fill()
    assert set(course.prepare(tmp_path, paths, resume=True, everything=True)["lessons"]) == {"00_a", "01_b"}
    assert set(course.prepare(tmp_path, paths[:1], resume=False, everything=False)["lessons"]) == {"01_b"}
    assert all((tmp_path / name).exists() for name in made)
    fill()
    assert course.prepare(tmp_path, paths, resume=False, everything=True)["lessons"] == {}
    assert not any((tmp_path / name).exists() for name in made)
    assert (tmp_path / "notes.txt").exists()
    (tmp_path / course.RECORD).write_text("{")
    with pytest.raises(course.CourseError, match="damaged"):
        course.prepare(tmp_path, paths, resume=True, everything=True)


def test_a_dead_kernel_is_named(folder, tmp_path, capsys):
    write(folder / "00_first.ipynb", "import os\nos._exit(9)")
    assert start(folder, tmp_path / "out", "--only", "00") == 1
    assert "00_first.ipynb, cell 3 of 3: the kernel died" in capsys.readouterr().err


def test_keyboard_stop_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "run", stopped)
    assert start(folder, tmp_path / "out") == 130
    assert "--resume" in capsys.readouterr().err


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
    notebook.cells[1].source = "rounds: int = 1\nshow: bool = True\nname = 'x'"
    nbformat.write(notebook, second)
    assert course.declared(second) == {"rounds": "int", "show": "bool", "name": "str"}
    common = {"data": "phantom"} | course.PROFILES["full"]
    parameters = course.chosen([first, second], common, {"show": "no", "alpha": "2", "name": "1"})
    assert parameters[first] == {"data": "phantom", "rounds": 40, "alpha": 2.0}
    assert parameters[second] == {"rounds": 40, "show": False, "name": "1"}


def test_refresh_rewrites_in_place_without_traces(folder, monkeypatch):
    monkeypatch.setenv("FEDSSG_DATA", "/nowhere")
    noisy = "import sys, ipywidgets\nprint('numbers')\nprint('noise', file=sys.stderr)\nipywidgets.Button()"
    fresh = "import os\nassert os.path.isdir(os.environ['FEDSSG_OUT']) and 'FEDSSG_DATA' not in os.environ"
    path = folder / "00_first.ipynb"
    write(path, noisy, fresh, "", PICTURE)
    words = ["refresh", "--lessons", str(folder), "--only", "00"]
    assert main(words) == 0
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [cell.id for cell in notebook.cells] == [f"00_first-{n}" for n in range(6)]
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, 2, 3, None, 4]
    assert [output.get("text") for output in notebook.cells[2].outputs] == ["numbers\n"]
    assert notebook.cells[5].metadata == {"tags": ["headline"]} and pages.headline(notebook)
    before = path.read_bytes()
    assert main(words) == 0
    assert path.read_bytes() == before
    write(path, "1 / 0")
    before = path.read_bytes()
    assert main(words) == 1
    assert path.read_bytes() == before


def test_stripped_copy():
    button = {"text/plain": "Button()", pages.WIDGET: {"model_id": "x"}}
    cell = new_code_cell("show()", execution_count=9, metadata={"papermill": {}, "tags": ["headline"]})
    cell.outputs = [
        new_output("stream", name="stderr", text="bar"),
        new_output("display_data", button),
        new_output("execute_result", {"text/plain": "7"}, execution_count=9),
    ]
    injected = new_code_cell("rounds = 7", metadata={"tags": ["injected-parameters"]})
    notebook = new_notebook(cells=[injected, cell], metadata={"widgets": {"state": {}}, "papermill": {}})
    committed, shown = pages.stripped(notebook), pages.stripped(notebook, keep_dials=True)
    assert [output.data for output in committed.cells[0].outputs] == [{"text/plain": "7"}]
    assert committed.cells[0].metadata == {"tags": ["headline"]}
    assert committed.cells[0].outputs[0].execution_count == committed.cells[0].execution_count == 1
    assert len(shown.cells) == 2, "a reader of the page sees which parameters ran"
    assert "move the dials in JupyterLab" in shown.cells[1].outputs[0].data["text/html"]
    assert not {"widgets", "papermill"} & (set(committed.metadata) | set(shown.metadata))
    assert cell.execution_count == 9 and len(cell.outputs) == 3, "the original is left alone"


def test_doctor_answers_fast():
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-m", "fedssg_helpers", "doctor"], cwd=course.ROOT, capture_output=True, text=True
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 5, "seconds of work; a clock on the wall would measure the machine's other business"
    assert "Traceback" not in result.stderr
    lines = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines() if line[:1] in "OM"}
    assert {"Python", "torch", "kernel", "widgets", "lessons", "data", "disk", "cores", "time"} <= set(lines)
    assert result.returncode == int("MISSING" in lines.values())
    assert "'make course' takes about" in result.stdout
