"""Attention by head is attention: the same vectors, of a model and of the function alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from transformers import VideoMAEConfig, VideoMAEModel

from ego2robot.stages import attention


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 17, 8), (1, 12, 196, 64)])
def test_it_gives_what_torchs_own_gives(shape: tuple[int, ...]) -> None:
    torch.manual_seed(sum(shape))
    q, k, v = (torch.randn(shape) for _ in range(3))
    ours, weights = attention.by_head(torch.nn.Identity(), q, k, v, None)
    assert weights is None
    torch.testing.assert_close(ours, scaled_dot_product_attention(q, k, v).transpose(1, 2))
    scaled, _ = attention.by_head(torch.nn.Identity(), q, k, v, None, scaling=0.3)
    torch.testing.assert_close(scaled, scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2))


def test_a_mask_is_refused() -> None:
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="mask"):
        attention.by_head(torch.nn.Identity(), x, x, x, torch.zeros(2, 2))


def test_a_model_in_bfloat16_is_as_near_to_float32_as_with_torchs_own() -> None:
    small = VideoMAEConfig(
        image_size=64,
        num_frames=4,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
    )
    torch.manual_seed(3)
    exact = VideoMAEModel._from_config(small, attn_implementation="sdpa").eval()
    half = VideoMAEModel._from_config(small, attn_implementation="sdpa").eval()
    half.load_state_dict(exact.state_dict())
    half.to(torch.bfloat16)
    pixels = torch.randn(2, 4, 3, 64, 64)
    with torch.inference_mode():
        wanted = exact(pixel_values=pixels).last_hidden_state.mean(1)
        own = half(pixel_values=pixels.bfloat16()).last_hidden_state.float().mean(1)
        attention.use_by_head(half)
        ours = half(pixel_values=pixels.bfloat16()).last_hidden_state.float().mean(1)
    assert half.config._attn_implementation == attention.NAME
    assert not torch.equal(ours, own)  # it was used
    apart, own_apart = (1 - cosine_similarity(x, wanted).min() for x in (ours, own))
    assert apart < max(2 * own_apart, 1e-4)


def test_it_is_for_bfloat16_on_a_cpu_alone() -> None:
    assert not attention.pays("cpu", torch.float32)
    assert not attention.pays("cuda", torch.bfloat16)
