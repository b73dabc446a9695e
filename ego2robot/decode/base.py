"""What every decoder backend promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ego2robot.types import Blob, FrameSpec, VideoInfo


@dataclass
class FrameBatch:
    """Consecutive due frames of one read.

    Attributes:
        first: index into the ``times_s`` that were asked for.
        frames_THWC: uint8 RGB [T, spec.height, spec.width, 3] on the device that was asked for.
        times_s: float64 [T], real presentation times, relative to the video's first frame.
        corrupt: bool [T], the decoder reported damage since the last keyframe before this frame.
        greys_Thw: the small grey pictures that motion is computed from, [T, 90, 160] on the same device,
            where the conversion made them on its way; None where it did not.
    """

    first: int
    frames_THWC: torch.Tensor
    times_s: np.ndarray
    corrupt: np.ndarray
    greys_Thw: torch.Tensor | None = None


class Backend(Protocol):
    """A decoder. One module a backend; ``decode.policy`` picks.

    Attributes:
        name: as in ``decode.backend``.
        devices: where it can leave frames, ``("cpu",)`` or ``("cuda",)`` or both.
        planes: what it can hand over: ``rgb`` (scaled to the spec) and, on a GPU, ``nv12``/``p010``
            (decoded surfaces, for kernels that scale and convert themselves).
    """

    name: str
    devices: tuple[str, ...]
    planes: tuple[str, ...]

    def missing(self) -> str | None:
        """None when usable here, else what is missing and how to get it, on one line."""

    def version(self) -> str:
        """Its version, for ``ego2robot doctor``; only asked where nothing is missing."""

    def refuses(self, info: VideoInfo) -> str | None:
        """None when it can decode such a video exactly, else why not."""

    def read(
        self,
        name: str,
        blob: Blob,
        info: VideoInfo,
        times_s: np.ndarray,
        spec: FrameSpec,
        device: str,
        fast: bool = False,
    ) -> Iterator[FrameBatch]:
        """The frames that are on screen at ``times_s``, in one forward pass.

        Args:
            name: the video as the user knows it, for messages.
            times_s: float64, strictly ascending, seconds after the video's first frame. A frame is on
                screen at t when its own time is ≤ t (plus half a microsecond) and no later frame's is.
            spec: area scaling into its content rectangle, the rest black; rotation is applied first.
            device: ``cpu`` or ``cuda``.
            fast: pictures that no other refers to may be passed over, and those that are not may be a
                little less clean: then the picture before is given, with its own time. A backend that has
                no such way decodes exactly.

        Yields:
            Batches of at most 16 frames, in order, none left out. The stream may end early: then the
            last due frames are missing, and it is the caller's business to say so.

        Raises:
            VideoError: nothing can be decoded at all (not a video, no decoder, unreadable file).
        """
