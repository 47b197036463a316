"""The book: built without a warning, and read in a browser without a network, on a screen and on a phone."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_browser import SCREENS, browser  # noqa: F401 (a fixture)

from fedssg_helpers import course

BOOK = course.ROOT / ".book"
NOTEBOOKS = sorted(course.LESSONS.glob("*.ipynb"))
PAGES = sorted((course.LESSONS / "pages").glob("*.md"))
NAMES = [
    "index",
    "data/README",
    *[str(path.relative_to(course.ROOT).with_suffix("")) for path in [*NOTEBOOKS, *PAGES]],
]
FORMULA = r"(?<![\\$])\$(?!\s)[^$]+\$"


@pytest.fixture(scope="module", autouse=True)
def packages():
    """What the pages are made with."""
    for name in ("latex2mathml", "myst_nb", "sphinx_book_theme", "sphinx_design", "ziamath"):
        pytest.importorskip(name, reason="the book's packages are missing: pip install -e '.[book]'")


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """The folder of the book of the committed notebooks."""
    out = tmp_path_factory.mktemp("book") / "html"
    command = [sys.executable, str(BOOK / "build.py"), "none", "--out", str(out)]
    known = {"cwd": out.parent, "env": os.environ | {"FEDSSG_REPOSITORY": ""}}
    result = subprocess.run(command, capture_output=True, text=True, **known)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    assert result.stdout.strip() == f"Open {out / 'index.html'}"
    return out


def prose(name: str) -> str:
    """The markdown of a page."""
    path = course.ROOT / name
    if path.with_suffix(".md").exists():
        return path.with_suffix(".md").read_text(encoding="utf-8")
    cells = nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_every_page_is_there_and_in_the_side_bar(book):
    start = (book / "index.html").read_text(encoding="utf-8")
    side = start[start.index('class="bd-sidebar-primary') : start.index("</nav>", start.index("Glossary"))]
    for name in NAMES[1:]:
        assert (book / f"{name}.html").exists() and f'href="{name}.html"' in side, name
    assert [side.index(f">{part}<") for part in ("Lessons", "Appendices", "Pages")]
    second = (book / "notebooks" / "01_data_partitioning.html").read_text(encoding="utf-8")
    assert 'class="left-prev"' in second and 'class="right-next"' in second


def test_the_start_page_is_the_map(book):
    start = (book / "index.html").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        if path.stem != "explorer":
            title = course.read(path).cells[0].source.partition("\n")[0].strip("# ")
            card = re.search(rf'alt="Figure of {re.escape(title)}"', start.replace("’", "'"))
            assert card, f"{path.stem} has a card"
    assert "teaching implementation" in start and "not for clinical use" in start


def test_nothing_is_loaded_from_elsewhere(book):
    loads = r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]*)"'
    for path in book.rglob("*.html"):
        assert not re.findall(loads, path.read_text(encoding="utf-8")), path
    for path in book.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import\s)[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), (
            path
        )


def test_figures_have_words(book):
    page = (book / "notebooks" / "00_start_here.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img alt="[^"_./]{20,}', page)) >= 3, "the caption's first sentence"


# ---------------------------------------- in a browser, the network off

LOOK = """() => {
    document.querySelectorAll('details').forEach(e => e.open = true)
    const page = document.querySelector('article').cloneNode(true)
    page.querySelectorAll('pre, code, math, script, style').forEach(e => e.remove())
    const maths = [...document.querySelectorAll('article math')]
    return {
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        maths: maths.length,
        empty: maths.filter(e => !(e.getBoundingClientRect().width > 2 && e.getBoundingClientRect().height > 2))
            .map(e => e.textContent),
        broken: [...document.images].filter(e => e.complete && !e.naturalWidth).map(e => e.src),
        font: maths.length == 0 || document.fonts.check('16px "STIX Two Math"'),
        text: page.textContent,
    }
}"""


@pytest.fixture
def opened(browser, book, request):  # noqa: F811
    """Opens a page of the book without a network, at a width: the page, and what it asked the network for."""
    contexts, asked = [], []

    def open_page(name: str, width: int, **options):
        size = {"width": width, "height": 844 if width < 500 else 900}
        contexts.append(browser.new_context(viewport=size, offline=True, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else asked.append(r.url))
        page.goto((book / f"{name}.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not asked, "everything lies beside the pages"


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_readable(opened, name, width):
    page = opened(name, width)
    page.evaluate("document.fonts.ready")
    look = page.evaluate(LOOK)
    SCREENS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENS / f"book-{name.split('/')[-1]}-{width}.png")
    assert look["wide"] <= 0, "no sideways scrolling"
    assert not look["empty"] and not look["broken"] and look["font"]
    left = re.findall(r"\$[^$\n]+\$|\\(?:frac|sum|text|math\w+|log|big|sigma|alpha)\b|```", look["text"])
    assert not left, "TeX or markdown that nobody set"
    if name != "index":
        code = re.compile(r"```.*?```|`[^`\n]*`", re.S)
        assert look["maths"] == len(re.findall(r"\$\$.+?\$\$|" + FORMULA, code.sub("", prose(name)), re.S))


@pytest.mark.browser
def test_search_finds_a_term(opened):
    page = opened("index", 1280)
    page.locator(".search-button-field").first.click()
    page.keyboard.type("logit adjustment")
    page.keyboard.press("Enter")
    for found in ("04 Federated rounds", "Glossary"):
        page.locator("#search-results li a", has_text=found).first.wait_for()


@pytest.mark.browser
def test_dark_mode_and_solutions(opened):
    page = opened("notebooks/02_sample_generator", 1280, color_scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    colours = "e => [getComputedStyle(document.body).backgroundColor, getComputedStyle(e).color]"
    back, fore = page.locator("article math").first.evaluate(colours)
    assert (
        sum(map(int, re.findall(r"\d+", back)[:3])) < 150 < 350 < sum(map(int, re.findall(r"\d+", fore)[:3]))
    )
    solution = page.locator("details:has(> summary:text-is('Solution'))").first
    assert not solution.locator(".highlight").is_visible()
    solution.locator("summary").click()
    assert solution.locator(".highlight").is_visible()


# ---------------------------------------- what goes in


@pytest.fixture
def build():
    return runpy.run_path(str(BOOK / "build.py"))


def test_a_run_is_shown_as_it_ran(build, tmp_path):
    button = {"text/plain": "Button()", "application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
    code = {"text/plain": "def f(): ...", "text/html": "<pre>", "text/latex": "x"}
    cell = new_code_cell("show()", metadata={"jupyter": {"source_hidden": True}, "tags": ["exercise-check"]})
    cell.outputs = [new_output("stream", name="stderr", text="noise")]
    cell.outputs += [new_output("display_data", data) for data in (button, code)]
    words = new_markdown_cell("*What to see*: two *lines*, with $x$. And more.")
    cells = [new_markdown_cell("# 00 Mine\n\n[data](../data/README.md), [README](../README.md)"), cell, words]
    ran = {"parameters": {"data": "mine"}, "exception": True, "duration": 230.0}
    notebook = new_notebook(cells=cells, metadata={"widgets": {"x": 1}, "papermill": ran})
    (tmp_path / "run" / "notebooks").mkdir(parents=True)
    (tmp_path / "run" / "results.csv").write_text("dataset\n")
    nbformat.write(notebook, tmp_path / "run" / "notebooks" / "00_start_here.ipynb")

    build["Source"](tmp_path / "src", tmp_path / "run").fill()
    start = (tmp_path / "src" / "index.md").read_text(encoding="utf-8")
    assert "00 Mine" in start and "**stopped at an error** · mine · 4 min" in start and "results.csv" in start
    assert "01 Data partitioning" in start and start.count("stopped") == 1, "the rest as committed"
    shown = nbformat.read(tmp_path / "src" / "notebooks" / "00_start_here.ipynb", as_version=4)
    assert "widgets" not in shown.metadata and "(../index.md)" in shown.cells[0].source
    said = [output.data["text/markdown"] for output in shown.cells[1].outputs]
    assert said[0].startswith("```python\ndef f()") and "sliders work in JupyterLab" in said[1]
    assert "hide-input" in shown.cells[1].metadata.tags
    known = shown.cells[1].metadata.mystnb
    assert known.code_prompt_show == "Show the check" and known.image.alt == "two lines, with x."


def test_links_to_files_lead_to_the_address_if_there_is_one(monkeypatch, tmp_path, build):
    text, here = (
        "[`app`](flowerapp), [code](damage.py), [next](01_data_partitioning.ipynb)",
        course.LESSONS / "x",
    )
    assert "[`app`]" not in build["Source"](tmp_path / "a", None).text(text, here)
    assert (tmp_path / "a" / "notebooks" / "damage.py").exists(), "without an address: a download"
    monkeypatch.setenv("FEDSSG_REPOSITORY", "https://github.com/me/course")
    linked = runpy.run_path(str(BOOK / "build.py"))["Source"](tmp_path / "b", None).text(text, here)
    assert "(https://github.com/me/course/tree/main/notebooks/flowerapp)" in linked
    assert "(https://github.com/me/course/blob/main/notebooks/damage.py)" in linked
    assert linked.endswith("[next](01_data_partitioning.ipynb)")
    options = runpy.run_path(str(BOOK / "conf.py"))["html_theme_options"]
    assert {"colab_url", "binderhub_url"} <= set(options["launch_buttons"]) and options["use_source_button"]


def test_a_wrong_folder_is_named(tmp_path):
    command = [sys.executable, str(BOOK / "build.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (
        result.returncode == 1
        and result.stderr == f"error: {tmp_path} is no folder that a run of the course wrote\n"
    )


@pytest.mark.parametrize(
    "tex, inside",
    [
        (r"\mathcal N(0, \mathbb E)", ["<mi>𝒩</mi>", "<mi>𝔼</mi>"]),
        (r"\Big\lfloor x \Big\rfloor", [">⌊</mo>", ">⌋</mo>"]),
        (r"\text{oracle\_real}", ["oracle_real"]),
        (r"a \pm b \sim c", ["<mo>±</mo>", "<mo>∼</mo>"]),
        (r"\frac12 \log v", ["<mfrac>", '</mfrac><mspace width="0.167em" /><mi>log</mi><mspace']),
    ],
)
def test_formulas(tex, inside):
    text = runpy.run_path(str(BOOK / "conf.py"))["mathml"](tex, "inline")
    assert all(part in text for part in inside) and "\\" not in text
