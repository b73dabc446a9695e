"""Motion of a clip: how much a small grey picture changes from one used frame to the next.

The definition is the reference pipeline's: every second sampled frame, OpenCV's bilinear resize to
160 x 90, its RGB-to-grey, the mean |difference| of neighbours, the mean over pairs, as a share of 255.
OpenCV computes it in fixed point; the same integers are computed here, so that CPU, GPU and OpenCV
agree on every grey level and the sums are exact in any order.

This file holds the CPU reference, which defines the result; ``motion_triton`` does it in one pass on a
GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

SIZE = (90, 160)  # height, width of the small picture
STEP = 2
# OpenCV, imgproc/resize.cpp: weights have 11 fractional bits. imgproc/color: grey has 15.
WEIGHT_BITS = 11
GREY_R, GREY_G, GREY_B, GREY_BITS = 9798, 19235, 3735, 15

Frames = torch.Tensor | Sequence[torch.Tensor]


def motion(
    frames_BTHWC: Frames,
    n_frames: Sequence[int] | torch.Tensor | None = None,
    step: int = STEP,
    size: tuple[int, int] = SIZE,
) -> torch.Tensor:
    """Mean absolute grey difference between neighbouring used frames, a share of full scale.

    Args:
        frames_BTHWC: uint8 RGB [B, T, H, W, 3] with any strides, or B tensors [T_i, H, W, 3] of one
            picture size on one device. Nothing is copied but pictures whose rows are not packed.
        n_frames: how many frames of each clip count, at most T; None: all.
        step: frames 0, step, 2 step … are used.
        size: (height, width) of the small picture.

    Returns:
        float32 [B] on the device of the frames; 0 for a clip of fewer than two used frames.

    Raises:
        ValueError: wrong shape, dtype or ``n_frames``, or clips that differ in size or device.
    """
    clips = _clips(frames_BTHWC, n_frames, step)
    if not clips:
        return torch.zeros(0)
    if clips[0].is_cuda:
        from ego2robot_kernels import motion_triton

        return motion_triton.motion_of(clips, size)
    return torch.tensor([_reference(clip, size) for clip in clips], dtype=torch.float32)


def _clips(
    frames: Frames, n_frames: Sequence[int] | torch.Tensor | None, step: int = STEP
) -> list[torch.Tensor]:
    """Views of the used frames of each clip: uint8 [U_i, H, W, 3], rows packed."""
    clips = list(frames)
    counts = [len(clip) for clip in clips] if n_frames is None else [int(n) for n in n_frames]
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if len(counts) != len(clips):
        raise ValueError(f"{len(counts)} n_frames for {len(clips)} clips")
    for clip, count in zip(clips, counts, strict=True):
        if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape[1:]:
            raise ValueError(f"a clip is uint8 [T, H, W, 3], got {clip.dtype} {list(clip.shape)}")
        if not 0 <= count <= len(clip):
            raise ValueError(f"n_frames {count} of a clip of {len(clip)}")
        if clip.shape[1:] != clips[0].shape[1:] or clip.device != clips[0].device:
            raise ValueError("clips differ in picture size or device")
    used = [clip[:count:step] for clip, count in zip(clips, counts, strict=True)]
    return [clip if clip.stride()[2:] == (3, 1) else clip.contiguous() for clip in used]


@lru_cache(maxsize=64)
def taps(source: int, target: int, clamp_weight: bool) -> np.ndarray:
    """OpenCV's bilinear taps along one axis: int32 [4, target], rows index, index, weight, weight.

    ``clamp_weight``: outside the picture the weight of the outer tap is 0 (OpenCV's columns); else the
    index is clamped only (its rows), which rounds differently by one grey level.
    """
    at = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(at)
    share = at - first
    if clamp_weight:
        share[(first < 0) | (first >= source - 1)] = 0
    index = np.clip(np.stack([first, first + 1]), 0, source - 1)
    # Half to even, as OpenCV's saturate_cast does.
    weight = np.rint(np.stack([np.float32(1) - share, share]) * np.float32(1 << WEIGHT_BITS))
    return np.concatenate([index, weight]).astype(np.int32)


@lru_cache(maxsize=16)
def _corners(source: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Where the four source bytes of each small byte lie in a packed picture, and the weights.

    Returns:
        Four int64 [3 * h * w] (colour by colour) for (row 0, column 0), (0, 1), (1, 0), (1, 1), and the
        weights int32 [4, 1, h, w] of column 0, column 1, row 0, row 1.
    """
    y0, y1, b0, b1 = taps(source[0], size[0], False).astype(np.int64)
    x0, x1, a0, a1 = taps(source[1], size[1], True).astype(np.int64)
    colour = np.arange(3)[:, None, None]
    index = [(y[:, None] * source[1] + x) * 3 + colour for y in (y0, y1) for x in (x0, x1)]
    columns = [np.broadcast_to(a, size) for a in (a0, a1)]
    rows = [np.broadcast_to(b[:, None], size) for b in (b0, b1)]
    weights = np.stack([*columns, *rows]).astype(np.int32)[:, None]
    return tuple(i.reshape(-1) for i in index), weights


def grey_small(frames_THWC: torch.Tensor, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 RGB [T, H, W, 3] on the CPU to grey levels int32 [T, *size], as OpenCV gives them.

    Only the (at most) four source pixels of each target pixel are touched.
    """
    n, height, width = frames_THWC.shape[:3]
    bytes_TN = frames_THWC.reshape(n, -1).numpy()
    index, (a0, a1, b0, b1) = _corners((height, width), size)
    # numpy's take is several times faster than torch's index_select on bytes.
    v00, v01, v10, v11 = (bytes_TN.take(i, axis=1).reshape(n, 3, *size).astype(np.int32) for i in index)
    top, bottom = _blend(v00, v01, a0, a1), _blend(v10, v11, a0, a1)
    for sums, weight in ((top, b0), (bottom, b1)):
        np.right_shift(sums, 4, out=sums)
        np.multiply(sums, weight, out=sums)
        np.right_shift(sums, 16, out=sums)
    top += bottom
    top += 2
    top >>= 2
    grey = top[:, 0] * GREY_R + top[:, 1] * GREY_G
    grey += top[:, 2] * GREY_B
    grey += 1 << (GREY_BITS - 1)
    grey >>= GREY_BITS
    return grey


def _blend(a: np.ndarray, b: np.ndarray, weight_a: np.ndarray, weight_b: np.ndarray) -> np.ndarray:
    """``a * weight_a + b * weight_b``, in place of ``a``."""
    a *= weight_a
    b *= weight_b
    a += b
    return a


def _reference(used_UHWC: torch.Tensor, size: tuple[int, int]) -> float:
    pairs = len(used_UHWC) - 1
    if pairs < 1:
        return 0.0
    total = 0
    # One frame at a time stays in the processor's cache, and memory does not grow with the clip.
    last = grey_small(used_UHWC[:1], size)
    for i in range(1, len(used_UHWC)):
        grey = grey_small(used_UHWC[i : i + 1], size)
        total += int(np.abs(grey - last).sum(dtype=np.int64))
        last = grey
    return total / (pairs * size[0] * size[1] * 255)
