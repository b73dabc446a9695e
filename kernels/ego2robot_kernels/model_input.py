"""Frames to the pictures that models take: resize and crop exactly as Pillow, normalise, any frames of any
clips in one launch.

The models were made with Pillow's antialiased resize. One grey level is 0.017 after normalisation, so a
resize that is only close is not close enough. Pillow works in fixed point (libImaging/Resample.c): one
horizontal and one vertical pass, each a sum of pixels times integer weights with 22 fractional bits, rounded
to 8 bits. Such sums are exact in float64 whatever their order, so plain matrix products give Pillow's bytes.

Pillow 13 does the vertical pass first for some pictures over twice as tall as wide (one grey level, here
and there); here it is the horizontal one always, as in every Pillow before.

Bytes that must move for a picture: what its crop needs of the frame once, 3 x 360 x 360 of 360 x 640, and the
result, 3 x 224 x 224 of two bytes each: 0.69 MB, 11 MB for a clip of 16.

This file holds the CPU reference, which defines the result; ``model_input_triton`` does it on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

Filter = Literal["bilinear", "bicubic"]
WEIGHT_BITS = 22  # Pillow: 32 - 8 bits of pixel - 2 bits of headroom
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
BLOCK = 16  # output pixels whose common input window is multiplied at once
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    def resized(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(height, width) after the resize, and (top, left) of the crop there."""
        # As transformers: the longer edge is rounded down.
        short, long = min(height, width), max(height, width)
        longer = int(self.shortest_edge * long / short)
        new = (longer, self.shortest_edge) if width <= height else (self.shortest_edge, longer)
        return *new, (new[0] - self.crop[0]) // 2, (new[1] - self.crop[1]) // 2


def model_inputs(
    clips: Sequence[torch.Tensor],
    indices: Sequence[Sequence[int]],
    picture: Picture,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Some frames of some clips as a model takes them, in one launch on a GPU.

    Args:
        clips: uint8 RGB [T_i, H, W, 3] each, of one picture size on one device, any strides of T and rows.
        indices: for each clip, which of its frames, in any order, repeated or none.
        picture: how they are resized, cropped and normalised.
        dtype: of the result: float32, bfloat16 or float16.
        out: [N, 3, *picture.crop] of that dtype to write to, any strides (such as ``channels_last``).

    Returns:
        [N, 3, *picture.crop], frames in the order of ``indices``, clip by clip (``out`` where given):
        ``picture.normalise`` of Pillow's levels, in float32 and then rounded to ``dtype``. A GPU is not
        waited for; a CUDA graph cannot hold the call, as addresses go up with it.

    Raises:
        ValueError: wrong shape, dtype or index, or clips that differ in size or device.
    """
    if len(clips) != len(indices):
        raise ValueError(f"{len(indices)} lists of indices for {len(clips)} clips")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is float32, bfloat16 or float16, got {dtype}")
    for clip, some in zip(clips, indices, strict=True):
        _check(clip)
        if (clip.shape[1:], clip.device) != (clips[0].shape[1:], clips[0].device):
            raise ValueError("clips differ in picture size or device")
        if any(not 0 <= index < len(clip) for index in some):
            raise ValueError(f"indices {list(some)} of a clip of {len(clip)} frames")
    shape = (sum(len(some) for some in indices), 3, *picture.crop)
    device = clips[0].device if clips else torch.device("cpu")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    elif (out.shape, out.dtype, out.device) != (shape, dtype, device):
        raise ValueError(f"out is {dtype} {list(shape)} on {device}, got {out.dtype} {list(out.shape)}")
    if not shape[0]:
        return out
    if device.type == "cuda" and kernel_takes(clips[0], picture):
        from ego2robot_kernels import model_input_triton

        model_input_triton.draw(clips, indices, picture, out)
        return out
    at = 0
    for clip, some in zip(clips, indices, strict=True):
        for index in some:  # one at a time: memory does not grow with the clip
            out[at] = picture.normalise(resize_and_crop(clip[index : index + 1], picture))[0]
            at += 1
    return out


def resize_and_crop(frames_THWC: torch.Tensor, picture: Picture) -> torch.Tensor:
    """Pillow's resize of the shortest edge, then the centre crop, bit for bit.

    Only the rows and columns that survive the crop are computed.

    Args:
        frames_THWC: uint8 RGB [T, H, W, 3], any device.

    Returns:
        uint8 [T, *picture.crop, 3], contiguous, on the same device.
    """
    n = len(frames_THWC)
    device = frames_THWC.device
    if not n:
        return frames_THWC.new_empty((0, *picture.crop, 3))
    if device.type == "cuda" and kernel_takes(frames_THWC, picture):
        from ego2robot_kernels import model_input_triton

        small = torch.empty((n, *picture.crop, 3), dtype=torch.uint8, device=device)
        model_input_triton.draw([frames_THWC], [range(n)], picture, small.permute(0, 3, 1, 2))
        return small
    height, width = frames_THWC.shape[1:3]
    new_height, new_width, top, left = picture.resized(height, width)
    # A CPU skips most of the zero weights and keeps the planes of one frame in its cache; for a GPU one
    # large product is less work than many small ones.
    on_cpu = device.type == "cpu"
    across = _weights(width, new_width, left, picture.crop[1], picture.resample, on_cpu, device)
    down = _weights(height, new_height, top, picture.crop[0], picture.resample, on_cpu, device)
    parts = frames_THWC.split(1) if on_cpu else [frames_THWC]
    return torch.cat([_two_passes(part, across, down) for part in parts])


def kernel_takes(frames_THWC: torch.Tensor, picture: Picture) -> bool:
    """Whether the Triton kernel does this: packed pixels, and not so many rows to a pixel that its float32
    sums might round (:mod:`ego2robot_kernels.model_input_triton`)."""
    height, width = frames_THWC.shape[1:3]
    new_height, new_width = picture.resized(height, width)[:2]
    stretch = max(height / new_height, width / new_width, 1.0)
    return frames_THWC.stride()[2:] == (3, 1) and 2 * SUPPORT[picture.resample] * stretch + 1 <= 30


def _check(frames_THWC: torch.Tensor) -> None:
    shape = frames_THWC.shape
    if frames_THWC.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise ValueError(f"a clip is uint8 [T, H, W, 3], got {frames_THWC.dtype} {list(shape)}")


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
    taps = [pillow_taps(source, target, i, resample) for i in range(first, first + n)]
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


def pillow_taps(source: int, target: int, i: int, resample: Filter) -> tuple[int, np.ndarray]:
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
