"""Letterboxed frames and rotated squares in one Triton launch each; see :mod:`ego2robot_kernels.crops`.

A program makes 256 neighbouring pixels of one picture. The two pixels that each needs of a row are six bytes,
read in aligned words of four: two or three loads in place of six. Only words that hold a byte with a weight
are read, nothing at all for what stays black. Positions are float32 sums in the reference's order, and the
compiler is kept from fusing them, so that they round to the same 1/32.

What is kept on the device is kept for good: few sizes occur, and a CUDA graph may look at it at any time.

Not yet run or measured on a GPU: it compiles for sm_90, and Triton's interpreter holds it to the CPU
reference.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ego2robot_kernels.crops import STEPS, line_taps, steps_of
from ego2robot_kernels.launch import constant, held

BLOCK = 256  # pixels a program
_STEPS = tl.constexpr(STEPS)
# Added to and taken off a float32 of less than 2^22, it leaves the nearest whole number, half to even.
_WHOLE = tl.constexpr(3.0 * 2**22)


@triton.jit
def _row(address, pixels, inside):  # type: ignore[no-untyped-def]
    """Six bytes from ``address`` on as a uint64; where ``pixels`` is 1 only the first three are read."""
    phase = (address & 3).to(tl.int32)
    words = (address - phase).to(tl.pointer_type(tl.uint32))
    last = phase + 3 * pixels - 1
    first = tl.load(words, mask=inside, other=0).to(tl.uint64)
    second = tl.load(words + 1, mask=inside & (last >= 4), other=0).to(tl.uint64)
    third = tl.load(words + 2, mask=inside & (last >= 8), other=0).to(tl.uint64)
    six = (first | (second << 32)) >> (8 * phase).to(tl.uint64)
    return six | (third << 40)  # it is read only if the phase is 3


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    out_ptr, lut_ptr, upper, lower, shift: tl.constexpr, y0, y1, x0, x1, inside,
):  # fmt: skip
    """One colour: weights, rounding half to even, 0 to 1."""
    above = ((upper >> shift) & 255).to(tl.int32) * x0 + ((upper >> (shift + 24)) & 255).to(tl.int32) * x1
    below = ((lower >> shift) & 255).to(tl.int32) * x0 + ((lower >> (shift + 24)) & 255).to(tl.int32) * x1
    total = above * y0 + below * y1
    level = (total + 511 + ((total >> 10) & 1)) >> 10
    tl.store(out_ptr, tl.load(lut_ptr + level), mask=inside)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    frame, row_stride, low_y, low_x, y0, y1, x0, x1, lut_ptr, out, inside,
):  # fmt: skip
    """Three colours from two rows of two pixels each, where any has a weight."""
    pixels = tl.where(x1 > 0, 2, 1)
    seen = inside & (x0 + x1 > 0)
    address = frame + low_y.to(tl.int64) * row_stride + low_x * 3
    upper = _row(address, pixels, seen & (y0 > 0))
    lower = _row(address + row_stride, pixels, seen & (y1 > 0))
    _store(out, lut_ptr, upper, lower, 0, y0, y1, x0, x1, inside)
    _store(out + 1, lut_ptr, upper, lower, 8, y0, y1, x0, x1, inside)
    _store(out + 2, lut_ptr, upper, lower, 16, y0, y1, x0, x1, inside)


@triton.jit
def _letterbox_kernel(  # type: ignore[no-untyped-def]
    frames_ptr,  # uint8 [B, H, W, 3], pixels packed
    frame_stride,  # bytes
    row_stride,
    y_ptr,  # int32 [3, size]: crops.line_taps
    x_ptr,
    lut_ptr,  # [256], what levels become, of the output's dtype
    out_ptr,  # [B, size, size, 3]
    size,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    picture = tl.program_id(1).to(tl.int64)
    inside = pixel < size * size
    y = pixel // size
    x = pixel % size
    low_y = tl.load(y_ptr + y, mask=inside, other=0)
    y0 = tl.load(y_ptr + size + y, mask=inside, other=0)
    y1 = tl.load(y_ptr + 2 * size + y, mask=inside, other=0)
    low_x = tl.load(x_ptr + x, mask=inside, other=0)
    x0 = tl.load(x_ptr + size + x, mask=inside, other=0)
    x1 = tl.load(x_ptr + 2 * size + x, mask=inside, other=0)
    frame = frames_ptr.to(tl.int64) + picture * frame_stride
    out = out_ptr + picture * size * size * 3 + pixel * 3
    _draw(frame, row_stride, low_y, low_x, y0, y1, x0, x1, lut_ptr, out, inside)


@triton.jit
def _nearest(at, length):  # type: ignore[no-untyped-def]
    """Inside a line, to 1/32 pixel: the pixel and the 32nds after it."""
    at = tl.minimum(tl.maximum(at, 0.0), (length - 1).to(tl.float32))
    position = ((at * _STEPS + _WHOLE) - _WHOLE).to(tl.int32)
    return position // _STEPS, position % _STEPS


@triton.jit
def _crops_kernel(  # type: ignore[no-untyped-def]
    frames_ptr,  # uint8 [B, H, W, 3], pixels packed
    frame_stride,  # bytes
    row_stride,
    height,
    width,
    frame_ptr,  # int64 [N]
    turned_ptr,  # float32 [4, N]: centre x and y, side times cosine and sine of the turn
    steps_ptr,  # float32 [size]: crops.steps_of
    lut_ptr,  # [256], what levels become, of the output's dtype
    out_ptr,  # [N, size, size, 3]
    size,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    picture = tl.program_id(1)
    n = tl.num_programs(1)
    inside = pixel < size * size
    down = tl.load(steps_ptr + pixel // size, mask=inside, other=0.0)
    right = tl.load(steps_ptr + pixel % size, mask=inside, other=0.0)
    cos = tl.load(turned_ptr + 2 * n + picture)
    sin = tl.load(turned_ptr + 3 * n + picture)
    x = (tl.load(turned_ptr + picture) + cos * right) - sin * down
    y = (tl.load(turned_ptr + n + picture) + sin * right) + cos * down
    low_x, x1 = _nearest(x, width)
    low_y, y1 = _nearest(y, height)
    frame = frames_ptr.to(tl.int64) + tl.load(frame_ptr + picture) * frame_stride
    out = out_ptr + picture.to(tl.int64) * size * size * 3 + pixel * 3
    _draw(frame, row_stride, low_y, low_x, _STEPS - y1, y1, _STEPS - x1, x1, lut_ptr, out, inside)


@cache
def _line_taps(length: int, side: int, size: int, device: torch.device) -> torch.Tensor:
    return constant(line_taps(length, side, size), device)


@cache
def _steps(size: int, device: torch.device) -> torch.Tensor:
    return constant(steps_of(size), device)


@cache
def _lut(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return (torch.arange(256).float() * (1 / 255)).to(dtype).to(device)


def letterbox(frames_BHWC: torch.Tensor, out_BSSC: torch.Tensor) -> None:
    """Draws B squares; what :func:`crops.letterbox` has checked. ``out_BSSC`` is contiguous."""
    n, height, width = frames_BHWC.shape[:3]
    size, side = out_BSSC.shape[1], max(height, width)
    y, x = (held(_line_taps(length, side, size, out_BSSC.device)) for length in (height, width))
    with torch.cuda.device_of(out_BSSC):  # Triton launches on the current device
        _letterbox_kernel[(triton.cdiv(size * size, BLOCK), n)](
            frames_BHWC,
            frames_BHWC.stride(0),
            frames_BHWC.stride(1),
            y,
            x,
            held(_lut(out_BSSC.dtype, out_BSSC.device)),
            out_BSSC,
            size,
            BLOCK=BLOCK,
        )


def crops(
    frames_BHWC: torch.Tensor, frame_N: torch.Tensor, turned_4N: torch.Tensor, out_NSSC: torch.Tensor
) -> None:
    """Draws N squares; what :func:`crops.crops` has checked. All but the frames are contiguous."""
    size = out_NSSC.shape[1]
    with torch.cuda.device_of(out_NSSC):  # Triton launches on the current device
        _crops_kernel[(triton.cdiv(size * size, BLOCK), len(frame_N))](
            frames_BHWC,
            frames_BHWC.stride(0),
            frames_BHWC.stride(1),
            *frames_BHWC.shape[1:3],
            frame_N.contiguous(),
            turned_4N,
            held(_steps(size, out_NSSC.device)),
            held(_lut(out_NSSC.dtype, out_NSSC.device)),
            out_NSSC,
            size,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
