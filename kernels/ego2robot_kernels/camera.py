"""How the camera moved between the small grey pictures of a clip: one similarity per pair of neighbours.

First-person video moves mostly because the head does. Between two pictures the scene as a whole is taken to
shift, grow and turn (a similarity); hands are left out where boxes say so, and what else moves by itself is
outvoted. A regular grid that fills the picture may be followed to its next line.

Phase correlation on a windowed, band-limited spectrum (Kuglin and Hines 1975) with the parabola's top
between pixels gives shifts of up to half a picture; the likeliest start is refined by inverse-compositional
Gauss-Newton steps (Baker and Matthews 2004) with Tukey's weights on a pyramid.

All of it is batched over pairs in torch and runs where the pictures are. On a CPU each clip is computed by
itself, which fits its caches and keeps a clip's result from depending on its batch; that is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from ego2robot_kernels.motion import GREY_B, GREY_BITS, GREY_G, GREY_R, SIZE, grey_small, taps

Content = tuple[float, float, float, float]

PAIRS = 1024  # on a device at a time: about 0.4 GB
CHUNK = 9  # pairs of whole pictures on a CPU at a time: fits its caches, asks for no fresh memory
# What is looked at, as standard deviations of Gaussians in pixels of the small picture: what is finer is
# mostly aliasing of the coarse resize, what is coarser is light and vignette.
FINEST, COARSEST = 1.2, 6.0
BAND = (0.02, 0.22)  # cycles per pixel of the half picture that phase correlation listens to
CONTRAST = 3.0  # grey levels: texture stronger than this counts no more for it, so that no edge rules
NOISE = 0.25  # of the texture that is left: so much is taken for noise
HAND_MARGIN = 0.15  # of a hand's box, left out around it
FAR = 0.05  # of the correlation: what a start half a picture away has to be better by than one at rest
OVERLAP = 0.25  # of the first picture: with less in common, the less is believed
OPEN = 0.5  # pixels: a shift whose standard error is this in some direction is half believed
COARSE_STEPS, FINE_STEPS = 4, 2
TUKEY = 4.685  # standard deviations; 95 % efficient on Gaussian residuals (Holland and Welsch 1977)
MAX_LOG_SCALE, MAX_ROLL = 0.4, 0.6  # of a step that is believed


@dataclass(frozen=True)
class CameraMotion:
    """The similarities of P pairs: what is at ``p`` in one picture is in the next at
    ``middle + s R (p - middle) + shift``, ``middle`` being that of the picture.

    Attributes:
        shift: float32 [P, 2], dx to the right and dy down, pixels of the small picture.
        log_scale: float32 [P], natural logarithm of s: positive when the camera comes nearer.
        roll: float32 [P], radians, R's angle: positive when the scene turns clockwise on the screen.
        confidence: float32 [P], 0 to 1: correlation of the two pictures, without their slow parts and the
            hands, after compensation; less where their texture leaves a direction open. Unrelated pictures
            come to about 0.2, pictures without texture to 0.
    """

    shift: torch.Tensor
    log_scale: torch.Tensor
    roll: torch.Tensor
    confidence: torch.Tensor

    def __len__(self) -> int:
        return len(self.shift)


def small_greys(frames_THWC: torch.Tensor, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """uint8 RGB [T, H, W, 3] to grey levels uint8 [T, *size] on its device: those of the motion score."""
    if not len(frames_THWC):
        return torch.zeros(0, *size, dtype=torch.uint8, device=frames_THWC.device)
    if not frames_THWC.is_cuda:
        return torch.from_numpy(grey_small(frames_THWC, size).astype(np.uint8))
    return _small_greys(frames_THWC, size)


def _small_greys(frames_THWC: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The integers of :func:`ego2robot_kernels.motion.grey_small`, on any device."""
    height, width = frames_THWC.shape[1:3]
    rows, columns = (
        torch.from_numpy(taps(*lengths)).to(frames_THWC.device)
        for lengths in ((height, size[0], False), (width, size[1], True))
    )
    sums = torch.zeros((), dtype=torch.int32, device=frames_THWC.device)
    for row, row_weight in zip(rows[:2], rows[2:], strict=True):
        picked = frames_THWC[:, row.long()]
        across = torch.zeros((), dtype=torch.int32, device=frames_THWC.device)
        for column, weight in zip(columns[:2], columns[2:], strict=True):
            across = across + picked[:, :, column.long()].int() * weight[:, None]
        sums = sums + (((across >> 4) * row_weight[:, None, None]) >> 16)
    red, green, blue = ((sums + 2) >> 2).unbind(-1)
    grey = red * GREY_R + green * GREY_G + blue * GREY_B + (1 << (GREY_BITS - 1))
    return (grey >> GREY_BITS).to(torch.uint8)


def camera_motion(
    greys_BThw: torch.Tensor | Sequence[torch.Tensor],
    hands_BTK4: Sequence[torch.Tensor | None] | None = None,
    content_B4: Sequence[Content] | None = None,
    pixel_aspect: float = 1.0,
) -> list[CameraMotion]:
    """The motion of the camera from each picture to the next of its clip.

    Args:
        greys_BThw: [B, T, h, w] or B tensors [T_i, h, w], uint8 or float, 0 to 255, of one size and device.
        hands_BTK4: per clip None or float [T_i, K, 4], boxes to leave out (x_min, y_min, x_max, y_max,
            shares of the picture); an empty or NaN box is none.
        content_B4: per clip (top, left, height, width) of what is not black bar, pixels of the small
            picture, fractions allowed; None: all of it.
        pixel_aspect: width over height of a pixel of the small picture.

    Returns:
        For each clip the T_i - 1 motions (none for fewer than two pictures), on the device of the pictures.
        Pictures without texture give no motion and no confidence.

    Raises:
        ValueError: wrong shapes, mixed sizes or devices, lists of different lengths, or no content.
    """
    clips = list(greys_BThw)
    hands = [None] * len(clips) if hands_BTK4 is None else list(hands_BTK4)
    if len(hands) != len(clips) or (content_B4 is not None and len(content_B4) != len(clips)):
        raise ValueError(f"{len(clips)} clips with hands or content of another number of clips")
    for clip, boxes in zip(clips, hands, strict=True):
        if clip.ndim != 3 or clip.shape[1:] != clips[0].shape[1:] or clip.device != clips[0].device:
            raise ValueError(f"greys are [T, h, w] of one size and device, got {list(clip.shape)}")
        if min(clip.shape[1:]) < 16:
            raise ValueError(f"pictures of {list(clip.shape[1:])} are too small, 16 x 16 at least")
        if boxes is not None and (boxes.ndim != 3 or boxes.shape[0] != len(clip) or boxes.shape[2] != 4):
            raise ValueError(f"boxes are [T, K, 4] with the clip's T, got {list(boxes.shape)}")
    contents = [(0, 0, *clip.shape[1:]) for clip in clips] if content_B4 is None else content_B4
    found: list[CameraMotion] = []
    for group in _groups(clips):
        some = [clips[i] for i in group]
        masks = [_mask(clips[i], hands[i], contents[i]) for i in group]
        motion = _motion_of(some, masks, [contents[i] for i in group], pixel_aspect)
        lengths = [max(len(clip) - 1, 0) for clip in some]
        fields = (motion.shift, motion.log_scale, motion.roll, motion.confidence)
        parts = zip(*(field.split(lengths) for field in fields), strict=True)
        found += [CameraMotion(*part) for part in parts]
    return found


def compensated_difference(
    greys_Thw: torch.Tensor,
    motion: CameraMotion,
    content: Content | None = None,
    pixel_aspect: float = 1.0,
) -> torch.Tensor:
    """What still differs between neighbouring pictures when the second is laid over the first.

    Args:
        greys_Thw: uint8 or float [T, h, w], one clip.
        motion: of its T - 1 pairs.
        content, pixel_aspect: as for :func:`camera_motion`.

    Returns:
        float32 [T - 1]: mean |difference| over the content that both show, share of full scale, or that of
        the pictures as they are where it is less: between pixels, sharp texture is known only roughly, and
        a shift of next to nothing must not add to the difference.

    Raises:
        ValueError: the number of motions is not that of the pairs.
    """
    if len(motion) != max(len(greys_Thw) - 1, 0):
        raise ValueError(f"{len(motion)} motions for {len(greys_Thw)} pictures")
    if not len(motion):
        return torch.zeros(0, device=greys_Thw.device)
    content = content or (0, 0, *greys_Thw.shape[1:])
    size = (greys_Thw.shape[1], greys_Thw.shape[2])
    rows, columns = _inside(size, content)
    out = []
    for first in range(0, len(motion), PAIRS):
        pairs = slice(first, first + PAIRS)
        pictures = greys_Thw[first : first + PAIRS + 1].float()
        grid = _grid(size, 1, pixel_aspect, greys_Thw.device)
        where = grid.warped(*_similarity(motion, pairs, pixel_aspect))
        cut = (slice(None), rows, columns)
        there = _bilinear(pictures[1:, None], where[cut])[:, 0]
        # Of the second picture only what is inside with all four neighbours; at rest that is everything.
        both = torch.ones_like(there, dtype=torch.bool)
        for axis, part, length in ((0, columns, size[1]), (1, rows, size[0])):
            at = where[cut][..., axis]
            slack = 2e-3 / length  # rounding must not cost a row
            both &= at >= (2 * part.start + 1) / length - 1 - slack
            both &= at <= (2 * part.stop - 1) / length - 1 + slack
        difference = (there - pictures[:-1][cut]).abs() * both
        count = both.sum((1, 2))
        compensated = difference.sum((1, 2)) / count.clamp(min=1)
        at_rest = (pictures[1:][cut] - pictures[:-1][cut]).abs().mean((1, 2))
        out.append(torch.where(count > 0, torch.minimum(compensated, at_rest), at_rest) / 255)
    return torch.cat(out)


def _groups(clips: Sequence[torch.Tensor]) -> list[list[int]]:
    """Which clips are computed together: one on a CPU, about ``PAIRS`` pairs' worth on a device."""
    groups: list[list[int]] = []
    pairs = 0
    for index, clip in enumerate(clips):
        if not groups or not clip.is_cuda or pairs + len(clip) > PAIRS:
            groups.append([])
            pairs = 0
        groups[-1].append(index)
        pairs += len(clip)
    return groups


def _inside(size: tuple[int, int], content: Content) -> tuple[slice, slice]:
    """Rows and columns that show nothing but content."""
    top, left, height, width = content
    rows = slice(max(0, int(np.ceil(top - 1e-6))), min(size[0], int(np.floor(top + height + 1e-6))))
    columns = slice(max(0, int(np.ceil(left - 1e-6))), min(size[1], int(np.floor(left + width + 1e-6))))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        raise ValueError(f"content {content} leaves nothing of a picture of {list(size)}")
    return rows, columns


def _mask(greys_Thw: torch.Tensor, hands_TK4: torch.Tensor | None, content: Content) -> torch.Tensor:
    """float32 [T, h // 2, w // 2]: 1 where a half-size pixel is all content and no hand."""
    height, width = greys_Thw.shape[1] // 2, greys_Thw.shape[2] // 2
    rows, columns = _inside((greys_Thw.shape[1], greys_Thw.shape[2]), content)
    mask = torch.zeros(len(greys_Thw), height, width, device=greys_Thw.device)
    mask[:, -(-rows.start // 2) : rows.stop // 2, -(-columns.start // 2) : columns.stop // 2] = 1
    if hands_TK4 is None or not hands_TK4.shape[1]:
        return mask
    low, high = hands_TK4.to(mask).split(2, -1)
    margin = HAND_MARGIN * (high - low)
    low, high = low - margin, high + margin
    x = (torch.arange(width, device=mask.device) + 0.5) / width
    y = (torch.arange(height, device=mask.device) + 0.5) / height
    across = (x >= low[..., :1]) & (x <= high[..., :1])
    down = (y >= low[..., 1:]) & (y <= high[..., 1:])
    hidden = (down[..., None] & across[:, :, None]).any(1)
    return mask.masked_fill_(hidden, 0)


class _Grid:
    """Pixel centres of a picture reduced ``factor`` times, seen from its middle.

    Similarities are complex numbers, p to ``turn`` p + ``shift``: real to the right, imaginary down, both in
    heights of a small picture's pixel.
    """

    def __init__(self, size: tuple[int, int], factor: int, aspect: float, device: torch.device) -> None:
        self.size = size
        self.height, self.width = size[0] * factor, size[1] * factor * aspect
        y = (torch.arange(size[0], device=device) + 0.5) * factor - self.height / 2
        x = (torch.arange(size[1], device=device) + 0.5) * (factor * aspect) - self.width / 2
        y, x = (place.reshape(-1) for place in torch.meshgrid(y, x, indexing="ij"))
        self.powers = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])  # [6, h * w]

    def warped(self, turn_P: torch.Tensor, shift_P: torch.Tensor) -> torch.Tensor:
        """float32 [P, h, w, 2]: where in the other picture each pixel is, -1 to 1 from edge to edge."""
        to_x = torch.stack([shift_P.real, turn_P.real, -turn_P.imag], 1) * (2 / self.width)
        to_y = torch.stack([shift_P.imag, turn_P.imag, turn_P.real], 1) * (2 / self.height)
        where = torch.stack([to_x, to_y], 1).reshape(-1, 3) @ self.powers[:3]
        return where.reshape(-1, 2, *self.size).permute(0, 2, 3, 1)


@lru_cache(maxsize=16)
def _grid(size: tuple[int, int], factor: int, aspect: float, device: torch.device) -> _Grid:
    return _Grid(size, factor, aspect, device)


def _bilinear(pictures_PChw: torch.Tensor, grid_Phw2: torch.Tensor) -> torch.Tensor:
    """float32 [P, C, h, w]: the pictures where the grid says, zero outside."""
    return functional.grid_sample(pictures_PChw, grid_Phw2, mode="bilinear", align_corners=False)


def _similarity(motion: CameraMotion, pairs: slice, aspect: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn (s R) and shift of :class:`_Grid`, complex64 [P]."""
    turn = torch.polar(motion.log_scale[pairs].exp(), motion.roll[pairs])
    return turn, torch.complex(motion.shift[pairs, 0] * aspect, motion.shift[pairs, 1])


@lru_cache(maxsize=64)
def _smoothing(n: int, source: int, sigma: float, start: int, stop: int) -> torch.Tensor:
    """float32 [n, source]: row i is a Gaussian about its place over ``start`` to ``stop`` alone, its sum 1.

    ``start`` and ``stop`` count source pixels, ``sigma`` pixels of the small picture.
    """
    at = (np.arange(source) + 0.5) * (2 * n / source)
    far = (2 * np.arange(n)[:, None] + 1 - at) / sigma
    inside = np.arange(source)
    weight = np.exp(-0.5 * far**2) * ((inside >= start) & (inside < stop))
    weight /= np.maximum(weight.sum(1, keepdims=True), 1e-12)
    return torch.from_numpy(weight.astype(np.float32))


@lru_cache(maxsize=64)
def _window(n: int, start: int, stop: int) -> np.ndarray:
    """float32 [n]: rises over a quarter of ``start`` to ``stop`` at either end as a cosine does (Tukey)."""
    share = (np.arange(n) + 0.5 - start) / max(stop - start, 1)
    edge = np.clip(np.minimum(share, 1 - share) / 0.25, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * edge)).astype(np.float32)


@lru_cache(maxsize=8)
def _band(height: int, width: int) -> np.ndarray:
    """float32 [h, w // 2 + 1]: how much each frequency counts, a difference of Gaussians."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    f2 = fy * fy + fx * fx
    low, high = BAND
    return (np.exp(-0.5 * f2 / high**2) * (1 - np.exp(-0.5 * f2 / low**2))).astype(np.float32)


def _motion_of(
    clips: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    contents: Sequence[Content],
    aspect: float,
) -> CameraMotion:
    """Of all pairs of neighbours in ``clips``, in order."""
    device = clips[0].device
    lengths = [len(clip) for clip in clips]
    if sum(lengths) <= len(lengths):
        empty = torch.zeros(0, device=device)
        return CameraMotion(torch.zeros(0, 2, device=device), empty, empty, empty)
    first: torch.Tensor | slice
    second: torch.Tensor | slice
    if len(clips) == 1:
        first, second = _ALL_BUT_LAST, _ALL_BUT_FIRST  # views, no copies
    else:
        starts = np.repeat(np.cumsum([0, *lengths[:-1]]), [max(n - 1, 0) for n in lengths])
        within = np.concatenate([np.arange(max(n - 1, 0)) for n in lengths])
        index = torch.from_numpy((starts + within).astype(np.int64)).to(device)
        first, second = index, index + 1
    textures = [_texture(clip, content) for clip, content in zip(clips, contents, strict=True)]
    half_N, slow_N, gain_N = (torch.cat(parts) for parts in zip(*textures, strict=True))
    mask_N = torch.cat(list(masks))
    half_N = half_N * mask_N
    coarse = _Level(*_halved(half_N, mask_N), first, second, 4, aspect)
    fine = _Level(half_N, mask_N, first, second, 2, aspect)

    spectrum = torch.fft.rfft2(half_N * _windows(clips, contents))
    start, at_start = coarse.best(_starts(spectrum[first].conj() * spectrum[second], fine.size, aspect))
    turn, shift = torch.ones_like(start), start
    for _ in range(COARSE_STEPS):
        turn, shift = coarse.step(turn, shift)
    # Steps that led astray are taken back.
    better = coarse.agreement(turn, shift) >= at_start
    turn, shift = torch.where(better, turn, torch.ones_like(turn)), torch.where(better, shift, start)
    for _ in range(FINE_STEPS):
        turn, shift = fine.step(turn, shift)
    confidence, weight = fine.judged(turn, shift)
    # One step on all pixels, of those that were seen to move with the scene, halves what error is left.
    weight = (weight * gain_N[first].square())[:, None]
    parts = []
    per_chunk = CHUNK if len(clips) == 1 and device.type != "cuda" else len(turn)
    for at in range(0, len(turn), per_chunk):
        chunk = slice(at, at + per_chunk)
        if len(clips) == 1:
            shown = slice(at, at + per_chunk + 1)
            full = _less_slow(clips[0][shown], slow_N[shown])
        else:
            full = torch.cat([_less_slow(*both) for both in zip(clips, slow_N.split(lengths), strict=True)])
        level = _Level(full, None, first, second, 1, aspect)
        everywhere = functional.interpolate(weight[chunk], scale_factor=2)[:, 0]
        parts.append(level.step(turn[chunk], shift[chunk], everywhere))
    turn, shift = (torch.cat(part) for part in zip(*parts, strict=True))
    moved = confidence > 0
    turn = torch.where(moved, turn, torch.ones_like(turn))
    shift = torch.where(moved, shift, torch.zeros_like(shift))
    return CameraMotion(
        torch.stack([shift.real / aspect, shift.imag], -1), turn.abs().log(), turn.angle(), confidence
    )


def _texture(greys_Thw: torch.Tensor, content: Content) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pictures half as high and wide, less their own smoothed selves, by their own contrast.

    Returns:
        float32 [T, h // 2, w // 2] each: that texture, what was taken off in grey levels, and by what the
        rest was multiplied.
    """
    size = (greys_Thw.shape[1], greys_Thw.shape[2])
    ranges = [(r.start, r.stop) for r in _inside(size, content)]
    halves = [(-(-start // 2), stop // 2) for start, stop in ranges]

    # Rows first, [h, T, w]: one multiplication for all pictures along either axis.
    tall = greys_Thw.transpose(0, 1).contiguous().float()

    def smoothed(tall: torch.Tensor, sigma: float) -> torch.Tensor:
        parts = ranges if tall.shape[0] == size[0] else halves
        down, across = (
            _smoothing(n // 2, source, sigma, *part).to(tall.device)
            for n, source, part in zip(size, (tall.shape[0], tall.shape[2]), parts, strict=True)
        )
        return (down @ tall.flatten(1)).reshape(len(down), *tall.shape[1:]) @ across.T

    half = smoothed(tall, FINEST)
    slow = smoothed(half, COARSEST)
    texture = half - slow
    gain = (smoothed(texture * texture, COARSEST) + CONTRAST**2).rsqrt()
    by_picture = torch.stack([texture * gain, slow, gain]).transpose(1, 2).contiguous()
    return by_picture[0], by_picture[1], by_picture[2]


def _less_slow(greys_Thw: torch.Tensor, slow_Thw: torch.Tensor) -> torch.Tensor:
    """The pictures, but for an odd last row or column, less what :func:`_texture` takes off."""
    slow = functional.interpolate(slow_Thw[:, None], scale_factor=2)[:, 0]
    return greys_Thw[:, : slow.shape[1], : slow.shape[2]] - slow


def _halved(texture: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half as high and wide, hidden pixels left out of the means."""
    share = functional.avg_pool2d(mask[:, None], 2)[:, 0]
    small = functional.avg_pool2d(texture[:, None], 2)[:, 0]
    return small / share.clamp(min=0.25), (share > 0.49).float()


def _windows(clips: Sequence[torch.Tensor], contents: Sequence[Content]) -> torch.Tensor:
    """float32 [N, h // 2, w // 2]: fades each picture out towards the edges of its content."""
    windows = []
    for clip, content in zip(clips, contents, strict=True):
        size = (clip.shape[1], clip.shape[2])
        down, across = (
            _window(n // 2, -(-part.start // 2), part.stop // 2)
            for n, part in zip(size, _inside(size, content), strict=True)
        )
        windows.append(torch.from_numpy(down[:, None] * across).to(clip.device).expand(len(clip), -1, -1))
    return windows[0] if len(windows) == 1 else torch.cat(windows)


def _starts(cross_Phf: torch.Tensor, size: tuple[int, int], aspect: float) -> torch.Tensor:
    """complex64 [P, 3]: shifts worth a look, in the grid's units: none, and two peaks of phase correlation.

    ``cross_Phf`` are the cross spectra of half pictures of ``size``.
    """
    height, width = size
    band = torch.from_numpy(_band(height, width)).to(cross_Phf.device)
    surface = torch.fft.irfft2(cross_Phf * (band / (cross_Phf.abs() + 1e-3)), s=size)
    starts = [torch.zeros(len(surface), dtype=torch.complex64, device=surface.device)]
    rows = torch.arange(height, device=surface.device)
    columns = torch.arange(width, device=surface.device)
    for _ in range(2):
        peak = surface.flatten(1).argmax(1)
        y, x = peak // width, peak % width
        sub_x = _summit(surface, y, x, 0, 1)
        sub_y = _summit(surface, y, x, 1, 0)
        dx = _signed(x, width) + sub_x
        dy = _signed(y, height) + sub_y
        starts.append(torch.complex(2 * aspect * dx, 2 * dy))
        near = _around(rows, y, height)[:, :, None] & _around(columns, x, width)[:, None]
        surface = surface.masked_fill(near, float("-inf"))
    return torch.stack(starts, 1)


def _summit(surface: torch.Tensor, y: torch.Tensor, x: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Where, from a highest pixel, the parabola through it and its neighbours has its top: -0.5 to 0.5."""
    pair = torch.arange(len(y), device=y.device)
    height, width = surface.shape[1:]
    before, here, after = (surface[pair, (y + k * dy) % height, (x + k * dx) % width] for k in (-1, 0, 1))
    bend = 2 * here - before - after
    top = torch.where(bend > 0, 0.5 * (after - before) / bend, torch.zeros_like(bend))
    return torch.nan_to_num(top).clamp(-0.5, 0.5)


def _signed(at: torch.Tensor, length: int) -> torch.Tensor:
    return torch.where(at > length // 2, at - length, at).float()


def _around(axis: torch.Tensor, at_P: torch.Tensor, length: int) -> torch.Tensor:
    """bool [P, length]: within two of ``at`` on a ring."""
    away = (axis - at_P[:, None]).abs()
    return torch.minimum(away, length - away) <= 2


class _Level:
    """Pairs of pictures of one size, and the steps that bring the second onto the first.

    Args:
        mask_Nhw: 1 where a picture is to be looked at; None: :meth:`step` is told.
    """

    def __init__(
        self,
        pictures_Nhw: torch.Tensor,
        mask_Nhw: torch.Tensor | None,
        first: torch.Tensor | slice,
        second: torch.Tensor | slice,
        factor: int,
        aspect: float,
    ) -> None:
        self.size = (pictures_Nhw.shape[1], pictures_Nhw.shape[2])
        self.grid = _grid(self.size, factor, aspect, pictures_Nhw.device)
        self.factor = factor
        padded = functional.pad(pictures_Nhw[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        if mask_Nhw is None:
            # A little smooth: straight lines between pixels are then nearly true.
            across = padded[..., :-2] + padded[..., 2:] + 2 * padded[..., 1:-1]
            pictures_Nhw = (across[:, :-2] + across[:, 2:] + 2 * across[:, 1:-1]) * (1 / 16)
            padded = functional.pad(pictures_Nhw[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
            self.there = pictures_Nhw[second][:, None]
        else:
            # Masks travel with the pictures: what leaves the picture or meets a hand has weight 0.
            self.there = torch.stack([pictures_Nhw, mask_Nhw], 1)[second]
            self.weight = _without_rim(mask_Nhw)[first]
        self.here = pictures_Nhw[first]
        # By how much each pixel changes per unit of shift to the right and down.
        padded = padded[first]
        self.gx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) * (0.5 / (factor * aspect))
        self.gy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) * (0.5 / factor)

    def _laid_over(self, turn: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The second picture as the first's camera would have seen it, and where both are to be seen."""
        moved, seen = _bilinear(self.there, self.grid.warped(turn, shift)).unbind(1)
        return moved, (seen + 0.01).floor() * self.weight

    def best(self, starts_PK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of several shifts the one after which the pictures agree most, and how much; far ones must be
        better."""
        turn = torch.ones_like(starts_PK[:, 0])
        agreements = torch.stack([self.agreement(turn, shift) for shift in starts_PK.unbind(1)], 1)
        choice = (agreements - 2 * FAR / self.grid.width * starts_PK.abs()).argmax(1, keepdim=True)
        return starts_PK.gather(1, choice)[:, 0], agreements.gather(1, choice)[:, 0]

    def agreement(self, turn: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """float32 [P]: correlation of the two pictures where both are seen."""
        return self._agreement(*self._laid_over(turn, shift))[0]

    def _agreement(self, moved: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The correlation, and the mean square of what differs, noise included.

        Noise counts as texture that never agrees; a small overlap that fits proves little.
        """
        count = weight.sum((1, 2)).clamp(min=1)
        a, b = weight * self.here, weight * moved
        mean_a, mean_b = a.sum((1, 2)) / count, b.sum((1, 2)) / count
        aa = (a * self.here).sum((1, 2)) / count - mean_a**2
        bb = (b * moved).sum((1, 2)) / count - mean_b**2
        ab = (a * moved).sum((1, 2)) / count - mean_a * mean_b
        agreement = ab / ((aa.clamp(min=0) + NOISE**2) * (bb.clamp(min=0) + NOISE**2)).sqrt()
        overlap = count / self.weight.sum((1, 2)).clamp(min=1)
        return agreement * (overlap / OVERLAP).clamp(max=1), (aa + bb - 2 * ab).clamp(min=0) + NOISE**2

    def judged(self, turn: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Confidence, float32 [P], and how much each pixel is believed to move with the scene [P, h, w]."""
        moved, weight = self._laid_over(turn, shift)
        agreement, noise = self._agreement(moved, weight)
        xx, yy, xy = (
            (weight * a * b).sum((1, 2))
            for a, b in ((self.gx, self.gx), (self.gy, self.gy), (self.gx, self.gy))
        )
        weakest = 0.5 * (xx + yy - ((xx - yy) ** 2 + 4 * xy * xy).sqrt())
        # Neighbouring pixels share what they differ by: about a ninth of them are witnesses.
        error = (9 * noise / weakest.clamp(min=1e-9)).sqrt()
        confidence = agreement.clamp(0, 1) / (1 + (error / OPEN) ** 2)
        return confidence, self._tukey(moved - self.here, weight)

    def _tukey(self, off: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` where ``off`` is no outlier."""
        # The spread is judged from a ninth of the pixels: a median needs no more, and costs as it sorts.
        some = off.flatten(1)[:, ::9].abs().where(weight.flatten(1)[:, ::9] > 0, _NAN)
        spread = 1.4826 * torch.nan_to_num(some.nanmedian(1).values) + 0.25 * NOISE
        off = off * (1 / (TUKEY * spread))[:, None, None]
        return (1 - off * off).clamp_(min=0).square_() * weight

    def step(
        self, turn: torch.Tensor, shift: torch.Tensor, weight_Phw: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One Gauss-Newton step of the four parameters, Tukey's weights unless some are given."""
        if weight_Phw is None:
            moved, weight = self._laid_over(turn, shift)
            off = moved - self.here
            weight = self._tukey(off, weight)
        else:
            moved = _bilinear(self.there, self.grid.warped(turn, shift))[:, 0]
            off, weight = moved - self.here, weight_Phw
        wx, wy = weight * self.gx, weight * self.gy
        powers = self.grid.powers.T

        def sums_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a * b).flatten(1) @ powers

        # Sums with 1, x, y, x², xy, y²: the slopes of growth and turn are a gradient times the place.
        pairs = ((wx, self.gx), (wx, self.gy), (wy, self.gy), (wx, off), (wy, off))
        sums = torch.stack([sums_of(a, b) for a, b in pairs])
        s, sx, sy, sxx, sxy, syy = sums.permute(2, 1, 0)  # [P, 5] each
        XX, XY, YY, XR, YR = range(5)
        grow = (sx[:, XX] + sy[:, XY], sx[:, XY] + sy[:, YY])  # with shift right, shift down
        roll = (sx[:, XY] - sy[:, XX], sx[:, YY] - sy[:, XY])
        grow_grow = sxx[:, XX] + 2 * sxy[:, XY] + syy[:, YY]
        roll_roll = sxx[:, YY] - 2 * sxy[:, XY] + syy[:, XX]
        grow_roll = sxx[:, XY] + sxy[:, YY] - sxy[:, XX] - syy[:, XY]
        normal = torch.stack(
            [
                *(s[:, XX], s[:, XY], grow[0], roll[0]),
                *(s[:, XY], s[:, YY], grow[1], roll[1]),
                *(grow[0], grow[1], grow_grow, grow_roll),
                *(roll[0], roll[1], grow_roll, roll_roll),
            ],
            1,
        ).reshape(-1, 4, 4)
        right = torch.stack([s[:, XR], s[:, YR], sx[:, XR] + sy[:, YR], sx[:, YR] - sy[:, XR]], 1)
        # A shift along stripes, or the growth of three dots, cannot be told: it is held where it is.
        far2 = (self.grid.width / 4) ** 2
        floor = 0.01 * NOISE**2 * torch.tensor([1, 1, far2, far2], device=off.device)
        normal = normal + torch.diag_embed(1e-3 * normal.diagonal(dim1=1, dim2=2) + floor)
        dx, dy, grown, rolled = torch.linalg.solve(normal, right).unbind(1)
        reach = 2.0 * self.factor  # a step further than two pixels of this level is not linear any more
        inner = torch.complex(1 + grown.clamp(-0.1, 0.1), rolled.clamp(-0.1, 0.1))
        turn = turn / inner
        shift = shift - turn * torch.complex(dx.clamp(-reach, reach), dy.clamp(-reach, reach))
        sane = (turn.abs().log().abs() < MAX_LOG_SCALE) & (turn.angle().abs() < MAX_ROLL)
        return torch.where(sane, turn, torch.ones_like(turn)), shift


_NAN = torch.tensor(float("nan"))
_ALL_BUT_LAST, _ALL_BUT_FIRST = slice(None, -1), slice(1, None)


def _without_rim(mask: torch.Tensor) -> torch.Tensor:
    """The mask less its outermost pixels, where slopes would be those of the mask."""
    padded = functional.pad(mask, (1, 1, 1, 1))
    across = padded[..., :-2] * padded[..., 1:-1] * padded[..., 2:]
    return across[:, :-2] * across[:, 1:-1] * across[:, 2:]
