"""Model inputs in one Triton launch; see :mod:`ego2robot_kernels.model_input`.

A program makes a strip of one picture, some rows of 32 columns. First every row of the frame that the strip
needs is resized along x, in Pillow's 32-bit integers: a thread owns a column, reads the colours of all its
taps in aligned words of four bytes (a third of the loads that bytes would take) and keeps the levels in
registers. Then the strip's rows are products of a small matrix with those levels on the tensor cores:
weights of 23 bits are cut into two halves of at most 2^11, which float16 holds exactly, and sums of up to 31
products with levels stay below 2^24, which float32 holds exactly. So the bytes are Pillow's. What a level
becomes after normalisation is read from a table of 256, so that it is the reference's to the last bit.

Frames are given by address: those of many clips need no common tensor and no copy. Not yet run or measured on
a GPU: it compiles for sm_90, and Triton's interpreter holds it to the CPU reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from ego2robot_kernels.launch import constant, held, upload
from ego2robot_kernels.model_input import WEIGHT_BITS, Picture, pillow_taps

COLUMNS = 32
STRIP = 16  # rows of a strip at most: what a tensor core multiplies at once
LOW_BITS = 12  # of a weight, in its lower half
_ROUND, _BITS = tl.constexpr(1 << (WEIGHT_BITS - 1)), tl.constexpr(WEIGHT_BITS)
_HIGH = tl.constexpr(1 << LOW_BITS)


@triton.jit
def _level(total):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum((total + _ROUND) >> _BITS, 0), 255)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    levels, high, low, lut_ptr, out_ptr, inside,
):  # fmt: skip
    """The vertical pass of one colour, and what its levels become."""
    levels = levels.to(tl.float16)
    total = tl.dot(high, levels, out_dtype=tl.float32).to(tl.int32) * _HIGH
    total += tl.dot(low, levels, out_dtype=tl.float32).to(tl.int32)
    tl.store(out_ptr, tl.load(lut_ptr + _level(total)), mask=inside)


@triton.jit
def _input_kernel(  # type: ignore[no-untyped-def]
    frame_ptr,  # int64 [2, N]: address and bytes from one row to the next
    x_ptr,  # int32 [1 + TAPS, width]: first pixel of each column, its weights
    strip_ptr,  # int32 [strips]: first row of the frame that each strip needs
    high_ptr,  # float16 [strips, 16, SOURCE]: weights of the strip's rows, upper halves
    low_ptr,  # the same, lower halves
    lut_ptr,  # [3, 256], what levels become, of the output's dtype
    out_ptr,
    out_n,  # strides of the output, elements
    out_c,
    out_y,
    out_x,
    source_height,
    height,
    width,
    rows,  # of a strip
    TAPS: tl.constexpr,
    SOURCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    strip = tl.program_id(0)
    picture = tl.program_id(2)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = x < width
    first_row = tl.load(strip_ptr + strip)
    row = first_row + tl.arange(0, SOURCE)[:, None]
    inside = (row < source_height) & within
    base = tl.load(frame_ptr + picture)
    stride = tl.load(frame_ptr + tl.num_programs(2) + picture)
    first = tl.load(x_ptr + x, mask=within, other=0)
    at = base + row.to(tl.int64) * stride + 3 * first
    phase = (at & 3).to(tl.int32)
    words = (at - phase).to(tl.pointer_type(tl.uint32))
    last = phase + 3 * TAPS - 1  # the last byte that is needed, from the first word on
    early = (8 * phase).to(tl.uint64)
    red = tl.zeros((SOURCE, COLUMNS), tl.int32)
    green = tl.zeros((SOURCE, COLUMNS), tl.int32)
    blue = tl.zeros((SOURCE, COLUMNS), tl.int32)
    word = tl.load(words, mask=inside, other=0)
    for i in tl.static_range((3 * TAPS + 3) // 4):
        # A word is read only if some byte of it is needed: nothing beyond the frame's own words is touched.
        following = tl.load(words + i + 1, mask=inside & (4 * i + 4 <= last), other=0)
        both = word.to(tl.uint64) | (following.to(tl.uint64) << 32)
        four = (both >> early).to(tl.uint32)
        word = following
        for b in tl.static_range(4):
            if 4 * i + b < 3 * TAPS:
                weight = tl.load(x_ptr + (1 + (4 * i + b) // 3) * width + x, mask=within, other=0)
                part = ((four >> (8 * b)) & 255).to(tl.int32) * weight
                if (4 * i + b) % 3 == 0:
                    red += part
                elif (4 * i + b) % 3 == 1:
                    green += part
                else:
                    blue += part
    matrix = strip * 16 * SOURCE + tl.arange(0, 16)[:, None] * SOURCE + tl.arange(0, SOURCE)[None, :]
    high = tl.load(high_ptr + matrix)
    low = tl.load(low_ptr + matrix)
    y = tl.arange(0, 16)[:, None]
    inside = within & (y < rows) & (strip * rows + y < height)
    out = out_ptr + picture.to(tl.int64) * out_n + (strip * rows + y) * out_y + x * out_x
    _store(_level(red), high, low, lut_ptr, out, inside)
    _store(_level(green), high, low, lut_ptr + 256, out + out_c, inside)
    _store(_level(blue), high, low, lut_ptr + 512, out + 2 * out_c, inside)


@lru_cache(maxsize=64)
def column_taps(source: int, target: int, first: int, n: int, resample: str) -> np.ndarray:
    """int32 [1 + K, n]: of output pixels ``first`` to ``first + n`` the first input pixel, at most
    ``source - K``, and K weights from there on."""
    taps = [pillow_taps(source, target, i, resample) for i in range(first, first + n)]  # type: ignore[arg-type]
    k = max(len(weights) for _, weights in taps)
    table = np.zeros((1 + k, n), np.int32)
    for i, (at, weights) in enumerate(taps):
        table[0, i] = min(at, source - k)
        shift = at - table[0, i]
        table[1 + shift : 1 + shift + len(weights), i] = weights
    return table


def strips(taps: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the result put together so that each strip needs few rows of the frame.

    Args:
        taps: int32 [1 + K, n] of :func:`column_taps`.

    Returns:
        Rows of a strip, at most 16; int32 [S], the first row of the frame that each needs; and its weights as
        matrices [S, 16, R], upper and lower halves, R a power of two.
    """
    first, weights = taps[0], taps[1:]
    n, k = len(first), len(weights)
    best: tuple[float, int, int] | None = None
    for source in (16, 32, 64, 128):
        fits = [
            rows
            for rows in range(1, STRIP + 1)
            if all(first[min(at + rows, n) - 1] + k - first[at] <= source for at in range(0, n, rows))
        ]
        if fits and (best is None or source / max(fits) < best[0]):
            best = source / max(fits), max(fits), source
    if best is None:
        raise ValueError(f"a row of {k} taps is too much for one strip")
    _, rows, source = best
    starts = first[::rows]
    matrix = np.zeros((len(starts), STRIP, source), np.int64)
    for i in range(n):
        strip = i // rows
        at = first[i] - starts[strip]
        matrix[strip, i % rows, at : at + k] = weights[:, i]
    high = (matrix + (1 << (LOW_BITS - 1))) >> LOW_BITS
    low = matrix - (high << LOW_BITS)
    return rows, starts, high.astype(np.float16), low.astype(np.float16)


@lru_cache(maxsize=64)
def _tables(
    height: int, width: int, picture: Picture, device: torch.device
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Rows of a strip, and on the device the columns' taps, the strips' starts and both halves of weights."""
    new_height, new_width, top, left = picture.resized(height, width)
    across = column_taps(width, new_width, left, picture.crop[1], picture.resample)
    rows, *down = strips(column_taps(height, new_height, top, picture.crop[0], picture.resample))
    return rows, tuple(constant(table, device) for table in (across, *down))


@lru_cache(maxsize=64)
def _lut(picture: Picture, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[3, 256] of ``dtype``: each colour's levels normalised, or as they are for uint8."""
    levels = torch.arange(256, dtype=torch.uint8)
    if dtype == torch.uint8:
        return levels.expand(3, -1).contiguous().to(device)
    grey = levels[:, None, None, None].expand(-1, 1, 1, 3)
    return picture.normalise(grey)[..., 0, 0].T.to(dtype).contiguous().to(device)


def draw(
    clips: Sequence[torch.Tensor], indices: Sequence[Sequence[int]], picture: Picture, out_NCHW: torch.Tensor
) -> None:
    """Draws the frames one after another; what :func:`model_input.model_inputs` has checked.

    Args:
        clips: uint8 [T_i, H, W, 3], pixels packed.
        out_NCHW: any strides; float32, bfloat16 or float16, or uint8 for the levels themselves.
    """
    height, width = clips[0].shape[1:3]
    device = out_NCHW.device
    places = [
        (clip.data_ptr() + index * clip.stride(0), clip.stride(1))
        for clip, some in zip(clips, indices, strict=True)
        for index in some
    ]
    rows, tables = _tables(height, width, picture, device)
    across, starts, high, low = (held(table) for table in tables)
    frames = upload([list(column) for column in zip(*places, strict=True)], device)
    grid = (len(starts), triton.cdiv(picture.crop[1], COLUMNS), len(places))
    with torch.cuda.device_of(out_NCHW):  # Triton launches on the current device
        _input_kernel[grid](
            frames,
            across,
            starts,
            high,
            low,
            held(_lut(picture, out_NCHW.dtype, device)),
            out_NCHW,
            *out_NCHW.stride(),
            height,
            *picture.crop,
            rows,
            TAPS=len(across) - 1,
            SOURCE=high.shape[2],
            COLUMNS=COLUMNS,
        )
