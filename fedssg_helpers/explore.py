"""Dials over a figure: state in, figure out; and exercises that check themselves."""
from __future__ import annotations

import html

import ipywidgets as widgets
import numpy as np
from IPython.display import display

from .plots import png


def explorer(draw, height: int = 420, **controls: widgets.Widget) -> None:
    """Show `controls` with the figure of ``draw(**values)`` below them; redraw when one is moved.

    The picture keeps its place while it changes, so nothing jumps. A ValueError of `draw` becomes a sentence
    under the dials, and the next move works again.

    Parameters
    ----------
    draw : callable
        Takes the controls' values by name, returns a matplotlib Figure.
    height : int
        Height of the picture in pixels.
    controls : ipywidgets by argument name
        Each with a ``description``; ``tooltip`` is shown on hovering.
    """
    place = widgets.Layout(height=f"{height}px", object_fit="contain", object_position="top")
    picture = widgets.Image(format="png", layout=place)
    message = widgets.HTML()

    def redraw(_=None) -> None:
        try:
            picture.value = png(draw(**{name: control.value for name, control in controls.items()}))
            message.value = ""
        except ValueError as error:
            message.value = f"<b>Not possible:</b> {html.escape(str(error))}"

    for control in controls.values():
        control.style.description_width = "initial"
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
        control.observe(redraw, "value")
    redraw()
    box = widgets.Layout(flex_flow="row wrap")
    display(widgets.VBox([widgets.HBox(list(controls.values()), layout=box), message, picture]))


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
