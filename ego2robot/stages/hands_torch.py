"""Hands in frames, by MediaPipe's own networks run with torch: many frames at once, on a CPU or a GPU.

Finds what :class:`ego2robot.stages.hands.MediaPipeHands` finds, with the same meaning of left and right, and
needs no mediapipe. How close the two are is measured by ``benchmarks/hands.py``.
"""

from __future__ import annotations

import numpy as np
import torch

from ego2robot import models
from ego2robot.hands_net.pipeline import FoundHands, HandNet
from ego2robot.stages.inference import compute_dtype
from ego2robot.stages.sides import Candidate, one_per_side, within
from ego2robot.types import Hand

# Frames in one pass, by device: on a CPU few enough for its caches, on a GPU enough to fill it.
_FRAMES = {"cpu": 8, "cuda": 128}
# Larger frames go in smaller passes. Pixels of a frame of 640 x 360.
_PIXELS = 640 * 360


def default_dtype(device: torch.device | str) -> torch.dtype:
    """float16 on a GPU, bfloat16 on a CPU that multiplies it (AVX512-BF16, AMX), else float32."""
    return torch.float16 if torch.device(device).type == "cuda" else compute_dtype("cpu")


class TorchHands:
    """Hands of single frames: no frame depends on another, so any subset gives the same result.

    Args:
        max_hands: at most so many are looked for; at most one per side is reported.
        min_detection: confidence of the palm detector, 0..1.
        min_presence: confidence of the landmark network that there is a hand, 0..1.
        device: where the networks run; frames that are elsewhere are copied there.
        dtype: what the networks compute in, see :class:`HandNet`; None: :func:`default_dtype`.
        networks: ``full``, or ``lite``: smaller, faster, less sure.

    Raises:
        UserError: the networks are missing or damaged.
    """

    def __init__(
        self,
        max_hands: int = 2,
        min_detection: float = 0.5,
        min_presence: float = 0.5,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        networks: models.Networks = "full",
    ) -> None:
        self._device = torch.device(device)
        self._net: HandNet | None = HandNet(
            *models.hand_networks(networks),
            self._device,
            dtype or default_dtype(device),
            max_hands,
            min_detection,
            min_presence,
        )

    def detect(
        self,
        frames_THWC: torch.Tensor,
        indices: np.ndarray,
        content: tuple[int, int, int, int] | None = None,
    ) -> list[list[Hand]]:
        """The hands in ``frames_THWC[indices]``.

        Args:
            frames_THWC: RGB [T, H, W, 3] of 0 to 255, uint8 or floating, on any device and with any strides.
                Frames that hold NaN or infinity have no hands.
            indices: int [N], which frames to look at.
            content: (top, left, height, width) of the picture inside the frame, in pixels; None is the
                whole frame. See ``MediaPipeHands``.

        Returns:
            N lists of at most two hands, left before right, at most one per side, as ``MediaPipeHands``
            gives them.

        Raises:
            ValueError: not such frames, or the detector was closed.
        """
        kind = frames_THWC.dtype == torch.uint8 or frames_THWC.is_floating_point()
        if not kind or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
            shape = tuple(frames_THWC.shape)
            raise ValueError(f"frames are {frames_THWC.dtype} {shape}, not uint8 or floating [T, H, W, 3]")
        if self._net is None:
            raise ValueError("the hand detector was closed")
        _, height, width, _ = frames_THWC.shape
        top, left, rows, columns = content or (0, 0, height, width)
        pictures = frames_THWC[:, top : top + rows, left : left + columns]
        size = _FRAMES[self._device.type]
        size = max(1, min(size, size * _PIXELS // (rows * columns)))
        found: list[list[Hand]] = []
        for chunk in np.array_split(indices, range(size, len(indices), size)):
            picked = pictures[torch.from_numpy(chunk).to(pictures.device)].to(self._device)
            hands = self._net(picked).cpu() if len(chunk) else None
            each = _candidates(hands, (rows, columns)) if hands else []
            if content is not None:
                each = [[within(c, content, (height, width)) for c in inner] for inner in each]
            found += [one_per_side(candidates, int(i)) for candidates, i in zip(each, chunk, strict=True)]
        return found

    def close(self) -> None:
        """Lets go of the networks."""
        self._net = None

    def __enter__(self) -> TorchHands:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _candidates(found: FoundHands, size: tuple[int, int]) -> list[list[Candidate]]:
    """What was found in each frame, landmarks as shares of the picture of (height, width) pixels."""
    height, width = size
    # z is in units of x.
    landmarks_BKL3 = (found.landmarks_BKL3 / torch.tensor((width, height, width))).numpy()
    world_BKL3, left_BK, present_BK = (
        found.world_BKL3.numpy(),
        found.left_BK.numpy(),
        found.present_BK.numpy(),
    )
    return [
        [Candidate(float(left_BK[b, k]), landmarks_BKL3[b, k], world_BKL3[b, k]) for k in slots.nonzero()[0]]
        for b, slots in enumerate(present_BK)
    ]
