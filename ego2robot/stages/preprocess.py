"""Which frames a model looks at, and the small pictures it gets: resize and crop, exactly Pillow's.

The models were made with Pillow's antialiased resize. One grey level is 0.017 after normalisation, so a
resize that is only close is not close enough. Pillow works in fixed point (libImaging/Resample.c): one
horizontal and one vertical pass, each a sum of pixels times integer weights with 22 fractional bits,
rounded to 8 bits. Such sums are exact in float64 whatever their order, so plain matrix products give
Pillow's bytes on any device.

Pillow 13 does the vertical pass first for some pictures over twice as tall as wide (one grey level, here
and there); here it is the horizontal one always, as in every Pillow before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
import torch

from ego2robot.errors import UserError

Filter = Literal["bilinear", "bicubic"]
WEIGHT_BITS = 22  # Pillow: 32 - 8 bits of pixel - 2 bits of headroom
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
PILLOW_FILTERS: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
BLOCK = 16  # output pixels whose common input window is multiplied at once


@dataclass(frozen=True)
class Picture:
    """What a model's ``preprocessor_config.json`` says.

    Attributes:
        shortest_edge: pixels, after the resize that keeps the aspect ratio.
        crop: (height, width) of the centre crop, pixels.
        mean, std: of the normalisation, per colour, of values in [0, 1].
    """

    shortest_edge: int = 224
    crop: tuple[int, int] = (224, 224)
    resample: Filter = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def normalise(self, pixels_THWC: torch.Tensor) -> torch.Tensor:
        """uint8 [..., h, w, 3] to float32 [..., 3, h, w], on the same device."""
        mean, std = (torch.tensor(v, device=pixels_THWC.device) for v in (self.mean, self.std))
        return ((pixels_THWC.float() / 255 - mean) / std).movedim(-1, -3)


# transformers' own defaults, which also fill what a configuration leaves out.
VIDEOMAE_PICTURE = Picture()
CLIP_PICTURE = Picture(
    resample="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


@dataclass(frozen=True)
class VideoMAEPreprocess:
    """``n_frames`` frames spread over the clip, first to last."""

    name: str = "videomae"
    n_frames: int = 16
    picture: Picture = VIDEOMAE_PICTURE

    def indices(self, n_frames: int) -> np.ndarray:
        """int64 [self.n_frames]: ``linspace(0, n - 1, 16)`` rounded down, as the reference does."""
        return np.linspace(0, n_frames - 1, self.n_frames).astype(np.int64)

    def prepare(self, frames_THWC: torch.Tensor) -> torch.Tensor:
        """uint8 [T, H, W, 3] to uint8 [T, h, w, 3] on the same device."""
        return resize_and_crop(frames_THWC, self.picture)


@dataclass(frozen=True)
class CLIPPreprocess:
    """The middle frames of ``n_frames`` equal parts of the clip; one: the middle frame."""

    name: str = "clip"
    n_frames: int = 1
    picture: Picture = CLIP_PICTURE

    def indices(self, n_frames: int) -> np.ndarray:
        """int64 [self.n_frames]: frame ``(2 i + 1) n // (2 parts)``, so ``n // 2`` for one part."""
        return (2 * np.arange(self.n_frames, dtype=np.int64) + 1) * n_frames // (2 * self.n_frames)

    def prepare(self, frames_THWC: torch.Tensor) -> torch.Tensor:
        """uint8 [T, H, W, 3] to uint8 [T, h, w, 3] on the same device."""
        return resize_and_crop(frames_THWC, self.picture)


def read_picture(folder: Path, default: Picture) -> Picture:
    """What a weights folder says about its pictures, ``default`` where it says nothing.

    Reads ``processor_config.json`` (its ``image_processor``) or ``preprocessor_config.json``.

    Raises:
        UserError: not JSON, or a step that is not done here.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not JSON ({error}); download the weights again") from None
        if name == "processor_config.json" and isinstance(tree, dict):
            tree = tree.get("image_processor")
            if tree is None:
                continue
        if not isinstance(tree, dict):
            raise UserError(f"{path}: not a mapping of keys; download the weights again")
        return _picture(tree, default, path)
    return default


def _picture(tree: Mapping[str, Any], default: Picture, path: Path) -> Picture:
    found = default

    def refuse(key: str, wanted: str) -> UserError:
        return UserError(f"{path}: {key}={tree[key]!r} is not supported (only {wanted}); use other weights")

    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if tree.get(key) not in (None, True):
            raise refuse(key, "true")
    factor = tree.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or not math.isclose(factor, 1 / 255):
        raise refuse("rescale_factor", "1/255")
    if (size := tree.get("size")) is not None:
        edge = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else size
        if not _is_size(edge):
            raise refuse("size", '{"shortest_edge": pixels}')
        found = replace(found, shortest_edge=edge)
    if (crop := tree.get("crop_size")) is not None:
        height, width = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
        if not _is_size(height) or not _is_size(width):
            raise refuse("crop_size", '{"height": pixels, "width": pixels}')
        found = replace(found, crop=(height, width))
    if max(found.crop) > found.shortest_edge:
        raise UserError(
            f"{path}: a crop of {found.crop} from a shortest edge of {found.shortest_edge} would need "
            "padding, which is not supported; use other weights"
        )
    if (resample := tree.get("resample")) is not None:
        if not isinstance(resample, int) or resample not in PILLOW_FILTERS:
            raise refuse("resample", "2 (bilinear) or 3 (bicubic)")
        found = replace(found, resample=PILLOW_FILTERS[resample])
    for key in ("image_mean", "image_std"):
        values = tree.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != 3 or not all(_is_number(v) for v in values):
            raise refuse(key, "three numbers")
        red, green, blue = (float(v) for v in values)
        if key == "image_mean":
            found = replace(found, mean=(red, green, blue))
        elif min(values) > 0:
            found = replace(found, std=(red, green, blue))
        else:
            raise refuse(key, "numbers above 0")
    return found


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 4096


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def resize_and_crop(frames_THWC: torch.Tensor, picture: Picture) -> torch.Tensor:
    """Pillow's resize of the shortest edge, then the centre crop, bit for bit.

    Only the rows and columns that survive the crop are computed.

    Args:
        frames_THWC: uint8 RGB [T, H, W, 3], any device.

    Returns:
        uint8 [T, *picture.crop, 3], contiguous, on the same device.
    """
    height, width = frames_THWC.shape[1:3]
    # As transformers: the longer edge is rounded down.
    short, long = min(height, width), max(height, width)
    longer = int(picture.shortest_edge * long / short)
    new_height, new_width = (
        (longer, picture.shortest_edge) if width <= height else (picture.shortest_edge, longer)
    )
    top, left = (new_height - picture.crop[0]) // 2, (new_width - picture.crop[1]) // 2
    device = frames_THWC.device
    # A CPU skips most of the zero weights and keeps the planes of one frame in its cache; for a GPU one
    # large product is less work than many small ones.
    on_cpu = device.type == "cpu"
    across = _weights(width, new_width, left, picture.crop[1], picture.resample, on_cpu, device)
    down = _weights(height, new_height, top, picture.crop[0], picture.resample, on_cpu, device)
    parts = frames_THWC.split(1) if on_cpu else [frames_THWC]
    small = [_two_passes(part, across, down) for part in parts if len(part)]
    return torch.cat(small) if small else frames_THWC.new_empty((0, *picture.crop, 3))


Band = tuple[int, torch.Tensor]  # first input pixel, float64 [output pixels, input pixels]


def _two_passes(frames_THWC: torch.Tensor, across: tuple[Band, ...], down: tuple[Band, ...]) -> torch.Tensor:
    """The horizontal, then the vertical pass: uint8 [T, H, W, 3] to uint8 [T, h, w, 3]."""
    n, device = len(frames_THWC), frames_THWC.device
    (y0, y1), (x0, x1) = _extent(down), _extent(across)
    planes = torch.empty((n, 3, y1 - y0, x1 - x0), dtype=torch.float64, device=device)
    planes.copy_(frames_THWC[:, y0:y1, x0:x1].permute(0, 3, 1, 2))
    rows = planes.view(-1, x1 - x0)
    columns = [rows[:, at - x0 : at - x0 + band.shape[1]] @ band.T for at, band in across]
    middle = torch.cat(columns, 1).add_(0.5).floor_().clamp_(0, 255).view(n * 3, y1 - y0, -1)
    bands = [torch.matmul(band, middle[:, at - y0 : at - y0 + band.shape[1]]) for at, band in down]
    # What is left after the clamp is positive, so the conversion's truncation is the floor.
    small = torch.cat(bands, 1).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return small.view(n, 3, *small.shape[1:]).permute(0, 2, 3, 1).contiguous()


def _extent(bands: tuple[Band, ...]) -> tuple[int, int]:
    """First and one past the last input pixel that any band reads."""
    return min(at for at, _ in bands), max(at + band.shape[1] for at, band in bands)


@lru_cache(maxsize=64)
def _weights(
    source: int, target: int, first: int, n: int, resample: Filter, banded: bool, device: torch.device
) -> tuple[Band, ...]:
    """Pillow's weights for output pixels ``first`` to ``first + n``, as shares (exact in float64)."""
    taps = [_taps(source, target, i, resample) for i in range(first, first + n)]
    block = BLOCK if banded else n
    bands = []
    for start in range(0, n, block):
        some = taps[start : start + block]
        low = min(at for at, _ in some)
        band = np.zeros((len(some), max(at + len(weights) for at, weights in some) - low))
        for row, (at, weights) in zip(band, some, strict=True):
            row[at - low : at - low + len(weights)] = weights
        bands.append((low, torch.from_numpy(band / (1 << WEIGHT_BITS)).to(device)))
    return tuple(bands)


def _taps(source: int, target: int, i: int, resample: Filter) -> tuple[int, np.ndarray]:
    """First input pixel of output pixel ``i`` and the integer weights from there (libImaging/Resample.c)."""
    scale = source / target
    stretch = max(scale, 1.0)  # antialiasing: the filter widens when the picture shrinks
    support = SUPPORT[resample] * stretch
    centre = (i + 0.5) * scale
    low, high = max(0, int(centre - support + 0.5)), min(source, int(centre + support + 0.5))
    x = np.abs((np.arange(low, high) - centre + 0.5) * (1 / stretch))
    if resample == "bilinear":
        weights = np.where(x < 1, 1 - x, 0.0)
    else:  # Keys' cubic with a = -0.5
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights /= math.fsum(weights)
    return low, np.trunc(weights * (1 << WEIGHT_BITS) + np.where(weights < 0, -0.5, 0.5))
