"""Simulated imaging devices: fixed profiles that change how an image looks, never what it shows.

MedMNIST and our drawn phantoms carry no device label, so the course simulates one: four profiles of cameras
(colour) or scanners (grey), each with a small jitter from image to image, and a rule for who was imaged
where. Whatever comes from here is called *simulated* in every lesson.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from .keys import rng

SHARES = (0.42, 0.31, 0.20, 0.07)  # of the groups, per device: unequal, the last one small (as in HAM10000)
JITTER = 0.10  # from image to image, each setting moves by this part of its distance from neutral (1 sd)
CHUNK = 2048  # images worked on at a time, so memory stays flat on large sets


@dataclass(frozen=True)
class Profile:
    """How one device renders a scene; every default is neutral.

    Attributes
    ----------
    name : str
    cast : three floats
        Gain per colour channel (illuminant and white balance); their mean applies to a grey image.
    gamma : float
        Exponent on intensities 0..1; above 1 darkens the mid-tones.
    contrast : float
        Gain around mid-grey.
    blur : float
        Gaussian standard deviation in pixels of a 28-pixel image; grows with the image.
    vignette : float
        Loss of light in the corners, 0..1.
    bias : two floats
        Uneven gain: relative change from the centre to the right and to the lower edge (coil or X-ray beam).
    noise : float
        Standard deviation of additive sensor noise, intensities 0..1.
    speckle : float
        Standard deviation of multiplicative noise.
    jpeg : float
        JPEG quality, 1..95; 100 leaves the file step out.
    """

    name: str
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    contrast: float = 1.0
    blur: float = 0.0
    vignette: float = 0.0
    bias: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.0
    speckle: float = 0.0
    jpeg: float = 100.0


COLOUR = (
    Profile("simulated A", cast=(1.03, 1.00, 0.96), bias=(0.06, 0.0), noise=0.012, jpeg=92),
    Profile(
        "simulated B", cast=(1.08, 0.95, 0.78), gamma=0.80, contrast=1.12, vignette=0.30, noise=0.02, jpeg=80
    ),
    Profile(
        "simulated C",
        cast=(0.86, 0.98, 1.12),
        gamma=1.25,
        contrast=0.88,
        blur=0.8,
        bias=(-0.08, 0.06),
        noise=0.015,
        jpeg=85,
    ),
    Profile(
        "simulated D",
        cast=(1.12, 0.84, 1.02),
        gamma=1.15,
        contrast=1.10,
        vignette=0.15,
        bias=(0.0, -0.10),
        noise=0.035,
        jpeg=75,
    ),
)
GREY = (
    Profile("simulated A", bias=(0.12, 0.12), noise=0.01),
    Profile("simulated B", gamma=0.75, contrast=0.90, bias=(0.30, -0.10), speckle=0.05),
    Profile("simulated C", gamma=1.30, contrast=1.10, blur=0.8, bias=(-0.30, 0.12)),
    Profile("simulated D", gamma=1.05, contrast=0.80, bias=(-0.10, -0.35), speckle=0.08, noise=0.02),
)


def profiles(channels: int) -> tuple[Profile, ...]:
    """The four profiles for images of 1 (grey) or 3 (colour) channels."""
    return GREY if channels == 1 else COLOUR


def _settings(profile: Profile) -> np.ndarray:
    """A profile's numbers as one float64 vector (12,), in the order of its fields."""
    return np.hstack([getattr(profile, f.name) for f in fields(profile)[1:]]).astype(float)


def _blur(images: np.ndarray, sigma: np.ndarray, radius: int) -> np.ndarray:
    """Gaussian blur of images (n, C, H, W), each with its own standard deviation (n,), cut off at `radius`
    pixels."""
    offset = np.arange(-radius, radius + 1)
    weight = np.exp(-0.5 * (offset / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    weight /= weight.sum(1, keepdims=True)
    for axis in (2, 3):
        width = [(0, 0)] * 4
        width[axis] = (radius, radius)
        padded, size = np.pad(images, width, mode="reflect"), images.shape[axis]
        images = sum(
            weight[:, i, None, None, None] * padded.take(range(i, i + size), axis) for i in range(len(offset))
        )
    return images


def _jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """One image (C, H, W), uint8, through a JPEG file of the given quality."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(
        file, "JPEG", quality=int(quality)
    )
    return np.asarray(Image.open(file)).reshape(*image.shape[1:], len(image)).transpose(2, 0, 1)


def _render(images: np.ndarray, settings: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Images (n, C, H, W), uint8, seen with settings (n, 12); `noise` is standard normal, shape (2, n, C, H,
    W)."""
    size = images.shape[-1]
    column = [s[:, None, None, None] for s in settings.T]
    gamma, contrast, blur, vignette, right, down, sensor, speckle, jpeg = column[3:]
    cast = settings[:, :3, None, None]
    y, x = np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij")
    scene = (images / 255) ** gamma * (cast if images.shape[1] == 3 else cast.mean(1, keepdims=True))
    scene = scene * (1 - vignette * (x**2 + y**2) / 2) * (1 + right * x + down * y)
    scene = 0.5 + contrast * (scene - 0.5)
    blur = blur.ravel() * size / 28
    soft = blur > 0
    if soft.any():
        scene[soft] = _blur(scene[soft], blur[soft], radius=3 * -(-size // 28))
    scene = scene * (1 + speckle * noise[0]) + sensor * noise[1]
    seen = np.rint(scene.clip(0, 1) * 255).astype(np.uint8)
    return np.stack([i if q >= 100 else _jpeg(i, q) for i, q in zip(seen, jpeg.ravel())])


def apply(images: np.ndarray, device: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images as their devices would have taken them.

    Jitter and noise of an image are keyed by its content, its device and the seed: the same image on the same
    device looks the same in any subset and any order.

    Parameters
    ----------
    images : uint8 (N, C, H, W), C in {1, 3}, square
    device : int (N,), 0..3
    seed : int

    Returns
    -------
    uint8 (N, C, H, W)
    """
    table = profiles(images.shape[1])
    neutral, base = _settings(Profile("neutral")), np.stack([_settings(p) for p in table])
    seen = np.empty_like(images)
    for start in range(0, len(images), CHUNK):
        part, owner = images[start : start + CHUNK], np.asarray(device)[start : start + CHUNK]
        jitter = np.empty((len(part), len(neutral)))
        noise = np.empty((2, *part.shape))
        for i, image in enumerate(part):
            content = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
            random = rng(seed, "device view", client=owner[i], round=content)
            jitter[i] = random.standard_normal(len(neutral))
            noise[:, i] = random.standard_normal((2, *image.shape))
        settings = neutral + (base[owner] - neutral) * (1 + JITTER * jitter.clip(-2, 2))
        seen[start : start + CHUNK] = _render(part, settings, noise)
    return seen


def affinity(counts: np.ndarray, devices: int = 4, seed: int = 0) -> np.ndarray:
    """How readily each class is imaged on each device: 1 as a rule, 0 never, 0.04 hardly ever.

    About a twelfth of the (class, device) cells is empty and a sixth nearly so, as in HAM10000 (2 and 5 of
    28). The commonest class is seen everywhere, and every class on at least two devices.

    Parameters
    ----------
    counts : int (C,)
        Images per class.

    Returns
    -------
    float64 (C, devices)
    """
    weight = np.ones((len(counts), devices))
    empty, sparse = max(1, round(weight.size / 12)), max(1, round(weight.size / 6))
    wanted = [0.0] * empty + [0.04] * sparse
    for cell in rng(seed, "empty cells").permutation(weight.size):
        label, d = divmod(int(cell), devices)
        if wanted and label != np.argmax(counts) and (weight[label] < 1).sum() < devices - 2:
            weight[label, d] = wanted.pop(0)
    return weight


def assign(labels: np.ndarray, group: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which of the four simulated devices took each image.

    All images of a group (a lesion or a patient) share a device. Devices are unequally busy (`SHARES`), and
    some (class, device) cells stay empty (`affinity`).

    Parameters
    ----------
    labels, group : int (N,)
    seed : int

    Returns
    -------
    int64 (N,), 0..3
    """
    weight = affinity(np.bincount(labels), len(SHARES), seed)
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    allowed = np.ones((len(first), len(SHARES)))
    np.minimum.at(allowed, inverse, weight[labels])  # a patient with two findings: the stricter one counts
    allowed = np.where(allowed.any(1, keepdims=True), allowed, 1.0)
    chance = np.cumsum(allowed * SHARES, axis=1)
    draw = rng(seed, "devices").random((len(first), 1)) * chance[:, -1:]
    return (draw >= chance).sum(1).astype(np.int64)[inverse]
