"""Figures of the course: one theme, one colour per method and per device, the plots that lessons share."""

import inspect
import io
import re
import textwrap
import warnings
import zlib
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython import get_ipython
from IPython.display import Code
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

COUNTS, RECALL = "viridis", "cividis"  # colour maps that survive grey print and colour-blindness
SLANTED = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}  # names below an axis
# Related methods share a hue (of the palette below) and differ in lightness; None: the palette's own.
_HUES = {
    0: {"fedavg+la": None, "combined": 0.17},
    1: {"balanced_sampling": None},
    2: {"centralised": None, "oracle_real": 0.2},
    3: {"fedssg": None, "server_pretraining": 0.72, "fedssg+combined": 0.16},
    4: {"uniform_shuffle": None, "duplication": 0.42},
    5: {"fedprox": None, "scaffold": 0.35},
    6: {"fedavgm": None},
    7: {"fedavg": None, "local_only": 0.3, "synthetic_only": 0.82, "class_only": 0.45},
    8: {"device_statistics": None, "local_normalisation": 0.18, "device_only": 0.42},
    9: {"fedssg_no_pretrain": None},
}
_PALETTE = sns.color_palette("colorblind")
METHOD_COLOURS = {m: sns.set_hls_values(_PALETTE[h], l=l) for h, ms in _HUES.items() for m, l in ms.items()}
# For methods of your own: those of Paul Tol's colours that are far from the ones above.
_OTHERS = "#332288 #117733 #882255 #999933 #CC6677 #DDCC77 #EE3377".split()
WIDER_FONTS = """Noto Sans CJK JP, Noto Sans CJK SC, Noto Sans JP, Noto Sans SC, WenQuanYi Zen Hei, IPAGothic, Hiragino Sans,
PingFang HK, Heiti TC, Arial Unicode MS, Microsoft YaHei, SimHei, Yu Gothic, MS Gothic"""  # with Chinese and Japanese characters


def theme() -> None:
    """Set the one look of all figures; the first thing that a lesson does after its imports."""
    installed = [font for font in re.split(r",\s", WIDER_FONTS) if font in font_manager.get_font_names()]
    own = {"figure.dpi": 100, "figure.constrained_layout.use": True, "axes.titlesize": "medium"}
    own |= {"font.family": ["sans-serif", *installed]}
    warnings.filterwarnings("ignore", "Glyph .* missing")  # `short` says it once, with a cure
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=own)


def method_colour(name: str) -> tuple[float, float, float]:
    """The fixed colour of a method of the course; for a method of your own, one derived from its name."""
    return METHOD_COLOURS.get(name) or to_rgb(_OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)])


def device_colours(devices) -> dict[str, tuple]:
    """One colour per device name."""
    return dict(zip(devices, sns.color_palette("Set2", max(len(devices), 3))))


def short(names, most: int = 14) -> list[str]:
    """Names of classes and devices for figures, cut to `most` characters: some data sets name a class in half a sentence.

    A dollar sign, which would begin a formula, is escaped. A warning names characters that no installed font has.
    """
    names = [name.replace(r"\$", "$") for name in names]
    if lacking := _not_drawn("".join(names), tuple(plt.rcParams["font.family"])):
        cure = "install the font Noto Sans CJK, or use other names"
        warnings.warn(f"no font of this machine has {lacking!r}: {cure}", stacklevel=2)
    names = [name if len(name) <= most else name[: most - 1].rstrip() + "…" for name in names]
    return [name.replace("$", r"\$") for name in names]


@lru_cache(maxsize=8)
def _not_drawn(text: str, families: tuple[str, ...]) -> str:
    """Characters of a text that none of these fonts can draw."""
    found = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    fonts, wanted = list(map(font_manager.get_font, found)), sorted(set(filter(str.isprintable, text)))
    return "".join(c for c in wanted if not any(font.get_char_index(ord(c)) for font in fonts))


def show_source(*things) -> Code:
    """The source of functions and classes, from the helpers or from a cell of this notebook."""
    return Code("\n\n\n".join(map(_source, things)), language="python")


def _source(thing) -> str:
    try:
        return textwrap.dedent(inspect.getsource(thing)).rstrip()
    except OSError:  # Python finds classes in files only: look in the cells that ran, the latest first
        pattern = re.compile(rf"^(@.*\n)*class {thing.__name__}\b.*:.*(\n([ \t].*)?)*", re.M)
        for cell in reversed(get_ipython().user_ns["In"] if get_ipython() else ()):
            if found := pattern.search(cell):
                return found[0].rstrip()
        raise


def to_display(image) -> np.ndarray:
    """An image (C, H, W), uint8 0..255, as matplotlib wants it: (H, W, 3), grey repeated."""
    array = np.asarray(image).transpose(1, 2, 0)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _mosaic(axis, images, columns: int, title: str = "", gaps=(0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Draw images (None: blank), with a gap after so many rows or columns; return the centres of both."""
    side = 2 + max((image.shape[-1] for image in images if image is not None), default=0)
    places = np.arange(-(-len(images) // columns)), np.arange(columns)
    tops, lefts = (n * side + n // (gap or len(n)) * (side // 4) for n, gap in zip(places, gaps))
    picture = np.full((tops[-1] + side, lefts[-1] + side, 3), 255, np.uint8)
    for i, image in enumerate(images):
        if image is not None:
            y, x, shown = tops[i // columns] + 1, lefts[i % columns] + 1, to_display(image)
            picture[y : y + shown.shape[0], x : x + shown.shape[1]] = shown
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title)
    axis.grid(False)
    return tops + side / 2, lefts + side / 2


def strip(axis, images, title: str = "", columns: int | None = None) -> None:
    """Draw images (n, C, H, W) as one tight mosaic on an axis; only the title where there are none."""
    if len(images):
        _mosaic(axis, images, columns or len(images))
    axis.set_axis_off()
    axis.set_title(title, fontsize="small")


def wall(axis, rows, title: str = "", every: int = 0) -> None:
    """Images (n, C, H, W) in named rows, a dict or a list of pairs, with a gap after each `every` rows."""
    pairs = list(rows.items() if isinstance(rows, dict) else rows)
    most = max([1, *(len(images) for _, images in pairs)])
    tiles = [tile for _, images in pairs for tile in (*images, *[None] * (most - len(images)))]
    axis.set_yticks(_mosaic(axis, tiles, most, title, (every, 0))[0], [name for name, _ in pairs])
    axis.set_xticks([])
    axis.tick_params(left=False)
    sns.despine(ax=axis, left=True, bottom=True)


def archive(axis, data, classes, devices, random, title: str = "", per_cell: int = 3) -> None:
    """Sample images of a `Client` or an `ImageSet`: classes down, devices across, blank where it has none."""
    labels, device, tiles = np.asarray(data.labels), np.asarray(data.device), []
    for c, d in np.ndindex(len(classes), len(devices)):
        chosen = random.permutation(np.flatnonzero((labels == c) & (device == d)))[:per_cell]
        tiles += [*data.images[chosen], *[None] * (per_cell - len(chosen))]
    down, across = _mosaic(axis, tiles, len(devices) * per_cell, title, (0, per_cell))
    axis.set_yticks(down, [f"{name} ({(labels == c).sum()})" for c, name in enumerate(short(classes))])
    axis.set_xticks(across.reshape(-1, per_cell).mean(1), short(devices))


def heat(axis, values, rows, columns, *, title="", fmt="d", cmap=COUNTS, **limits) -> None:
    """A numbered heat map (R, C); NaN cells stay empty. To compare several, pass vmin and vmax, or a norm."""
    limits |= {"xticklabels": columns, "yticklabels": rows, "annot_kws": {"fontsize": "small"}}
    sns.heatmap(values, annot=True, fmt=fmt, cmap=cmap, cbar=False, linewidths=0.5, ax=axis, **limits)
    axis.set_title(title)
    axis.tick_params(axis="y", rotation=0)
    axis.grid(False)  # an empty cell is white, not crossed by a grid line


def curves(axis, rounds, values, label: str, colour) -> None:
    """Mean over seeds of a score (S, E) against rounds (E,), with the range of the seeds as a band."""
    values = np.asarray(values)
    axis.plot(rounds, values.mean(0), label=label, color=colour)
    if len(values) > 1:
        axis.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def bars(axis, scores: dict, names, title: str = "", colours: dict | None = None) -> None:
    """Scores 0..1 by method, values (n,) side by side above `names` (n,); a dash marks a NaN.

    Bars that are not methods bring their `colours` by name.
    """
    width, places = 0.8 / len(scores), np.arange(len(names))
    for i, (name, values) in enumerate(scores.items()):
        x = places + (i - (len(scores) - 1) / 2) * width
        colour = colours[name] if colours else method_colour(name)
        drawn = axis.bar(x, np.nan_to_num(values), width, color=colour, label=name)
        axis.bar_label(drawn, ["–" if np.isnan(v) else f"{v:.2f}" for v in values], padding=1, fontsize=8)
    axis.set_xticks(places, names, **SLANTED)
    axis.set(title=title, ylim=(0, 1.06))
    axis.grid(False, axis="x")


def holdings(axis, have, classes, devices, title: str = "", most: int = 0) -> None:
    """Counts (K, C, D): hospitals down, classes across. Hue: device; depth: log of count, up to `most`."""
    hospitals, c, d = have.shape
    colours = np.array(list(device_colours(devices).values()))[:d]
    depth = np.where(have > 0, 0.2 + 0.8 * np.log1p(have) / np.log1p(max(most, have.max(), 1)), 0)[..., None]
    axis.imshow((1 - depth * (1 - colours)).reshape(hospitals, c * d, 3), aspect="auto")
    for k, i, j in np.argwhere(have) if c * d <= 40 else ():
        axis.text(i * d + j, k, have[k, i, j], ha="center", va="center", fontsize=7, in_layout=False)
    axis.vlines(np.arange(1, c) * d - 0.5, -0.5, hospitals - 0.5, color="0.6", linewidth=0.8)
    axis.set_xticks(np.arange(c) * d + (d - 1) / 2, short(classes), **SLANTED)
    axis.set_yticks(range(hospitals), [f"hospital {k}" for k in range(hospitals)])
    axis.set_title(title)
    axis.grid(False)


def device_legend(figure: Figure, devices) -> None:
    """One legend of device colours above a figure's axes."""
    patches = [plt.Rectangle((0, 0), 1, 1, color=c) for c in device_colours(devices).values()]
    look = {"loc": "outside upper center", "ncols": min(len(devices), 6), "frameon": False}
    figure.legend(patches, short(devices, 40), **look)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes; closes it. Quicker than `savefig`, which draws once more after the layout."""
    stream = io.BytesIO()
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    FigureCanvasAgg(figure).print_png(stream, pil_kwargs={"compress_level": 3})
    plt.close(figure)
    return stream.getvalue()
