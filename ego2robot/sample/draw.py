"""A small renderer: cones and slabs, as a height field seen from above, lit and blended over a picture.

Coordinates are in view heights: the picture is ``aspect`` wide and 1 high, x to the right, y down and z
towards the camera. Looking straight down at a height field is all that a bench needs, costs a few
milliseconds a frame in numpy, and gives what a flat drawing does not: fingers that pass over one another,
and shading that follows their form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

RGB = tuple[float, float, float]
Point = Sequence[float] | np.ndarray  # x, y, z
LIGHT = np.array([-0.20, -0.44, 0.875], np.float32)
AMBIENT, DIFFUSE = 0.50, 0.58
SOFTNESS = 0.0034  # of what is drawn, view heights: a lens is no sharper, and a hand has no creased edges
SHADOW_REACH, SHADOW_DEPTH = 0.035, 0.5  # view heights, share of light taken away


@dataclass(frozen=True)
class Cone:
    """A ball that rolls from ``a`` to ``b`` while its radius and colour change: fingers, tool handles."""

    a: Point
    b: Point
    radius_a: float
    radius_b: float
    colour_a: RGB
    colour_b: RGB
    flat: float = 1.0  # height as a share of the radius

    def bounds(self) -> tuple[float, float, float, float]:
        r = max(self.radius_a, self.radius_b)
        (ax, ay, _), (bx, by, _) = self.a, self.b
        return min(ax, bx) - r, min(ay, by) - r, max(ax, bx) + r, max(ay, by) + r


@dataclass(frozen=True)
class Slab:
    """A box with rounded corners and a flat top: workpieces, trays, cloths."""

    centre: Point  # of the foot
    half_width: float
    half_height: float
    angle: float  # radians, clockwise as seen
    thickness: float
    corner: float
    colour: RGB

    def bounds(self) -> tuple[float, float, float, float]:
        r = math.hypot(self.half_width, self.half_height)
        x, y, _ = self.centre
        return x - r, y - r, x + r, y + r


Shape = Cone | Slab


class Layer:
    """The height field of some shapes on the pixels they cover.

    Args:
        shapes: what to draw, in any order; the highest wins.
        height, width: the picture, pixels.
        margin: extra pixels around the shapes.
    """

    def __init__(self, shapes: Sequence[Shape], height: int, width: int, margin: int) -> None:
        self.scale = float(height)
        boxes = np.array([shape.bounds() for shape in shapes]) * self.scale
        left, top = np.floor(boxes[:, :2].min(0)).astype(int) - margin
        right, bottom = np.ceil(boxes[:, 2:].max(0)).astype(int) + margin
        self.left, self.top = max(0, left), max(0, top)
        self.right, self.bottom = min(width, right), min(height, bottom)
        self.empty = self.right - self.left < 4 or self.bottom - self.top < 4
        if self.empty:
            return
        size = (self.bottom - self.top, self.right - self.left)
        self.height = np.full(size, -1e3, np.float32)
        self.cover = np.zeros(size, np.float32)
        self.colour = np.zeros((*size, 3), np.float32)
        for shape in shapes:
            if isinstance(shape, Cone):
                self._cone(shape)
            else:
                self._slab(shape)

    def _window(self, shape: Shape) -> tuple[slice, slice, np.ndarray, np.ndarray] | None:
        x0, y0, x1, y1 = (v * self.scale for v in shape.bounds())
        x0, x1 = max(self.left, math.floor(x0) - 1), min(self.right, math.ceil(x1) + 1)
        y0, y1 = max(self.top, math.floor(y0) - 1), min(self.bottom, math.ceil(y1) + 1)
        if x1 <= x0 or y1 <= y0:
            return None
        xs = np.arange(x0, x1, dtype=np.float32)[None] + 0.5
        ys = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5
        return slice(y0 - self.top, y1 - self.top), slice(x0 - self.left, x1 - self.left), xs, ys

    def _put(
        self, rows: slice, columns: slice, height: np.ndarray, cover: np.ndarray, colour: np.ndarray
    ) -> None:
        wins = (cover > 0) & (height > self.height[rows, columns])
        np.copyto(self.height[rows, columns], height, where=wins)
        np.copyto(self.colour[rows, columns], colour, where=wins[..., None])
        np.maximum(self.cover[rows, columns], cover, out=self.cover[rows, columns])

    def _cone(self, cone: Cone) -> None:
        window = self._window(cone)
        if window is None:
            return
        rows, columns, xs, ys = window
        ax, ay, az = (v * self.scale for v in cone.a)
        bx, by, bz = (v * self.scale for v in cone.b)
        ra, rb = cone.radius_a * self.scale, cone.radius_b * self.scale
        dx, dy = bx - ax, by - ay
        x, y = xs - ax, ys - ay
        along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
        radius = ra + along * (rb - ra)
        # Positive inside; divided by the diameter it is the distance to the edge, pixels.
        depth = radius * radius - (x - along * dx) ** 2 - (y - along * dy) ** 2
        height = az + along * (bz - az) + cone.flat * np.sqrt(np.maximum(depth, 0))
        cover = np.clip(0.5 + depth / (2 * radius), 0, 1)
        tip, root = np.array(cone.colour_b, np.float32), np.array(cone.colour_a, np.float32)
        self._put(rows, columns, height, cover, root + along[..., None] * (tip - root))

    def _slab(self, slab: Slab) -> None:
        window = self._window(slab)
        if window is None:
            return
        rows, columns, xs, ys = window
        cx, cy, cz = (v * self.scale for v in slab.centre)
        cos, sin = math.cos(slab.angle), math.sin(slab.angle)
        x, y, corner = xs - cx, ys - cy, slab.corner * self.scale
        u = np.abs(x * cos + y * sin) - slab.half_width * self.scale + corner
        v = np.abs(y * cos - x * sin) - slab.half_height * self.scale + corner
        outside = np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0) - corner
        bevel = max(0.35 * slab.thickness * self.scale, 1.0)
        height = cz + slab.thickness * self.scale - bevel * np.clip(1 + outside / bevel, 0, 1) ** 2
        cover = np.clip(0.5 - outside, 0, 1)
        self._put(rows, columns, height, cover, np.array(slab.colour, np.float32)[None, None])

    def lit(self) -> np.ndarray:
        """float32 [h, w, 3]: the shapes' colours under the lamp."""
        slope_x, slope_y = np.zeros_like(self.height), np.zeros_like(self.height)
        np.subtract(self.height[:, 2:], self.height[:, :-2], out=slope_x[:, 1:-1])
        np.subtract(self.height[2:], self.height[:-2], out=slope_y[1:-1])
        # Cliffs (the rim, a finger over the palm) would otherwise be lit like mirrors.
        slope_x, slope_y = np.clip(0.5 * slope_x, -2.5, 2.5), np.clip(0.5 * slope_y, -2.5, 2.5)
        up = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
        facing = np.maximum((LIGHT[2] - slope_x * LIGHT[0] - slope_y * LIGHT[1]) * up, 0)
        light = (AMBIENT + DIFFUSE * facing) * (0.68 + 0.32 * up)
        lit: np.ndarray = self.colour * light[..., None]
        return lit

    def soft(self) -> tuple[np.ndarray, np.ndarray]:
        """Blurred for the lens: light times cover, float32 [h, w, 3], and cover, float32 [h, w]."""
        cover = self.cover[..., None]
        rgba = np.concatenate([self.lit() * cover, 255 * cover], -1)
        image = Image.fromarray(np.clip(rgba, 0, 255).astype(np.uint8), "RGBA")
        blurred = np.asarray(image.filter(ImageFilter.BoxBlur(SOFTNESS * self.scale)), np.float32)
        return blurred[..., :3], blurred[..., 3] / 255


def paint(picture: np.ndarray, shapes: Sequence[Shape]) -> None:
    """Draws ``shapes``, with their shadow, onto ``picture`` (uint8 RGB [h, w, 3]) in place."""
    height, width = picture.shape[:2]
    reach = max(2, round(SHADOW_REACH * height))
    layer = Layer(shapes, height, width, 2 * reach)
    if layer.empty:
        return
    patch = picture[layer.top : layer.bottom, layer.left : layer.right]
    light, cover = layer.soft()
    under = (1 - SHADOW_DEPTH * _shadow(layer.cover, reach)) * (1 - cover)
    blended = patch * under[..., None] + light
    patch[...] = np.clip(blended, 0, 255).astype(np.uint8)


def _shadow(cover: np.ndarray, reach: int) -> np.ndarray:
    """Where less lamp light arrives: the silhouette moved away from the lamp and blurred, 0..1."""
    rows, columns = cover.shape
    small = Image.fromarray((cover * 255).astype(np.uint8)).reduce(4)
    small = small.filter(ImageFilter.BoxBlur(reach / 4 * 0.6))
    blurred = np.asarray(small.resize((columns, rows), Image.Resampling.BILINEAR), np.float32) / 255
    moved = np.zeros_like(blurred)
    right, down = round(0.6 * reach), round(0.8 * reach)
    moved[down:, right:] = blurred[: rows - down, : columns - right]
    return moved
