"""Simulated imaging devices: fixed profiles that change how an image looks, never what it shows.

MedMNIST and the drawn phantoms carry no device label, so the course simulates one: four profiles of cameras
(colour) or scanners (grey), with a small jitter from image to image, and a rule for who was imaged where.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from .keys import rng

SHARES = (0.42, 0.31, 0.20, 0.07)  # of the groups, per device: unequal, the last one small (as in HAM10000)
JITTER = 0.10  # from image to image, each setting moves by this fraction of its distance from neutral (1 sd)


@dataclass(frozen=True)
class Profile:
    """How one device renders an image; every default is neutral."""

    name: str
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain per colour channel; grey images get their mean
    gamma: float = 1.0  # exponent on intensities 0..1; above 1 darkens the mid-tones
    contrast: float = 1.0  # gain around mid-grey
    blur: float = 0.0  # Gaussian standard deviation, in pixels of a 28-pixel image; grows with the size
    vignette: float = 0.0  # loss of light in the corners, 0..1
    bias: tuple[float, float] = (0.0, 0.0)  # change of gain from the centre to the right and the lower edge
    noise: float = 0.0  # standard deviation of additive sensor noise, intensities 0..1
    speckle: float = 0.0  # standard deviation of multiplicative noise
    jpeg: float = 100.0  # JPEG quality, 1..95; 100 leaves JPEG out

    def settings(self) -> np.ndarray:
        """All numbers as one float64 vector (12,), in the order of the fields."""
        return np.hstack(astuple(self)[1:]).astype(float)


A, B, C, D = (f"simulated {letter}" for letter in "ABCD")
COLOUR = (
    Profile(A, (1.03, 1.00, 0.96), bias=(0.06, 0), noise=0.012, jpeg=92),
    Profile(B, (1.08, 0.95, 0.78), gamma=0.80, contrast=1.12, vignette=0.30, noise=0.02, jpeg=80),
    Profile(
        C, (0.86, 0.98, 1.12), gamma=1.25, contrast=0.88, blur=0.8, bias=(-0.08, 0.06), noise=0.015, jpeg=85
    ),
    Profile(
        D, (1.12, 0.84, 1.02), gamma=1.15, contrast=1.10, vignette=0.15, bias=(0, -0.10), noise=0.035, jpeg=75
    ),
)
GREY = (
    Profile(A, bias=(0.12, 0.12), noise=0.01),
    Profile(B, gamma=0.75, contrast=0.90, bias=(0.30, -0.10), speckle=0.05),
    Profile(C, gamma=1.30, contrast=1.10, blur=0.8, bias=(-0.30, 0.12)),
    Profile(D, gamma=1.05, contrast=0.80, bias=(-0.10, -0.35), speckle=0.08, noise=0.02),
)


def profiles(channels: int) -> tuple[Profile, ...]:
    """The four profiles for images of 1 (grey) or 3 (colour) channels."""
    return GREY if channels == 1 else COLOUR


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """One image (C, H, W), uint8, as a JPEG file of this quality shows it."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file)).reshape(*image.shape[1:], len(image)).transpose(2, 0, 1)


def render(image: np.ndarray, settings: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """One image (C, H, H), uint8, with `settings` (12,); `noise` (2, C, H, H) is standard normal."""
    size, cast = image.shape[-1], settings[:3, None, None]
    gamma, contrast, sigma, vignette, right, down, sensor, speckle, quality = settings[3:].tolist()
    x = np.linspace(-1, 1, size)
    y = x[:, None]
    scene = (image / 255) ** gamma * (cast if len(image) == 3 else cast.mean())
    scene = scene * (1 - vignette * (x**2 + y**2) / 2) * (1 + right * x + down * y)
    scene = 0.5 + contrast * (scene - 0.5)
    if sigma > 0:
        spread = sigma * size / 28
        scene = gaussian_filter(scene, spread, axes=(1, 2), mode="mirror", radius=3 * math.ceil(size / 28))
    scene = scene * (1 + speckle * noise[0]) + sensor * noise[1]
    seen = np.rint(scene.clip(0, 1) * 255).astype(np.uint8)
    return seen if quality >= 100 else jpeg(seen, int(quality))


def apply(images: np.ndarray, device: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images, uint8 (N, C, H, H), as their devices, int (N,) in 0..3, would have taken them.

    Jitter and noise depend on the image, its device and the seed, not on the order or the rest of the set.
    """
    base, neutral = np.stack([p.settings() for p in profiles(images.shape[1])]), Profile("neutral").settings()
    seen = np.empty_like(images)
    for i, (image, owner) in enumerate(zip(images, device)):
        content = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
        random = rng(seed, "device view", client=owner, round=content)
        jitter = random.standard_normal(len(neutral)).clip(-2, 2)
        settings = neutral + (base[owner] - neutral) * (1 + JITTER * jitter)
        seen[i] = render(image, settings, random.standard_normal((2, *image.shape)))
    return seen


def affinity(counts: np.ndarray, devices: int = 4, seed: int = 0) -> np.ndarray:
    """Relative frequency (C, devices) of each class on each device: 1 usually, 0 never, 0.04 rarely.

    `counts` int (C,) are the images per class. About a twelfth of the cells are 0 and a sixth 0.04, as in
    HAM10000 (2 and 5 of 28). The most frequent class is seen on every device, every class on at least two.
    """
    weight = np.ones((len(counts), devices))
    wanted = [0.0] * max(1, round(weight.size / 12)) + [0.04] * max(1, round(weight.size / 6))
    for cell in rng(seed, "empty cells").permutation(weight.size):
        label, d = divmod(int(cell), devices)
        if wanted and label != np.argmax(counts) and (weight[label] < 1).sum() < devices - 2:
            weight[label, d] = wanted.pop(0)
    return weight


def assign(labels: np.ndarray, group: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which simulated device, int64 (N,) in 0..3, took each image, of class and group int (N,).

    All images of a group (a lesion or a patient) share a device. Devices take unequal numbers of images
    (`SHARES`), and some cells of class and device stay empty (`affinity`).
    """
    weight = affinity(np.bincount(labels), len(SHARES), seed)
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    allowed = np.ones((len(first), len(SHARES)))
    np.minimum.at(allowed, inverse, weight[labels])  # of a patient with several findings, the rarest counts
    allowed = np.where(allowed.any(1, keepdims=True), allowed, 1.0)
    chance = np.cumsum(allowed * SHARES, axis=1)
    draw = rng(seed, "devices").random((len(first), 1)) * chance[:, -1:]
    return (draw >= chance).sum(1).astype(np.int64)[inverse]
