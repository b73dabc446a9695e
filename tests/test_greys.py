"""Motion from grey pictures is the motion of the frames they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ego2robot_kernels.camera import small_greys
from ego2robot_kernels.greys import motion_from_greys, used
from ego2robot_kernels.motion import motion
from ego2robot_kernels.surface import convert_surfaces
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_kernels import UNSHRUNK, compile_for_hopper, device, on_device, on_gpu, run_interpreted


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_it_is_the_motion_of_the_frames_to_the_bit(step: int) -> None:
    frames = noise((3, 7, 54, 96, 3))
    counts = [7, 1, 4]
    greys = torch.stack([small_greys(clip) for clip in frames])
    expected = motion(frames, counts, step)
    assert expected[0] > 0.1
    assert torch.equal(motion_from_greys(greys, counts, step), expected)
    assert torch.equal(motion_from_greys(list(greys), torch.tensor(counts), step), expected)


def test_the_greys_of_surfaces_give_the_motion_of_their_frames() -> None:
    luma, chroma = noise((6, 90, 120)), noise((6, 45, 60, 2), 1)
    frames, greys = convert_surfaces(
        luma, chroma, height=360, width=640, content=(0, 80, 360, 480), matrix="bt709", full_range=False
    )
    assert torch.equal(motion_from_greys([greys]), motion([frames]))


def test_no_clips_and_views() -> None:
    assert motion_from_greys([]).shape == (0,)
    wide = noise((5, 20, 64))
    assert torch.equal(motion_from_greys([wide[:, 2:, 3:60]]), motion_from_greys([wide[:, 2:, 3:60].clone()]))


@pytest.mark.parametrize(
    ("greys", "n_frames", "message"),
    [
        (torch.zeros(1, 4, 8, 8), None, "uint8"),
        (torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8), None, r"\[T, h, w\]"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.uint8), [5], "n_frames 5 of a clip of 4"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.uint8), [4, 4], "2 n_frames for 1 clips"),
        ([torch.zeros(4, 8, s, dtype=torch.uint8) for s in (8, 9)], None, "differ in picture size"),
    ],
)
def test_wrong_input_is_refused(greys: Any, n_frames: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        motion_from_greys(greys, n_frames)


def by_kernel(greys: Any, counts: list[int], step: int) -> torch.Tensor:
    from ego2robot_kernels import greys_triton

    clips = [on_gpu(clip) for clip in greys] if device() == "cuda" else greys
    return greys_triton.motion_of(used(clips, counts, step)).cpu()


@on_device
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    height=st.integers(1, 60),
    width=st.integers(1, 80),
    margin=st.integers(0, 2),
    step=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=15, deadline=None, derandomize=True, **UNSHRUNK)
def test_kernel_equals_the_reference_on_device(
    lengths: list[int], height: int, width: int, margin: int, step: int, data: Any
) -> None:
    greys = [noise((n + 1, height, width + margin), i)[1:, :, margin:] for i, n in enumerate(lengths)]
    counts = [data.draw(st.integers(0, n)) for n in lengths]
    got = by_kernel(greys, counts, step)
    assert got.dtype == torch.float32
    assert torch.equal(got, motion_from_greys(greys, counts, step))


@on_device
@pytest.mark.parametrize(("clips", "size"), [(2, (90, 160)), (512, (4, 8))])
def test_real_size_and_many_clips_on_device(clips: int, size: tuple[int, int]) -> None:
    greys = noise((clips, 4, *size))
    counts = [i % 5 for i in range(clips)]
    assert torch.equal(by_kernel(greys, counts, 1), motion_from_greys(greys, counts, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel's own tests run on the GPU")
def test_kernel_in_the_interpreter() -> None:
    run_interpreted(__file__)


def test_kernel_compiles_for_hopper_and_reads_sixteen_bytes_at_a_time() -> None:
    pytest.importorskip("triton")
    from ego2robot_kernels.greys_triton import BLOCK, _difference_kernel

    pointers = {"clip_ptr": "*i64", "partial_ptr": "*i64"}
    compiled = compile_for_hopper(_difference_kernel, pointers, {"ALIGN": 16, "BLOCK": BLOCK})
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
