"""The form of every lesson and appendix: what a reader meets, and where, is the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("[0A]*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.name.startswith("0")]
CAPTION = "*What to see*:"
MOST_CELLS, MOST_LINES = 65, 15
# The course once had a vocabulary of its own. A reader looks these words up and finds something else.
PRIVATE = r"\b(deal|deals|dealt|dial|dials|freaks?|grain|oddly|odd|thin|worth|(?:a|its|the|their) flat)\b"


def cells_of(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells


def prose(path: Path) -> str:
    """The markdown cells, without code in them."""
    text = "\n\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.S)


def section(path: Path, title: str) -> str:
    """What stands under a heading of the second level, up to the next one."""
    text = "\n\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "markdown")
    found = re.search(rf"^## (?:\d+\. )?{title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found[1] if found else ""


def bullets(text: str) -> int:
    return len(re.findall(r"^- ", text, re.M))


def folded(cell) -> bool:
    return bool(cell.metadata.get("jupyter", {}).get("source_hidden"))


def has_figure(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
lessons = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@every
def test_it_opens_with_what_one_needs_to_know(path):
    first = cells_of(path)[0].source
    assert re.match(rf"# {path.name[:2]} \S", first)
    learn = re.search(r"\*\*You will learn\*\*.*?\n\n((?:- .*\n)+)", first)
    assert learn and 3 <= bullets(learn[1]) <= 5
    assert "**Before you start**: " in first
    assert re.search(r"\*\*Time\*\*: .*(second|minute|hour)", first)


@every
def test_sections_are_numbered_without_a_gap(path):
    titles = re.findall(r"^## (.*)$", prose(path), re.M)
    numbers = [int(found[1]) for title in titles if (found := re.match(r"(\d+)\. ", title))]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers
    assert [title for title in titles if title in ("Recap", "Next")] == ["Recap", "Next"]


@every
def test_the_recap_answers_what_one_will_learn(path):
    first = cells_of(path)[0].source
    learn = re.search(r"\*\*You will learn\*\*.*?\n\n((?:- .*\n)+)", first)
    assert bullets(section(path, "Recap")) == bullets(learn[1])


@every
def test_each_figure_has_its_caption_and_each_caption_its_figure(path):
    cells = cells_of(path)
    for i, cell in enumerate(cells):
        after = cells[i + 1].source if i + 1 < len(cells) else ""
        if cell.cell_type == "code" and has_figure(cell):
            assert after.startswith(CAPTION), f"no caption after cell {i}:\n{cell.source[:200]}"
        if cell.cell_type == "markdown" and "*What to see*" in cell.source:
            assert cell.source.count("*What to see*") == 1 and cell.source.startswith(CAPTION), cell.source[
                :200
            ]
            assert has_figure(cells[i - 1]), f"a caption without a figure, cell {i}:\n{cell.source[:200]}"


@every
def test_long_cells_are_folded(path):
    code = [cell for cell in cells_of(path) if cell.cell_type == "code"]
    for cell in code[2:]:  # after the parameters and the imports
        assert folded(cell) or len(cell.source.splitlines()) <= MOST_LINES, cell.source


@every
def test_words_are_the_fields(path):
    found = [m.group() for m in re.finditer(PRIVATE, prose(path), re.I)]
    assert not found


@lessons
def test_a_lesson_is_no_longer_than_one_can_read(path):
    assert len(cells_of(path)) <= MOST_CELLS


@lessons
def test_exercises_check_themselves_and_do_not_show_the_answer(path):
    cells, checks = cells_of(path), 0
    for cell in cells:
        if "exercise-check" in cell.metadata.get("tags", []):
            checks += 1
            assert folded(cell), cell.source
    assert 2 <= checks <= 3
    task = section(path, "Exercises").partition("### Open task")[2]
    assert "A good answer contains" in task and "<details>" in task


@lessons
def test_it_ends_with_a_quiz_and_where_to_read_on(path):
    quiz = section(path, "Quiz")
    assert (
        quiz.count("<details>")
        == quiz.count("</details>")
        == len(re.findall(r"^\*\*\d\.\*\*", quiz, re.M))
        == 3
    )
    assert re.search(r"\]\(", section(path, "Further reading")) and re.search(r"\]\(", section(path, "Next"))
    titles = re.findall(r"^## (.*)$", prose(path), re.M)
    assert titles[-4:] == ["Recap", "Quiz", "Further reading", "Next"]
