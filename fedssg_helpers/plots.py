"""Figures of the course: one theme, one colour per method and per device, and the few plots that lessons share."""
from __future__ import annotations

import inspect
import io

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Code
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

COUNTS, RECALL = "viridis", "cividis"  # colour maps that survive grey print and colour-blindness
_COLOURS = sns.color_palette("colorblind")
# Related methods share a hue and differ in lightness (None: the palette's own).
METHOD_COLOURS = {name: sns.set_hls_values(_COLOURS[hue], l=lightness) for name, (hue, lightness) in {
    "local_only": (7, 0.3), "fedavg": (7, None),
    "fedprox": (5, None), "scaffold": (5, 0.35), "fedavgm": (6, None),
    "local_normalisation": (8, 0.18), "balanced_sampling": (1, None), "fedavg+la": (0, None),
    "device_statistics": (8, None), "combined": (0, 0.17),
    "duplication": (4, 0.42), "uniform_shuffle": (4, None), "synthetic_only": (7, 0.82),
    "server_pretraining": (3, 0.72), "fedssg_no_pretrain": (9, None), "fedssg": (3, None),
    "fedssg+combined": (3, 0.16), "oracle_real": (2, 0.2), "centralised": (2, None)}.items()}


def theme() -> None:
    """Set the one look of all figures; the first thing a lesson does after its imports."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind",
                  rc={"figure.dpi": 100, "figure.constrained_layout.use": True, "axes.titlesize": "medium"})


def device_colours(devices) -> dict[str, tuple]:
    """One colour per device name."""
    return dict(zip(devices, sns.color_palette("Set2", max(len(devices), 3))))


def show_source(*functions) -> Code:
    """The helper's own source, as the lesson shows it: never a copy that could grow old."""
    return Code("\n\n".join(inspect.getsource(f).rstrip() for f in functions), language="python")


def to_display(image) -> np.ndarray:
    """An image (C, H, W), uint8 0..255, as matplotlib wants it: (H, W, 3), grey repeated."""
    array = np.asarray(image).transpose(1, 2, 0)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def strip(axis, images, title: str = "", columns: int | None = None) -> None:
    """Draw images (n, C, H, W) as one tight mosaic on an axis; nothing but a note where there are none."""
    axis.set_axis_off()
    axis.set_title(title, fontsize="small")
    if len(images) == 0:
        axis.text(0.5, 0.5, "none", ha="center", va="center", color="0.5", transform=axis.transAxes)
        return
    columns = columns or len(images)
    tiles = [np.pad(to_display(i), ((1, 1), (1, 1), (0, 0)), constant_values=255) for i in images]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    axis.imshow(np.vstack([np.hstack(tiles[i:i + columns]) for i in range(0, len(tiles), columns)]))


def cell_gallery(data, per_cell: int = 3, random: np.random.Generator | None = None) -> Figure:
    """Sample images of every (class, device) cell of an `ImageSet`: classes down, devices across."""
    random = random or np.random.default_rng(0)
    size = (2.6 * len(data.devices) + 1, 0.95 * len(data.classes) + 0.4)
    figure, axes = plt.subplots(len(data.classes), len(data.devices), figsize=size, squeeze=False)
    for c, row in enumerate(axes):
        for d, axis in enumerate(row):
            cell = np.flatnonzero((data.labels == c) & (data.device == d))
            strip(axis, data.images[random.permutation(cell)[:per_cell]], data.devices[d] if c == 0 else "", per_cell)
        row[0].text(-0.08, 0.5, short(data.classes, 24)[c], ha="right", va="center", transform=row[0].transAxes)
    return figure


def archive(axis, client, classes, devices, random: np.random.Generator, title: str = "", per_cell: int = 3) -> None:
    """Sample images of one hospital's `Client` on one axis: classes down, devices across; blank where it has none."""
    side, labels, device = client.images.shape[2] + 1, np.asarray(client.labels), np.asarray(client.device)
    tiles = np.full((len(classes) * side, len(devices) * per_cell * side, 3), 255, np.uint8)
    for c, d in np.unique(np.stack([labels, device], 1), axis=0):
        cell = np.flatnonzero((labels == c) & (device == d))
        for i, row in enumerate(random.permutation(cell)[:per_cell]):
            y, x = c * side, (d * per_cell + i) * side
            tiles[y:y + side - 1, x:x + side - 1] = to_display(client.images[row])
    axis.imshow(tiles, aspect="equal")
    axis.set_yticks((np.arange(len(classes)) + 0.5) * side, [
        f"{name} ({(labels == c).sum()})" for c, name in enumerate(short(classes))])
    axis.set_xticks((np.arange(len(devices)) + 0.5) * per_cell * side, short(devices))
    axis.set_title(title)
    axis.grid(False)


def heat(axis, values, rows, columns, *, title="", fmt="d", cmap=COUNTS, log=False, **limits) -> None:
    """A numbered heat map (R, C); NaN cells stay empty. Pass vmin and vmax to compare several."""
    values = np.asarray(values)
    shade = np.log10(values + 1.0) if log else values
    sns.heatmap(shade, annot=values, fmt=fmt, mask=~np.isfinite(values.astype(float)), cmap=cmap, cbar=False,
                xticklabels=columns, yticklabels=rows, linewidths=0.5, annot_kws={"fontsize": "small"}, ax=axis,
                **limits)
    axis.set_title(title)
    axis.tick_params(axis="y", rotation=0)
    axis.grid(False)  # an empty cell is white, not crossed by a grid line


def curves(axis, rounds, values, label: str, colour) -> None:
    """Mean over seeds of a score (S, E) against rounds (E,), with the range of the seeds as a band."""
    values = np.asarray(values)
    axis.plot(rounds, values.mean(0), label=label, color=colour)
    if len(values) > 1:
        axis.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes; closes it. Quicker than `savefig`, which draws once more after the layout."""
    canvas, stream = FigureCanvasAgg(figure), io.BytesIO()
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(stream, "PNG", compress_level=3)
    plt.close(figure)
    return stream.getvalue()


def short(names, most: int = 14) -> list[str]:
    """Names cut to `most` characters, for axes: some data sets name a class in half a sentence."""
    return [name if len(name) <= most else name[:most - 1].rstrip() + "…" for name in names]


def holdings(axis, have, classes, devices, title: str = "") -> None:
    """Who holds what, in one picture, from counts (K, C, D).

    A row per hospital and a block of D narrow columns per class; hue is the device, depth (log scale) and number
    are the count. White: not one image.
    """
    hospitals, c, d = have.shape
    colours = np.array(list(device_colours(devices).values()))[:, :3]
    depth = np.where(have > 0, 0.2 + 0.8 * np.log1p(have) / np.log1p(max(have.max(), 1)), 0.0)[..., None]
    axis.imshow((1 - depth * (1 - colours)).reshape(hospitals, c * d, 3), aspect="auto", interpolation="nearest")
    if c * d <= 40:
        for k, i, j in np.argwhere(have):
            axis.text(i * d + j, k, have[k, i, j], ha="center", va="center", fontsize=7, in_layout=False)
    axis.set_xticks(np.arange(c) * d + (d - 1) / 2, short(classes), rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(hospitals), [f"hospital {k}" for k in range(hospitals)])
    for edge in np.arange(c + 1) * d - 0.5:
        axis.axvline(edge, color="0.6", linewidth=0.8)
    axis.set_title(title)
    axis.grid(False)


def device_legend(figure: Figure, devices) -> None:
    """One legend of device colours above a figure's axes."""
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in device_colours(devices).values()]
    figure.legend(patches, list(devices), loc="outside upper center", ncols=min(len(devices), 6), frameon=False)


def bars(axis, scores: dict, names, title: str = "", colours: dict = METHOD_COLOURS) -> None:
    """Scores 0..1 side by side: `scores` maps a method's name to values (n,), `names` (n,) stand below.

    A NaN (nothing to score) is marked by a dash, so that it is not taken for 0.
    """
    width, place = 0.8 / len(scores), np.arange(len(names))
    for i, (name, values) in enumerate(scores.items()):
        x = place + (i - (len(scores) - 1) / 2) * width
        axis.bar(x, np.nan_to_num(values), width, color=colours.get(name, "0.5"), label=name)
        for at, value in zip(x, values):
            axis.text(at, np.nan_to_num(value) + 0.01, "–" if np.isnan(value) else f"{value:.2f}", ha="center",
                      va="bottom", fontsize=8)
    axis.set_xticks(place, names, rotation=30, ha="right", rotation_mode="anchor")
    axis.set(title=title, ylim=(0, 1.06))
    axis.grid(False, axis="x")


def method_sketch(clients, pool_images, coverage) -> Figure:
    """The method in one drawing, with real images of up to three `clients` and the synthetic `pool_images`.

    `coverage` (C, D) is the federation's images per class and device.
    """
    figure, axis = plt.subplots(figsize=(11, 5.2))
    axis.set(xlim=(0, 11), ylim=(0, 5.2), aspect="equal")
    axis.set_axis_off()

    def box(x, y, width, height, title, colour):
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12",
                                      facecolor=colour, edgecolor="0.35"))
        axis.text(x + width / 2, y + height - 0.1, title, ha="center", va="top", weight="bold", fontsize=11)

    def tiles(images, x, y, side, columns):
        for i, image in enumerate(images):
            left, top = x + side * 1.06 * (i % columns), y - side * 1.06 * (i // columns)
            axis.imshow(to_display(image), extent=(left, left + side, top - side, top), zorder=3)

    order = np.argsort([-len(c) for c in clients])[:3]
    for row, k in enumerate(order):
        y, client = 3.58 - 1.72 * row, clients[k]
        box(0.1, y, 3.3, 1.52, f"hospital {k}", "#eef3f8")
        tiles(client.images[np.linspace(0, len(client) - 1, 5).astype(int)], 0.2, y + 1.1, 0.58, 5)
        axis.text(1.75, y + 0.42, "real images stay here\nown generator, own copy of the model", ha="center",
                  va="top", fontsize=9, linespacing=1.15)
    box(7.9, 0.14, 3.0, 4.96, "server", "#f8f3ea")
    axis.text(9.4, 4.62, "who has what", ha="center", fontsize=10)
    shade = np.where(coverage > 0, np.log1p(coverage), np.nan)  # an empty cell stays blank
    axis.imshow(shade, cmap=COUNTS, extent=(8.5, 10.3, 3.25, 4.5), zorder=3, aspect="auto")
    axis.text(9.4, 2.82, "pool of synthetic images", ha="center", fontsize=10)
    tiles(pool_images[np.linspace(0, max(len(pool_images) - 1, 0), min(len(pool_images), 8)).astype(int)],
          8.15, 2.7, 0.58, 4)
    axis.text(9.4, 0.8, r"mean of the weights $\sum_k \frac{n_k}{n}\, w_k$", ha="center", fontsize=11)
    lanes = ((4.25, "-|>", "1   counts per class and device", "once", 2),
             (3.15, "-|>", "2   synthetic images", "once", 3),
             (2.05, "<|-", "3   those that a hospital lacks", "once", 3),
             (0.85, "<|-|>", "4   model weights", "every round", 0))
    for y, style, text, when, colour in lanes:
        axis.add_patch(FancyArrowPatch((3.5, y), (7.8, y), arrowstyle=style, mutation_scale=22, linewidth=2.6,
                                       color=_COLOURS[colour], shrinkA=0, shrinkB=0))
        axis.text(5.65, y + 0.12, text, ha="center", va="bottom", fontsize=11)
        axis.text(5.65, y - 0.12, when, ha="center", va="top", fontsize=9, color="0.35")
    axis.set(xlim=(0, 11), ylim=(0, 5.2))
    return figure


def coverage_map(axis, have, classes, devices, *, most: int, title: str = ""):
    """Coverage, hospital by hospital: counts (K, C, D) as hospitals down, (class, device) cells across.

    Colour is logarithmic from 1 to `most` images (give several maps the same); empty cells are hatched. The strip
    under the map names the device by its colour (`device_colours`, `device_legend`). Returns what `colorbar` needs.
    """
    grid = np.asarray(have, float).reshape(len(have), -1)
    axis.patch.set(facecolor="0.96", hatch="/////", edgecolor="0.75")
    mesh = axis.pcolormesh(np.ma.masked_less(grid, 1), norm=LogNorm(1, max(most, 2)), cmap=COUNTS)
    axis.set_xticks((np.arange(len(classes)) + 0.5) * len(devices), short(classes), rotation=30, ha="right",
                    rotation_mode="anchor")
    axis.set_yticks(np.arange(len(have)) + 0.5, range(len(have)))
    axis.vlines(np.arange(1, len(classes)) * len(devices), 0, len(have), color="white", linewidth=2)
    axis.hlines(np.arange(1, len(have)), 0, grid.shape[1], color="white", linewidth=1)
    colours = list(device_colours(devices).values())[:len(devices)] * len(classes)
    axis.bar(np.arange(grid.shape[1]) + 0.5, 0.03, color=colours, width=0.9, bottom=-0.035, clip_on=False,
             transform=axis.get_xaxis_transform(), in_layout=False)  # what needs no place of its own costs no time
    axis.set(xlim=(0, grid.shape[1]), ylim=(len(have), 0), title=title, ylabel="hospital")
    axis.grid(False)
    axis.tick_params(axis="x", pad=8)
    return mesh


def flow_arrows(axis, flow, home, devices, *, per_hospital: int = 2, title: str = "") -> None:
    """Hospitals on a circle, coloured by their main device `home` (K,); each one's largest sources as arrows.

    flow (K, K): samples from source (row) to hospital (column); an arrow's width is in proportion.
    """
    flow, palette = np.asarray(flow, float), list(device_colours(devices).values())
    angle = np.pi / 2 - 2 * np.pi * np.arange(len(flow)) / len(flow)
    spots = np.stack([np.cos(angle), np.sin(angle)], 1)
    for k in range(len(flow)):
        for j in np.argsort(-flow[:, k], kind="stable")[:per_hospital]:
            if flow[j, k] > 0:
                axis.add_patch(FancyArrowPatch(
                    spots[j], spots[k], connectionstyle="arc3,rad=0.2", arrowstyle="-|>", mutation_scale=12,
                    linewidth=0.5 + 4 * flow[j, k] / flow.max(), color=palette[home[j]], shrinkA=14, shrinkB=14,
                    in_layout=False))
    axis.scatter(*spots.T, s=500, c=[palette[d] for d in home], edgecolors="0.3", zorder=3)
    for k, (x, y) in enumerate(spots):
        axis.text(x, y, str(k), ha="center", va="center", zorder=4)
    axis.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", title=title)
    axis.set_axis_off()


def wall(axis, rows, title: str = "", every: int = 1) -> None:
    """Images in named rows, as one tight mosaic; rows may differ in length.

    Parameters
    ----------
    rows : dict or list of pairs
        A name and uint8 images (n, C, H, W) for each row; names may repeat in a list.
    every : int
        A gap follows each `every` rows; 1: no gaps.
    """
    pairs = list(rows.items() if isinstance(rows, dict) else rows)
    tile = max(np.asarray(images).shape[-1] for _, images in pairs) + 2
    gap = tile // 4 if every > 1 else 0
    tops = [i * tile + i // every * gap for i in range(len(pairs))]
    picture = np.full((tops[-1] + tile, max(len(images) for _, images in pairs) * tile, 3), 255, np.uint8)
    for top, (_, images) in zip(tops, pairs):
        for i, image in enumerate(images):
            shown = to_display(image)
            picture[top + 1:top + 1 + shown.shape[0], i * tile + 1:i * tile + 1 + shown.shape[1]] = shown
    axis.imshow(picture, interpolation="nearest")
    axis.set_yticks([top + tile / 2 for top in tops], [name for name, _ in pairs])
    axis.set_xticks([])
    axis.set_title(title)
    axis.grid(False)
    axis.tick_params(left=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
