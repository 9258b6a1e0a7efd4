"""Pictures of the demo: one coloured shape and one handwritten digit on a shaded background, 64x64 RGB.

The digits come from scikit-learn's ``load_digits``. Those in ``digits.npz`` are held out: pictures with them show
handwriting that the model has never seen (written by tools/train_demo/scenes.py).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.float32]

IMAGE_SIZE = 64
HELD_OUT = Path(__file__).parent / "digits.npz"
_OVERSAMPLE = 4
_GRID = 8  # pixels; one patch of the encoder, which learns far faster from aligned strokes

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 220, 40),
    "green": (35, 145, 55),
    "blue": (35, 70, 205),
    "purple": (125, 40, 165),
    "pink": (245, 130, 185),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "diamond", "heart")


class Scene(NamedTuple):
    """What a picture shows: indices into COLORS and SHAPES, and the digit."""

    color: int
    shape: int
    digit: int

    @property
    def color_name(self) -> str:
        return list(COLORS)[self.color]

    @property
    def shape_name(self) -> str:
        return SHAPES[self.shape]


@functools.cache
def held_out_digits() -> tuple[Pixels, Labels]:
    """Handwritten digits u8 [300, 8, 8] that the model was not trained on, and their labels [300]."""
    with np.load(HELD_OUT) as file:
        return file["images"], file["labels"].astype(np.int64)


def _polygon(shape: str, angle: float) -> list[tuple[float, float]]:
    """Outline of a shape in the unit circle."""

    def ring(n: int, radii: tuple[float, ...], start: float) -> list[tuple[float, float]]:
        return [
            (radii[i % len(radii)] * math.cos(start + 2 * math.pi * i / n),
             radii[i % len(radii)] * math.sin(start + 2 * math.pi * i / n))
            for i in range(n)
        ]  # fmt: skip

    up = -math.pi / 2
    if shape == "square":
        points = ring(4, (1.0,), up + math.pi / 4)
    elif shape == "diamond":
        points = [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)]
    elif shape == "triangle":
        points = ring(3, (1.0,), up)
    elif shape == "star":
        points = ring(10, (1.0, 0.42), up)
    elif shape == "cross":
        w = 0.34
        arm = [(-w, -1.0), (w, -1.0), (w, -w)]
        points = [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in arm]
    elif shape == "heart":
        points = []
        for i in range(40):
            t = 2 * math.pi * i / 40
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((math.sin(t) ** 3, -(y + 2.5) / 15))
    else:
        raise ValueError(f"no outline for shape {shape!r}")
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def _shape_mask(shape: str, cx: float, cy: float, radius: float, angle: float) -> Mask:
    """Anti-aliased coverage of a shape, (64, 64) in 0..1."""
    k = _OVERSAMPLE
    mask = Image.new("L", (IMAGE_SIZE * k, IMAGE_SIZE * k), 0)
    draw = ImageDraw.Draw(mask)
    x, y, r = cx * k, cy * k, radius * k
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            inner = 0.58 * r
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    else:
        draw.polygon([(x + r * px, y + r * py) for px, py in _polygon(shape, angle)], fill=255)
    coverage: Mask = np.asarray(mask.reduce(k), dtype=np.float32) / 255.0
    return coverage


def _digit_mask(digit: Pixels, left: int, top: int, size: int, angle: float) -> Mask:
    """Coverage of an upscaled handwritten digit, (64, 64) in 0..1."""
    image = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    image = image.rotate(angle, resample=Image.Resampling.BILINEAR)
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    mask[top : top + size, left : left + size] = np.asarray(image, dtype=np.float32) / 255.0
    coverage: Mask = np.clip(mask * 1.15, 0.0, 1.0)
    return coverage


def _place(rng: np.random.Generator, a: int, b: int) -> tuple[int, int, int, int]:
    """Corners of two non-overlapping boxes of sides a and b, a + b <= 64, on a coarse grid."""
    while True:
        ax, ay = (_GRID * int(v) for v in rng.integers(0, (IMAGE_SIZE - a) // _GRID + 1, 2))
        bx, by = (_GRID * int(v) for v in rng.integers(0, (IMAGE_SIZE - b) // _GRID + 1, 2))
        if ax + a <= bx or bx + b <= ax or ay + a <= by or by + b <= ay:
            return ax, ay, bx, by


def draw_scene(scene: Scene, digit_image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw a scene at random places and sizes; returns (64, 64, 3) uint8."""
    dark = rng.random() < 0.3
    base = rng.uniform(70, 110) if dark else rng.uniform(165, 225)
    tint = rng.uniform(-14, 14, 3)
    slope = rng.uniform(-18, 18, 2)
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    canvas = (base + shade)[:, :, None] + tint + rng.normal(0, rng.uniform(1, 6), (IMAGE_SIZE, IMAGE_SIZE, 1))

    shape_size = int(rng.integers(24, 33))
    digit_size = 24
    sx, sy, dx, dy = _place(rng, shape_size, digit_size)
    color = np.array(list(COLORS.values())[scene.color]) + rng.uniform(-10, 10, 3)
    radius = shape_size / 2
    mask = _shape_mask(SHAPES[scene.shape], sx + radius, sy + radius, radius, math.radians(rng.uniform(-12, 12)))
    canvas += mask[:, :, None] * (color - canvas)

    ink = rng.uniform(235, 255) if dark else rng.uniform(0, 35)
    mask = _digit_mask(digit_image, dx, dy, digit_size, float(rng.uniform(-10, 10)))
    canvas += mask[:, :, None] * (ink - canvas)
    picture: Pixels = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return picture


def draw_scenes(rng: np.random.Generator, n: int, digits: Pixels, labels: Labels) -> tuple[Pixels, Labels]:
    """Draw n random scenes with these digits u8 [n_digit, 8, 8] and their labels [n_digit]; returns pictures
    u8 [n, 64, 64, 3] and labels [n, 3] of color, shape, digit.
    """
    pictures = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    found = np.empty((n, 3), dtype=np.int64)
    for i in range(n):
        sample = int(rng.choice(len(digits)))
        scene = Scene(int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES))), int(labels[sample]))
        pictures[i] = draw_scene(scene, digits[sample], rng)
        found[i] = scene
    return pictures, found


def held_out_scenes(n: int, seed: int) -> tuple[Pixels, Labels]:
    """Draw n random scenes that the model has never seen, the same ones for a seed; see draw_scenes()."""
    return draw_scenes(np.random.default_rng([seed, 1]), n, *held_out_digits())
