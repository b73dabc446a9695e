"""Motion of clips whose small grey pictures are there already, such as ``surface`` leaves them.

The definition is that of :mod:`ego2robot_kernels.motion`, whose first two steps are done: the same float
comes out, to the bit. Bytes that must move: each used picture once, 14,400; what is written is 8 bytes for
every 2,048 pixels of a clip.

The other consumer of greys, :mod:`ego2robot_kernels.camera`, stays in torch: see ``kernels/README.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ego2robot_kernels.motion import STEP

Greys = torch.Tensor | Sequence[torch.Tensor]


def motion_from_greys(
    greys_BThw: Greys, n_frames: Sequence[int] | torch.Tensor | None = None, step: int = STEP
) -> torch.Tensor:
    """Mean absolute difference between neighbouring used pictures, a share of full scale.

    Args:
        greys_BThw: uint8 [B, T, h, w], or B tensors [T_i, h, w] of one size on one device.
        n_frames: how many pictures of each clip count, at most T; None: all.
        step: pictures 0, step, 2 step … are used.

    Returns:
        float32 [B] on the device of the pictures, :func:`ego2robot_kernels.motion.motion` of their frames; 0
        for a clip of fewer than two used pictures.

    Raises:
        ValueError: wrong shape, dtype or ``n_frames``, or clips that differ in size or device.
    """
    clips = used(greys_BThw, n_frames, step)
    if not clips:
        return torch.zeros(0)
    if clips[0].is_cuda:
        from ego2robot_kernels import greys_triton

        return greys_triton.motion_of(clips)
    return torch.tensor([_reference(clip) for clip in clips], dtype=torch.float32)


def used(
    greys: Greys, n_frames: Sequence[int] | torch.Tensor | None = None, step: int = STEP
) -> list[torch.Tensor]:
    """Views of the used pictures of each clip, pictures packed: uint8 [U_i, h, w]."""
    clips = list(greys)
    counts = [len(clip) for clip in clips] if n_frames is None else [int(n) for n in n_frames]
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if len(counts) != len(clips):
        raise ValueError(f"{len(counts)} n_frames for {len(clips)} clips")
    for clip, count in zip(clips, counts, strict=True):
        if clip.dtype != torch.uint8 or clip.ndim != 3 or 0 in clip.shape[1:]:
            raise ValueError(f"a clip's greys are uint8 [T, h, w], got {clip.dtype} {list(clip.shape)}")
        if not 0 <= count <= len(clip):
            raise ValueError(f"n_frames {count} of a clip of {len(clip)}")
        if clip.shape[1:] != clips[0].shape[1:] or clip.device != clips[0].device:
            raise ValueError("clips differ in picture size or device")
    views = [clip[:count:step] for clip, count in zip(clips, counts, strict=True)]
    return [view if view.stride()[1:] == (view.shape[2], 1) else view.contiguous() for view in views]


def _reference(used_Uhw: torch.Tensor) -> float:
    pairs = len(used_Uhw) - 1
    if pairs < 1:
        return 0.0
    wide = used_Uhw.to(torch.int16)
    total = int((wide[1:] - wide[:-1]).abs_().sum(dtype=torch.int64))
    return total / (pairs * used_Uhw[0].numel() * 255)
