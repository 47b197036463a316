"""Sliders over a figure, a long run that can be stopped, and exercises that check themselves."""

import asyncio
import html
import threading

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from .plots import png

WORDS = """<style>.explorer .pale { opacity: 0.3 }</style>
<div role="status" style="height: 2.7em; overflow-y: auto; font-size: 15px; line-height: 1.35">%s</div>"""
GAPS = {"flex_flow": "row wrap", "grid_gap": "2px 28px"}


class _Panel:
    """Controls, `parts`, two lines for words, and a picture; all keep their places, whatever they show."""

    def __init__(self, draw, height: int, controls: dict[str, widgets.Widget], *parts: widgets.Widget):
        place = {"height": f"{height}px", "object_fit": "contain", "object_position": "left top"}
        self.draw, self.controls, self.shown, self.words = draw, controls, None, widgets.HTML(WORDS % "")
        self.picture = widgets.Image(format="png", layout={"width": "100%", **place})
        for control in controls.values():
            control.style.description_width = "initial"
            if hasattr(control, "continuous_update"):
                control.continuous_update = False  # a slider answers when it is released
            elif control.tooltip:  # lists do not show their tooltip by themselves
                label, more = html.escape(control.description), html.escape(control.tooltip)
                control.description_allow_html = True
                control.description = f'<span title="{more}">{label}</span>'
        row = widgets.HBox(list(controls.values()), layout=GAPS)
        self.box = widgets.VBox([row, *parts, self.words, self.picture]).add_class("explorer")

    def values(self) -> dict:
        return {name: control.value for name, control in self.controls.items()}

    def show(self, **state) -> None:
        if state == self.shown:
            return
        self.shown = dict(state)
        try:
            drawn = self.draw(**state)
            figure, words = drawn if isinstance(drawn, tuple) else (drawn, "")
            self.picture.value = png(figure)
            self.picture.remove_class("pale")
            self.words.value = WORDS % html.escape(words)
        except Exception as error:  # a student's function can raise anything
            plt.close("all")  # a figure that was begun would appear under the next cell
            self.picture.add_class("pale")
            self.words.value = WORDS % _sentence(error)


def _sentence(error: Exception) -> str:
    what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"<b>Not possible:</b> {html.escape(what + str(error))}"


def _between_cells(action):
    """A callback: `action` is done soon, by the thread that runs cells, as no other may draw figures."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # no kernel
        return lambda *_: action()
    return lambda *_: loop.call_soon_threadsafe(action)


def explorer(draw, height: int = 420, **controls: widgets.Widget) -> None:
    """Show `controls` above the figure of ``draw(**values)``, and draw it again when one is moved.

    `draw` gets the controls' values by name. It returns a Figure, or a pair of it and the words that stand
    above it and that a screen reader speaks. An error becomes a sentence there, and until the next move the
    picture, `height` pixels high, is pale.
    """
    panel = _Panel(draw, height, controls)
    redraw = _between_cells(lambda: panel.show(**panel.values()))
    for control in controls.values():
        control.observe(redraw, "value")
    panel.show(**panel.values())
    display(panel.box)


def live(work, draw, height: int = 420, **controls: widgets.Widget) -> None:
    """Show `controls`, Start, Stop and a bar; while `work` runs in a thread, the figure of ``draw()`` grows.

    ``work(tell, **values)`` calls ``tell(done, total)`` after each step. When that returns True (Stop was
    pressed), it should end. ``draw()`` returns what `explorer`'s does, of what the work has left so far.
    """
    start = widgets.Button(description="Start", icon="play", tooltip="run with these settings")
    halt = widgets.Button(description="Stop", icon="stop", tooltip="end after this step, keep what ran")
    bar, label, stop = widgets.IntProgress(), widgets.HTML(), threading.Event()
    panel = _Panel(lambda **_: draw(), height, controls, widgets.HBox([start, halt, bar, label], layout=GAPS))
    now = {"running": False, "text": "ready", "done": 0, "total": 0}

    @_between_cells
    def refresh() -> None:
        start.disabled, halt.disabled = now["running"], stop.is_set() or not now["running"]
        bar.max, bar.value = now["total"] or 1, now["done"]
        label.value = now["text"] + f" step {now['done']} of {now['total']}" * (now["total"] > 0)
        panel.show(**now)

    def say(**news) -> bool:
        now.update(news)
        refresh()
        return stop.is_set()

    def job(values: dict) -> None:
        try:
            work(lambda done, total: say(text="running:", done=done, total=total), **values)
            say(running=False, text="stopped, and what ran is kept:" if stop.is_set() else "done:")
        except Exception as error:
            say(running=False, text=_sentence(error))

    def begin(_) -> None:
        if not now["running"]:  # two quick presses are one
            stop.clear()
            say(running=True, text="preparing", done=0, total=0)
            threading.Thread(target=job, args=(panel.values(),), daemon=True).start()

    start.on_click(begin)
    halt.on_click(lambda _: stop.set())
    halt.on_click(lambda _: say(text="stopping:"))
    refresh()
    display(panel.box)


def check(answer, expected, hint: str) -> None:
    """Say whether an exercise's `answer` (None: not done) is as `expected`; `hint` tells where to look."""
    got, wanted = np.asarray(answer), np.asarray(expected)
    if answer is None:
        print("Not done yet: replace None above, then run this cell again.")
    elif got.shape != wanted.shape:
        print(f"Not yet: the answer has shape {got.shape}, it should have {wanted.shape}. {hint}")
    elif not np.allclose(got, wanted, rtol=1e-4, atol=1e-6):
        near = wanted.dtype.kind == "f" and np.allclose(got, wanted, rtol=0.02)
        print("Nearly: give more digits, best as Python computes them." if near else f"Not yet: {hint}")
    else:
        print("Correct.")
