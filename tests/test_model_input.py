"""Model inputs are what the Hugging Face processors make of the same frames, on every device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ego2robot_kernels.model_input import Picture, kernel_takes, model_inputs, resize_and_crop
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from ego2robot.stages.preprocess import CLIP_PICTURE, VIDEOMAE_PICTURE
from tests.triton_kernels import UNSHRUNK, compile_for_hopper, device, on_device, on_gpu, run_interpreted


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("picture", "processor"),
    [(VIDEOMAE_PICTURE, VideoMAEImageProcessorPil), (CLIP_PICTURE, CLIPImageProcessorPil)],
)
def test_frames_of_several_clips_are_what_the_processors_give(picture: Picture, processor: Any) -> None:
    clips = [noise((3, 90, 160, 3), i) for i in range(3)]
    indices = [[2, 0], [], [1, 1, 0]]
    frames = [clip[i].numpy() for clip, some in zip(clips, indices, strict=True) for i in some]
    pixels = processor()(frames, return_tensors="pt")["pixel_values"]
    expected = pixels.reshape(5, 3, 224, 224)
    ours = model_inputs(clips, indices, picture, torch.float32)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    out = torch.empty(5, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    drawn = model_inputs(clips, indices, picture, torch.bfloat16, out)
    assert drawn is out
    assert torch.equal(drawn, ours.to(torch.bfloat16))


def test_nothing_asked_for_is_nothing_given() -> None:
    assert model_inputs([], [], VIDEOMAE_PICTURE).shape == (0, 3, 224, 224)
    assert model_inputs([noise((2, 9, 9, 3))], [[]], VIDEOMAE_PICTURE).shape == (0, 3, 224, 224)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": []}, "0 lists of indices for 1 clips"),
        ({"indices": [[2]]}, "of a clip of 2 frames"),
        ({"indices": [[-1]]}, "of a clip of 2 frames"),
        ({"clips": [torch.zeros(2, 9, 9, 3)]}, "uint8"),
        ({"dtype": torch.uint8}, "dtype is"),
        ({"out": torch.zeros(1, 3, 224, 224)}, "out is"),
        (
            {"clips": [noise((2, 9, s, 3)) for s in (9, 8)], "indices": [[0], [0]]},
            "differ in picture size",
        ),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    given_ = {"clips": [noise((2, 9, 9, 3))], "indices": [[0]], "picture": VIDEOMAE_PICTURE, **change}
    with pytest.raises(ValueError, match=message):
        model_inputs(**given_)


def test_the_kernel_leaves_what_it_cannot_do_exactly_to_torch() -> None:
    frames = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert kernel_takes(frames, VIDEOMAE_PICTURE)
    assert not kernel_takes(frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), VIDEOMAE_PICTURE)
    assert kernel_takes(torch.zeros(1, 1, 1, 3).expand(1, 1080, 1920, 3), CLIP_PICTURE) is False
    large = torch.zeros(1, 1080, 1920, 3, dtype=torch.uint8)
    assert kernel_takes(large, CLIP_PICTURE)
    assert not kernel_takes(large, Picture(shortest_edge=96, crop=(96, 96), resample="bicubic"))


@pytest.mark.parametrize("picture", [VIDEOMAE_PICTURE, CLIP_PICTURE])
def test_halves_of_weights_are_exact_in_half_precision(picture: Picture) -> None:
    pytest.importorskip("triton")
    from ego2robot_kernels.model_input_triton import LOW_BITS, column_taps, strips

    for source in (100, 224, 360, 640, 1080):
        taps = column_taps(source, 224, 0, 224, picture.resample)
        rows, starts, high, low = strips(taps)
        assert rows * len(starts) >= 224
        whole = high.astype(np.int64) * (1 << LOW_BITS) + low.astype(np.int64)
        np.testing.assert_array_equal(whole.sum(2).reshape(-1, 16)[:, :rows].ravel()[:224], taps[1:].sum(0))
        assert np.abs(whole[..., :]).sum(2).max() * 255 < 2**31
        for half in (high, low):
            assert np.abs(half).max() <= 2048
            assert np.abs(half.astype(np.int64)).sum(2).max() * 255 < 2**24


def by_kernel(clips: Any, indices: Any, picture: Picture, out: torch.Tensor) -> torch.Tensor:
    if device() == "cuda":
        return model_inputs([on_gpu(c) for c in clips], indices, picture, out.dtype, on_gpu(out)).cpu()
    from ego2robot_kernels import model_input_triton

    model_input_triton.draw(clips, indices, picture, out)
    return out


@on_device
@given(
    height=st.integers(5, 90),
    width=st.integers(5, 90),
    margin=st.integers(0, 3),
    edge=st.integers(12, 70),
    resample=st.sampled_from(["bilinear", "bicubic"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    last=st.booleans(),
    data=st.data(),
)
@settings(max_examples=6, deadline=None, derandomize=True, **UNSHRUNK)
def test_kernel_equals_the_reference_on_device(
    height: int, width: int, margin: int, edge: int, resample: Any, dtype: torch.dtype, last: bool, data: Any
) -> None:
    clips = [noise((2, height, width + margin, 3), i)[:, :, margin:] for i in range(2)]
    # Stripes: bicubic overshoots, so both passes have to clamp.
    clips[1][1] = (torch.arange(width) // 5 % 2 * 255)[:, None]
    crop = (data.draw(st.integers(edge // 2, edge)), data.draw(st.integers(edge // 2, edge)))
    picture = Picture(edge, crop, resample, (0.48, 0.45, 0.4), (0.26, 0.27, 0.3))
    indices = [data.draw(st.lists(st.integers(0, 1), max_size=2)) for _ in clips]
    n = sum(map(len, indices))
    if n == 0 or not kernel_takes(clips[0], picture):
        return
    out = torch.full((n, 3, *crop), -9, dtype=dtype)
    if last:
        out = out.contiguous(memory_format=torch.channels_last)
    assert torch.equal(by_kernel(clips, indices, picture, out), model_inputs(clips, indices, picture, dtype))


@on_device
@pytest.mark.parametrize("picture", [VIDEOMAE_PICTURE, CLIP_PICTURE])
def test_full_size_on_device(picture: Picture) -> None:
    if device() == "cpu":  # the interpreter draws the middle of it only
        picture = replace(picture, crop=(64, 64))
    clips = [noise((1, 360, 640, 3))]
    out = torch.empty(1, 3, *picture.crop, dtype=torch.bfloat16)
    assert torch.equal(by_kernel(clips, [[0]], picture, out), model_inputs(clips, [[0]], picture))


@on_device
def test_many_tiny_frames_on_device() -> None:
    n = 512 if device() == "cuda" else 20
    picture = Picture(8, (8, 8))
    clips = [noise((n, 9, 12, 3))]
    out = torch.empty(n, 3, 8, 8)
    assert torch.equal(
        by_kernel(clips, [range(n)], picture, out), model_inputs(clips, [range(n)], picture, torch.float32)
    )


@on_device
def test_levels_themselves_on_device() -> None:
    """The levels of ``resize_and_crop`` come from the same kernel on a GPU."""
    from ego2robot_kernels import model_input_triton

    frames = noise((2, 40, 60, 3)).to(device())
    small = torch.zeros(2, 24, 32, 3, dtype=torch.uint8, device=frames.device)
    picture = Picture(40, (24, 32), "bicubic")
    model_input_triton.draw([frames], [range(2)], picture, small.permute(0, 3, 1, 2))
    assert torch.equal(small.cpu(), resize_and_crop(frames.cpu(), picture))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel's own tests run on the GPU")
def test_kernel_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize(("taps", "kind"), [(5, "*bf16"), (8, "*fp32")])
def test_kernel_compiles_for_hopper(taps: int, kind: str) -> None:
    pytest.importorskip("triton")
    from ego2robot_kernels.model_input_triton import _input_kernel

    pointers = {"frame_ptr": "*i64", "x_ptr": "*i32", "strip_ptr": "*i32", "lut_ptr": kind, "out_ptr": kind}
    pointers |= {"high_ptr": "*fp16", "low_ptr": "*fp16"}
    constants = {"TAPS": taps, "SOURCE": 32, "COLUMNS": 32}
    ptx = compile_for_hopper(_input_kernel, pointers, constants).asm["ptx"]
    assert "mma.sync" in ptx
    assert "ld.global.b32" in ptx
