"""Build the book: python .book/build.py [RUN], then open out/book/index.html.

RUN is a folder that `make course` wrote (default: the last one in out/). Lessons that ran there are shown as they ran; all
others, and all with `none` for RUN, as they are committed. Nothing is executed here, and no network is used.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import runpy
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fedssg_helpers import course

SETTINGS = runpy.run_path(str(ROOT / ".book" / "conf.py"))
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#|mailto:)([^)#\s]+)([^)\s]*)\)")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.M | re.S)  # code, in which nothing is a link
EXPLORER = re.compile(r"explore\.(explorer|live)\(|widget-view")
PAGES = ("glossary", "paper_and_ours", "bibliography", "installing", "two_laptops", "for_teachers")
SHORT = {
    "notebooks/explorer": "Explorer <notebooks/explorer>",
    "data/README": "Data <data/README>",
}  # in the side bar
CARD = """
:::::{{grid-item-card}} {title}
:link: {link}
:link-type: doc
:img-top: {image}
:img-alt: Figure of {title}

{question}

{facts}
:::::
"""


class Source:
    """The folder from which Sphinx builds: it mirrors the project, so that links between its files hold."""

    def __init__(self, folder: Path, run: Path | None):
        self.folder, self.run = folder, run
        shutil.copytree(ROOT / "notebooks" / "images", folder / "notebooks" / "images")
        shutil.copytree(ROOT / ".book" / "_static", folder / "_static")
        shutil.copy(ROOT / ".book" / "conf.py", folder)
        notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
        pages = (ROOT / "notebooks" / "pages").glob("*.md")
        pages = sorted(pages, key=lambda p: (PAGES.index(p.stem) if p.stem in PAGES else len(PAGES), p.stem))
        self.parts = {
            "Lessons": [p for p in notebooks if p.name[0].isdigit()],
            "Appendices": [p for p in notebooks if re.match(r"A\d", p.name)],
            "Pages": [*pages, ROOT / "data" / "README.md", ROOT / "notebooks" / "explorer.ipynb"],
        }
        self.names = {path for paths in self.parts.values() for path in paths}

    def link(self, found: re.Match, here: Path) -> str:
        """A link as the book has it: pages stay, README is the start page, other files are at the project's address."""
        words, path, rest = found.groups()
        target = (here.parent / path).resolve()
        if target == ROOT / "README.md":
            return f"[{words}]({os.path.relpath(ROOT / 'index.md', here.parent)}{rest})"
        if target in self.names or not target.exists():  # Sphinx names what leads nowhere
            return found[0]
        name = target.relative_to(ROOT)
        if address := SETTINGS["REPOSITORY"]:
            kind = "tree" if target.is_dir() else "blob"
            return f"[{words}]({address}/{kind}/{SETTINGS['BRANCH']}/{name}{rest})"
        if target.is_dir():
            return words
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, self.folder / name)  # Sphinx makes it a download
        return found[0]

    def text(self, markdown: str, here: Path) -> str:
        """Markdown of a file of the project, with the book's links."""
        parts = FENCE.split(markdown)  # every second one is code
        return "".join(p if i % 2 else LINK.sub(lambda f: self.link(f, here), p) for i, p in enumerate(parts))

    def write(self, path: Path, markdown: str) -> None:
        target = self.folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(markdown, encoding="utf-8")

    def notebook(self, path: Path):
        """Put a notebook into the folder, as it ran or as it is committed; the notebook that went in."""
        ran = self.run and self.run / "notebooks" / path.name
        notebook = course.read(ran if ran and ran.exists() else path)
        notebook.metadata.pop("widgets", None)
        if course.ADDED & set(
            notebook.cells[0].metadata.get("tags", [])
        ):  # the news of an error, above the title
            notebook.cells.insert(1, notebook.cells.pop(0))
        following = [*notebook.cells[1:], None]
        for cell, after in zip(notebook.cells, following):
            if cell.cell_type == "markdown":
                cell.source = self.text(cell.source, path)
            elif cell.cell_type == "code":
                cell.outputs = outputs(cell)
                fold(cell, after)
        if png := course.headline(notebook):
            picture = self.folder / "notebooks" / "images" / f"{path.stem}.png"
            picture.write_bytes(base64.b64decode(png))
        self.folder.joinpath("notebooks").mkdir(exist_ok=True)
        course.write(notebook, self.folder / "notebooks" / path.name)
        return notebook

    def fill(self) -> None:
        """All pages, and the start page with the map."""
        questions = dict(re.findall(r"^\| \[[^\]]*\]\(([^)]+)\) \| (.*) \|$", readme(), re.M))
        cards, trees = [], []
        for part, paths in self.parts.items():
            names = [str(path.relative_to(ROOT).with_suffix("")) for path in paths]
            entries = "\n".join(SHORT.get(name, name) for name in names)
            trees.append(f"```{{toctree}}\n:caption: {part}\n:hidden:\n\n{entries}\n```\n")
            inside = []
            for path, name in zip(paths, names):
                if path.suffix == ".md":
                    self.write(path, self.text(path.read_text(encoding="utf-8"), path))
                else:
                    notebook = self.notebook(path)
                    question = questions.get(str(path.relative_to(ROOT)), "").removeprefix("Appendix: ")
                    image = f"notebooks/images/{path.stem}.png"
                    title = notebook.cells[0].source.partition("\n")[0].strip("# ")
                    card = {"title": title, "link": name, "image": image, "question": question}
                    inside.append(CARD.format(**card, facts=facts(notebook)))
            if part != "Pages":
                cards.append(f"## {part}\n\n::::::{{grid}} 1 2 2 3\n:gutter: 3\n{''.join(inside)}::::::\n")
        self.write(ROOT / "index.md", "\n".join([*self.start(cards), *trees]))

    def start(self, cards: list[str]) -> list[str]:
        """The start page: what README says first, the map, how to run the lessons."""
        intro, *sections = re.split(r"^(?=## )", readme(), flags=re.M)
        commands = [section for section in sections if section.startswith("## Two commands")]
        results = self.run and self.run / "results.csv"
        if results and results.exists():
            shutil.copy(results, self.folder)
            cards.insert(
                0, "The lessons as they ran on this machine; every number: [results.csv](results.csv).\n"
            )
        start = ROOT / "README.md"
        return [self.text(intro, start), *cards, *(self.text(section, start) for section in commands)]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def outputs(cell) -> list:
    """A cell's outputs that a page can show: no progress, no widgets; source code as source code."""
    from nbformat.v4 import new_output

    kept = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or any("widget" in kind for kind in data):
            continue
        if output.output_type == "stream":
            output.text = "".join(map(wrapped, output.text.splitlines(keepends=True)))
        if {"text/html", "text/latex"} <= set(data):  # of plots.show_source
            code = {
                "text/markdown": f"```python\n{data['text/plain']}\n```",
                "text/plain": data["text/plain"],
            }
            output = new_output("display_data", code)
        kept.append(output)
    if EXPLORER.search(cell.source + str(cell.outputs)):
        words = "*Here is an explorer. Its sliders work in JupyterLab (`make lab`).*"
        kept.append(new_output("display_data", {"text/markdown": words, "text/plain": words}))
    return kept


def wrapped(line: str) -> str:
    """A printed sentence that is too long for the page, on two lines; a row of a table stays one."""
    long = len(line) > 106 and "  " not in line.strip()
    return textwrap.fill(line, 105, subsequent_indent="    ", break_on_hyphens=False) + "\n" if long else line


def fold(cell, after) -> None:
    """Fold what JupyterLab folds; a figure's alternative text is the caption that follows."""
    tags, look = cell.metadata.get("tags", []), cell.metadata.setdefault("mystnb", {})
    if cell.metadata.get("jupyter", {}).get("source_hidden"):
        cell.metadata["tags"] = [*(tag for tag in tags if tag != "hide-input"), "hide-input"]
        if "exercise-check" in tags:
            look |= {"code_prompt_show": "Show the check", "code_prompt_hide": "Hide the check"}
    if after and (caption := re.match(r"\*What to see\*:? *(.*?[.?!])(?=\s|$)", after.source, re.S)):
        words = re.sub(r"[*`$\[\]\\]|\(http\S*\)", "", caption[1])
        look["image"] = {"alt": " ".join(words.split())}


def facts(notebook) -> str:
    """How a lesson ran here: data, seconds, an error; nothing where it is shown as committed."""
    ran = notebook.metadata.get("papermill")
    if not ran:
        return ""
    seconds = ran.get("duration") or 0
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    stopped = "**stopped at an error**" if ran.get("exception") else "**stopped before its end**"
    found = ["" if "made_from" in ran else stopped, str(ran.parameters.get("data", "")), took]
    return f"::::{{card-footer}}\n{' · '.join(filter(None, found))}\n::::"


def last_run() -> Path | None:
    """The folder in out/ to which a run wrote last."""
    return max(ROOT.glob("out/run-*"), key=lambda run: (run / course.LOCK).stat().st_mtime, default=None)


def build(run: Path | None, out: Path) -> int:
    """Build the pages into `out`, afresh; the status of Sphinx. Its warnings are errors."""
    from sphinx.cmd.build import main

    with tempfile.TemporaryDirectory() as folder:
        Source(Path(folder, "source"), run).fill()
        shutil.rmtree(out, ignore_errors=True)
        words = ["-q", "-W", "--keep-going", "-j", "auto", "-d", f"{folder}/doctrees"]
        return main([*words, f"{folder}/source", str(out)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, default=last_run(), metavar="RUN")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "book")
    options = parser.parse_args()
    run = None if options.run == Path("none") else options.run
    if run and not (run / "notebooks").is_dir():
        sys.exit(f"error: {run} is no folder that a run of the course wrote")
    if status := build(run, options.out):
        sys.exit(status)
    print(f"Open {options.out / 'index.html'}")
