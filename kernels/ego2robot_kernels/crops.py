"""Pictures for the hand networks, read straight out of uint8 frames: whole frames in a square, and rotated
squares around palms.

The definition is MediaPipe's image-to-tensor step as ``ego2robot/hands_net/sampling.py`` has it: bilinear
with the centres of source pixels at whole numbers, positions rounded to 1/32 pixel, results to whole levels
(half to even), then 0 to 1. With such positions weights have 10 fractional bits and sums are integers, so
that every device gives the same levels.

Bytes that must move, with two bytes a value in the result: letterboxed 640 x 360 to 192 x 192, the two rows
and columns in 3.3 that are looked at (0.42 MB with the rest of their sectors) and 0.22 MB written; a crop of
224 x 224, at most what it covers of its frame and 0.30 MB written.

This file holds the CPU reference; ``crops_triton`` does it on a GPU, in one launch each and without waiting
for the device, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from ego2robot_kernels.model_input import DTYPES

STEPS = 32  # positions to a pixel


def letterbox(frames_BHWC: torch.Tensor, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Whole frames in the middle of a square, the rest black.

    Args:
        frames_BHWC: uint8 RGB [B, H, W, 3], any device; a GPU wants pixels packed, else they are copied.
        size: pixels of a side of the result.
        dtype: float32, bfloat16 or float16.

    Returns:
        [B, 3, size, size] of 0 to 1, ``channels_last``, on the device of the frames.

    Raises:
        ValueError: wrong shape or dtype.
    """
    frames_BHWC = _checked(frames_BHWC, size, dtype)
    n, height, width = frames_BHWC.shape[:3]
    out_BSSC = torch.empty((n, size, size, 3), dtype=dtype, device=frames_BHWC.device)
    if frames_BHWC.is_cuda and n:
        from ego2robot_kernels import crops_triton

        crops_triton.letterbox(frames_BHWC, out_BSSC)
        return out_BSSC.permute(0, 3, 1, 2)
    side = max(height, width)
    x, y = (
        torch.from_numpy(line_taps(length, side, size)).to(frames_BHWC.device) for length in (width, height)
    )
    for frame_HWC, square_SSC in zip(frames_BHWC, out_BSSC, strict=True):
        where = y[0][:, None].expand(-1, size), x[0].expand(size, -1)
        square_SSC.copy_(_sampled(frame_HWC, *where, (y[1][:, None], y[2][:, None]), (x[1], x[2])))
    return out_BSSC.permute(0, 3, 1, 2)


def crops(
    frames_BHWC: torch.Tensor,
    frame_N: torch.Tensor,
    rect_N4: torch.Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rotated squares out of frames, edges repeated outward.

    Args:
        frames_BHWC: uint8 RGB [B, H, W, 3], any device; a GPU wants pixels packed, else they are copied.
        frame_N: int64, the frame of each square, on that device; on a GPU it is not looked at before use.
        rect_N4: float32, centre x, centre y and side in pixels, clockwise rotation in radians.
        size: pixels of a side of the result.
        dtype: float32, bfloat16 or float16.

    Returns:
        [N, 3, size, size] of 0 to 1, ``channels_last``, on the device of the frames.

    Raises:
        ValueError: wrong shape or dtype.
    """
    frames_BHWC = _checked(frames_BHWC, size, dtype)
    n = len(frame_N)
    if frame_N.dtype != torch.int64 or rect_N4.dtype != torch.float32 or rect_N4.shape != (n, 4):
        raise ValueError(
            f"squares are int64 [N] and float32 [N, 4], got {frame_N.dtype} {list(frame_N.shape)} and "
            f"{rect_N4.dtype} {list(rect_N4.shape)}"
        )
    out_NSSC = torch.empty((n, size, size, 3), dtype=dtype, device=frames_BHWC.device)
    centre_x, centre_y, side, rotation = rect_N4.unbind(1)
    turned_4N = torch.stack((centre_x, centre_y, side * rotation.cos(), side * rotation.sin()))
    if frames_BHWC.is_cuda and n:
        from ego2robot_kernels import crops_triton

        crops_triton.crops(frames_BHWC, frame_N, turned_4N, out_NSSC)
        return out_NSSC.permute(0, 3, 1, 2)
    height, width = frames_BHWC.shape[1:3]
    steps = torch.from_numpy(steps_of(size)).to(frames_BHWC.device)
    for i, (frame, (x, y, cos, sin)) in enumerate(zip(frame_N.tolist(), turned_4N.unbind(1), strict=True)):
        along_x, along_y = cos * steps, sin * steps
        at_x = ((x + along_x)[None, :] - along_y[:, None]).clamp_(0, width - 1)
        at_y = ((y + along_y)[None, :] + along_x[:, None]).clamp_(0, height - 1)
        (low_x, share_x), (low_y, share_y) = (_split(at) for at in (at_x, at_y))
        weights = (STEPS - share_y, share_y), (STEPS - share_x, share_x)
        out_NSSC[i] = _sampled(frames_BHWC[frame], low_y, low_x, *weights)
    return out_NSSC.permute(0, 3, 1, 2)


def _checked(frames_BHWC: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    shape = frames_BHWC.shape
    if frames_BHWC.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise ValueError(f"frames are uint8 [B, H, W, 3], got {frames_BHWC.dtype} {list(shape)}")
    if size < 1 or dtype not in DTYPES:
        raise ValueError(f"a square has pixels of float32, bfloat16 or float16, got {size} of {dtype}")
    return frames_BHWC if frames_BHWC.stride()[2:] == (3, 1) else frames_BHWC.contiguous()


@lru_cache(maxsize=64)
def line_taps(length: int, side: int, size: int) -> np.ndarray:
    """What each of ``size`` positions along a square of ``side`` pixels sees of a line of ``length`` in its
    middle.

    Returns:
        int32 [3, size]: the first of two pixels, and the weights of both in 1/32; 0 of what lies outside.
    """
    step, before = np.float32(side / size), np.float32((side - length) / 2)
    position = np.rint((np.arange(size, dtype=np.float32) * step - before) * np.float32(STEPS)).astype(
        np.int64
    )
    low, share = position // STEPS, position % STEPS
    first = np.where((low >= 0) & (low < length), STEPS - share, 0)
    second = np.where((low + 1 >= 0) & (low + 1 < length), share, 0)
    # Left of the line only the second pixel counts: it becomes the first.
    outside = low < 0
    first, second = np.where(outside, second, first), np.where(outside, 0, second)
    low = np.where(first + second > 0, np.clip(low, 0, length - 1), 0)
    return np.stack([low, first, second]).astype(np.int32)


@lru_cache(maxsize=16)
def steps_of(size: int) -> np.ndarray:
    """float32 [size]: where the pixels of a square lie, -0.5 to 0.5 of its side."""
    return (torch.arange(size) / size - 0.5).numpy()


def _split(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in pixels to whole pixels and 32nds."""
    position = (at * STEPS).round_().to(torch.int64)
    return position // STEPS, position % STEPS


def _sampled(
    frame_HWC: torch.Tensor,
    low_y: torch.Tensor,
    low_x: torch.Tensor,
    weights_y: tuple[torch.Tensor, torch.Tensor],
    weights_x: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """float32 [S, S, 3]: each pixel from four of the frame, weights in 1/32 along either axis."""
    height, width = frame_HWC.shape[:2]
    total = torch.zeros((), dtype=torch.int64, device=frame_HWC.device)
    for down, weight_y in enumerate(weights_y):
        for right, weight_x in enumerate(weights_x):
            y, x = (low_y + down).clamp(max=height - 1).long(), (low_x + right).clamp(max=width - 1).long()
            total = total + frame_HWC[y, x].long() * (weight_y * weight_x)[..., None]
    one = STEPS * STEPS
    shift = int(math.log2(one))
    return ((total + (one // 2 - 1) + ((total >> shift) & 1)) >> shift).float() * (1 / 255)
