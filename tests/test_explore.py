"""Figures and explorers without a browser, and what each slider means by the notebooks' own functions."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from slices import names, needed

from fedssg_helpers import explore, methods, plots

LESSONS = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = {path.stem.split("_")[0]: path for path in LESSONS.glob("*.ipynb")}


@pytest.fixture(scope="module", autouse=True)
def no_window():
    matplotlib.use("agg")


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, in place of a notebook's output."""
    seen = []
    monkeypatch.setattr(explore, "display", seen.append)
    return seen


def parts(box) -> list:
    """All widgets inside a box."""
    return [box, *(part for child in getattr(box, "children", ()) for part in parts(child))]


def of(box, kind):
    return [part for part in parts(box) if isinstance(part, kind)]


def words(box) -> str:
    found = (re.search('role="status"[^>]*>(.*)</div>', part.value) for part in of(box, widgets.HTML))
    return re.sub(r"<[^>]*>", "", next(filter(None, found))[1])


def figure():
    return plt.subplots(figsize=(1, 1))[0]


def part_of(stem: str, function: str, monkeypatch, also: str = "", **changed) -> dict:
    """What a notebook knows once its function `function` (and `also`) stands; parameters may be changed."""
    cells = nbformat.read(NOTEBOOKS[stem], as_version=4).cells
    wanted = max(i for i, c in enumerate(cells) if c.cell_type == "code" and f"def {function}(" in c.source)
    also = [i for i, c in enumerate(cells) if c.cell_type == "code" and also and f"def {also}(" in c.source]
    monkeypatch.setattr(explore, "display", lambda _: None)
    known: dict = {}
    for i in needed(cells, [wanted, *also]):
        exec(compile(cells[i].source, cells[i].id, "exec"), known)
        if "parameters" in cells[i].metadata.get("tags", []):
            known.update(changed)
    return known


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text)[1])


def said(drawn) -> str:
    """The words of a drawn pair; the figure must draw."""
    drawing, text = drawn
    assert plots.png(drawing).startswith(b"\x89PNG")
    return text


# --- figures ---


def test_every_method_has_a_colour_of_its_own_and_so_has_a_method_of_the_user():
    # lesson 05 draws two rules beside the methods
    fixed = {*methods.METHODS, "class_only", "device_only"}
    assert set(plots.METHOD_COLOURS) == fixed
    assert len({tuple(colour) for colour in plots.METHOD_COLOURS.values()}) == len(fixed)
    for name in fixed:
        assert plots.method_colour(name) == plots.METHOD_COLOURS[name]
    mine = plots.method_colour("my method")
    assert mine == plots.method_colour("my method") and mine not in plots.METHOD_COLOURS.values()
    assert max(mine) - min(mine) > 0.2, "not grey"
    assert len({plots.method_colour(f"my method {i}") for i in range(40)}) > 4


def test_bars_draw_a_method_of_the_user_and_a_dash_where_nothing_is_scored():
    _, axis = plt.subplots()
    plots.bars(axis, {"fedavg": np.array([0.5, np.nan]), "mine": np.array([0.25, 1])}, ["a", "b"])
    assert [text.get_text() for text in axis.texts] == ["0.50", "–", "0.25", "1.00"]
    assert axis.containers[1][0].get_facecolor()[:3] == plots.method_colour("mine")
    _, axis = plt.subplots()
    plots.bars(axis, {"real": [0.5]}, ["a"], "title", {"real": "black"})
    assert axis.containers[0][0].get_facecolor()[:3] == (0, 0, 0)
    plt.close("all")


def test_mosaics_place_every_image():
    images = np.arange(1, 4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)
    _, axes = plt.subplots(1, 4)
    plots.strip(axes[0], images, columns=2)
    assert axes[0].images[0].get_array()[[1, 1, 7, 7], [1, 7, 1, 7], 0].tolist() == [1, 2, 3, 255]
    plots.strip(axes[1], images[:0], "none")
    assert not axes[1].images and axes[1].get_title() == "none"
    plots.wall(axes[2], [("a", images), ("b", images[:1]), ("a", images[:2])], every=2)
    assert axes[2].images[0].get_array().shape == (3 * 6 + 1, 3 * 6, 3), "a gap after two rows"
    assert axes[2].get_yticks().tolist() == [3, 9, 16]
    known = SimpleNamespace(images=images, labels=np.array([0, 1, 1]), device=np.array([1, 0, 0]))
    plots.archive(axes[3], known, ["one", "two"], ["left", "right"], np.random.default_rng(0), per_cell=2)
    picture = axes[3].images[0].get_array()[[1, 1, 7, 7], [1, 14, 1, 14], 0].tolist()
    assert picture[:2] == [255, 1] and picture[2] in (2, 3) and picture[3] == 255
    assert [label.get_text() for label in axes[3].get_yticklabels()] == ["one (1)", "two (2)"]
    plt.close("all")


def test_source_of_helpers_and_of_a_notebooks_own_cells():
    both = plots.show_source(plots.short, plots.theme).data
    assert both.startswith("def short(") and "\n\n\ndef theme(" in both
    assert plots.show_source(explore._Panel.values).data.startswith("def values(self)"), (
        "a method is not indented"
    )
    assert plots.show_source(methods.Proximal).data.startswith("@dataclass(frozen=True)\nclass Proximal")
    with pytest.raises(OSError):
        plots.show_source(type("Nowhere", (), {"__module__": "__main__"}))
    mine = "@dataclass(frozen=True)\nclass Mine:\n    x: int = 1\n\n    def __call__(self):\n        pass"
    other = "def other():\n    return 1"
    show = "from fedssg_helpers import plots\nprint(plots.show_source(Mine, other).data)"
    cells = [
        "from dataclasses import dataclass\nclass Mine: pass",
        f"{other}\n\n{mine}\ny = 2",
        "class Mine(",
        show,
    ]
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in {cells!r}:
    shell.run_cell(cell, store_history=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith(f"{mine}\n\n\n{other}\n")


# --- explorers ---


def test_a_slider_redraws_and_an_impossible_value_is_a_sentence(shown):
    def draw(n, word):
        begun = figure()
        if n > 2:
            raise ValueError(f"there are no {n} <hospitals>")
        if word == "bad":
            raise IndexError("a student's slip")
        return begun, f"{n} {word}"

    n, word = (
        widgets.IntSlider(1, 0, 5, description="n", tooltip="a number"),
        widgets.Text("a", description="word"),
    )
    explore.explorer(draw, n=n, word=word)
    picture, first = of(shown[0], widgets.Image)[0], of(shown[0], widgets.Image)[0].value
    assert words(shown[0]) == "1 a" and not n.continuous_update and picture.layout.height == "420px"
    n.value = 3
    assert words(shown[0]) == "Not possible: there are no 3 &lt;hospitals&gt;"
    assert picture.value == first and "pale" in picture._dom_classes
    n.value, word.value = 2, "bad"
    assert words(shown[0]) == "Not possible: IndexError: a student&#x27;s slip"
    word.value = "b"
    assert words(shown[0]) == "2 b" and "pale" not in picture._dom_classes
    assert not plt.get_fignums(), "no figure is left for the next cell to show"


def test_a_figure_alone_will_do_and_lists_show_their_tooltip(shown):
    choice = widgets.Dropdown(options=["a"], description="rule", tooltip='the "rule"')
    explore.explorer(lambda rule: figure(), rule=choice)
    assert words(shown[0]) == "" and of(shown[0], widgets.Image)[0].value
    assert (
        choice.description == '<span title="the &quot;rule&quot;">rule</span>'
        and choice.description_allow_html
    )


def test_linked_sliders_are_drawn_once_in_the_thread_that_runs_cells(shown):
    drawn = []

    async def kernel():
        one, two = (
            widgets.IntSlider(0, 0, 9, description="one"),
            widgets.IntSlider(0, 0, 9, description="two"),
        )
        explore.explorer(
            lambda **v: drawn.append((v, threading.current_thread())) or figure(), one=one, two=two
        )

        def moved():
            one.value = two.value = 7

        moved()
        await asyncio.sleep(0)
        await asyncio.to_thread(setattr, one, "value", 8)  # as JupyterLab's messages may come
        await asyncio.sleep(0)

    asyncio.run(kernel())
    assert [v for v, _ in drawn] == [{"one": 0, "two": 0}, {"one": 7, "two": 7}, {"one": 8, "two": 7}]
    assert {thread for _, thread in drawn} == {threading.current_thread()}


def test_a_live_run_is_stopped_and_started_again(shown):
    """Steps wait for a permit, so nothing here depends on how fast the machine is."""
    permits, begun, kept = threading.Semaphore(0), [], []

    def work(tell, n):
        begun.append(n)
        for step in range(1, n + 1):
            assert permits.acquire(timeout=60)
            if n == 3:
                raise ValueError("three is impossible")
            kept.append(step)
            if tell(step, n):
                return

    async def until(happened):
        for _ in range(600):
            if happened():
                return
            await asyncio.sleep(0.02)
        raise AssertionError

    async def kernel():
        n = widgets.IntSlider(5, 1, 9, description="n")
        explore.live(work, lambda: (figure(), f"{len(kept)} kept"), n=n)
        box = shown[0]
        start, stop = of(box, widgets.Button)
        bar, state = (
            of(box, widgets.IntProgress)[0],
            lambda: " ".join(part.value for part in of(box, widgets.HTML)),
        )
        await until(lambda: words(box) == "0 kept")
        assert stop.disabled and not start.disabled
        start.click()
        start.click()  # a second press while it runs is nothing
        permits.release(2)
        await until(lambda: words(box) == "2 kept" and bar.value == 2 and bar.max == 5)
        assert start.disabled and not stop.disabled and begun == [5]
        stop.click()
        permits.release(1)  # the step under way is finished, then the run ends
        await until(lambda: not start.disabled)
        await until(lambda: words(box) == "3 kept")
        assert kept == [1, 2, 3] and "stopped, and what ran is kept: step 3 of 5" in state()
        n.value = 2
        start.click()
        permits.release(2)
        await until(lambda: "done: step 2 of 2" in state())
        assert kept == [1, 2, 3, 1, 2] and begun == [5, 2] and stop.disabled
        n.value = 3
        start.click()
        permits.release(1)
        await until(lambda: "three is impossible" in state())
        assert not start.disabled and "Not possible" in state()

    asyncio.run(kernel())


def test_slices_of_a_notebook():
    made, used = names(
        "import numpy as np\ndef f(x):\n    y = np.sum(x) + z\n    return y\n"
        "for i in range(3): pass\nw = f(i)"
    )
    assert made == {"np", "f", "i", "w"} and {"z", "range", "f", "np"} <= used and not {"x", "y"} & used
    sources = ["a = 1", "b = 2", "a = 3", "c = lambda: a", "d = c() + e", "print(d)"]
    assert needed([nbformat.v4.new_code_cell(s) for s in sources], [5]) == [2, 3, 4, 5]


# --- what the notebooks' sliders mean ---


def test_00_two_archives(monkeypatch):
    known = part_of("00", "draw", monkeypatch)
    k = int(np.argmax((known["have"].sum(2) == 0).sum(1)))
    text = said(known["draw"](k, 0, 1))
    lacks = int((known["have"][k].sum(1) == 0).sum())
    assert (
        f"hospital {k} holds {len(known['clients'][k])} images and lacks {lacks} of 6 classes; hospital 0"
        in text
    )


def test_01_each_slider_moves_its_own_number(monkeypatch):
    known = part_of("01", "draw", monkeypatch)
    start = dict(alpha=0.3, device_mix=0.0, count=10, tail=1, size_skew=0.0, look=0)

    def at(pattern, **moved):
        return number(pattern, said(known["draw"](**start | moved)))

    label, device = r"label divergence ([.\d]+)", r"device divergence ([.\d]+)"
    assert at(label, alpha=0.03) > at(label) > at(label, alpha=100) and at(device) == at(device, alpha=100)
    assert at(device) > at(device, device_mix=0.5) > at(device, device_mix=1.0)
    assert at(r"rarest class: (\d+)", tail=10) < at(r"rarest class: (\d+)")
    assert at(r"largest with (\d+)", size_skew=1.0, alpha=100) > at(r"largest with (\d+)", alpha=100)
    with pytest.raises(ValueError, match="stayed empty"):
        known["draw"](**start | dict(alpha=0.01, count=20))


def test_02_latent_walk_temperature_and_quality(monkeypatch):
    known = part_of("02", "draw", monkeypatch)
    cell = known["able"][0]

    def at(pattern, *moved):
        return number(pattern, said(known["draw"](cell, *moved)))

    lies, stray = r"lies ([.\d]+)", r"stray ([.\d]+)"
    assert at(lies, 0, 0, 0.9) == 0 < at(lies, 1, 0, 0.9) < at(lies, 3, 0, 0.9)
    assert at(lies, 0, -2, 0.9) > 0
    assert at(stray, 1, 0, 0.0) == 0 < at(stray, 1, 0, 0.5) < at(stray, 1, 0, 2.0)
    known = part_of("02", "quality", monkeypatch)
    few, many = (said(known["quality"](n)) for n in (known["learnt_from"][0], known["learnt_from"][-1]))
    assert number(r"within ([.\d]+)", few) > 1.5 * number(r"within ([.\d]+)", many)
    assert number(r"AUC is ([.\d]+)", few) > 0.9 > number(r"AUC is ([.\d]+)", many)


def test_03_budget_and_silence(monkeypatch):
    known = part_of("03", "draw", monkeypatch)
    start = dict(rule="class_and_device", fill=200, cell=120, per_image=0.5, receive=1500, silent=())

    def at(pattern, **moved):
        return number(pattern, said(known["draw"](**start | moved)))

    dealt, after, most = r"(\d+) samples distributed", r"before, (\d+) after", r"to (\d+) to each"
    assert at(dealt, fill=400) > at(dealt) > at(dealt, fill=100, cell=60)
    assert at(most, receive=200) <= 200 < at(most)
    assert at(after) < at(after, rule="class_only") < at(r"(\d+) before")
    everybody = tuple(range(len(known["have"])))
    assert at(dealt, per_image=0) == at(dealt, silent=everybody) == 0
    assert at(r"up ([.\d]+) MB", silent=(4,)) < at(r"up ([.\d]+) MB")
    with pytest.raises(ValueError, match="hospitals, 0 to"):
        known["draw"](**start | dict(silent=(99,)))


def test_04_a_live_run_grows_stops_and_is_kept(monkeypatch):
    known = part_of("04", "grown", monkeypatch, also="train")
    train, kept, seen = known["train"], known["kept"], []
    assert said(known["grown"]()) == "no run yet: choose, then press Start"

    def tell(done, total):
        seen.append((done, total))
        return done == 2

    train(tell, "fedavg", 5, 1, 100.0)
    assert seen == [(0, 5), (1, 5), (2, 5)]
    ((method, run, asked),) = kept.values()
    assert (method, asked, len(run.took_part)) == ("fedavg", 5, 2) and run.rounds.tolist() == [0, 1, 2]
    text = said(known["grown"]())
    assert re.match(r"run 1: fedavg, 1 ep., alpha 100: round 2 of 5, balanced accuracy 0\.\d\d; 1 run", text)
    for _ in range(7):
        train(lambda done, total: True, "fedavg", 5, 1, 100.0)
    assert [name.split(":")[0] for name in kept] == ["3", "4", "5", "6", "7", "8"]


def test_05_class_and_device_pick_a_line_of_the_file(monkeypatch):
    known = part_of("05", "draw", monkeypatch)
    draw, setting = known["draw"], "ham10000/by_device"
    metric_of = known["metric_of"]
    assert (
        metric_of("df", "all devices") == "recall[df]"
        and metric_of("df", "rosendahl") == "recall[df|rosendahl]"
    )
    assert metric_of("balanced_accuracy", "rosendahl") == "balanced_accuracy[rosendahl]"
    for what, device in (("balanced_accuracy", "all devices"), ("nv", "rosendahl")):
        pair, metric = ("fedssg", "fedavg"), metric_of(what, device)
        one, other = (said(draw(setting, *order, what, device)) for order in (pair, pair[::-1]))
        mean = (known["scores"]("fedssg", metric) - known["scores"]("fedavg", metric)).mean()
        assert number(r": ([-+.\d]+) points", one) == pytest.approx(100 * mean, abs=0.051)
        assert number(r": ([-+.\d]+) points", one) == -number(r": ([-+.\d]+) points", other)
    with pytest.raises(ValueError, match="the file has no seed with all classes"):
        draw(setting, "fedssg", "fedavg", "macro_f1", "rosendahl")


def test_09_the_mean_follows_and_the_median_stays(monkeypatch):
    known = part_of("09", "draw", monkeypatch)

    def away(aggregate, hostile, factor):
        direction = "right" if factor > 0 else "reversed"
        text = said(known["draw"](hostile, abs(factor), direction))
        return number(rf"{aggregate} is ([.\d]+) away", text)

    mean, median = r"mean \(FedAvg\)", "median"
    assert away(mean, 0, -5) == away(mean, 1, 1) == 0 < away(median, 0, -5) < 1
    assert away(mean, 1, 10) > away(mean, 1, 5) > 1 and away(mean, 2, -5) > away(mean, 1, -5)
    assert away(median, 1, 10) == pytest.approx(away(median, 1, 5), abs=0.05)


def test_explorer_page(monkeypatch):
    known = part_of("explorer", "draw", monkeypatch)
    assert (
        set(known["table"].shared) == set(known["RULES"])
        and known["table"].balanced_accuracy.between(0, 1).all()
    )
    assert known["table"].groupby(["alpha", "shared", "receive"]).size().nunique() == 1, (
        "as many seeds behind each bar"
    )
    rules, after = list(known["RULES"]), r", (\d+) after"
    texts = {rule: said(known["draw"](0.3, rule, 100, 0.9)) for rule in (rules[0], rules[-1])}
    nothing, ours = texts.values()
    assert number(r"(\d+) of 240", nothing) == number(after, nothing) > number(after, ours)
    table = known["table"]
    there = (table.alpha == 0.3) & (table.shared == rules[-1]) & (table.receive == 100)
    scores = table[there].balanced_accuracy
    assert f"balanced accuracy {scores.mean():.2f}, and" in ours
    want, offer = known["agreed"](0.3, rules[-1], 100)
    calm, wild = (known["received"](0.3, want, offer, 2, t).float() for t in (0.0, 2.0))
    assert calm.shape == wild.shape and calm.shape[0] > 10 and wild.std() > calm.std()


@pytest.mark.parametrize("name", [r"$\frac{$", "$5 or $10", "a_b^c{", r"back\slash", r"\$", "%s {x} <b>&"])
def test_names_are_drawn_as_they_are(name):
    figure, axis = plt.subplots()
    have = np.ones((2, 2, 2), int)
    plots.holdings(axis, have, [name, "b"], [name, "d"])
    plots.device_legend(figure, [name, "d"])
    plots.png(figure)
    said = [text.get_text() for text in [*axis.get_xticklabels(), *figure.legends[0].get_texts()]]
    assert [text.replace(r"\$", "$") for text in said] == [name.replace(r"\$", "$"), "b"] + [
        name.replace(r"\$", "$"),
        "d",
    ]
    assert plots.short(plots.short([name])) == plots.short([name])


def test_characters_without_a_font_are_named():
    plots.theme()
    with pytest.warns(UserWarning, match="Noto Sans CJK"):
        plots.short(["fine", "\U00012000"])  # cuneiform
    with warnings.catch_warnings(action="error"):
        plots.short(["fine", "é", "Ω", "–"])


def test_a_font_with_wider_characters_is_used_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(
        plots.font_manager, "get_font_names", lambda: ["DejaVu Sans", "SimHei", "Arial Unicode MS"]
    )
    monkeypatch.setattr(plots.sns, "set_theme", lambda **given: used.update(given["rc"]))
    used = {}
    plots.theme()
    assert used["font.family"] == ["sans-serif", "Arial Unicode MS", "SimHei"]


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (None, 0.259138, "Not done yet"),
        (0.259138, 0.259138, "Correct."),
        (0.26, 0.259138, "Nearly"),
        ([0.6, 0.17], [0.603, 0.1667], "Nearly"),
        (0.3, 0.259138, "Not yet: look"),
        ([0.26], 0.259138, "Not yet: the answer has shape"),
        (1001, 1000, "Not yet: look"),  # a count is right or wrong
        ([True, False], [True, True], "Not yet: look"),
    ],
)
def test_a_rounded_answer_is_nearly_right_and_a_wrong_count_is_not(answer, expected, said, capsys):
    explore.check(answer, expected, "look")
    assert capsys.readouterr().out.startswith(said)
