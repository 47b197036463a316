"""Figures of the course: one theme, one colour per method and per device, and the few plots that lessons share."""
from __future__ import annotations

import inspect
import io

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Code
from matplotlib.figure import Figure

COUNTS, RECALL = "viridis", "cividis"  # colour maps that survive grey print and colour-blindness
_COLOURS = sns.color_palette("colorblind")
METHOD_COLOURS = {name: _COLOURS[i] for name, i in
                  {"fedavg": 7, "fedprox": 5, "balanced_sampling": 1, "fedavg+la": 0, "uniform_shuffle": 4,
                   "fedssg": 3, "centralised": 2}.items()}


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
        row[0].text(-0.08, 0.5, data.classes[c], ha="right", va="center", transform=row[0].transAxes)
    return figure


def heat(axis, values, rows, columns, *, title="", fmt="d", cmap=COUNTS, log=False, **limits) -> None:
    """A numbered heat map (R, C); NaN cells stay empty. Pass vmin and vmax to compare several."""
    values = np.asarray(values)
    shade = np.log10(values + 1.0) if log else values
    sns.heatmap(shade, annot=values, fmt=fmt, mask=~np.isfinite(values.astype(float)), cmap=cmap, cbar=False,
                xticklabels=columns, yticklabels=rows, linewidths=0.5, annot_kws={"fontsize": "small"}, ax=axis,
                **limits)
    axis.set_title(title)
    axis.tick_params(axis="y", rotation=0)


def hospital_map(have, classes, devices, title: str = "Images per hospital, class and device") -> Figure:
    """Who holds what: one heat map (hospitals x classes) per device, one colour scale, from counts (K, C, D)."""
    hospitals = [f"hospital {k}" for k in range(len(have))]
    figure, axes = plt.subplots(1, len(devices), figsize=(3.3 * len(devices) + 1, 0.34 * len(have) + 1.7),
                                sharey=True, squeeze=False)
    for d, axis in enumerate(axes[0]):
        heat(axis, have[:, :, d], hospitals, classes, title=devices[d], log=True, vmin=0,
             vmax=np.log10(have.max() + 1.0))
        axis.tick_params(axis="x", rotation=60)
    figure.suptitle(title)
    return figure


def curves(axis, rounds, values, label: str, colour) -> None:
    """Mean over seeds of a score (S, E) against rounds (E,), with the range of the seeds as a band."""
    values = np.asarray(values)
    axis.plot(rounds, values.mean(0), label=label, color=colour)
    if len(values) > 1:
        axis.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes; closes it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    plt.close(figure)
    return stream.getvalue()
