"""What every kernel's launch needs: small tables on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def upload(numbers: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Integers of one call, int64, on ``device`` by its current stream's turn; a GPU is not waited for."""
    table = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def constant(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A table that will be kept: it is there for every stream when this returns."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def held(kept: torch.Tensor) -> torch.Tensor:
    """``kept`` for the current stream: its memory is not given away before what is launched now has run,
    even if a cache lets go of it meanwhile."""
    if kept.is_cuda:
        kept.record_stream(torch.cuda.current_stream(kept.device))
    return kept
