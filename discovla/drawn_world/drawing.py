"""Pixels of the drawn world: coloured shapes on a tinted background, drawn with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

SIDE = 64
COLOURS = {
    "red": (220, 35, 35),
    "green": (35, 165, 55),
    "blue": (40, 75, 235),
    "yellow": (240, 215, 40),
    "purple": (175, 45, 195),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
RADII = {"small": 6.0, "big": 10.5}
PLACES = {
    "top left": (13, 13),
    "top": (32, 13),
    "top right": (51, 13),
    "left": (13, 32),
    "middle": (32, 32),
    "right": (51, 32),
    "bottom left": (13, 51),
    "bottom": (32, 51),
    "bottom right": (51, 51),
}
JITTER = 3.0  # largest distance in pixels, along x and y, from the centre of a place

_RAMP = np.linspace(-1, 1, SIDE)
_REACH = 1.2  # distance of the farthest point of any shape, in radii, with its soft edge
# Random bytes index normal quantiles: ten times faster than drawing normals, and accurate enough for noise.
_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object in one frame; x, y and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        """Return the nearer of the two sizes."""
        return "small" if self.radius < sum(RADII.values()) / 2 else "big"

    @property
    def place(self) -> str:
        """Return the nearest of the nine places."""
        return min(PLACES, key=lambda p: (PLACES[p][0] - self.x) ** 2 + (PLACES[p][1] - self.y) ** 2)


@dataclass(frozen=True, kw_only=True)
class Look:
    """Ellipses of a background (fewest, most) and standard deviation of the noise in grey levels."""

    clutter: tuple[int, int]
    noise: float


def ground(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Draw a tinted gradient with faint ellipses.

    Returns:
        y x 3, float32, 0..255.
    """
    tint = rng.uniform(45, 105) + rng.uniform(-16, 16, 3)
    slope = rng.uniform(-22, 22, (2, 3))
    rows = (tint + _RAMP[:, None] * slope[0]).astype(np.float32)
    canvas = rows[:, None] + (_RAMP[:, None] * slope[1]).astype(np.float32)  # y x c
    for _ in range(rng.integers(look.clutter[0], look.clutter[1] + 1)):
        x, y, a, b, turn, opacity = rng.uniform((0, 0, 3, 3, 0, 0.3), (SIDE, SIDE, 13, 8, np.pi, 0.7))
        _blend(canvas, _ellipse(x, y, a, b, turn) * opacity, tint + rng.uniform(-34, 34, 3), x, y, max(a, b))
    return canvas


def picture(canvas: np.ndarray, things: Sequence[Thing]) -> np.ndarray:
    """Draw objects on a copy of a background, later ones in front.

    Args:
        canvas: y x 3, float32.

    Returns:
        y x 3, float32.
    """
    canvas = canvas.copy()
    for thing in things:
        dx, dy = _offsets(thing.x, thing.y, thing.radius * _REACH)
        alpha = np.clip(0.5 - _distance(thing.shape, dx, dy, thing.radius), 0, 1)
        _blend(canvas, alpha, np.array(COLOURS[thing.colour]), thing.x, thing.y, thing.radius * _REACH)
    return canvas


def expose(canvas: np.ndarray, rng: np.random.Generator, look: Look, brightness: float = 1.0) -> np.ndarray:
    """Apply brightness and noise, and round to 8 bits.

    Returns:
        y x 3, uint8.
    """
    noise = _QUANTILES[np.frombuffer(rng.bytes(canvas.size), np.uint8)].reshape(canvas.shape)
    return np.clip(canvas * np.float32(brightness) + noise * np.float32(look.noise) + 0.5, 0, 255).astype(
        np.uint8
    )


def _window(x: float, y: float, reach: float) -> tuple[slice, slice]:
    """Return the rows and columns of the canvas within `reach` of a point."""
    low, high = (lambda v: max(int(v - reach) - 1, 0)), (lambda v: min(int(v + reach) + 3, SIDE))
    return slice(low(y), high(y)), slice(low(x), high(x))


def _offsets(x: float, y: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of a window's pixels from its point: along x as a row, along y as a column."""
    rows, columns = _window(x, y, reach)
    dx = np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(x)
    dy = np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(y)
    return dx[None], dy[:, None]


def _blend(
    canvas: np.ndarray, alpha: np.ndarray, colour: np.ndarray, x: float, y: float, reach: float
) -> None:
    """Blend a colour into a window of the canvas, in place."""
    patch = canvas[_window(x, y, reach)]
    patch += alpha[..., None] * (colour.astype(np.float32) - patch)


def _ellipse(x: float, y: float, a: float, b: float, turn: float) -> np.ndarray:
    """Return the coverage (0..1) of a rotated ellipse with half axes a and b."""
    dx, dy = _offsets(x, y, max(a, b))
    c, s = np.cos(turn), np.sin(turn)
    radius = np.sqrt(((c * dx + s * dy) / a) ** 2 + ((c * dy - s * dx) / b) ** 2)
    return np.clip(0.5 - (radius - 1) * min(a, b), 0, 1).astype(np.float32)


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Return the distance from the outline of a shape in pixels, negative inside."""
    ax, ay = np.abs(dx), np.abs(dy)
    match shape:
        case "circle":
            return np.hypot(dx, dy) - 0.95 * r
        case "square":
            return np.maximum(ax, ay) - 0.85 * r
        case "diamond":
            return (ax + ay - 1.18 * r) * np.float32(0.7071)
        case "ring":
            return np.abs(np.hypot(dx, dy) - 0.78 * r) - 0.24 * r
        case "cross":
            return np.minimum(
                np.maximum(ax - 0.34 * r, ay - 1.05 * r), np.maximum(ax - 1.05 * r, ay - 0.34 * r)
            )
        case "triangle":
            return np.maximum(dy - 0.8 * r, (1.85 * ax - dy - 1.05 * r) * np.float32(0.4755))
    raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
