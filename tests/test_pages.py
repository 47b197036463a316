"""The pages beside the lessons: links lead somewhere, entries are used, sources are complete, names exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest

from fedssg_helpers.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "notebooks" / "pages").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GLOSSARY, SOURCES, LAPTOPS = (
    ROOT / "notebooks" / "pages" / f"{name}.md" for name in ("glossary", "bibliography", "two_laptops")
)
NUMBER = r"(?:arxiv\.org/abs/|arxiv[\s:(\[]+)(\d{4}\.\d{4,5})"  # also where a line breaks in between
AND = r"(\d{4}\.\d{4,5}) and (\d{4}\.\d{4,5})"
LINK = r"\]\((?!https?:|attachment:|#)([^)#\s]+)"


def prose(path: Path) -> str:
    """A page, or the markdown cells of a notebook."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")


def cited(text: str) -> set[str]:
    """The arXiv numbers in a text."""
    return set(re.findall(NUMBER, text, re.I)) | {number for pair in re.findall(AND, text) for number in pair}


def entries() -> list[tuple[str, str]]:
    """Terms of the glossary, each with the notebook that it names."""
    return re.findall(r"^- \*\*(.+?)\*\* \(\[\d\d\]\(\.\./(.+?)\)\): ", prose(GLOSSARY), re.M)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    links = re.findall(LINK, re.sub(r"```.*?```", "", prose(path), flags=re.S))
    assert not [link for link in links if not (path.parent / link).exists()]
    assert path.suffix == ".ipynb" or links


def test_every_page_can_be_found():
    readme = prose(ROOT / "README.md")
    assert len(PAGES) == 6 and all(f"notebooks/pages/{page.name}" in readme for page in PAGES)


def test_the_glossary_is_in_order_and_used():
    terms = [term for term, _ in entries()]
    assert len(terms) >= 80 and terms == sorted(terms, key=str.lower)
    assert len(terms) == sum(line.startswith("- ") for line in prose(GLOSSARY).splitlines())
    texts = {path.name: re.sub(r"[*\s]+", " ", prose(path)).lower() for path in NOTEBOOKS}
    lost = [
        (term, name)
        for term, name in entries()
        if not re.search(r"(?<!\w)" + re.escape(term.lower()), texts[name])
    ]
    assert not lost, "these lessons do not contain these terms"


def test_sources_are_complete_and_used():
    files = [
        *NOTEBOOKS,
        ROOT / "README.md",
        *(ROOT / "fedssg_helpers").glob("*.py"),
        *(ROOT / "notebooks").rglob("*.py"),
    ]
    found = {}
    for path in files:
        cells = nbformat.read(path, as_version=4).cells if path.suffix == ".ipynb" else []
        text = "\n".join(cell.source for cell in cells) or path.read_text(encoding="utf-8")
        found |= dict.fromkeys(cited(text), path.name)
    listed = cited(prose(SOURCES))
    assert {number: name for number, name in found.items() if number not in listed} == {}
    assert listed - set(found) == set() and len(listed) > 25


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_names_of_code_exist(path):
    modules = {file.stem for file in (ROOT / "fedssg_helpers").glob("*.py")}
    text, names = prose(path), 0
    for module, name in re.findall(
        r"(?<![\w./])([a-z]\w*)\.([A-Za-z]\w*)\b(?!/)", " ".join(re.findall(r"`([^`\n]+)`", text))
    ):
        if module in modules:
            names += 1
            assert hasattr(importlib.import_module(f"fedssg_helpers.{module}"), name), f"{module}.{name}"
    for method in re.findall(r"`([a-z]+_[a-z_]+)`", text):
        assert method in METHODS or hasattr(importlib.import_module("fedssg_helpers.models"), method), method
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        for module, name in re.findall(r"\b([a-z]+)\.(\w+)\(", code):
            if module in modules:
                names += 1
                assert hasattr(importlib.import_module(f"fedssg_helpers.{module}"), name), f"{module}.{name}"
    assert names or path.name in ("for_teachers.md", "installing.md")


def test_the_commands_between_laptops_are_the_apps_own():
    pytest.importorskip("flwr", reason="needs Flower: pip install -e '.[flower]'")
    from flowerapp.fedssg_app import SETTINGS, deploy

    config = {"method": "fedssg_no_pretrain", "rounds": 5, "patience": 120}
    lines, text = deploy.commands(2, False, address="192.168.1.20", **config), prose(LAPTOPS)
    for who in ("server", "register 0", "register 1", "hospital 0", "run"):
        assert lines[who] in text, who
    assert json.dumps(config)[1:-1] in text and 'address = "192.168.1.20"' in text
    assert " ".join(f"{name}={value}" for name, value in SETTINGS.items()) in text
