"""Draw the course's built-in data set: skin-lesion phantoms, data/phantom.npz.

    python data/draw_phantom.py

These are drawings, not medical images: no patient was ever photographed for them, and nothing learnt from
them says anything about real skin. Their six classes follow the ABCD rule of dermoscopy (asymmetry, border,
colour, differential structures; Nachbar et al. 1994, doi:10.1016/S0190-9622(94)70061-3), so a class lies in
shape and structure rather than in one average colour:

    naevus     symmetric, soft border, even brown, a regular pigment network or globules
    keratosis  sharp, scalloped border, waxy brown, white cysts and dark pores
    melanoma   asymmetric, ragged border with streaks, several browns, blue-white veil
    carcinoma  pink and pearly, branching vessels, blue-grey nests, hardly any brown
    vascular   red to purple round lagoons
    fibroma    white scar-like centre in a faint brown ring

Colour is mixed as skin does it: light is absorbed by melanin and by blood (Beer-Lambert), then scattered by
white keratin or scar. Every drawing is finer than what is stored (four times at 28 pixels). The file holds clean drawings;
the devices are applied on loading, by the code that also simulates them for MedMNIST. The same code gives
the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedssg_helpers import devices  # noqa: E402
from fedssg_helpers.keys import rng  # noqa: E402

CLASSES = ("naevus", "keratosis", "melanoma", "carcinoma", "vascular", "fibroma")
SHARES = (0.60, 0.145, 0.12, 0.08, 0.043, 0.012)  # of the lesions: the long tail
LESIONS, VIEWS = 2400, (0.35, 0.45, 0.20)  # how many lesions, and how likely one, two or three images of each
SEED, SIZE, FINE = 0, 28, 4
STEP = 6  # stored intensities are multiples of this: the file packs to half, and device noise hides the steps

MELANIN, BLOOD = np.array([0.75, 1.35, 1.75]), np.array([0.22, 1.25, 1.05])  # absorption of red, green, blue
WHITE, BLUE = np.array([0.95, 0.90, 0.87]), np.array([0.42, 0.47, 0.60])


# ---------------------------------------- pieces of a drawing
# All coordinates u, v are float64 (112, 112); the image spans -1..1. All fields returned have that shape.


def waves(random, u, v, period: float, count: int = 5) -> np.ndarray:
    """A smooth random field, about zero mean and unit variance, whose hills are about `period` apart.

    u and v must be turned or shifted only, not bent: then a plane wave cos(a + b) over the image is
    cos a cos b - sin a sin b of a row and a column, and needs no cosine per pixel.
    """
    angle, phase = random.uniform(0, 2 * np.pi, (2, count))
    k = 2 * np.pi / period * random.uniform(0.7, 1.3, count)
    row = k[:, None] * (np.cos(angle)[:, None] * u[0] + np.sin(angle)[:, None] * v[0]) + phase[:, None]
    column = k[:, None] * (
        np.cos(angle)[:, None] * (u[:, 0] - u[0, 0]) + np.sin(angle)[:, None] * (v[:, 0] - v[0, 0])
    )
    return (np.cos(column).T @ np.cos(row) - np.sin(column).T @ np.sin(row)) * np.sqrt(2 / count)


def outline(random, u, v, size: float, ragged: float, lobes: int = 6, stretch: float = 0.15) -> np.ndarray:
    """Distance from the centre in units of the border's own: below 1 inside. `ragged` 0 is an ellipse."""
    angle, ratio = random.uniform(0, np.pi), 1 + random.uniform(0, stretch)
    x, y = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
    x, y = x * ratio, y / ratio
    around, border = np.arctan2(y, x), 1.0
    for k in range(2, lobes + 1):
        border = border + ragged * random.normal() / k**0.8 * np.cos(
            k * around + random.uniform(0, 2 * np.pi)
        )
    return np.hypot(x, y) / (size * np.maximum(border, 0.3))


def inside(rho, soft: float) -> np.ndarray:
    """1 inside the border, 0 outside, `soft` wide in between."""
    return 1 / (1 + np.exp(np.clip((rho - 1) / soft, -30, 30)))


def spots(random, u, v, count: int, spread: float, size: float) -> np.ndarray:
    """`count` round spots, 0..1, scattered over a disc of radius `spread`."""
    field = np.zeros_like(u)
    for _ in range(count):
        r, a, s = (
            spread * np.sqrt(random.uniform()),
            random.uniform(0, 2 * np.pi),
            size * random.uniform(0.7, 1.3),
        )
        d2 = ((u - r * np.cos(a)) ** 2 + (v - r * np.sin(a)) ** 2) / s**2
        field = np.maximum(field, np.exp(-(np.minimum(d2, 5.0) ** 2)))
    return field


def network(random, u, v, period: float, warp: float) -> np.ndarray:
    """A pigment network, 0..1: brown lines around a honeycomb of holes; `warp` makes it irregular."""
    u, v = u + warp * waves(random, u, v, 0.9, 3), v + warp * waves(random, u, v, 0.9, 3)
    angle = random.uniform(0, np.pi)
    comb = sum(
        np.cos(2 * np.pi / period * (np.cos(angle + i * np.pi / 3) * u + np.sin(angle + i * np.pi / 3) * v))
        for i in range(3)
    )
    return 1 / (1 + np.exp(1.8 * (comb - 0.1)))


def strands(random, u, v, count: int, spread: float, width: float) -> np.ndarray:
    """`count` bent lines, 0..1, that run through a disc of radius `spread`: vessels, hairs, streaks."""
    field = np.zeros_like(u)
    for _ in range(count):
        angle, bend = random.uniform(0, 2 * np.pi), random.normal(0, 0.5)
        offset, length = random.uniform(-0.6, 0.6) * spread, spread * random.uniform(0.5, 1.0)
        x, y = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        away = (y - offset - bend * (x**2 - 0.2) - 0.04 * np.sin(9 * x)) / width
        field = np.maximum(field, np.exp(-np.minimum(away**2, 30)) * inside(np.abs(x) / length, 0.08))
    return field


# ---------------------------------------- the classes
# Each returns the amounts of melanin, blood, white and blue in the skin; `much` (0..1) says how typical the
# lesion is: the untypical ones of all classes resemble one another, and that is what makes the task hard.


def naevus(random, u, v, much):
    rho = outline(random, u, v, random.uniform(0.35, 0.68), 0.04 + 0.12 * (1 - much))
    body, dark = inside(rho, random.uniform(0.05, 0.13)), random.uniform(0.35, 1.1)
    tone = 1 + 0.10 * waves(random, u, v, 1.2) + 0.35 * (1 - np.minimum(rho, 1.2)) * random.uniform(-0.4, 1)
    if random.uniform() < 0.65:
        tone = tone + (0.2 + 0.4 * much) * (network(random, u, v, random.uniform(0.22, 0.30), 0.03) - 0.5)
    else:
        tone = tone + 0.5 * much * spots(random, u, v, random.integers(6, 14), 0.5, 0.08)
    return (
        dark * body * tone,
        random.uniform(0.05, 0.35) * body,
        random.uniform(0, 0.25) * (1 - much) * body,
        random.uniform(0, 0.12) * body * (rho < 0.6),
    )


def keratosis(random, u, v, much):
    rho = outline(random, u, v, random.uniform(0.45, 0.78), 0.09 + 0.05 * much, lobes=9, stretch=0.25)
    body, dark = inside(rho, 0.025 + 0.05 * (1 - much)), random.uniform(0.3, 0.95)
    tone = 1 + 0.18 * waves(random, u, v, 0.6) + 0.20 * waves(random, u, v, 0.3) * much
    pores = spots(random, u, v, random.integers(2, 8), 0.5, 0.055) * body
    cysts = spots(random, u, v, random.integers(3, 10), 0.5, 0.06) * body
    return (
        dark * body * tone + 0.8 * much * pores,
        0.10 * body,
        (0.05 + 0.12 * much + 0.65 * much * cysts) * body * (1 - pores),
        0.10 * much * body,
    )


def melanoma(random, u, v, much):
    shift = 0.22 * much * random.choice([-1, 1])
    rho = outline(random, u - shift, v, random.uniform(0.42, 0.70), 0.08 + 0.12 * much, lobes=8, stretch=0.3)
    rho = rho - 0.16 * much * np.maximum(0, waves(random, u, v, 0.26)) * (1 - inside(rho, 0.06))
    body, dark = inside(rho, random.uniform(0.03, 0.10)), random.uniform(0.6, 1.2)
    patch = waves(random, u, v, 0.9)
    tone = 1 + (0.15 + 0.45 * much) * patch + 0.4 * (network(random, u, v, 0.34, 0.08) - 0.5)
    tone = tone + 0.6 * much * spots(random, u, v, random.integers(3, 9), 0.55, 0.10)
    veil = inside(outline(random, u - random.normal(0, 0.2), v - random.normal(0, 0.2), 0.3, 0.15), 0.15)
    pale = inside(outline(random, u - random.normal(0, 0.3), v - random.normal(0, 0.3), 0.2, 0.2), 0.2) * (
        1 - veil
    )
    return (
        dark * body * np.maximum(tone, 0.15),
        (0.15 + 0.35 * much * np.maximum(0, -patch)) * body,
        0.5 * much * pale * body,
        0.6 * much * veil * body,
    )


def carcinoma(random, u, v, much):
    rho = outline(random, u, v, random.uniform(0.4, 0.75), 0.08 + 0.06 * much)
    body = inside(rho, random.uniform(0.08, 0.16))
    tree = strands(random, u, v, random.integers(2, 6), 0.7, 0.03) * inside(rho, 0.2)
    nests = spots(random, u, v, random.integers(1, 6), 0.45, 0.14) * body
    return (
        (0.45 * (1 - much) + 0.10) * body * (1 + 0.2 * waves(random, u, v, 0.6)) + 0.55 * much * nests,
        (0.25 + 0.15 * waves(random, u, v, 0.9)).clip(0.05) * body + (0.3 + 0.8 * much) * tree,
        0.25 * much * body * (1 - nests),
        0.6 * much * nests,
    )


def vascular(random, u, v, much):
    rho = outline(random, u, v, random.uniform(0.3, 0.62), 0.08)
    body = inside(rho, random.uniform(0.04, 0.10))
    lagoons = spots(random, u, v, random.integers(5, 12), 0.5, random.uniform(0.13, 0.2)) * body
    purple = random.uniform(0, 0.5)
    return (
        (0.10 + 0.5 * (1 - much) + 0.5 * purple * lagoons) * body,
        (0.20 + 0.50 * much) * body + (0.1 + 1.1 * much) * lagoons,
        0.15 * body * (1 - lagoons),
        purple * 0.3 * lagoons,
    )


def fibroma(random, u, v, much):
    rho = outline(random, u, v, random.uniform(0.4, 0.68), 0.06)
    body, dark = inside(rho, random.uniform(0.09, 0.17)), random.uniform(0.35, 0.75)
    scar = inside(outline(random, u, v, random.uniform(0.18, 0.30), 0.10), 0.18)
    ring = body * (1 - (0.2 + 0.7 * much) * scar)
    lines = network(random, u, v, random.uniform(0.22, 0.30), 0.03) - 0.5
    return (dark * ring * (1 + 0.5 * lines), 0.22 * body, (0.05 + 0.55 * much) * scar, 0 * u)


DRAW = (naevus, keratosis, melanoma, carcinoma, vascular, fibroma)


# ---------------------------------------- one image


def skin(random, u, v) -> np.ndarray:
    """Bare skin (112, 112, 3), 0..1: a skin tone, a flush, and its mottling."""
    tone, flush = random.beta(1.3, 3.0), random.uniform(0, 0.18)
    melanin = 0.05 + 0.50 * tone + 0.012 * waves(random, u, v, 0.5, 9) + 0.03 * waves(random, u, v, 1.5)
    blood = flush + 0.03 * waves(random, u, v, 1.0) + 0.012 * waves(random, u, v, 0.35, 9)
    return np.array([0.97, 0.86, 0.80]) * np.exp(-melanin[..., None] * MELANIN - blood[..., None] * BLOOD)


def draw(label: int, lesion: int, view: int, seed: int = SEED, size: int = SIZE) -> np.ndarray:
    """One view of one lesion, uint8 (size, size, 3). Views differ in turn, place, zoom, light and hair."""
    what, how = rng(seed, "lesion", lesion), rng(seed, "view", lesion, view)
    fine = max(1, round(SIZE * FINE / size))
    y, x = np.meshgrid(*[(np.arange(size * fine) + 0.5) / (size * fine / 2) - 1] * 2, indexing="ij")
    angle, zoom = how.uniform(0, 2 * np.pi), how.uniform(0.92, 1.08)
    dx, dy = how.normal(0, 0.07, 2)
    u = (np.cos(angle) * (x - dx) + np.sin(angle) * (y - dy)) / zoom
    v = (np.cos(angle) * (y - dy) - np.sin(angle) * (x - dx)) / zoom

    image = skin(what, u, v)
    melanin, blood, white, blue = DRAW[label](what, u, v, what.beta(1.5, 1.4))
    image = image * np.exp(
        -np.maximum(melanin, 0)[..., None] * MELANIN - np.maximum(blood, 0)[..., None] * BLOOD
    )
    for amount, colour in ((blue, BLUE), (white, WHITE)):
        amount = np.clip(amount, 0, 1)[..., None]
        image = image * (1 - amount) + amount * colour
    if how.uniform() < 0.25:
        hair = strands(how, x, y, how.integers(1, 5), 1.6, 0.022)[..., None]
        image = image * (1 - 0.75 * hair) + 0.75 * hair * np.array([0.13, 0.09, 0.07])
    side = how.uniform(0, 2 * np.pi)
    image = image * how.uniform(0.94, 1.04) * (1 + 0.05 * (np.cos(side) * x + np.sin(side) * y))[..., None]
    image = image.reshape(size, fine, size, fine, 3).mean((1, 3))
    return (np.rint(image.clip(0, 1) * 255 / STEP) * STEP).clip(0, 255).astype(np.uint8)


def draw_all(seed: int = SEED, size: int = SIZE, first: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of phantom.npz: images (N, size, size, 3) uint8, labels, device, group (N,), class_names (6,).

    With `first`, only so many images of the whole set.
    """
    random = rng(seed, "phantom census")
    kinds = random.permutation(
        np.repeat(np.arange(len(CLASSES)), np.rint(LESIONS * np.array(SHARES)).astype(int))
    )
    views = 1 + random.choice(3, len(kinds), p=VIEWS)
    group = np.repeat(np.arange(len(kinds)), views)
    labels = kinds[group]
    view = np.arange(len(group)) - np.repeat(np.cumsum(views) - views, views)
    device, wanted = devices.assign(labels, group, seed), slice(first)
    parts = zip(labels[wanted], group[wanted], view[wanted])
    return dict(
        images=np.stack([draw(label, lesion, i, seed, size) for label, lesion, i in parts]),
        labels=labels[wanted].astype(np.uint8),
        group=group[wanted].astype(np.int16),
        device=device[wanted].astype(np.uint8),
        class_names=np.array(CLASSES),
    )


if __name__ == "__main__":
    target = Path(__file__).with_name("phantom.npz")
    np.savez_compressed(target, **draw_all())
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
