"""Attention on a CPU that multiplies bfloat16 but has no matrix tiles (AVX512-BF16 without AMX).

There torch's fused attention is no faster in bfloat16 than in float32, and takes two thirds of VideoMAE's
time for a quarter of its arithmetic. Plain products, one head at a time so that the weights of one head
(1568 x 1568) stay in the cache, take 0.42 of its time, and 0.62 of the model's, with vectors as near to
float32's.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "ego2robot_by_head"


def by_head(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls its attention functions, without dropout: for inference.

    Args:
        query, key, value: [B, heads, N, D].
        attention_mask: must be None.

    Returns:
        [B, N, heads, D], and no attention weights.
    """
    if attention_mask is not None:
        raise ValueError("by_head attends to everything: there is no mask to it")
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    out_BNHD = query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3]))
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            weights_NN = torch.softmax(scaled[b, h] @ key[b, h].T, -1)
            out_BNHD[b, :, h] = weights_NN @ value[b, h]
    return out_BNHD, None


def pays(device: str, dtype: torch.dtype) -> bool:
    """Whether :func:`by_head` is the faster one: bfloat16 on a CPU without matrix tiles."""
    if torch.device(device).type != "cpu" or dtype != torch.bfloat16:
        return False
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return tiles is not None and not tiles()


def use_by_head(model: Any) -> None:
    """Has a transformers model of long sequences without masks, such as VideoMAE, attend by head."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, by_head)
    model.set_attn_implementation(NAME)
