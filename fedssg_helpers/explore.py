"""Dials over a figure: state in, figure out; a long run that can be stopped; exercises that check themselves."""
from __future__ import annotations

import asyncio
import html
import threading

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from .plots import png

# The words have room for two lines whether they need them or not; a picture that its dials have left goes pale.
WORDS = '<div role="status" style="height: 2.7em; overflow-y: auto; font-size: 15px; line-height: 1.35">{}</div>'
DRAWING = threading.RLock()  # matplotlib knows one thread only
GAPS = {"flex_flow": "row wrap", "grid_gap": "2px 28px"}
PALE = "<style>.explorer .pale { opacity: 0.3 }</style>"


class _Screen:
    """A picture with its words above it; both keep their places, whatever they show."""

    def __init__(self, draw, height: int):
        self.draw = draw
        place = widgets.Layout(height=f"{height}px", width="100%", object_fit="contain", object_position="left top")
        self.picture = widgets.Image(format="png", layout=place)
        self.words = widgets.HTML(WORDS.format(""))

    def show(self, **values) -> None:
        with DRAWING:
            self._show(values)

    def _show(self, values: dict) -> None:
        before = plt.get_fignums()
        try:
            drawn = self.draw(**values)
            figure, words = drawn if isinstance(drawn, tuple) else (drawn, "")
            self.picture.value = png(figure)
            self.picture.remove_class("pale")
            self.words.value = WORDS.format(html.escape(words))
        except Exception as error:  # also a student's own rule: a dial has no place for a traceback
            for number in set(plt.get_fignums()) - set(before):
                plt.close(number)  # what was begun would be shown under the next cell
            self.picture.add_class("pale")
            self.words.value = WORDS.format(_sentence(error))


def _sentence(error: Exception) -> str:
    what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"<b>Not possible:</b> {html.escape(what + str(error))}"


def _in_turn(action):
    """A callback that has `action` done soon, between two cells and by the thread that runs cells.

    JupyterLab may call widgets back from another thread, where figures must not be drawn. Calls that come before the
    action is done are served by it together.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # no kernel
        return lambda *_: action()
    waiting = False

    def now() -> None:
        nonlocal waiting
        waiting = False
        action()

    def later(*_) -> None:
        nonlocal waiting
        if not waiting:
            waiting = True
            loop.call_soon_threadsafe(now)

    return later


def _values(controls: dict[str, widgets.Widget]) -> dict:
    return {name: control.value for name, control in controls.items()}


def _display(controls: dict[str, widgets.Widget], *parts: widgets.Widget) -> None:
    """The controls in a row that wraps, above the parts; each answers when it is let go, not on the way."""
    for control in controls.values():
        control.style.description_width = "initial"
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
        elif control.tooltip:  # lists do not show their tooltip by themselves
            control.description_allow_html = True
            label, more = html.escape(control.description), html.escape(control.tooltip)
            control.description = f'<span title="{more}">{label}</span>'
    row = widgets.HBox(list(controls.values()), layout=GAPS)
    box = widgets.VBox([row, *parts, widgets.HTML(PALE, layout=widgets.Layout(display="none"))])
    box.add_class("explorer")
    display(box)


def explorer(draw, height: int = 420, **controls: widgets.Widget) -> None:
    """Show `controls` with the figure of ``draw(**values)`` below them; redraw when one is moved.

    The picture keeps its place while it changes, so nothing jumps. An error of `draw` becomes a sentence under the
    dials, the picture goes pale, and the next move works again.

    Parameters
    ----------
    draw : callable
        Takes the controls' values by name; returns a matplotlib Figure, or a pair of it and the words that say in
        numbers what it shows. They stand above the picture, and a screen reader speaks them.
    height : int
        Height of the picture in pixels.
    controls : ipywidgets by argument name
        Each with a ``description``; ``tooltip`` is shown on hovering.
    """
    screen = _Screen(draw, height)
    redraw = _in_turn(lambda: screen.show(**_values(controls)))
    for control in controls.values():
        control.observe(redraw, "value")
    screen.show(**_values(controls))
    _display(controls, screen.words, screen.picture)


def live(work, draw, height: int = 420, **controls: widgets.Widget) -> None:
    """Show `controls` with Start, Stop and a bar; while `work` runs, the figure of ``draw()`` grows below them.

    The work is done in a thread of its own, so that Stop is heard.

    Parameters
    ----------
    work : callable
        ``work(tell, **values)`` computes with the controls' values of the moment of Start. It calls
        ``tell(done, total)`` after every step; once that returns True, as Stop was pressed, it should end and leave
        what it has. An error becomes a sentence, and Start can be pressed again.
    draw : callable
        Takes nothing; returns what `explorer`'s does, of what the work has left so far.
    height, controls
        As in `explorer`.
    """
    screen, stop, said = _Screen(draw, height), threading.Event(), {"state": "ready"}
    start_button = widgets.Button(description="Start", icon="play", tooltip="run with these dials")
    stop_button = widgets.Button(description="Stop", icon="stop", disabled=True,
                                 tooltip="end after this step; what ran so far is kept")
    bar, state = widgets.IntProgress(0, 0, 1, tooltip="steps done"), widgets.HTML()

    @_in_turn
    def refresh() -> None:
        running = said["state"] in ("running", "preparing")
        start_button.disabled, stop_button.disabled = running, not running or stop.is_set()
        bar.max, bar.value = said.get("of", 1), said.get("done", 0)
        steps = f"step {bar.value} of {bar.max}" * ("of" in said)
        state.value = " ".join(filter(None, (said["state"], "(stopping)" * (running and stop.is_set()), steps)))
        screen.show()

    def tell(done: int, total: int) -> bool:
        said.update(state="running", done=done, of=total)
        refresh()
        return stop.is_set()

    def job(values: dict) -> None:
        try:
            work(tell, **values)
            said["state"] = "stopped, and what ran is kept:" if stop.is_set() else "done:"
        except Exception as error:
            said["state"] = _sentence(error)
        refresh()

    def start(_) -> None:
        if not start_button.disabled:
            start_button.disabled = True  # at once: two quick presses are one
            stop.clear()
            said.clear()
            said["state"] = "preparing"
            refresh()
            threading.Thread(target=job, args=(_values(controls),), daemon=True).start()

    def halt(_) -> None:
        stop.set()
        refresh()

    start_button.on_click(start)
    stop_button.on_click(halt)
    refresh()
    row = widgets.HBox([start_button, stop_button, bar, state], layout=GAPS)
    _display(controls, row, screen.words, screen.picture)


def check(answer, expected, hint: str) -> None:
    """Say whether an exercise's answer is right.

    Parameters
    ----------
    answer : number, array or tensor; None as long as the exercise is not done
    expected : the same shape
    hint : str
        What to look at when the answer is wrong.
    """
    if answer is None:
        print("Not done yet: replace None above, then run this cell again.")
        return
    got, wanted = np.asarray(answer), np.asarray(expected)
    if got.shape != wanted.shape:
        print(f"Not yet: the answer has shape {got.shape}, it should have {wanted.shape}. {hint}")
    elif not np.allclose(got, wanted, rtol=1e-4, atol=1e-6):
        print(f"Not yet: {hint}")
    else:
        print("Correct.")
