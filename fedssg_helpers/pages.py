"""The lessons as they look without a kernel: stripped notebooks, a page of each, and one that links them."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

WIDGET = "application/vnd.jupyter.widget-view+json"
DIALS = "<p><em>Here is an explorer: move the dials in JupyterLab.</em></p>"
# Lines of the lessons' pages stay readable on a projector.
READABLE = (
    "<style>body { max-width: 72rem; margin: 0 auto !important; padding: 1rem }"
    " .highlight pre, .highlight pre * { font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace }</style>"
)
# nbconvert closes <details> before the text that it should fold: these stand in for it until the page is made.
FOLDS = {"<details><summary>Solution</summary>": "FOLD-BEGINS", "</details>": "FOLD-ENDS"}


def stripped(notebook, keep_dials: bool = False):
    """A copy without what changes from run to run: widget state, runner's metadata, timings, stderr.

    Widget views are dropped, or with `keep_dials` give way to a sentence (for pages that no kernel serves).
    """
    import nbformat

    notebook = nbformat.from_dict(notebook)
    language = {
        key: value for key, value in notebook.metadata.get("language_info", {}).items() if key != "version"
    }
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
            "language_info": language or {"name": "python"},
        }
    )
    runner = (
        {"papermill-error-cell-tag"} if keep_dials else {"papermill-error-cell-tag", "injected-parameters"}
    )
    notebook.cells = [cell for cell in notebook.cells if not runner & set(cell.metadata.get("tags", []))]
    count = 0
    for cell in notebook.cells:
        for name in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        outputs = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if WIDGET in output.get("data", {}):
                if not keep_dials:
                    continue
                output = nbformat.v4.new_output("display_data", {"text/html": DIALS})
            if "execution_count" in output:
                output.execution_count = count
            outputs.append(output)
        cell.outputs = outputs
    return notebook


def save_text(path: Path, text: str) -> None:
    """Write a text file so that a reader meets either the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:  # no space, perhaps: leave the old one, and no part of the new one
        part.unlink(missing_ok=True)
        raise


def page(notebook_path: Path, pictures: Path) -> str:
    """One executed lesson as a page with its images inside; image files are sought in folder `pictures`.

    Formulas are set by MathJax from its public server; without a network they stand as TeX, and nothing
    waits for it.
    """
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(require_js_url="", mermaid_js_url="", embed_images=True)
    notebook = stripped(nbformat.read(notebook_path, as_version=4), keep_dials=True)
    notebook.metadata.title = heading(notebook)[0]
    for cell in notebook.cells:
        for tag, word in FOLDS.items() if cell.cell_type == "markdown" else ():
            cell.source = cell.source.replace(tag, f"\n\n{word}\n\n")
    text, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(pictures)}})
    for tag, word in FOLDS.items():
        text = text.replace(f"<p>{word}</p>", tag)
    text = text.replace('<script src=""></script>', "")
    text = re.sub(r'<script type="module">.*?</script>', "", text, flags=re.S)  # diagrams that no lesson uses
    text = re.sub(r'<script src="(http[^"]*mathjax[^"]*)">', r'<script async src="\1">', text, flags=re.I)
    text = text.replace("</head>", READABLE + "</head>", 1)
    text = re.sub(r"<body[^>]*>", r'\g<0><p><a href="index.html">All lessons</a></p>', text, count=1)
    return re.sub(r'href="((?:\d\d|A\d)_\w+)\.ipynb', r'href="\1.html', text)


def heading(notebook) -> tuple[str, str]:
    """Title and first sentence of a lesson, without their mark-up."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = re.search(r"^#\s+(.+)$", text, flags=re.M)
    prose = re.search(
        r"^\s*([A-Za-z*_`\"'“‘].*(?:\n\S.*)*)", text[title.end() :] if title else text, flags=re.M
    )
    sentence = re.split(r"(?<=[.!?])\s", " ".join(prose[1].split()), maxsplit=1)[0] if prose else ""
    sentence = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", sentence)
    return (title[1].strip() if title else "Lesson"), re.sub(r"[*_`]", "", sentence)


def headline(notebook) -> str | None:
    """The PNG (base64) of the cell tagged `headline`; where there is none, the first picture."""
    for cells in ([c for c in notebook.cells if "headline" in c.metadata.get("tags", [])], notebook.cells):
        for cell in cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return "".join(output.data["image/png"].split())
    return None


CARD = """<article><a href="{stem}.html">{figure}<h2>{title}</h2></a>
<p>{sentence}</p><p class="facts">{facts} · <a href="notebooks/{stem}.ipynb">notebook</a></p></article>"""
INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FedSSG, hands on</title><style>
body {{ margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem; background: #fafafa; color: #1c2733;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }}
h1 {{ margin: 0 0 .3rem; font-size: 1.9rem }} h2 {{ margin: .9rem 0 .2rem; font-size: 1.15rem }}
p {{ margin: .3rem 0 }}
main {{ display: grid; gap: 1.5rem; margin: 1.75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)) }}
article {{ padding: 1rem; background: #fff; border: 1px solid #dde3e9; border-radius: 8px }}
article img {{ width: 100%; height: 12rem; object-fit: contain; background: #fff }}
a {{ color: #0b5c94; text-decoration: none }} a:hover, a:focus {{ text-decoration: underline }}
.facts, footer {{ color: #53616f; font-size: .875rem }} .failed {{ color: #a3260f; font-weight: 600 }}
footer {{ border-top: 1px solid #dde3e9; padding-top: 1rem }}
</style></head><body><header><h1>Federated medical image classification, hands on</h1>
<p>The lessons as they ran on this machine, in order.{results}</p></header>
<main>
{cards}
</main><footer>For teaching and research. Not for clinical use. An independent teaching
implementation of the published FedSSG idea; generator, sharing rule and benchmark are ours.</footer>
</body></html>
"""


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def save_index(out: Path, record: dict) -> None:
    """Write `index.html`: a card for every lesson that ran, whole or in part."""
    import nbformat

    cards = []
    for stem, entry in sorted(record["lessons"].items()):
        notebook = nbformat.read(out / "notebooks" / f"{stem}.ipynb", as_version=4)
        title, sentence = (html.escape(text) for text in heading(notebook))
        png = headline(notebook)
        figure = f'<img alt="Headline figure: {title}" src="data:image/png;base64,{png}">' if png else ""
        facts = html.escape(f"{entry['data']} · {entry['profile']} profile · {duration(entry['seconds'])}")
        if entry["status"] == "failed":
            facts = '<span class="failed">stopped at an error</span> · ' + facts
        cards.append(CARD.format(stem=stem, figure=figure, title=title, sentence=sentence, facts=facts))
    results = (
        ' Every number: <a href="results.csv">results.csv</a>.' if (out / "results.csv").exists() else ""
    )
    save_text(out / "index.html", INDEX.format(cards="\n".join(cards), results=results))
