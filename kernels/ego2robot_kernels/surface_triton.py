"""Surfaces to frames and grey levels in one Triton launch; see :mod:`ego2robot_kernels.surface`.

A program draws one tile of a frame, then the grey pixels of the same place. For those it computes the (at
most) four pixels that each needs a second time, a quarter of the work for 640 x 360, out of samples that it
has just read: the surface crosses the memory bus once, and no grey pixel waits for another program. Tiles
without content write black and read nothing. Taps are neighbours in memory, so one address serves a row of
them.

Surfaces are given by address: a decoder's need no common tensor and no copy. Not yet run or measured on a
GPU: it compiles for sm_90, and Triton's interpreter holds it to the CPU reference byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from ego2robot_kernels.launch import constant, held, upload
from ego2robot_kernels.motion import GREY_B, GREY_BITS, GREY_G, GREY_R, SIZE, taps
from ego2robot_kernels.surface import X_BITS, Y_BITS, Geometry

TILE = (8, 128)  # of the frame; a warp writes neighbours in a row
_SHIFT = tl.constexpr(X_BITS + Y_BITS - 8)  # from 8-bit samples times weights to 8.8 fixed point
_SHIFT_DEEP = tl.constexpr(X_BITS + Y_BITS - 6)  # from 10-bit samples
_ROUND, _ROUND_DEEP = tl.constexpr(1 << (_SHIFT.value - 1)), tl.constexpr(1 << (_SHIFT_DEEP.value - 1))
_R, _G, _B = (tl.constexpr(v) for v in (GREY_R, GREY_G, GREY_B))
_HALF, _GREY_BITS = tl.constexpr(1 << (GREY_BITS - 1)), tl.constexpr(GREY_BITS)


@triton.jit
def _rounded(total, DEEP: tl.constexpr):  # type: ignore[no-untyped-def]
    return (total + _ROUND_DEEP) >> _SHIFT_DEEP if DEEP else (total + _ROUND) >> _SHIFT


@triton.jit
def _field(pack, i: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ``i``-th of the 16-bit fields that follow each other, four to a pack."""
    return ((pack >> (16 * (i % 4))) & 65535).to(tl.int32)


@triton.jit
def _area(  # type: ignore[no-untyped-def]
    base, stride, y, x, y_ptr, x_ptr, high, wide, inside, rows, columns, KY: tl.constexpr,
    KX: tl.constexpr, STEP: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """A weighted sum of KY x KX samples, every STEP-th of a row: 8.8 fixed point (int32)."""
    y_pack = tl.load(y_ptr + y, mask=rows, other=0)
    x_start = tl.load(x_ptr + x, mask=columns, other=0)
    # Offsets inside a surface fit 32 bits, and those of taps the instruction that loads them.
    row = base + (_field(y_pack, 0) * stride + _field(x_start, 0) * STEP)
    total = tl.zeros(inside.shape, tl.int32)
    for ky in tl.static_range(KY):
        if (ky + 1) % 4 == 0:
            y_pack = tl.load(y_ptr + (ky + 1) // 4 * high + y, mask=rows, other=0)
        across = tl.zeros(inside.shape, tl.int32)
        x_pack = x_start
        for kx in tl.static_range(KX):
            if (kx + 1) % 4 == 0:
                x_pack = tl.load(x_ptr + (kx + 1) // 4 * wide + x, mask=columns, other=0)
            sample = tl.load(row + kx * STEP, mask=inside, other=0).to(tl.int32)
            if DEEP:
                sample = sample >> 6
            across += sample * _field(x_pack, kx + 1)
        total += across * _field(y_pack, ky + 1)
        row += stride
    return _rounded(total, DEEP)


@triton.jit
def _pair_area(  # type: ignore[no-untyped-def]
    base, stride, y, x, y_ptr, x_ptr, high, wide, inside, rows, columns, KY: tl.constexpr,
    KX: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """:func:`_area` of two interleaved planes whose pairs of samples are read at once."""
    y_pack = tl.load(y_ptr + y, mask=rows, other=0)
    x_start = tl.load(x_ptr + x, mask=columns, other=0)
    row = base + (_field(y_pack, 0) * stride + _field(x_start, 0))
    total_b = tl.zeros(inside.shape, tl.int32)
    total_r = tl.zeros(inside.shape, tl.int32)
    for ky in tl.static_range(KY):
        if (ky + 1) % 4 == 0:
            y_pack = tl.load(y_ptr + (ky + 1) // 4 * high + y, mask=rows, other=0)
        across_b = tl.zeros(inside.shape, tl.int32)
        across_r = tl.zeros(inside.shape, tl.int32)
        x_pack = x_start
        for kx in tl.static_range(KX):
            if (kx + 1) % 4 == 0:
                x_pack = tl.load(x_ptr + (kx + 1) // 4 * wide + x, mask=columns, other=0)
            pair = tl.load(row + kx, mask=inside, other=0).to(tl.int32)
            if DEEP:
                blue = (pair >> 6) & 1023
                red = (pair >> 22) & 1023
            else:
                blue = pair & 255
                red = pair >> 8
            across_b += blue * _field(x_pack, kx + 1)
            across_r += red * _field(x_pack, kx + 1)
        total_b += across_b * _field(y_pack, ky + 1)
        total_r += across_r * _field(y_pack, ky + 1)
        row += stride
    return _rounded(total_b, DEEP), _rounded(total_r, DEEP)


@triton.jit
def _level(value):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(value, 0), 255)


@triton.jit
def _rgb(  # type: ignore[no-untyped-def]
    luma, luma_stride, chroma, chroma_stride, frame_y, frame_x, luma_y, luma_x, chroma_y, chroma_x,
    colour_ptr, top, left, height, width, LY: tl.constexpr, LX: tl.constexpr, CY: tl.constexpr,
    CX: tl.constexpr, TURNS: tl.constexpr, PAIRS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Red, green and blue (int32) of the frame at rows [N, 1], columns [1, M]; black beside the content."""
    y = frame_y - top
    x = frame_x - left
    down = (y >= 0) & (y < height)
    along = (x >= 0) & (x < width)
    inside = down & along
    # Back to the surface, which was turned clockwise.
    if TURNS % 2 == 1:
        high, wide = width, height
        y, x = x, y
        rows, columns = along, down
    else:
        high, wide = height, width
        rows, columns = down, along
    if (TURNS == 1) | (TURNS == 2):
        y = high - 1 - y
    if (TURNS == 2) | (TURNS == 3):
        x = wide - 1 - x
    luminance = _area(
        luma, luma_stride, y, x, luma_y, luma_x, high, wide, inside, rows, columns, LY, LX, 1, DEEP,
    )  # fmt: skip
    if PAIRS:
        cb, cr = _pair_area(
            chroma, chroma_stride, y, x, chroma_y, chroma_x, high, wide, inside, rows, columns, CY, CX,
            DEEP,
        )  # fmt: skip
    else:
        cb = _area(
            chroma, chroma_stride, y, x, chroma_y, chroma_x, high, wide, inside, rows, columns, CY, CX, 2,
            DEEP,
        )  # fmt: skip
        cr = _area(
            chroma + 1, chroma_stride, y, x, chroma_y, chroma_x, high, wide, inside, rows, columns, CY, CX,
            2, DEEP,
        )  # fmt: skip
    shift = tl.load(colour_ptr + 8)
    luminance = luminance * tl.load(colour_ptr)
    red = luminance + cr * tl.load(colour_ptr + 1) + tl.load(colour_ptr + 5)
    green = luminance + cb * tl.load(colour_ptr + 2) + cr * tl.load(colour_ptr + 3) + tl.load(colour_ptr + 6)
    blue = luminance + cb * tl.load(colour_ptr + 4) + tl.load(colour_ptr + 7)
    red = tl.where(inside, _level(red >> shift), 0)
    green = tl.where(inside, _level(green >> shift), 0)
    blue = tl.where(inside, _level(blue >> shift), 0)
    return red, green, blue


@triton.jit
def _small(level, weight_y, weight_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """OpenCV's fixed-point blend of each two rows and columns: int32 [ROWS, COLUMNS] of twice that."""
    across = tl.sum(tl.reshape(level * weight_x, (2 * ROWS, COLUMNS, 2)), axis=2)
    down = ((across >> 4) * weight_y) >> 16
    return (tl.sum(tl.reshape(down, (ROWS, 2, COLUMNS)), axis=1) + 2) >> 2


@triton.jit
def _surface_kernel(  # type: ignore[no-untyped-def]
    surface_ptr,  # int64 [4, B]: address and row stride (samples, or pairs) of luma, then of chroma
    luma_y,  # int64 [.., height of the scaled picture]: area_taps, four fields in each, and so on
    luma_x,
    chroma_y,
    chroma_x,
    colour_ptr,  # int32 [9]: surface.factors
    grey_y,  # int32 [4, grey_height]: motion.taps
    grey_x,  # int32 [4, grey_width]
    out_ptr,  # uint8 [B, frame_height, frame_width, 3], pixels packed
    out_stride,  # bytes from one frame to the next
    out_row_stride,
    grey_ptr,  # uint8 [B, grey_height, grey_width]
    frame_height,
    frame_width,
    top,
    left,
    height,
    width,
    grey_height,
    grey_width,
    tiles_across,
    tiles_down,
    LY: tl.constexpr,
    LX: tl.constexpr,
    CY: tl.constexpr,
    CX: tl.constexpr,
    TURNS: tl.constexpr,
    PAIRS: tl.constexpr,
    DEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GREY_ROWS: tl.constexpr,
    GREY_COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    picture = tl.program_id(1)
    n = tl.num_programs(1)
    tile_y = tile // tiles_across
    tile_x = tile % tiles_across
    luma = tl.load(surface_ptr + picture)
    luma = luma.to(tl.pointer_type(tl.uint16)) if DEEP else luma.to(tl.pointer_type(tl.uint8))
    luma_stride = tl.load(surface_ptr + n + picture).to(tl.int32)
    chroma = tl.load(surface_ptr + 2 * n + picture)
    if PAIRS:
        chroma = chroma.to(tl.pointer_type(tl.uint32)) if DEEP else chroma.to(tl.pointer_type(tl.uint16))
    else:
        chroma = chroma.to(tl.pointer_type(tl.uint16)) if DEEP else chroma.to(tl.pointer_type(tl.uint8))
    chroma_stride = tl.load(surface_ptr + 3 * n + picture).to(tl.int32)

    y = tile_y * ROWS + tl.arange(0, ROWS)[:, None]
    x = tile_x * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    red, green, blue = _rgb(
        luma, luma_stride, chroma, chroma_stride, y, x, luma_y, luma_x, chroma_y, chroma_x, colour_ptr,
        top, left, height, width, LY, LX, CY, CX, TURNS, PAIRS, DEEP,
    )  # fmt: skip
    inside = (y < frame_height) & (x < frame_width)
    pixel = out_ptr + picture.to(tl.int64) * out_stride + (y * out_row_stride + x * 3)
    tl.store(pixel, red.to(tl.uint8), mask=inside)
    tl.store(pixel + 1, green.to(tl.uint8), mask=inside)
    tl.store(pixel + 2, blue.to(tl.uint8), mask=inside)

    # The grey pixels are dealt out to the tiles evenly; each has two rows and two columns of the frame.
    first_y = tile_y * grey_height // tiles_down
    first_x = tile_x * grey_width // tiles_across
    end_y = (tile_y + 1) * grey_height // tiles_down
    end_x = (tile_x + 1) * grey_width // tiles_across
    ry = tl.arange(0, 2 * GREY_ROWS)
    rx = tl.arange(0, 2 * GREY_COLUMNS)
    at_y = first_y + ry // 2
    at_x = first_x + rx // 2
    there_y = at_y < end_y
    there_x = at_x < end_x
    # Beyond the frame is no content, so nothing is read for pixels that are not there.
    y = tl.load(grey_y + (ry % 2) * grey_height + at_y, mask=there_y, other=-1)[:, None]
    x = tl.load(grey_x + (rx % 2) * grey_width + at_x, mask=there_x, other=-1)[None, :]
    weight_y = tl.load(grey_y + (2 + ry % 2) * grey_height + at_y, mask=there_y, other=0)[:, None]
    weight_x = tl.load(grey_x + (2 + rx % 2) * grey_width + at_x, mask=there_x, other=0)[None, :]
    red, green, blue = _rgb(
        luma, luma_stride, chroma, chroma_stride, y, x, luma_y, luma_x, chroma_y, chroma_x, colour_ptr,
        top, left, height, width, LY, LX, CY, CX, TURNS, PAIRS, DEEP,
    )  # fmt: skip
    grey = _small(red, weight_y, weight_x, GREY_ROWS, GREY_COLUMNS) * _R
    grey += _small(green, weight_y, weight_x, GREY_ROWS, GREY_COLUMNS) * _G
    grey += _small(blue, weight_y, weight_x, GREY_ROWS, GREY_COLUMNS) * _B
    grey = (grey + _HALF) >> _GREY_BITS
    at_y = first_y + tl.arange(0, GREY_ROWS)[:, None]
    at_x = first_x + tl.arange(0, GREY_COLUMNS)[None, :]
    grey_at = grey_ptr + picture.to(tl.int64) * grey_height * grey_width + (at_y * grey_width + at_x)
    tl.store(grey_at, grey.to(tl.uint8), mask=(at_y < end_y) & (at_x < end_x))


def packed(table: np.ndarray) -> np.ndarray:
    """:func:`surface.area_taps` with four of its fields, 16 bits each, in one number: a thread gets the first
    sample and up to three weights with one load. int32 [1 + K, n] to int64 [ceil((1 + K) / 4), n]."""
    fields = np.zeros((-(-len(table) // 4) * 4, table.shape[1]), np.uint16)
    fields[: len(table)] = table
    shifts = (16 * np.arange(4, dtype=np.uint64))[:, None]
    return (fields.reshape(-1, 4, table.shape[1]).astype(np.uint64) << shifts).sum(1).view(np.int64)


@lru_cache(maxsize=256)
def _tables(geometry: Geometry, device: torch.device) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...]]:
    """Numbers of taps of luma along y and x, then of chroma; their tables, then OpenCV's of the greys."""
    areas = geometry.tables()
    rows, columns = (
        taps(source, target, across)
        for source, target, across in zip(geometry.frame, SIZE, (False, True), strict=True)
    )
    tables = (*(packed(table) for table in areas), rows, columns)
    return tuple(len(table) - 1 for table in areas), tuple(constant(table, device) for table in tables)


@lru_cache(maxsize=64)
def _factors(colour: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return constant(np.array(colour, np.int32), device)


def convert(
    luma: Sequence[torch.Tensor] | torch.Tensor,
    chroma: Sequence[torch.Tensor] | torch.Tensor,
    origin: tuple[int, int],
    geometry: Geometry,
    colour: tuple[int, ...],
    out_BHWC: torch.Tensor,
    grey_Bhw: torch.Tensor,
) -> None:
    """Draws frames and grey levels; what has been checked by :func:`surface.convert_surfaces`.

    Args:
        origin: (top, left) of the visible picture in the surface, even.
        colour: :func:`surface.factors`.
    """
    n, device = len(luma), out_BHWC.device
    deep = luma[0].dtype == torch.uint16
    size = 2 if deep else 1
    rows = [_places(luma, origin[0], origin[1], size), _places(chroma, origin[0] // 2, origin[1], size)]
    pairs = all(v % (2 * size) == 0 for numbers in rows[1] for v in numbers)
    unit = 2 * size if pairs else size
    strides = [[stride // size for stride in rows[0][1]], [stride // unit for stride in rows[1][1]]]
    surfaces = upload([rows[0][0], strides[0], rows[1][0], strides[1]], device)
    counts, kept = _tables(geometry, device)
    tables = [held(table) for table in kept]
    frame_height, frame_width = geometry.frame
    tiles_down, tiles_across = (triton.cdiv(a, b) for a, b in zip(geometry.frame, TILE, strict=True))
    grey_rows, grey_columns = (
        triton.next_power_of_2(triton.cdiv(a, b))
        for a, b in zip(SIZE, (tiles_down, tiles_across), strict=True)
    )
    with torch.cuda.device_of(out_BHWC):  # Triton launches on the current device
        _surface_kernel[(tiles_across * tiles_down, n)](
            surfaces,
            *tables[:4],
            held(_factors(colour, device)),
            *tables[4:],
            out_BHWC,
            out_BHWC.stride(0),
            out_BHWC.stride(1),
            grey_Bhw,
            frame_height,
            frame_width,
            *geometry.content,
            *SIZE,
            tiles_across,
            tiles_down,
            *counts,
            TURNS=geometry.turns,
            PAIRS=pairs,
            DEEP=deep,
            ROWS=TILE[0],
            COLUMNS=TILE[1],
            GREY_ROWS=grey_rows,
            GREY_COLUMNS=grey_columns,
        )


def _places(
    planes: Sequence[torch.Tensor] | torch.Tensor, row: int, column: int, size: int
) -> tuple[list[int], list[int]]:
    """Addresses of the visible parts and row strides, bytes."""
    if isinstance(planes, torch.Tensor):
        first, step = planes.data_ptr(), planes.stride(0) * size
        stride = planes.stride(1) * size
        places = [(first + i * step, stride) for i in range(len(planes))]
    else:
        places = [(plane.data_ptr(), plane.stride(0) * size) for plane in planes]
    addresses = [at + row * stride + column * size for at, stride in places]
    return addresses, [stride for _, stride in places]
