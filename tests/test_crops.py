"""Pictures for the hand networks are what hands_net samples, on every device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ego2robot_kernels.crops import crops, letterbox, line_taps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ego2robot.hands_net import sampling
from tests.triton_kernels import UNSHRUNK, compile_for_hopper, device, on_device, on_gpu, run_interpreted


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def squares(n: int, frames: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Some inside, some over the edge, some outside altogether, large and small, any turn."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(-0.3, 1.3, (n, 2)) * (width, height)
    side = rng.uniform(0.05, 1.5, (n, 1)) * max(height, width)
    rect = np.concatenate([centre, side, rng.uniform(-math.pi, math.pi, (n, 1))], 1).astype(np.float32)
    return torch.from_numpy(rng.integers(0, frames, n)), torch.from_numpy(rect)


def looked_up(frames: torch.Tensor, x: torch.Tensor, y: torch.Tensor, outside: str) -> torch.Tensor:
    """What lies at pixels x, y [B, S, S] of each frame, as MediaPipe's step has it: float32 [B, 3, S, S]."""
    height, width = frames.shape[1:3]
    places = [(at * 32).round() / 32 for at in (x.double(), y.double())]
    grid = torch.stack([(2 * p + 1) / n - 1 for p, n in zip(places, (width, height), strict=True)], -1)
    planes = frames.permute(0, 3, 1, 2).double()
    found = F.grid_sample(planes, grid, padding_mode=outside, align_corners=False)
    # In float64 what lies half way between two levels does, but for one part in 10^10.
    return (found * 1024).round().div(1024).round().div(255).float()


@pytest.mark.parametrize("size", [(360, 640), (640, 360), (96, 96), (31, 50), (192, 150)])
def test_letterboxes_are_mediapipes(size: tuple[int, int]) -> None:
    frames = noise((2, *size, 3))
    side = max(size)
    along = torch.arange(192) * (side / 192)
    y, x = torch.meshgrid(along - (side - size[0]) / 2, along - (side - size[1]) / 2, indexing="ij")
    ours = letterbox(frames, 192)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        ours, looked_up(frames, x.expand(2, -1, -1), y.expand(2, -1, -1), "zeros"), rtol=0, atol=1e-6
    )
    assert torch.equal(letterbox(frames, 192, torch.float16), ours.half())
    assert ours[:, :, 96, 96].any()


def test_crops_are_mediapipes() -> None:
    frames = noise((3, 180, 320, 3))
    frame, rect = squares(12, 3, 180, 320)
    steps = torch.arange(224) / 224 - 0.5
    x0, y0, side, turn = (v[:, None, None] for v in rect.unbind(1))
    right, down = steps[None, None, :], steps[None, :, None]
    x = (x0 + side * turn.cos() * right) - side * turn.sin() * down
    y = (y0 + side * turn.sin() * right) + side * turn.cos() * down
    ours = crops(frames, frame, rect, 224)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, looked_up(frames[frame], x, y, "border"), rtol=0, atol=1e-6)
    assert torch.equal(crops(frames, frame, rect, 224, torch.bfloat16), ours.bfloat16())


def test_hands_net_samples_the_same_levels() -> None:
    """Its crops come from ``grid_sample`` in float32: what lies next to half a level falls to either side."""
    frames = noise((3, 180, 320, 3))
    assert torch.equal(letterbox(frames, 192), sampling.letterbox(frames, 192))
    frame, rect = squares(12, 3, 180, 320)
    off = crops(frames, frame, rect, 224) - sampling.crops(sampling.planes(frames), 180, frame, rect, 224)
    assert off.abs().max() < 1.01 / 255
    assert (off.abs() > 1e-3).float().mean() < 0.02


def test_an_upright_square_on_whole_pixels_is_the_frame_itself() -> None:
    frames = noise((2, 40, 60, 3))
    rect = torch.tensor([[26.0, 18.0, 16.0, 0.0], [26.0, 18.0, 16.0, math.pi]])
    upright, turned = (crops(frames, torch.tensor([1, 1]), rect, 16) * 255).round()
    expected = frames[1, 10:26, 18:34].permute(2, 0, 1).float()
    assert torch.equal(upright, expected)
    # Positions begin at a corner, so that half a turn reaches one pixel further.
    assert torch.equal(turned, frames[1, 11:27, 19:35].permute(2, 0, 1).flip(1, 2).float())


@given(length=st.integers(1, 700), more=st.integers(0, 400), size=st.integers(1, 260))
@settings(max_examples=60, deadline=None)
def test_positions_along_a_line_stay_inside_it(length: int, more: int, size: int) -> None:
    low, first, second = line_taps(length, length + more, size)
    assert low.min() >= 0
    assert low.max() < length
    assert (low + 1)[second > 0].max(initial=0) < length
    assert first.min() >= 0
    assert second.min() >= 0
    assert (first + second).max() <= 32


def test_nothing_asked_for_is_nothing_given() -> None:
    frames = noise((2, 9, 12, 3))
    assert letterbox(frames[:0], 16).shape == (0, 3, 16, 16)
    empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    assert crops(frames, *empty, 16).shape == (0, 3, 16, 16)


def test_views_are_sampled_as_copies_are() -> None:
    wide = noise((4, 30, 50, 3))[::2, 3:, 4:]
    planar = wide.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    frame, rect = squares(4, 2, 27, 46)
    for view in (wide, planar):
        assert torch.equal(letterbox(view, 24), letterbox(wide.clone(), 24))
        assert torch.equal(crops(view, frame, rect, 24), crops(wide.clone(), frame, rect, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames_BHWC": torch.zeros(1, 8, 8, 3)}, "uint8"),
        ({"frames_BHWC": torch.zeros(1, 8, 8, 4, dtype=torch.uint8)}, r"\[B, H, W, 3\]"),
        ({"dtype": torch.uint8}, "float32"),
        ({"frame_N": torch.zeros(2, dtype=torch.int64)}, "squares are"),
        ({"frame_N": torch.zeros(1, dtype=torch.int32)}, "squares are"),
        ({"rect_N4": torch.zeros(1, 4, dtype=torch.float64)}, "squares are"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    sound = {
        "frames_BHWC": noise((1, 8, 8, 3)), "frame_N": torch.zeros(1, dtype=torch.int64),
        "rect_N4": torch.zeros(1, 4), "size": 8, "dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        crops(**{**sound, **change})


def by_kernel(frames: torch.Tensor, size: int, dtype: torch.dtype, of: Any = None) -> torch.Tensor:
    if device() == "cuda":
        there = on_gpu(frames)
        found = (
            letterbox(there, size, dtype)
            if of is None
            else crops(there, of[0].cuda(), of[1].cuda(), size, dtype)
        )
        return found.cpu()
    from ego2robot_kernels import crops_triton

    n = len(frames) if of is None else len(of[0])
    out = torch.full((n, size, size, 3), 9, dtype=dtype)
    if of is None:
        crops_triton.letterbox(frames, out)
    else:
        x, y, side, turn = of[1].unbind(1)
        crops_triton.crops(frames, of[0], torch.stack((x, y, side * turn.cos(), side * turn.sin())), out)
    return out.permute(0, 3, 1, 2)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """A GPU's cosine may differ in its last bit, which moves a position by 1/32 pixel here and there."""
    if device() == "cuda":
        assert (ours != expected).float().mean() < 1e-2
        assert (ours.float() - expected.float()).abs().mean() < 1e-3
    else:
        assert torch.equal(ours, expected)


@on_device
@given(
    n=st.integers(1, 3),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    margin=st.integers(0, 3),
    size=st.integers(1, 24),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=6, deadline=None, derandomize=True, **UNSHRUNK)
def test_kernels_equal_the_reference_on_device(
    n: int, height: int, width: int, margin: int, size: int, dtype: torch.dtype
) -> None:
    frames = noise((n, height + 1, width + margin, 3), height)[:, 1:, margin:]
    assert torch.equal(by_kernel(frames, size, dtype), letterbox(frames, size, dtype))
    of = squares(4, n, height, width, width)
    assert_same(by_kernel(frames, size, dtype, of), crops(frames, *of, size, dtype))


@on_device
def test_real_sizes_on_device() -> None:
    frames = noise((1, 360, 640, 3))
    n, boxed, cut = (4, 192, 224) if device() == "cuda" else (1, 48, 56)
    assert torch.equal(by_kernel(frames, boxed, torch.float16), letterbox(frames, boxed, torch.float16))
    of = squares(n, 1, 360, 640)
    assert_same(by_kernel(frames, cut, torch.float16, of), crops(frames, *of, cut, torch.float16))


@on_device
def test_many_tiny_pictures_on_device() -> None:
    n = 512 if device() == "cuda" else 24
    frames = noise((n, 5, 7, 3))
    assert torch.equal(by_kernel(frames, 8, torch.float32), letterbox(frames, 8))
    of = squares(n, n, 5, 7)
    assert_same(by_kernel(frames, 8, torch.float32, of), crops(frames, *of, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_holds_both() -> None:
    frames = noise((2, 90, 160, 3)).cuda()
    frame, rect = (v.cuda() for v in squares(5, 2, 90, 160))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        letterbox(frames, 64), crops(frames, frame, rect, 64)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        square, cut = letterbox(frames, 64), crops(frames, frame, rect, 64)
    frames.copy_(noise((2, 90, 160, 3), 1))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(square, letterbox(frames, 64))
    assert torch.equal(cut, crops(frames, frame, rect, 64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests run on the GPU")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize("kind", ["*fp16", "*fp32"])
def test_kernels_compile_for_hopper(kind: str) -> None:
    pytest.importorskip("triton")
    from ego2robot_kernels.crops_triton import BLOCK, _crops_kernel, _letterbox_kernel

    constants = {"BLOCK": BLOCK}
    taps = {"frames_ptr": "*u8", "y_ptr": "*i32", "x_ptr": "*i32", "lut_ptr": kind, "out_ptr": kind}
    assert "ld.global.b32" in compile_for_hopper(_letterbox_kernel, taps, constants).asm["ptx"]
    where = {
        "frames_ptr": "*u8",
        "frame_ptr": "*i64",
        "turned_ptr": "*fp32",
        "steps_ptr": "*fp32",
        "lut_ptr": kind,
        "out_ptr": kind,
    }
    ptx = compile_for_hopper(_crops_kernel, where, constants, enable_fp_fusion=False).asm["ptx"]
    assert "ld.global.b32" in ptx
    assert "fma.rn.f32" not in ptx
