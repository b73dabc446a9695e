"""A face in a few strokes that MediaPipe's detectors take for one, and pictures with it in a known place."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 480  # pixels of a side of the drawing
BOX = (128, 148, 352, 372)  # in it: brows to chin, ear to ear


@functools.cache
def drawn() -> Image.Image:
    """Head and shoulders, RGB, ``SIZE`` x ``SIZE``."""
    picture = Image.new("RGB", (SIZE, SIZE), (70, 80, 90))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((195, 330, 285, 480), fill=(190, 145, 118))
    draw.ellipse((60, 420, 420, 640), fill=(60, 70, 120))
    draw.ellipse((105, 50, 375, 330), fill=(50, 35, 28))
    draw.ellipse((125, 85, 355, 390), fill=(214, 170, 140))
    draw.pieslice((120, 50, 360, 260), 185, 355, fill=(50, 35, 28))
    for x in (190, 290):
        draw.ellipse((x - 34, 205, x + 34, 245), fill=(180, 130, 108))
        draw.ellipse((x - 27, 212, x + 27, 240), fill=(240, 238, 235))
        draw.ellipse((x - 13, 211, x + 13, 239), fill=(60, 40, 30))
        draw.ellipse((x - 6, 218, x + 6, 232), fill=(10, 10, 10))
        draw.line((x - 36, 192, x, 182, x + 36, 192), fill=(60, 40, 30), width=10)
        draw.ellipse(
            (x - 13 if x > 240 else x + 32, 286, x + 1 if x > 240 else x + 46, 298), fill=(120, 80, 65)
        )
    draw.polygon([(240, 225), (218, 292), (262, 292)], fill=(196, 150, 122))
    draw.ellipse((194, 322, 286, 356), fill=(176, 84, 84))
    draw.line((196, 338, 240, 342, 284, 338), fill=(110, 45, 50), width=5)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(4)), np.float64)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.4
    pixels *= (1.05 - 0.25 * x**2 - 0.2 * y**2)[..., None]
    pixels += np.random.default_rng(0).normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def wall(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A background without faces: coarse soft patches and a little noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(70, 150, (9, 16, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return (pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)


def put(picture_HWC: np.ndarray, left: int, top: int, size: int) -> np.ndarray:
    """Draws head and shoulders of ``size`` pixels into a picture; where its face is: float [4]."""
    part = np.asarray(drawn().resize((size, size), Image.Resampling.LANCZOS))
    rows, columns = (slice(max(0, a), max(0, a + size)) for a in (top, left))
    room = picture_HWC[rows, columns]
    y, x = max(0, -top), max(0, -left)
    room[:] = part[y : y + room.shape[0], x : x + room.shape[1]]
    return np.array(BOX) * (size / SIZE) + np.array((left, top, left, top))
