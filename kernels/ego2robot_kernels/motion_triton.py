"""The motion of clips in one Triton kernel: scale, grey, difference and mean in one pass.

Each program owns some pixels of one clip's small picture and walks through the clip's used frames with
the last grey levels in registers. Every needed source pixel is read once, no picture is written; what is
written is one integer a program. Sums are integers, so the result does not depend on their order.

Clips are given by address, so that clips of many videos need no common tensor. Not yet run or
measured on a GPU: it compiles for sm_90, and Triton's interpreter holds it to the CPU reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ego2robot_kernels.launch import upload
from ego2robot_kernels.motion import GREY_B, GREY_BITS, GREY_G, GREY_R, SIZE, taps

BLOCK = 256  # small pixels a program: 57 programs a clip, two fill the 132 SMs of an H200
_R, _G, _B = (tl.constexpr(v) for v in (GREY_R, GREY_G, GREY_B))
_HALF, _BITS = tl.constexpr(1 << (GREY_BITS - 1)), tl.constexpr(GREY_BITS)


@triton.jit
def _channel(base, p00, p01, p10, p11, a0, a1, b0, b1, inside):  # type: ignore[no-untyped-def]
    """One colour of the small picture, in OpenCV's fixed point (int32)."""
    v00 = tl.load(base + p00, mask=inside, other=0).to(tl.int32)
    v01 = tl.load(base + p01, mask=inside, other=0).to(tl.int32)
    v10 = tl.load(base + p10, mask=inside, other=0).to(tl.int32)
    v11 = tl.load(base + p11, mask=inside, other=0).to(tl.int32)
    top = ((v00 * a0 + v01 * a1) >> 4) * b0 >> 16
    bottom = ((v10 * a0 + v11 * a1) >> 4) * b1 >> 16
    return (top + bottom + 2) >> 2


@triton.jit
def _grey(base, p00, p01, p10, p11, a0, a1, b0, b1, inside):  # type: ignore[no-untyped-def]
    r = _channel(base, p00, p01, p10, p11, a0, a1, b0, b1, inside)
    g = _channel(base + 1, p00, p01, p10, p11, a0, a1, b0, b1, inside)
    b = _channel(base + 2, p00, p01, p10, p11, a0, a1, b0, b1, inside)
    return (r * _R + g * _G + b * _B + _HALF) >> _BITS


@triton.jit
def _motion_kernel(  # type: ignore[no-untyped-def]
    address_ptr,  # int64 [B], of each clip's first used frame
    t_stride_ptr,  # int64 [B], bytes from one used frame to the next
    row_stride_ptr,  # int64 [B], bytes from one row to the next
    used_ptr,  # int32 [B], used frames
    y_ptr,  # int32 [4, height]: taps' rows and weights
    x_ptr,  # int32 [4, width]: taps' columns and weights
    partial_ptr,  # int64 [B, blocks], sum of |difference| over the program's pixels and all pairs
    height,
    width,
    BLOCK: tl.constexpr,
):
    clip = tl.program_id(0)
    block = tl.program_id(1)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    y = pixel // width
    x = pixel % width
    b0 = tl.load(y_ptr + 2 * height + y, mask=inside, other=0)
    b1 = tl.load(y_ptr + 3 * height + y, mask=inside, other=0)
    a0 = tl.load(x_ptr + 2 * width + x, mask=inside, other=0)
    a1 = tl.load(x_ptr + 3 * width + x, mask=inside, other=0)
    # 64-bit offsets: a batch of clips is far beyond 2 GiB.
    row_stride = tl.load(row_stride_ptr + clip)
    row0 = tl.load(y_ptr + y, mask=inside, other=0).to(tl.int64) * row_stride
    row1 = tl.load(y_ptr + height + y, mask=inside, other=0).to(tl.int64) * row_stride
    x0 = tl.load(x_ptr + x, mask=inside, other=0) * 3
    x1 = tl.load(x_ptr + width + x, mask=inside, other=0) * 3
    p00 = row0 + x0
    p01 = row0 + x1
    p10 = row1 + x0
    p11 = row1 + x1
    used = tl.load(used_ptr + clip)
    t_stride = tl.load(t_stride_ptr + clip)
    base = tl.load(address_ptr + clip).to(tl.pointer_type(tl.uint8))
    total = tl.zeros([BLOCK], tl.int32)  # at most 255 a pair: good for 8 million pairs
    if used > 1:
        last = _grey(base, p00, p01, p10, p11, a0, a1, b0, b1, inside)
        for _ in range(1, used):
            base += t_stride
            grey = _grey(base, p00, p01, p10, p11, a0, a1, b0, b1, inside)
            total += tl.abs(grey - last)
            last = grey
    sums = tl.sum(tl.where(inside, total, 0).to(tl.int64), axis=0)
    tl.store(partial_ptr + clip.to(tl.int64) * tl.num_programs(1) + block, sums)


@lru_cache(maxsize=64)
def _taps_on(source: int, target: int, clamp_weight: bool, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(taps(source, target, clamp_weight)).to(device)


def motion_of(clips: Sequence[torch.Tensor], size: tuple[int, int] = SIZE) -> torch.Tensor:
    """The motion of clips whose frames are all used; see :func:`ego2robot_kernels.motion.motion`.

    Args:
        clips: uint8 RGB [U_i, H, W, 3], rows packed, one picture size, one CUDA device (or the CPU,
            in Triton's interpreter).

    Returns:
        float32 [B] on that device.
    """
    device, n = clips[0].device, len(clips)
    source_height, source_width = clips[0].shape[1:3]
    height, width = size
    numbers = [[c.data_ptr() for c in clips], *([c.stride(i) for c in clips] for i in (0, 1))]
    address, t_stride, row_stride, used = upload([*numbers, [len(c) for c in clips]], device)
    blocks = triton.cdiv(height * width, BLOCK)
    partial = torch.empty((n, blocks), dtype=torch.int64, device=device)
    with torch.cuda.device_of(clips[0]):  # Triton launches on the current device
        _motion_kernel[(n, blocks)](
            address,
            t_stride,
            row_stride,
            used.int(),
            _taps_on(source_height, height, False, device),
            _taps_on(source_width, width, True, device),
            partial,
            height,
            width,
            BLOCK=BLOCK,
        )
    full_scale = (used - 1).clamp(min=1) * (height * width * 255)
    return (partial.sum(1).double() / full_scale).float()
