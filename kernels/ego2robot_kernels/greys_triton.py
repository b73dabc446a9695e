"""Differences of grey pictures, summed per clip in one Triton launch; see :mod:`ego2robot_kernels.greys`.

A program owns some pixels of one clip and walks through time with the last picture in registers, as
``motion_triton`` does: each byte is read once, in words of 16 where addresses allow. Sums are integers, so
their order does not matter. Not yet run or measured on a GPU: it compiles for sm_90, and Triton's interpreter
holds it to the CPU reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ego2robot_kernels.launch import upload

BLOCK = 2048  # pixels a program, 16 a thread: 8 programs for a clip of 90 x 160


@triton.jit
def _difference_kernel(  # type: ignore[no-untyped-def]
    clip_ptr,  # int64 [3, B]: address of the first used picture, bytes to the next, how many
    partial_ptr,  # int64 [B, blocks], sum of |difference| over the program's pixels and all pairs
    words,  # of a picture, ALIGN pixels each
    ALIGN: tl.constexpr,  # all addresses and steps are multiples of it
    BLOCK: tl.constexpr,
):
    clip = tl.program_id(0)
    block = tl.program_id(1)
    n = tl.num_programs(0)
    base = tl.multiple_of(tl.load(clip_ptr + clip).to(tl.pointer_type(tl.uint8)), ALIGN)
    step = tl.multiple_of(tl.load(clip_ptr + n + clip), ALIGN)
    used = tl.load(clip_ptr + 2 * n + clip).to(tl.int32)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < words * ALIGN
    total = tl.zeros([BLOCK], tl.int32)  # at most 255 a pair: good for 8 million pairs
    last = tl.load(base + pixel, mask=inside & (used > 1), other=0).to(tl.int32)
    for i in range(1, used):
        grey = tl.load(base + i * step + pixel, mask=inside, other=0).to(tl.int32)
        total += tl.abs(grey - last)
        last = grey
    sums = tl.sum(total.to(tl.int64), axis=0)
    tl.store(partial_ptr + clip.to(tl.int64) * tl.num_programs(1) + block, sums)


def motion_of(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """The motion of clips whose pictures are all used; see :func:`greys.motion_from_greys`.

    Args:
        clips: uint8 [U_i, h, w], pictures packed, of one size, on one CUDA device (or the CPU, in Triton's
            interpreter).

    Returns:
        float32 [B] on that device, which is not waited for.
    """
    device, pixels = clips[0].device, clips[0].shape[1] * clips[0].shape[2]
    counts = [len(clip) for clip in clips]
    places = [[clip.data_ptr() for clip in clips], [clip.stride(0) for clip in clips]]
    align = 16 if all(v % 16 == 0 for row in places for v in row) and pixels % 16 == 0 else 1
    table = upload([*places, counts], device)
    partial = torch.empty((len(clips), triton.cdiv(pixels, BLOCK)), dtype=torch.int64, device=device)
    with torch.cuda.device_of(clips[0]):  # Triton launches on the current device
        _difference_kernel[tuple(partial.shape)](table, partial, pixels // align, ALIGN=align, BLOCK=BLOCK)
    full_scale = (table[2] - 1).clamp(min=1) * (pixels * 255)
    return (partial.sum(1).double() / full_scale).float()
