"""Sphinx: how the pages look. Nothing here, and nothing on the pages, asks for a network."""

import os
import re
import unicodedata
from importlib.resources import files

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util.logging import getLogger

# The address of this project, such as https://github.com/OWNER/NAME: write it here, or set the variable. It switches the
# buttons for Colab, Binder and the source on, and links to files of the project lead there.
REPOSITORY = os.environ.get("FEDSSG_REPOSITORY", "")
BRANCH = os.environ.get("FEDSSG_BRANCH", "main")

project = html_title = "FedSSG, hands on"
author, copyright = (
    "the authors of the course",
    "MIT licence. For teaching and research, not for clinical use",
)
extensions = ["myst_nb", "sphinx_design"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
nb_ipywidgets_js = {}  # would come from the network
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_static_path = ["_static", str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_show_sphinx = html_use_index = False
html_theme_options = {"show_navbar_depth": 1, "navbar_persistent": []}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": BRANCH,
        "use_repository_button": True,
        "use_source_button": True,
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
    }


# Where latex2mathml and browsers part: signs that it does not know after \big, and what it takes for a name or an operator.
SIGNS = dict(zip((r"\lfloor", r"\rfloor", r"\lceil", r"\rceil", r"\|", r"\lVert", r"\rVert"), "⌊⌋⌈⌉‖‖‖"))
MENDED = {
    "<mi>&#x0007E;</mi>": "<mo>∼</mo>",
    "<mi>&#x000B1;</mi>": "<mo>±</mo>",
    "<mo>&#x0221E;</mo>": "<mi>∞</mi>",
    "<mo>&#x02016;</mo>": '<mo stretchy="false">‖</mo>',
    "<mover>": '<mover accent="true">',
}
THIN = '<mspace width="0.167em" />'


def letter(found: re.Match) -> str:
    """A script, double-struck or bold letter: browsers know the character, not the attribute."""
    kind, what = found[1].upper(), found[2]
    what = f"{'CAPITAL' if what.isupper() else 'SMALL'} {what.upper()}"
    for prefix in ("MATHEMATICAL ", ""):
        try:
            return f"<mi>{unicodedata.lookup(f'{prefix}{kind} {what}')}</mi>"
        except KeyError:  # a few letters had their character before the others
            pass
    return found[0]


def mathml(formula: str, display: str) -> str:
    """A formula in TeX as MathML, which browsers draw by themselves."""
    formula = re.sub(r"\\text\{[^}]*\}", lambda found: found[0].replace(r"\_", "_"), formula.strip())
    formula = re.sub(
        r"(\\[bB]igg?[lr]?)\s*(\\[a-zA-Z]+|\\\|)", lambda f: f[1] + SIGNS.get(f[2], f[2]), formula
    )
    text = convert(formula.replace(r"\|", r"\Vert "), display=display)
    for wrong, right in MENDED.items():
        text = text.replace(wrong, right)
    text = re.sub(r'<mi mathvariant="(script|double-struck|bold)">(\w)</mi>', letter, text)
    # TeX puts a thin space between log and its neighbours, unless that is a bracket.
    text = re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<m(?!o|space))", rf"\1{THIN}", text)
    return re.sub(r"(</(?:m[in]|mfrac|msu[bp]|mrow)>)(<mi>[a-z]{2,}</mi>)", rf"\1{THIN}\2", text)


def draw(display: str, tag: str):
    """What writes a formula into a page, for Sphinx."""

    def visit(translator, node) -> None:
        text = mathml(node.astext(), display)
        if "\\" in text:
            getLogger(__name__).warning("a formula that is not understood: %s", node.astext(), location=node)
        long = " long" * (len(re.sub(r"<[^>]*>|&[^;]*;", "", text)) > 30)
        translator.body.append(f'<{tag} class="formula{long}">{text}</{tag}>')
        raise SkipNode  # the TeX inside

    return visit


def start_page(app, pagename, templatename, context, doctree) -> None:
    """The start page is made here: there is no file of the project to show or to download."""
    if pagename == "index":
        context["page_source_suffix"] = ""


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("html-page-context", start_page, priority=1)
    app.add_html_math_renderer("mathml", (draw("inline", "span"), None), (draw("block", "div"), None))
