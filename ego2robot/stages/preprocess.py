"""Which frames a model looks at, and the small pictures it gets: resize and crop, exactly Pillow's.

How that is computed is in ``ego2robot_kernels.model_input``; here is what a folder of weights asks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from ego2robot_kernels.model_input import Filter, Picture, resize_and_crop

from ego2robot.errors import UserError

__all__ = [
    "CLIP_PICTURE",
    "VIDEOMAE_PICTURE",
    "CLIPPreprocess",
    "Picture",
    "VideoMAEPreprocess",
    "read_picture",
    "resize_and_crop",
]

PILLOW_FILTERS: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling

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
