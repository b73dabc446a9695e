"""How a model is run: in which precision, and in batches of one shape."""

from __future__ import annotations

from collections.abc import Callable

import torch


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 or float16 where ``device`` computes in it natively, else float32."""
    if torch.device(device).type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major >= 7 else torch.float32
    # Without these instructions bfloat16 on a CPU is slower than float32. torch has no public question
    # for them yet, and not every build has the private ones.
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return torch.bfloat16
    return torch.float32


def batch_shape(device: str, batch_size: int) -> int:
    """Clips to run at a time: ``batch_size`` on a GPU, one on a CPU.

    A CPU gains nothing from batches of such models, and one at a time needs no padding.
    """
    return batch_size if torch.device(device).type == "cuda" else 1


def in_batches(
    run: Callable[[torch.Tensor], torch.Tensor],
    prepared_BTHWC: torch.Tensor,
    size: int,
    device: str,
    dim: int,
    name: str,
) -> torch.Tensor:
    """``run`` over clips in batches of one shape, so that a vector does not depend on its neighbours.

    Args:
        run: uint8 [b, T, h, w, 3] on ``device`` to float32 [b, dim].
        prepared_BTHWC: uint8 [B, T, h, w, 3], any B.
        size: clips at a time, see :func:`batch_shape`; the last batch is padded with black.

    Returns:
        float32 [B, dim] on the CPU.

    Raises:
        FloatingPointError: a vector is not finite; names the model.
    """
    vectors = torch.empty((len(prepared_BTHWC), dim), dtype=torch.float32)
    with torch.inference_mode():
        for start in range(0, len(prepared_BTHWC), size):
            some = prepared_BTHWC[start : start + size].to(device, non_blocking=True)
            n = len(some)
            if n < size:
                some = torch.cat([some, some.new_zeros((size - n, *some.shape[1:]))])
            found = run(some)[:n].cpu()
            bad = int((~torch.isfinite(found)).any(1).sum())
            if bad:
                raise FloatingPointError(f"{name}: {bad} of {n} vectors are not finite")
            vectors[start : start + n] = found
    return vectors
