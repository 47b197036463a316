"""Draw the animations of lesson 00, notebooks/images/round.gif and exchange.gif: python .ci/animate.py"""

import io
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fedssg_helpers import methods, plots, runs, server
from fedssg_helpers.keys import rng

WIDTH, HEIGHT, TILE, TOPS = (
    720,
    414,
    40,
    (44, 160, 276),
)  # in pixels; TOPS: the upper edges of three hospitals
WHO, REAL, MADE = (2, 8, 9), "0.35", plots.method_colour("fedssg")  # hospitals; frames: real, synthetic
ROUND = """Three hospitals hold images. The images stay there.
The server holds a model. Bars stand for its weights.
1. The server sends the weights to every hospital.
2. Every hospital trains the model on its own images.
3. Every hospital sends its new weights to the server.
4. The server averages them. More images count more.
The average is the new model. The next round starts."""
EXCHANGE = """Every hospital has images of some classes only.
1. Every hospital reports how many images it has.
2. The server asks every hospital for what others lack.
3. Every hospital trains a generator on its own images.
4. Every hospital uploads samples that its generator drew.
5. The server sends samples of what a hospital lacks.
Orange: synthetic images. No real image has moved."""


def text(axis, x, y, words, size=10, ha="center", **look):
    axis.text(x, y, words, fontsize=size, ha=ha, va="center", **look)


def stage(words, hospitals):
    """An axis in pixels, from the upper left corner, with a sentence, the hospitals and the server."""
    axis = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), layout="none").add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), autoscale_on=False)
    axis.set_axis_off()
    text(axis, 10, 22, words, 15, weight="bold", ha="left")
    text(axis, 712, 402, "drawn images, simulated devices", 8, ha="right")
    boxes = [(8, y, 344, 112, name) for y, name in zip(TOPS, hospitals)]
    for x, y, wide, high, name in [*boxes, (458, 44, 254, 344, "server")]:
        axis.add_patch(plt.Rectangle((x, y), wide, high, facecolor="#eef3f8", edgecolor="0.5"))
        text(axis, x + 8, y + 14, name, weight="bold", ha="left")
    return axis


def tile(axis, x, y, images, edge):
    """The first of the images in a frame; an empty frame where there is none."""
    axis.add_patch(plt.Rectangle((x, y), TILE, TILE, fill=False, ec=edge, lw=2, zorder=3))
    for image in images[:1]:
        axis.imshow(plots.to_display(image), extent=(x, x + TILE, y + TILE, y), aspect="auto", zorder=2)


def arrows(axis, up="", down=""):
    """What goes from every hospital up to the server, and down from it."""
    look = dict(arrowstyle="-|>", lw=2.5, color="0.35", mutation_scale=20)
    for top in TOPS:
        for y, words, start, end in ((top + 46, up, 358, 452), (top + 88, down, 452, 358)):
            axis.annotate("", (end, y), (start, y), arrowprops=look if words else None)
            text(axis, 405, y - 12, words)


def one_round(clients, step, words):
    """A picture of FedAvg. The bars are made up; their mean is computed as FedAvg does."""
    random, images = rng(0, "bars"), np.array([len(client) for client in clients])
    old = random.uniform(0.35, 0.75, 7)
    new = (old + random.uniform(-0.3, 0.3, (3, 7))).clip(0.08, 1)
    axis = stage(words, [f"hospital {k}: {n} images" for k, n in zip(WHO, images)])
    arrows(axis, "weights" if step == 4 else "", "weights" if step in (2, 6) else "")
    mean = images @ new / images.sum()
    middle = (602, TOPS[1], old, "C1", "weights"), (602, TOPS[1], mean, "C0", "mean")
    shown = [middle[step >= 5]] * (step >= 1)
    for k, (client, y) in enumerate(zip(clients, TOPS)):
        for i in range(5):
            tile(axis, 18 + 44 * i, y + 40, client.images[i * len(client) // 5 :], REAL)
        mine, much = (new[k], f"C{k + 2}"), f"times {images[k] / images.sum():.2f}"
        shown += [(256, y, *{2: (old, "C1"), 6: (mean, "C0")}.get(step, mine), "")] * (step >= 2)
        shown += [(474, y, *mine, much if step == 5 else "")] * (step in (4, 5))
    for x, y, values, colour, name in shown:
        axis.bar(x + 12 * np.arange(7), -44 * values, 10, y + 82, color=colour, align="edge")
        text(axis, x + 41, y + 95, name)
    return axis.figure


def one_exchange(clients, step, words, classes, shared):
    """A picture of an exchange: images, counts and samples are those of a real one between the three hospitals."""
    pool, axis = shared.pool, stage(words, [f"hospital {k}" + ", with generator" * (step >= 3) for k in WHO])
    table = ["  " + "".join(f"{name[:3]:>4}" for name in classes)]
    for k, (client, y) in enumerate(zip(clients, TOPS)):
        numbers, rows = np.bincount(client.labels, minlength=len(classes)), shared.rows[k]
        table.append(f"{WHO[k]} " + "".join(f"{n:>4}" for n in numbers))
        for c, name in enumerate(classes):
            own, came = client.images[client.labels == c], pool.images[rows[pool.labels[rows] == c]]
            came, x = came[: None if step >= 5 else 0], 37 + 56 * c
            colour = REAL if len(own) else MADE if len(came) else "0.8"
            tile(axis, x - 20, y + 38, [*own, *came], colour)
            text(axis, x, y + 29, name, 7.5)
            text(axis, x, y + 88, str(len(own)))
            text(axis, x, y + 102, f"+ {len(came)}" if len(came) else "", color=MADE)
    text(axis, 585, 126, "\n".join(table) if step >= 1 else "", 10, family="monospace", linespacing=1.4)
    text(axis, 585, 74, "number of images" if step >= 1 else "")
    text(axis, 585, 194, "pool of synthetic images" if step >= 4 else "")
    for i in range(24 if step >= 4 else 0):
        tile(axis, 465 + i % 6 * 40, 206 + i // 6 * 44, pool.images[pool.labels == i % 6][i // 6 :], MADE)
    up, down = {1: "counts", 4: "samples", 6: "samples"}, {2: "requests", 5: "samples", 6: "samples"}
    arrows(axis, up.get(step, ""), down.get(step, ""))
    return axis.figure


def save(figures, path):
    pages = [Image.open(io.BytesIO(plots.png(figure))).convert("RGB") for figure in figures]
    first, *others = [page.quantize(128, dither=Image.Dither.NONE) for page in pages]
    times = [2500] * len(others) + [5000]  # milliseconds
    first.save(path, save_all=True, append_images=others, duration=times, loop=0, optimize=True)


if __name__ == "__main__":
    plots.theme()
    federation, folder = runs.federation("phantom"), ROOT / "notebooks" / "images"
    clients = [federation.clients[k] for k in WHO]
    shared = server.share(replace(federation, clients=clients), methods.Sharing(), 0)
    save([one_round(clients, *step) for step in enumerate(ROUND.split("\n"))], folder / "round.gif")
    rest = federation.classes, shared
    pages = [one_exchange(clients, *step, *rest) for step in enumerate(EXCHANGE.split("\n"))]
    save(pages, folder / "exchange.gif")
