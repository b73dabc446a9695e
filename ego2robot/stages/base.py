"""What the pipeline asks of a hand detector and of an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ego2robot.types import Hand


class HandDetector(Protocol):
    def detect(
        self,
        frames_THWC: torch.Tensor,
        indices: np.ndarray,
        content: tuple[int, int, int, int] | None = None,
    ) -> list[list[Hand]]:
        """The hands in ``frames_THWC[indices]`` (uint8 RGB), one list per index, each sorted by side.

        ``Hand.frame`` is the index. At most ``max_hands`` a frame, at most one per side. ``content`` is
        (top, left, height, width) of the picture inside the frame, as in ``ClipFrames``: only there is
        looked, but coordinates are shares of the whole frame.
        """

    def detect_batch(
        self, clips: Sequence[tuple[torch.Tensor, np.ndarray, tuple[int, int, int, int] | None]]
    ) -> list[list[list[Hand]]]:
        """``detect`` with the arguments of each clip; batches may be filled across clips."""

    def refind(
        self,
        clips: Sequence[tuple[torch.Tensor, Sequence[Hand], tuple[int, int, int, int] | None]],
        rounds: int,
    ) -> list[list[Hand]]:
        """Hands that were missed up to ``rounds`` frames away from where they were found, per clip."""

    def close(self) -> None: ...


class Preprocess(Protocol):
    """The part of an embedder that runs in the decoding process. Small, picklable, loads no model."""

    @property
    def name(self) -> str: ...

    def indices(self, n_frames: int) -> np.ndarray:
        """Which frames of a clip of ``n_frames`` the model looks at: int64 [T], may repeat."""

    def prepare(self, frames_THWC: torch.Tensor) -> torch.Tensor:
        """uint8 [T, H, W, 3] to uint8 [T, h, w, 3]: resized and cropped, not yet normalised."""


class Embedder(Protocol):
    """A model that turns some frames of a clip into one vector.

    ``preprocess`` runs beside the decoder (cheap, uint8), ``embed`` where the model is, on batches
    that come from many videos.

    Attributes:
        name: folder under ``embeddings/``.
        dim: length of the vector.
        weights: hub id or folder and revision, as it is stored beside the vectors.
        fingerprint: hash of the weights' bytes.
        random: the weights are random.
        batch_size: clips worth giving to one call. Any number may be given: vectors do not depend on how
            clips were grouped.
    """

    # Properties: read only, so that a frozen dataclass with a narrower type is one too.
    @property
    def name(self) -> str: ...
    @property
    def preprocess(self) -> Preprocess: ...
    @property
    def dim(self) -> int: ...
    @property
    def weights(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def random(self) -> bool: ...
    @property
    def batch_size(self) -> int: ...

    def embed(self, prepared_BTHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, T, h, w, 3] from ``prepare`` to float32 [B, dim] on the CPU.

        Raises:
            FloatingPointError: a vector is not finite.
        """
