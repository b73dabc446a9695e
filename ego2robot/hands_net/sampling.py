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

import torch
from torch.nn import functional as F


def planes(frames_BHWC: torch.Tensor) -> torch.Tensor:
    """Frames as the rest of this module takes them.

    Args:
        frames_BHWC: uint8 or floating [B, H, W, 3], values of 0 to 255; those that hold anything that is not
            finite become black.

    Returns:
        float32 [3, B, H, W], contiguous.
    """
    planes_CBHW = frames_BHWC.permute(3, 0, 1, 2).to(torch.float32).contiguous()
    if frames_BHWC.is_floating_point():
        sound_B = planes_CBHW.isfinite().all(3).all(2).all(0)
        planes_CBHW = torch.where(sound_B[:, None, None], planes_CBHW, 0.0)
    return planes_CBHW


def letterbox(planes_CBHW: torch.Tensor, size: int) -> torch.Tensor:
    """Whole frames in a square, the rest black: float32 [B, 3, size, size] of 0 to 1, ``channels_last``."""
    _, n_frames, height, width = planes_CBHW.shape
    side = max(height, width)
    (x, *sides), (y, *ends) = (_inside(n, side, size, planes_CBHW.device) for n in (width, height))
    # Both coordinates are planes, not pairs: torch is slow at interleaving.
    grid = torch.stack((x[None, :].expand(len(y), -1), y[:, None].expand(-1, len(x))))
    grid_BHW2 = grid.permute(1, 2, 0).expand(n_frames, -1, -1, -1)
    return _finish(F.pad(_sample(planes_CBHW.permute(1, 0, 2, 3), grid_BHW2, "zeros"), (*sides, *ends)))


def _inside(length: int, side: int, size: int, device: torch.device) -> tuple[torch.Tensor, int, int]:
    """Of the ``size`` positions along a square of ``side`` pixels around a picture of ``length`` pixels:
    those that see the picture, as :func:`_grid` gives them, and how many lie before and behind it."""
    step = side / size
    before = (side - length) / 2
    first = max(0, math.floor((before - 1) / step) + 1)
    last = min(size, math.ceil((before + length) / step))
    positions = torch.arange(first, last, device=device) * step - before
    return _grid(positions, length), first, size - last


def crops(planes_CBHW: torch.Tensor, frame_N: torch.Tensor, rect_N4: torch.Tensor, size: int) -> torch.Tensor:
    """Rotated squares out of frames, edges repeated outward.

    Args:
        planes_CBHW: of :func:`planes`.
        frame_N: int64, the frame of each square.
        rect_N4: float32, centre x, centre y and side in pixels, clockwise rotation in radians.
        size: pixels of a side of the result.

    Returns:
        float32 [N, 3, size, size] of 0 to 1, ``channels_last``.
    """
    _, n_frames, height, width = planes_CBHW.shape
    steps = torch.arange(size, device=rect_N4.device) / size - 0.5
    centre_x, centre_y, side, rotation = rect_N4.unbind(1)
    along_x = (side * rotation.cos())[:, None] * steps
    along_y = (side * rotation.sin())[:, None] * steps
    x = (centre_x[:, None] + along_x)[:, None, :] - along_y[:, :, None]
    y = (centre_y[:, None] + along_y)[:, None, :] + along_x[:, :, None]
    # All frames above one another are one picture, so that each square samples the frame it belongs to
    # without a copy of it. Clamping first keeps squares out of their frame's neighbours.
    y = y.clamp_(0, height - 1).add_((frame_N * height)[:, None, None])
    grid = torch.stack((_grid(x.clamp_(0, width - 1), width), _grid(y, n_frames * height)))
    grid_1HW2 = grid.view(1, 2, -1, size).permute(0, 2, 3, 1)
    picture = _sample(planes_CBHW.view(1, 3, n_frames * height, width), grid_1HW2, "border")
    return _finish(picture.view(3, -1, size, size).permute(1, 0, 2, 3))


def _grid(pixel: torch.Tensor, length: int) -> torch.Tensor:
    """Pixels, rounded to 1/32, to what ``grid_sample`` takes: -1 to 1 from edge to edge."""
    return (pixel * 32).round_().mul_(1 / (16 * length)).add_(1 / length - 1)


def _sample(planes_BCHW: torch.Tensor, grid_BHW2: torch.Tensor, outside: str) -> torch.Tensor:
    return F.grid_sample(planes_BCHW, grid_BHW2, mode="bilinear", padding_mode=outside, align_corners=False)


def _finish(picture_BCHW: torch.Tensor) -> torch.Tensor:
    return picture_BCHW.round().mul_(1 / 255).contiguous(memory_format=torch.channels_last)
