"""The exercises: each says "Not done yet" as committed, and each folded solution is right."""

from __future__ import annotations

import re

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from slices import needed

from fedssg_helpers import course

LESSONS = course.lessons(only=["0", "A4"])  # those with exercises
SMALL = {"rounds": 2, "seeds": 1}  # what an exercise asks does not depend on how long the runs before it are


def tagged(notebook, tag: str) -> list[int]:
    """Positions of the cells with this tag."""
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def printed(cell) -> str:
    """What a code cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_exercises_are_complete_and_undone(lesson):
    notebook = nbformat.read(lesson, as_version=4)
    exercises = tagged(notebook, "exercise")
    assert 2 <= len(exercises) <= 3
    assert [i + 1 for i in exercises] == tagged(notebook, "exercise-check")
    for i in exercises:
        assert "Not done yet" in printed(notebook.cells[i + 1])
        assert "<details>" in notebook.cells[i + 2].source


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_solutions_are_correct(lesson):
    notebook = nbformat.read(lesson, as_version=4)
    for i in tagged(notebook, "exercise"):
        notebook.cells[i].source = re.search(r"```python\n(.*?)```", notebook.cells[i + 2].source, re.S)[1]
    (parameters,) = tagged(notebook, "parameters")
    for name in SMALL.keys() & papermill.inspect_notebook(str(lesson)).keys():
        notebook.cells[parameters].source += f"\n{name} = {SMALL[name]}"
    exercises = tagged(notebook, "exercise") + tagged(notebook, "exercise-check")
    for i in set(range(len(notebook.cells))) - set(needed(notebook.cells, exercises)):
        if notebook.cells[i].cell_type == "code":  # the lesson as a whole is run cell by cell elsewhere
            notebook.cells[i].source = ""
    with course.kernel_here():
        NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(lesson.parent)}}
        ).execute()
    for i in tagged(notebook, "exercise-check"):
        assert "Correct." in printed(notebook.cells[i]), notebook.cells[i - 1].source
