"""Decoded surfaces to the frames that every stage shares, and their small grey pictures, in one read.

A decoder leaves a picture as a plane of luma and one of interleaved chroma at half the size: NV12 (8 bits)
or P010/P016 (the high bits of 16). Both are area-averaged where the picture shrinks and interpolated
linearly where it grows, each from where its samples lie, then turned into RGB: what swscale does with
``AREA | FULL_CHR_H_INT``. Everything is integer arithmetic, so that every device gives the same bytes.

Weights along x have 10 fractional bits and weights along y 11, so that the sum over both of 10-bit samples
fits 32 bits without a rounding in between; colour is computed from 8.8 fixed point with 13-bit factors. On
the samples and on made pictures the result differs from swscale's by one level at most, in about 1 % of the
bytes (67 dB and more); on noise at full contrast by two (59 dB).

Bytes that must move for a picture of H x W samples of s bytes: 1.5 H W s read, 3 h w of the frame and its
grey levels (14,400) written: 3.8 MB from 1080p NV12 to 640 x 360.

This file holds the CPU reference, which defines the result; ``surface_triton`` does it on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from ego2robot_kernels.motion import SIZE, grey_small

Matrix = Literal["bt601", "bt709", "bt2020"]
Siting = Literal["left", "center", "topleft"]
X_BITS, Y_BITS, COLOUR_BITS = 10, 11, 13
# ITU-R BT.601-7, BT.709-6, BT.2020-2: the shares of red and blue in luma.
KR_KB = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
# Where the first chroma sample lies, in chroma samples: (down, across). Luma's lies at 0.5.
SITING = {"left": (0.5, 0.25), "center": (0.5, 0.5), "topleft": (0.25, 0.25)}
# A kernel is compiled for each number of taps; rounding up keeps them few where sizes are many.
TAPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Geometry:
    """From a visible picture to its place in a frame; hashable, the same for all surfaces of a call.

    Attributes:
        source: (height, width) of the visible picture, samples of luma.
        frame: (height, width) of the frame.
        content: (top, left, height, width) of the picture in the frame.
        turns: clockwise quarter turns from surface to frame.
        siting: where chroma samples lie.
    """

    source: tuple[int, int]
    frame: tuple[int, int]
    content: tuple[int, int, int, int]
    turns: int
    siting: Siting

    @property
    def scaled(self) -> tuple[int, int]:
        """(height, width) of the scaled picture before it is turned."""
        height, width = self.content[2:]
        return (width, height) if self.turns % 2 else (height, width)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """:func:`area_taps` of luma along y and x, and of chroma along y and x."""
        found = []
        for of_chroma in (False, True):
            for axis, bits in enumerate((Y_BITS, X_BITS)):
                length, target = self.source[axis], self.scaled[axis]
                # As swscale: chroma spans the picture even where luma has an odd row or column less.
                n = -(-length // 2) if of_chroma else length
                found.append(area_taps(n, target, SITING[self.siting][axis] if of_chroma else 0.5, bits))
        return found[0], found[1], found[2], found[3]


def convert_surfaces(
    luma: Sequence[torch.Tensor] | torch.Tensor,
    chroma: Sequence[torch.Tensor] | torch.Tensor,
    *,
    height: int,
    width: int,
    content: tuple[int, int, int, int],
    rotation: int = 0,
    matrix: Matrix,
    full_range: bool,
    crop: tuple[int, int, int, int] | None = None,
    out: torch.Tensor | None = None,
    siting: Siting = "left",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, turns and colours B surfaces of one size and format into frames.

    Args:
        luma: B tensors [H, W], uint8 or uint16 (the value in the high bits, 10 of which count), any row
            stride, columns packed; or one tensor [B, H, W].
        chroma: B tensors [ceil(H / 2), ceil(W / 2), 2], Cb and Cr, of luma's dtype and device, any row
            stride, the rest packed; or one tensor [B, …].
        height, width: of the frame.
        content: (top, left, height, width) where the picture lies in the frame; the rest is black.
        rotation: clockwise degrees from surface to frame: 0, 90, 180 or 270.
        matrix: which luma and chroma the samples are.
        full_range: 0 to 255 rather than 16 to 235 (and their multiples). As in swscale, 255.75 of ten-bit
            full range counts as 255.75 of eight.
        crop: (top, left, height, width) of the visible picture in the surface, top and left even; None: all.
        out: uint8 [B, height, width, 3] to write to, any strides of B and rows, pixels packed.
        siting: where chroma samples lie: left is MPEG-2's, which H.264 and HEVC mean unless they are tagged;
            center is what swscale takes untagged VP9 and AV1 for.

    Returns:
        uint8 RGB [B, height, width, 3] (``out`` where given) and the grey levels uint8 [B, 90, 160] that
        :func:`ego2robot_kernels.motion.grey_small` gives for it; on the device of the surfaces. A GPU is
        not waited for: surfaces must be ready on its current stream and stay until the work there is done.

    Raises:
        ValueError: wrong shapes, dtypes, strides or places, or surfaces that differ in them.
    """
    geometry = _geometry(luma, chroma, (height, width), content, rotation, crop, siting)
    if matrix not in KR_KB:
        raise ValueError(f"matrix is one of {', '.join(KR_KB)}, got {matrix!r}")
    device, n = luma[0].device if len(luma) else torch.device("cpu"), len(luma)
    if out is None:
        out = torch.empty((n, height, width, 3), dtype=torch.uint8, device=device)
    elif out.shape != (n, height, width, 3) or out.dtype != torch.uint8 or out.device != device:
        raise ValueError(
            f"out is uint8 {[n, height, width, 3]} on {device}, got {out.dtype} {list(out.shape)}"
        )
    elif out.stride()[2:] != (3, 1):
        raise ValueError(f"out has packed pixels, got strides {out.stride()}")
    grey_Bhw = torch.empty((n, *SIZE), dtype=torch.uint8, device=device)
    if not n:
        return out, grey_Bhw
    top, left = crop[:2] if crop is not None else (0, 0)
    colour = factors(matrix, full_range)
    if device.type == "cuda":
        from ego2robot_kernels import surface_triton

        surface_triton.convert(luma, chroma, (top, left), geometry, colour, out, grey_Bhw)
        return out, grey_Bhw
    for i in range(n):
        _reference(luma[i].numpy(), chroma[i].numpy(), (top, left), geometry, colour, out[i].numpy())
    grey_Bhw.copy_(torch.from_numpy(grey_small(out).astype(np.uint8)))
    return out, grey_Bhw


def _geometry(
    luma: Sequence[torch.Tensor] | torch.Tensor,
    chroma: Sequence[torch.Tensor] | torch.Tensor,
    frame: tuple[int, int],
    content: tuple[int, int, int, int],
    rotation: int,
    crop: tuple[int, int, int, int] | None,
    siting: Siting,
) -> Geometry:
    if len(luma) != len(chroma):
        raise ValueError(f"{len(luma)} planes of luma and {len(chroma)} of chroma")
    if rotation not in {0, 90, 180, 270}:
        raise ValueError(f"rotation is 0, 90, 180 or 270, got {rotation}")
    if siting not in SITING:
        raise ValueError(f"siting is one of {', '.join(SITING)}, got {siting!r}")
    top, left, high, wide = content
    if min(top, left) < 0 or min(high, wide) < 1 or top + high > frame[0] or left + wide > frame[1]:
        raise ValueError(f"content {content} does not lie in a frame of {frame[0]} x {frame[1]}")
    whole = isinstance(luma, torch.Tensor) and isinstance(chroma, torch.Tensor)
    for y, uv in zip(luma[:1] if whole else luma, chroma[:1] if whole else chroma, strict=True):
        if y.ndim != 2 or y.dtype not in (torch.uint8, torch.uint16) or (y.shape[1] > 1 and y.stride(1) != 1):
            raise ValueError(f"luma is uint8 or uint16 [H, W], columns packed, got {y.dtype} {list(y.shape)}")
        if uv.shape != (-(-y.shape[0] // 2), -(-y.shape[1] // 2), 2) or uv.stride()[1:] != (2, 1):
            raise ValueError(f"chroma of luma {list(y.shape)} is [H / 2, W / 2, 2], got {list(uv.shape)}")
        first = luma[0]
        if (y.shape, y.dtype, y.device) != (first.shape, first.dtype, first.device):
            raise ValueError("surfaces differ in size, dtype or device")
        if max(y.shape) >= 1 << 16 or max(abs(p.stride(0)) * p.shape[0] for p in (y, uv)) >= 1 << 31:
            raise ValueError(f"a surface of {list(y.shape)} with rows {y.stride(0)} apart is too large")
        if (uv.dtype, uv.device) != (y.dtype, y.device):
            raise ValueError(f"chroma is {uv.dtype} on {uv.device}, luma {y.dtype} on {y.device}")
    surface = (luma[0].shape[0], luma[0].shape[1]) if len(luma) else (2, 2)
    y0, x0, visible_height, visible_width = crop if crop is not None else (0, 0, *surface)
    inside = min(y0, x0) >= 0 and y0 + visible_height <= surface[0] and x0 + visible_width <= surface[1]
    if not inside or min(visible_height, visible_width) < 1 or y0 % 2 or x0 % 2:
        raise ValueError(f"crop {crop} is no even place in a surface of {surface[0]} x {surface[1]}")
    return Geometry((visible_height, visible_width), frame, content, rotation // 90, siting)


@lru_cache(maxsize=256)
def area_taps(n: int, target: int, first_at: float, bits: int) -> np.ndarray:
    """Which of ``n`` samples along an axis make up each of ``target`` pixels.

    A pixel is ``n / target`` samples wide. If that is more than one it is the mean over its width, each
    sample standing for the one around it; else it lies on the line between the two next to it. Beyond the
    ends the outermost samples go on.

    Args:
        first_at: where the first sample's middle lies; the picture begins at 0.

    Returns:
        int32 [1 + K, target]: the first sample, at most ``n - K``, and K weights from there on, which add
        up to ``1 << bits``.
    """
    ratio, one = n / target, 1 << bits
    pixel = np.arange(target)[:, None]
    if ratio > 1:
        k = int(np.ceil(ratio)) + 2
        first = np.floor(pixel * ratio - first_at - 0.5).astype(np.int64)
        sample = first + np.arange(k)
        # The share of the pixel up to the end of each sample: rounding it moves edges, no weight is lost.
        share = np.clip((sample + first_at + 0.5 - pixel * ratio) / ratio, 0, 1)
        weight = np.diff(np.rint(share * one), prepend=0, axis=1)
        weight[:, -1] += one - weight.sum(1)
    else:
        at = (pixel + 0.5) * ratio - first_at
        first = np.floor(at).astype(np.int64)
        behind = np.rint((at - first) * one)
        sample, weight = np.concatenate([first, first + 1], 1), np.concatenate([one - behind, behind], 1)
    sample = np.clip(sample, 0, n - 1)
    lowest = np.where(weight > 0, sample, n).min(1)
    needed = int((np.where(weight > 0, sample, 0).max(1) - lowest).max()) + 1
    taps = min(n, next((t for t in TAPS if t >= needed), needed))
    lowest = np.minimum(lowest, n - taps)
    table = np.zeros((1 + taps, target), np.int32)
    table[0] = lowest
    used = weight > 0
    rows = np.where(used, sample - lowest[:, None] + 1, 1)
    np.add.at(table, (rows, np.broadcast_to(pixel, rows.shape)), np.where(used, weight, 0).astype(np.int32))
    return table


@lru_cache(maxsize=8)
def factors(matrix: Matrix, full_range: bool) -> tuple[int, ...]:
    """From Y, Cb, Cr in 8.8 fixed point to R, G, B: nine integers.

    ``R = (y * Y + rv * Cr + r0) >> (8 + COLOUR_BITS)`` and so on, in the order y, rv, gu, gv, bu, r0, g0, b0
    and the shift. Offsets and rounding are in r0, g0, b0.
    """
    kr, kb = KR_KB[matrix]
    kg = 1 - kr - kb
    luma, chroma, black = (1.0, 1.0, 0) if full_range else (255 / 219, 255 / 224, 16)
    one = 1 << COLOUR_BITS
    y = round(luma * one)
    rv, bu = round(chroma * 2 * (1 - kr) * one), round(chroma * 2 * (1 - kb) * one)
    gu, gv = (-round(chroma * 2 * (1 - k) * k / kg * one) for k in (kb, kr))
    half = 1 << (7 + COLOUR_BITS)
    zeros = [half - (y * black + at * 128) * 256 for at in (rv, gu + gv, bu)]
    return y, rv, gu, gv, bu, *zeros, 8 + COLOUR_BITS


def _reference(
    luma_HW: np.ndarray,
    chroma_HW2: np.ndarray,
    origin: tuple[int, int],
    geometry: Geometry,
    colour: tuple[int, ...],
    frame_HWC: np.ndarray,
) -> None:
    top, left = origin
    high, wide = geometry.source
    luma_HW = luma_HW[top : top + high, left : left + wide]
    half = (top // 2, left // 2, -(-high // 2), -(-wide // 2))
    chroma_HW2 = chroma_HW2[half[0] : half[0] + half[2], half[1] : half[1] + half[3]]
    luma_y, luma_x, chroma_y, chroma_x = geometry.tables()
    y = _scaled(luma_HW, luma_y, luma_x)
    cb, cr = (_scaled(chroma_HW2[..., i], chroma_y, chroma_x) for i in (0, 1))
    fy, rv, gu, gv, bu, r0, g0, b0, shift = colour
    luminance = fy * y
    channels = (luminance + rv * cr + r0, luminance + gu * cb + gv * cr + g0, luminance + bu * cb + b0)
    rgb = np.stack([np.clip(c >> shift, 0, 255) for c in channels], -1).astype(np.uint8)
    frame_HWC[:] = 0
    y0, x0, content_height, content_width = geometry.content
    frame_HWC[y0 : y0 + content_height, x0 : x0 + content_width] = np.rot90(rgb, -geometry.turns)


def _scaled(plane_HW: np.ndarray, taps_y: np.ndarray, taps_x: np.ndarray) -> np.ndarray:
    """int32 [target height, target width], 8.8 fixed point."""
    bits = 8
    if plane_HW.dtype == np.uint16:
        plane_HW, bits = plane_HW >> 6, 10
    # Rows first: they are whole, and what is left for the columns is small. No rounding: any order will do.
    rows = np.zeros((taps_y.shape[1], plane_HW.shape[1]), np.int32)
    for k, weight in enumerate(taps_y[1:]):
        rows += plane_HW.take(taps_y[0] + k, axis=0) * weight[:, None]
    total = np.zeros((len(rows), taps_x.shape[1]), np.int32)
    for k, weight in enumerate(taps_x[1:]):
        total += rows.take(taps_x[0] + k, axis=1) * weight
    shift = bits + X_BITS + Y_BITS - 16
    return (total + (1 << (shift - 1))) >> shift
