"""Places: a workbench seen from above, and an aisle between shelves. Drawn once, then filmed by a camera.

Everything is a picture made from a seed: planks, a cutting mat, trays of screws, tools, a pegboard; no
asset is read. The bench is a plane drawn from straight above and put into perspective; the aisle is a
floor, a ceiling and two walls, looked up per pixel at the depth where the ray meets them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

MARGIN = 0.14  # of the bench's picture around the view, view heights: how far the camera may move
HORIZON, BACK, DEPTH = -0.9, 0.07, 2.0  # of the bench: y of its horizon and back edge; strength of tilt
NEAR = 1 + MARGIN - HORIZON  # magnification at the bottom of the bench's picture, 1 at y = HORIZON + 1
AISLE_PERIOD_M = 5.2  # the aisle repeats, so that a walk can loop
EYE_M, CEILING_M, WALL_M = 1.6, 1.7, 1.15  # camera over the floor, ceiling over the camera, wall beside it
BOLD = ((196, 62, 48), (44, 92, 160), (226, 168, 44), (60, 128, 84), (92, 92, 100))


@dataclass(frozen=True)
class Camera:
    """How the view lies on the picture of a place: shift in view heights, roll in radians, zoom."""

    x: float = 0.0
    y: float = 0.0
    roll: float = 0.0
    zoom: float = 1.0

    def seen(self, points: np.ndarray, aspect: float) -> np.ndarray:
        """Where ``points`` [..., 2 or more] at rest are in the view; further coordinates are kept."""
        out = np.array(points, np.float64)
        x, y = out[..., 0] - aspect / 2 - self.x, out[..., 1] - 0.5 - self.y
        cos, sin = math.cos(self.roll) * self.zoom, math.sin(self.roll) * self.zoom
        out[..., 0], out[..., 1] = x * cos + y * sin + aspect / 2, y * cos - x * sin + 0.5
        return out


def film(place: Image.Image, camera: Camera, height: int, width: int, margin: float) -> np.ndarray:
    """uint8 RGB [height, width, 3]: what ``camera`` sees of a picture that has ``margin`` around the view."""
    cos, sin = math.cos(camera.roll) / camera.zoom, math.sin(camera.roll) / camera.zoom
    cx, cy = width / 2, height / 2
    x = cx + (camera.x + margin) * height - cx * cos + cy * sin
    y = cy + (camera.y + margin) * height - cx * sin - cy * cos
    turned = place.transform(
        (width, height), Image.Transform.AFFINE, (cos, -sin, x, sin, cos, y), Image.Resampling.BILINEAR
    )
    return np.array(turned)


def grain(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> np.ndarray:
    """float32 [height, width]: smooth noise of unit variance with cells of so many pixels."""
    rows, columns = max(2, round(height / cell_y)), max(2, round(width / cell_x))
    small = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)


# --- the bench -------------------------------------------------------------------------------------------


def bench(seed: int, height: int, width: int) -> Image.Image:
    """RGB picture of a workbench for a view of ``width`` x ``height``, with ``MARGIN`` around it."""
    rng = np.random.default_rng([seed, 1])
    aspect = width / height
    top = _bench_top(rng, aspect, NEAR * height)
    wide, tall = round((aspect + 2 * MARGIN) * height), round((1 + 2 * MARGIN) * height)
    # Corners of the picture's bench part, and where each lies on the plane (u, w).
    corners = [(-MARGIN, BACK), (aspect + MARGIN, BACK), (aspect + MARGIN, 1 + MARGIN), (-MARGIN, 1 + MARGIN)]
    pixels = [((x + MARGIN) * height, (y + MARGIN) * height) for x, y in corners]
    plane = [_to_pixels(*_on_bench(x, y, aspect), top) for x, y in corners]
    coefficients = _homography(pixels, plane)
    picture = top.transform((wide, tall), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    edge = round((BACK + MARGIN) * height)
    picture.paste(_pegboard(rng, wide, edge, height), (0, 0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, edge - 0.012 * height, wide, edge), fill=(70, 52, 38))
    return _lamp(picture)


def _on_bench(x: float, y: float, aspect: float) -> tuple[float, float]:
    """View to plane: (u, w), u to the right and w towards the wearer, 0 at the back edge."""
    scale = y - HORIZON
    return (x - aspect / 2) / scale, DEPTH * (1 / (BACK - HORIZON) - 1 / scale)


def _to_pixels(u: float, w: float, top: Image.Image) -> tuple[float, float]:
    half, tall = cast(tuple[float, float], top.info["extent"])
    return (u / half + 1) / 2 * top.width, w / tall * top.height


def _homography(target: list[tuple[float, float]], source: list[tuple[float, float]]) -> tuple[float, ...]:
    """PIL's eight PERSPECTIVE coefficients that take ``target`` corners to ``source`` corners."""
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return tuple(np.linalg.solve(np.array(rows), np.array(values)))


def _bench_top(rng: np.random.Generator, aspect: float, scale: float) -> Image.Image:
    """The plane from straight above, ``scale`` pixels a unit of u."""
    half = (aspect / 2 + MARGIN) / (BACK - HORIZON)
    tall = DEPTH * (1 / (BACK - HORIZON) - 1 / NEAR)
    width, height = round(2 * half * scale), round(tall * scale)
    picture = _planks(rng, width, height, scale)
    shadow = Image.new("L", (width, height), 0)
    shade, draw = ImageDraw.Draw(shadow), ImageDraw.Draw(picture)
    things = Things(draw, shade, rng, scale, half)
    things.mat(0.0, 0.52 * tall, 0.33, 0.46 * tall)
    # Things stand around the mat, where hands pass over them but do not hide them all.
    slots = [
        (side * u, w * tall)
        for side in (-1, 1)
        for u, w in (
            (0.47, 0.13),
            (0.68, 0.13),
            (0.88, 0.13),
            (0.47, 0.37),
            (0.70, 0.37),
            (0.46, 0.64),
            (0.66, 0.66),
        )
    ]
    kinds = [things.tray] * 5 + [things.wrench, things.driver, things.tape, things.board] * 2 + [things.ruler]
    order = rng.permutation(len(slots))
    shadows_first = picture.copy()
    for slot, kind in zip(order, kinds, strict=True):
        kind(*slots[slot])
    for _ in range(46):
        things.nut(rng.uniform(-0.95, 0.95), rng.uniform(0.05, 0.95) * tall)
    # The shadows were collected while drawing; they fall on the wood, not on the things.
    changed = np.abs(np.asarray(picture, np.int16) - np.asarray(shadows_first, np.int16)).max(-1) > 0
    soft = np.asarray(shadow.filter(ImageFilter.BoxBlur(0.012 * scale)), np.float32) / 255
    dark = np.where(changed, 1.0, 1 - 0.62 * soft).astype(np.float32)
    lit = Image.fromarray((np.asarray(picture, np.float32) * dark[..., None]).astype(np.uint8))
    lit.info["extent"] = (half, tall)
    return lit


def _planks(rng: np.random.Generator, width: int, height: int, scale: float) -> Image.Image:
    tone = 13 * grain(rng, height, width, 0.004 * scale, 0.2 * scale)
    tone += 9 * grain(rng, height, width, 0.02 * scale, 0.6 * scale)
    tone += 10 * grain(rng, height, width, 0.12 * scale, 0.12 * scale)
    plank = max(8, round(0.13 * scale))
    for index, row in enumerate(range(0, height, plank)):
        tone[row : row + plank] += rng.uniform(-16, 16)
        tone[row : row + max(2, round(0.004 * scale))] -= 45
        joint = int(rng.uniform(0, width))
        tone[row : row + plank, joint : joint + max(2, round(0.003 * scale))] -= 40
        tone[row : row + plank] = np.roll(tone[row : row + plank], 97 * index, axis=1)
    base = np.array([(150, 112, 74), (128, 104, 82), (160, 130, 92)][rng.integers(3)], np.float32)
    colour = base + tone[..., None] * np.array([1.0, 0.85, 0.68], np.float32)
    return Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))


class Things:
    """Draws what lies on a bench, from above, with the shadow mask beside it. Lengths in units of u."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        shade: ImageDraw.ImageDraw,
        rng: np.random.Generator,
        scale: float,
        half: float,
    ) -> None:
        self.draw, self.shade, self.rng, self.scale, self.half = draw, shade, rng, scale, half

    def _at(self, u: float, w: float) -> np.ndarray:
        return np.array([(u + self.half) * self.scale, w * self.scale])

    def _outline(self, u: float, w: float, points: list[tuple[float, float]], angle: float) -> np.ndarray:
        cos, sin = math.cos(angle), math.sin(angle)
        return self._at(u, w) + self.scale * np.array(points) @ np.array([[cos, sin], [-sin, cos]])

    def _solid(
        self,
        u: float,
        w: float,
        points: list[tuple[float, float]],
        angle: float,
        colour: tuple[int, int, int],
        rise: float = 0.014,
    ) -> None:
        corners = self._outline(u, w, points, angle)
        if rise:
            offset = self.scale * rise * np.array([0.7, 1.0])
            self.shade.polygon([tuple(p) for p in corners + offset], fill=255)
        edge = cast(tuple[int, int, int], tuple(int(0.6 * c) for c in colour))
        self.draw.polygon(
            [tuple(p) for p in corners], fill=colour, outline=edge, width=max(1, int(0.003 * self.scale))
        )

    def _box(
        self,
        u: float,
        w: float,
        a: float,
        b: float,
        angle: float,
        colour: tuple[int, int, int],
        rise: float = 0.014,
    ) -> None:
        self._solid(u, w, [(-a, -b), (a, -b), (a, b), (-a, b)], angle, colour, rise)

    def _ring(self, u: float, w: float, radius: float, colour: tuple[int, int, int], width: float) -> None:
        (x, y), r = self._at(u, w), radius * self.scale
        self.draw.ellipse(
            (x - r, y - r, x + r, y + r), outline=colour, width=max(1, round(width * self.scale))
        )

    def _disc(
        self, u: float, w: float, radius: float, colour: tuple[int, int, int], rise: float = 0.0
    ) -> None:
        (x, y), r = self._at(u, w), radius * self.scale
        if rise:
            dx, dy = 0.7 * rise * self.scale, rise * self.scale
            self.shade.ellipse((x - r + dx, y - r + dy, x + r + dx, y + r + dy), fill=255)
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def mat(self, u: float, w: float, half_width: float, depth: float) -> None:
        colour = [(38, 92, 78), (44, 60, 86), (72, 74, 80)][int(self.rng.integers(3))]
        half_depth = 0.8 * depth
        self._box(u, w, half_width, half_depth, 0.0, colour, 0.0)
        line = cast(tuple[int, int, int], tuple(min(255, c + 58) for c in colour))
        for i in range(-10, 11):
            x = u + i * half_width / 10.5
            width = max(1, round((0.004 if i % 5 == 0 else 0.0018) * self.scale))
            a, b = self._at(x, w - half_depth * 0.95), self._at(x, w + half_depth * 0.95)
            self.draw.line((*a, *b), fill=line, width=width)
            y = w + i * half_depth / 10.5
            a, b = self._at(u - half_width * 0.95, y), self._at(u + half_width * 0.95, y)
            self.draw.line((*a, *b), fill=line, width=width)

    def tray(self, u: float, w: float) -> None:
        colour = BOLD[int(self.rng.integers(len(BOLD)))]
        angle = float(self.rng.uniform(-0.12, 0.12))
        self._box(u, w, 0.098, 0.082, angle, colour, 0.02)
        inner = cast(tuple[int, int, int], tuple(int(0.42 * c) for c in colour))
        self._box(u, w, 0.084, 0.068, angle, inner, 0.0)
        for _ in range(70):
            x, y = self.rng.uniform(-0.072, 0.072), self.rng.uniform(-0.056, 0.056)
            shine = int(self.rng.integers(110, 225))
            turn = float(self.rng.uniform(0, math.pi))
            self._box(u + x, w + y, 0.012, 0.0035, turn, (shine, shine, min(255, shine + 8)), 0.0)

    def wrench(self, u: float, w: float) -> None:
        angle = float(self.rng.uniform(-0.9, 0.9)) + math.pi / 2
        steel = (168, 174, 182)
        self._box(u, w, 0.10, 0.012, angle, steel)
        for end in (-1, 1):
            x, y = u + end * 0.105 * math.cos(angle), w + end * 0.105 * math.sin(angle)
            self._disc(x, y, 0.03, steel, 0.012)
            self._disc(x, y, 0.014, (84, 72, 60))

    def driver(self, u: float, w: float) -> None:
        angle = float(self.rng.uniform(-0.7, 0.7)) + math.pi / 2
        colour = BOLD[int(self.rng.integers(3))]
        cos, sin = math.cos(angle), math.sin(angle)
        self._box(u + 0.07 * cos, w + 0.07 * sin, 0.07, 0.006, angle, (186, 190, 196))
        self._box(u - 0.055 * cos, w - 0.055 * sin, 0.06, 0.020, angle, colour, 0.02)
        dark = cast(tuple[int, int, int], tuple(int(0.55 * c) for c in colour))
        for stripe in (-0.009, 0.004):
            self._box(
                u - 0.055 * cos - stripe * sin, w - 0.055 * sin + stripe * cos, 0.05, 0.0025, angle, dark, 0.0
            )

    def board(self, u: float, w: float) -> None:
        angle = float(self.rng.uniform(-0.3, 0.3))
        self._box(u, w, 0.11, 0.08, angle, (24, 104, 66))
        cos, sin = math.cos(angle), math.sin(angle)
        for _ in range(26):
            x, y = self.rng.uniform(-0.09, 0.09), self.rng.uniform(-0.06, 0.06)
            chip = [(28, 28, 32), (190, 186, 170), (46, 48, 54), (204, 170, 72)][int(self.rng.integers(4))]
            a, b = self.rng.uniform(0.004, 0.018), self.rng.uniform(0.004, 0.012)
            self._box(u + x * cos - y * sin, w + x * sin + y * cos, a, b, angle, chip, 0.003)

    def tape(self, u: float, w: float) -> None:
        colour = BOLD[int(self.rng.integers(len(BOLD)))]
        self._disc(u, w, 0.075, colour, 0.022)
        self._ring(u, w, 0.066, cast(tuple[int, int, int], tuple(int(0.75 * c) for c in colour)), 0.004)
        self._disc(u, w, 0.046, (206, 186, 150))
        self._disc(u, w, 0.038, (92, 74, 56))

    def ruler(self, u: float, w: float) -> None:
        angle = float(self.rng.uniform(-0.5, 0.5))
        self._box(u, w, 0.15, 0.02, angle, (222, 206, 120))
        cos, sin = math.cos(angle), math.sin(angle)
        for i in range(-14, 15):
            length = 0.010 if i % 5 == 0 else 0.006
            x, y = i * 0.01, -0.02 + length
            self._box(u + x * cos - y * sin, w + x * sin + y * cos, 0.001, length, angle, (60, 54, 40), 0.0)

    def nut(self, u: float, w: float) -> None:
        size = float(self.rng.uniform(0.007, 0.013))
        turn = float(self.rng.uniform(0, math.pi))
        corners = [(size * math.cos(k * math.pi / 3), size * math.sin(k * math.pi / 3)) for k in range(6)]
        shine = int(self.rng.integers(130, 200))
        self._solid(u, w, corners, turn, (shine, shine, shine), 0.006)
        self._disc(u, w, 0.45 * size, (70, 58, 46))


def _pegboard(rng: np.random.Generator, width: int, height: int, scale: float) -> Image.Image:
    base = np.array([(184, 178, 164), (150, 164, 160), (170, 170, 176)][rng.integers(3)], np.float32)
    tone = base + 5 * grain(rng, height, width, 0.05 * scale, 0.1 * scale)[..., None]
    picture = Image.fromarray(np.clip(tone, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    step, hole = 0.035 * scale, 0.004 * scale
    for x in np.arange(step / 2, width, step):
        for y in np.arange(step / 2, height, step):
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=(84, 80, 74))
    x = 0.05 * scale
    while x < width - 0.06 * scale:
        colour = BOLD[int(rng.integers(len(BOLD)))]
        wide, long = rng.uniform(0.014, 0.03) * scale, rng.uniform(0.3, 0.62) * height
        draw.rectangle(
            (x + 0.008 * scale, 0, x + wide + 0.008 * scale, long + 0.01 * scale), fill=(120, 114, 104)
        )
        draw.rectangle((x, 0, x + wide, long), fill=(152, 156, 162))
        draw.rectangle((x - 0.2 * wide, 0, x + 1.2 * wide, 0.5 * long), fill=colour)
        x += wide + rng.uniform(0.05, 0.14) * scale
    return picture


def _lamp(picture: Image.Image) -> Image.Image:
    """A pool of light over the middle of the bench."""
    y, x = np.mgrid[-1 : 1 : picture.height * 1j, -1 : 1 : picture.width * 1j].astype(np.float32)
    light = 1.10 - 0.26 * ((x + 0.15) ** 2 + (0.8 * y - 0.1) ** 2)
    tint = np.array([1.02, 1.0, 0.95], np.float32)
    lit = np.asarray(picture, np.float32) * light[..., None] * tint
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


# --- the aisle -------------------------------------------------------------------------------------------


class Aisle:
    """An aisle between shelves, for a camera that walks along it.

    Args:
        seed: what stands on the shelves.
        height, width: the view, pixels; the picture has ``MARGIN`` around it.
    """

    TEXTURE = 1024  # pixels along the aisle's period
    LEVELS = 5

    def __init__(self, seed: int, height: int, width: int) -> None:
        rng = np.random.default_rng([seed, 2])
        self.size = (round((1 + 2 * MARGIN) * height), round((width / height + 2 * MARGIN) * height))
        rows, columns = self.size
        x = (np.arange(columns, dtype=np.float32)[None] - columns / 2 + 0.5) / (0.72 * height)
        y = (np.arange(rows, dtype=np.float32)[:, None] - rows * 0.42) / (0.72 * height)
        vertical = np.where(y > 0, EYE_M / np.maximum(y, 1e-4), CEILING_M / np.maximum(-y, 1e-4))
        sideways = WALL_M / np.maximum(np.abs(x), 1e-4)
        self.is_wall = np.broadcast_to(sideways < vertical, self.size)
        depth = np.minimum(*np.broadcast_arrays(sideways, vertical)).astype(np.float32)
        # Across the texture: height on a wall, or lateral place on floor and ceiling, 0..1.
        wall = (depth * y + CEILING_M) / (CEILING_M + EYE_M)
        flat = (depth * x + WALL_M) / (2 * WALL_M)
        across = np.clip(np.where(self.is_wall, wall, flat), 0, 0.999)
        surface = np.where(self.is_wall, np.where(x > 0, 1, 0), np.where(y > 0, 2, 3))
        # A pixel at depth z covers about z² / (focal length x offset) of the aisle's length.
        footprint = depth * depth / (0.72 * height * np.where(self.is_wall, WALL_M, EYE_M))
        step = AISLE_PERIOD_M / self.TEXTURE
        level = np.clip(np.round(np.log2(np.maximum(footprint / step, 1))), 0, self.LEVELS - 1).astype(
            np.int32
        )
        self.textures = self._pyramids(rng)
        tall = self.textures.shape[2]
        row = (level * 4 + surface) * tall + (across * tall).astype(np.int32)
        self.row = (row * self.TEXTURE).astype(np.int32)
        self.along = (depth / step).astype(np.int32)
        self.fog = np.clip(np.exp(-depth / 11.0), 0, 1)[..., None].astype(np.float32)
        self.haze = (1 - self.fog) * np.array([148, 152, 156], np.float32)
        self.flat_textures = self.textures.reshape(-1, 3)

    def picture(self, walked_m: float) -> Image.Image:
        """RGB picture, with ``MARGIN`` around the view, after walking so far."""
        offset = int(walked_m / AISLE_PERIOD_M * self.TEXTURE)
        index = self.row + ((self.along + offset) & (self.TEXTURE - 1))
        colour = self.flat_textures[index].astype(np.float32)
        colour *= self.fog
        colour += self.haze
        return Image.fromarray(colour.astype(np.uint8))

    def _pyramids(self, rng: np.random.Generator) -> np.ndarray:
        """uint8 [levels, 4 surfaces, across, along, 3]; each level is blurred twice as far."""
        tall = 512
        left, right = self._shelves(rng, tall), self._shelves(rng, tall)
        surfaces = [left, right, self._floor(rng, tall), self._ceiling(tall)]
        levels = []
        for level in range(self.LEVELS):
            reach = 2**level - 1
            rows = []
            for picture in surfaces:
                # Blurred on three periods, so that the seam stays invisible.
                long = np.concatenate([picture] * 3, 1)
                soft = np.asarray(Image.fromarray(long).filter(ImageFilter.BoxBlur(reach / 2)))
                rows.append(soft[:, self.TEXTURE : 2 * self.TEXTURE])
            levels.append(np.stack(rows))
        return np.stack(levels)

    def _shelves(self, rng: np.random.Generator, tall: int) -> np.ndarray:
        picture = Image.new("RGB", (self.TEXTURE, tall), (44, 46, 52))
        draw = ImageDraw.Draw(picture)
        boards = [0.18, 0.38, 0.58, 0.78, 0.97]
        for low, high in pairwise(boards):
            x = 4.0
            while x < self.TEXTURE - 30:
                wide = min(float(rng.uniform(40, 130)), self.TEXTURE - 6 - x)
                top = high - rng.uniform(0.5, 0.9) * (high - low)
                colour = [(176, 136, 92), (158, 118, 76), *BOLD][int(rng.integers(7))]
                shade = rng.uniform(0.75, 1.1)
                fill = cast(tuple[int, int, int], tuple(int(min(255, shade * c)) for c in colour))
                draw.rectangle((x, top * tall, x + wide, high * tall), fill=fill)
                band = (top + 0.3 * (high - top)) * tall
                draw.rectangle((x + 0.2 * wide, band, x + 0.7 * wide, band + 22), fill=(226, 222, 210))
                draw.line((x + 0.25 * wide, band + 9, x + 0.6 * wide, band + 9), fill=(60, 60, 60), width=3)
                x += wide + float(rng.uniform(4, 26))
        for board in boards:
            draw.rectangle((0, board * tall - 7, self.TEXTURE, board * tall + 7), fill=(206, 116, 44))
        for post in range(0, self.TEXTURE, self.TEXTURE // 4):
            draw.rectangle((post, 0.1 * tall, post + 14, tall), fill=(52, 80, 122))
        tone = np.asarray(picture, np.float32) + 5 * rng.standard_normal((tall, self.TEXTURE, 1))
        return np.clip(tone, 0, 255).astype(np.uint8)

    def _floor(self, rng: np.random.Generator, tall: int) -> np.ndarray:
        tone = 132 + 13 * grain(rng, tall, self.TEXTURE, 16, 16) + 9 * grain(rng, tall, self.TEXTURE, 90, 60)
        colour = tone[..., None] * np.array([1.0, 0.98, 0.94], np.float32)
        colour[:: tall // 4] *= 0.6
        for joint in range(0, self.TEXTURE, self.TEXTURE // 8):
            colour[:, joint : joint + 5] *= 0.6
        for edge in (0.08, 0.89):
            colour[int(edge * tall) : int((edge + 0.035) * tall)] = (214, 178, 58)
        return np.clip(colour, 0, 255).astype(np.uint8)

    def _ceiling(self, tall: int) -> np.ndarray:
        colour = np.full((tall, self.TEXTURE, 3), (108, 112, 118), np.uint8)
        for beam in range(0, self.TEXTURE, self.TEXTURE // 4):
            colour[:, beam : beam + 36] = (70, 74, 82)
        for lamp in range(self.TEXTURE // 8, self.TEXTURE, self.TEXTURE // 2):
            colour[int(0.38 * tall) : int(0.62 * tall), lamp : lamp + 200] = (248, 248, 240)
        return colour
