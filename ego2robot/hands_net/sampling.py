"""Pictures for the networks, cut out of frames as MediaPipe's image-to-tensor step does.

MediaPipe maps the corners of a rotated rectangle to the corners of the network's picture and samples
bilinearly, with the centres of source pixels at whole numbers (``image_to_tensor_converter_opencv.cc``).
So pixel x of a picture of S lies x/S along the rectangle, half a pixel off what torch's grids assume, and
nothing is averaged where the picture is smaller than the rectangle. OpenCV rounds positions to 1/32 pixel and
results to whole numbers. The networks amplify such differences: without that rounding landmarks on the mixer
clip lie 0.28 pixels from MediaPipe's on average, with it 0.05.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


def sound(frames_BHWC: torch.Tensor) -> torch.Tensor:
    """Frames as the rest of this module takes them: uint8 as they are, others float32, those black that hold
    anything that is not finite."""
    if not frames_BHWC.is_floating_point():
        return frames_BHWC
    frames_BHWC = frames_BHWC.to(torch.float32)
    sound_B = frames_BHWC.isfinite().flatten(1).all(1)
    return frames_BHWC.masked_fill(~sound_B[:, None, None, None], 0.0)


def planes(frames_BHWC: torch.Tensor) -> torch.Tensor:
    """Frames of :func:`sound` for :func:`crops`: float32 [3, L, W], contiguous; the frames above one another,
    and below them a black line and lines that hold anything, so that L is a power of two."""
    n_frames, height, width, n_channels = frames_BHWC.shape
    n_lines = n_frames * height
    planes_CLW = frames_BHWC.new_empty((n_channels, 1 << n_lines.bit_length(), width), dtype=torch.float32)
    # One pass; converting first and ordering then takes twice as long.
    planes_CLW[:, :n_lines].unflatten(1, (n_frames, height)).copy_(frames_BHWC.permute(3, 0, 1, 2))
    planes_CLW[:, n_lines].zero_()
    return planes_CLW


def letterbox(frames_BHWC: torch.Tensor, size: int) -> torch.Tensor:
    """Whole frames of :func:`sound` in a square, the rest black: float32 [B, 3, size, size] of 0 to 1,
    ``channels_last``."""
    n_frames, height, width, n_channels = frames_BHWC.shape
    side = max(height, width)
    x, y = (_taps(n, side, size, frames_BHWC.device) for n in (width, height))
    # Columns of a row are told apart by channel, so that pixels are never taken out of their order.
    rows_BHV = frames_BHWC.flatten(2)
    channel = torch.arange(n_channels, device=frames_BHWC.device)
    columns = [(i[:, None] * n_channels + channel).flatten() for i in x.places]
    share_x = [w[:, None].expand(-1, n_channels).flatten() for w in x.shares]
    lines = []
    for places in y.places:
        line_BHV = rows_BHV.index_select(1, places)
        a, b = (line_BHV.gather(2, c.expand(*line_BHV.shape[:2], -1)).to(torch.float32) for c in columns)
        lines.append(a.mul_(share_x[0]).add_(b.mul_(share_x[1])))
    top, bottom = lines
    picture_BHV = top.mul_(y.shares[0][:, None]).add_(bottom.mul_(y.shares[1][:, None]))
    picture_BHV = picture_BHV.round_().mul_(1 / 255)
    margins = (x.before * n_channels, x.behind * n_channels, y.before, y.behind)
    square = F.pad(picture_BHV, margins).view(n_frames, size, size, n_channels)
    return square.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Taps:
    """Between which two pixels of a line each position lies.

    Attributes:
        places: two int64 [n], inside the line.
        shares: two float32 [n], of each pixel in the result; 0 where it would lie outside.
        before: how many positions before these see nothing of the line.
        behind: how many after.
    """

    places: tuple[torch.Tensor, torch.Tensor]
    shares: tuple[torch.Tensor, torch.Tensor]
    before: int
    behind: int


def _taps(length: int, side: int, size: int, device: torch.device) -> _Taps:
    """Of the ``size`` positions along a square of ``side`` pixels around a picture of ``length`` pixels:
    those that see the picture."""
    step = side / size
    before = (side - length) / 2
    first = max(0, math.floor((before - 1) / step) + 1)
    last = min(size, math.ceil((before + length) / step))
    position = ((torch.arange(first, last, device=device) * step - before) * 32).round_().mul_(1 / 32)
    low = position.floor()
    share = position - low
    places, shares = [], []
    for i, w in ((low, 1 - share), (low + 1, share)):
        places.append(i.clamp(0, length - 1).to(torch.int64))
        shares.append(w.masked_fill((i < 0) | (i >= length), 0.0))
    return _Taps((places[0], places[1]), (shares[0], shares[1]), first, size - last)


def crops(
    planes_CLW: torch.Tensor, height: int, frame_N: torch.Tensor, rect_N4: torch.Tensor, size: int
) -> torch.Tensor:
    """Rotated squares out of frames, edges repeated outward.

    Args:
        planes_CLW: of :func:`planes`.
        height: of a frame.
        frame_N: int64, the frame of each square.
        rect_N4: float32, centre x, centre y and side in pixels, clockwise rotation in radians.
        size: pixels of a side of the result.

    Returns:
        float32 [N, 3, size, size] of 0 to 1, ``channels_last``.
    """
    _, n_lines, width = planes_CLW.shape
    steps = torch.arange(size, device=rect_N4.device) / size - 0.5
    centre_x, centre_y, side, rotation = rect_N4.unbind(1)
    along_x = (side * rotation.cos())[:, None] * steps
    along_y = (side * rotation.sin())[:, None] * steps
    x = (centre_x[:, None] + along_x)[:, None, :] - along_y[:, :, None]
    y = (centre_y[:, None] + along_y)[:, None, :] + along_x[:, :, None]
    # In 1/32 pixel. All frames above one another are one picture, so that each square samples the frame it
    # belongs to without a copy of it; clamping first keeps squares out of their frame's neighbours.
    x = x.clamp_(0, width - 1).mul_(32).round_()
    y = y.clamp_(0, height - 1).mul_(32).round_().add_((frame_N * (32 * height))[:, None, None])
    # Both coordinates are planes, not pairs: torch is slow at interleaving. With a power of two of lines the
    # way to shares of them and back is exact, and so the same in a batch of any length.
    grid = torch.stack((_grid(x, width), _grid(y, n_lines)))
    grid_1HW2 = grid.view(1, 2, -1, size).permute(0, 2, 3, 1)
    picture = F.grid_sample(
        planes_CLW[None],
        grid_1HW2,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    picture_BCHW = picture.round_().mul_(1 / 255).view(3, -1, size, size).permute(1, 0, 2, 3)
    return picture_BCHW.contiguous(memory_format=torch.channels_last)


def _grid(place: torch.Tensor, length: int) -> torch.Tensor:
    """1/32 pixels to what ``grid_sample`` takes: -1 to 1 from edge to edge."""
    return place.mul_(1 / (16 * length)).add_(1 / length - 1)
