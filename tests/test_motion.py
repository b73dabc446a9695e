"""Motion is what OpenCV gives, on the CPU and in the Triton kernel."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from ego2robot_kernels import camera
from ego2robot_kernels.motion import grey_small, motion

from ego2robot.stages.motion import motion_scores, used_greys
from ego2robot.types import Clip, ClipFrames

cv2 = pytest.importorskip("cv2", reason="OpenCV comes with mediapipe", exc_type=ImportError)


def opencv_motion(frames_THWC: np.ndarray, step: int = 2) -> float:
    """The reference pipeline's computation (FACTS §1), on RGB."""
    grey = [
        cv2.cvtColor(cv2.resize(frame, (160, 90), interpolation=cv2.INTER_LINEAR), cv2.COLOR_RGB2GRAY)
        for frame in frames_THWC[::step]
    ]
    if len(grey) < 2:
        return 0.0
    pairs = [np.abs(a.astype(float) - b.astype(float)).mean() for a, b in itertools.pairwise(grey)]
    return float(np.mean(pairs)) / 255


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def moving_scene(n: int, height: int = 360, width: int = 640, px_per_frame: float = 9.0) -> np.ndarray:
    """A smooth textured scene that slides: what video looks like, unlike noise."""
    wide = cv2.GaussianBlur(noise(height, 2 * width, seed=5), (0, 0), 6)
    wide = cv2.normalize(wide, None, 0, 255, cv2.NORM_MINMAX)
    starts = (np.arange(n) * px_per_frame).astype(int) % width
    return np.stack([wide[:, start : start + width] for start in starts])


def clip_of(frames: np.ndarray, content: tuple[int, int, int, int] | None = None) -> ClipFrames:
    n, height, width = frames.shape[:3]
    clip = Clip("0" * 16, "1" * 16, 0, n, 6.0)
    return ClipFrames(clip, torch.from_numpy(frames), np.arange(n) / 6, content or (0, 0, height, width))


@pytest.mark.parametrize(
    "size", [(360, 640), (180, 320), (90, 160), (720, 1280), (361, 641), (45, 80), (33, 517), (2, 2)]
)
def test_grey_levels_are_opencvs_exactly(size: tuple[int, int]) -> None:
    frame = noise(*size)
    expected = cv2.cvtColor(cv2.resize(frame, (160, 90), interpolation=cv2.INTER_LINEAR), cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(grey_small(torch.from_numpy(frame)[None])[0], expected)


@pytest.mark.parametrize("n", [2, 3, 4, 11, 36])
def test_a_clip_scores_what_opencv_computes(n: int) -> None:
    scene = moving_scene(n)
    score = motion_scores([clip_of(scene)])
    assert score.dtype == np.float32
    assert score.shape == (1,)
    assert score[0] == pytest.approx(opencv_motion(scene), abs=1e-7)
    assert (score[0] > 0.005) == (n > 2)


def test_clips_of_different_length_and_any_strides_score_as_alone() -> None:
    padded = torch.from_numpy(np.stack([noise(9, 70, 130, seed=i) for i in range(4)]))
    lengths = [9, 2, 5, 0]
    expected = [opencv_motion(padded[i, :n].numpy()) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(motion(padded, lengths), expected, atol=1e-7)
    # Time before batch, rows with a margin, colours last in memory order CHW: views, not copies.
    time_first = padded.transpose(0, 1).contiguous().transpose(0, 1)
    np.testing.assert_array_equal(motion(time_first, lengths), motion(padded, lengths))
    planar = padded.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    np.testing.assert_array_equal(motion(planar, lengths), motion(padded, lengths))
    cropped = padded[:, :, 3:61, 5:99]
    expected = [opencv_motion(np.ascontiguousarray(cropped[i, :n].numpy())) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(motion(cropped, torch.tensor(lengths)), expected, atol=1e-7)


def test_a_still_clip_and_one_too_short_score_zero_and_black_to_white_scores_one() -> None:
    still = np.repeat(noise(1, 60, 80), 12, axis=0)
    flash = np.zeros((5, 60, 80, 3), np.uint8)
    flash[2] = 255
    scores = motion_scores(
        [clip_of(still), clip_of(noise(2, 60, 80)), clip_of(noise(1, 60, 80)), clip_of(flash)]
    )
    np.testing.assert_array_equal(scores, [0, 0, 0, 1])
    assert motion_scores([]).shape == (0,)


def test_black_bars_do_not_dilute_the_score() -> None:
    scene = moving_scene(12, 360, 202)
    boxed = np.zeros((12, 360, 640, 3), np.uint8)
    boxed[:, :, 218:420] = scene
    full = opencv_motion(boxed)
    score = motion_scores([clip_of(boxed, (0, 218, 360, 202))])[0]
    assert score == pytest.approx(full * 640 / 202, rel=1e-6)
    assert score == pytest.approx(opencv_motion(scene), rel=0.25)


def test_other_steps_and_sizes() -> None:
    frames = noise(7, 50, 90)
    assert float(motion([torch.from_numpy(frames)], step=3)[0]) == pytest.approx(
        opencv_motion(frames, 3), abs=1e-7
    )
    grey = [
        cv2.cvtColor(cv2.resize(f, (31, 17), interpolation=cv2.INTER_LINEAR), cv2.COLOR_RGB2GRAY).astype(
            float
        )
        for f in frames
    ]
    expected = np.mean([np.abs(a - b).mean() for a, b in itertools.pairwise(grey)]) / 255
    assert float(motion([torch.from_numpy(frames)], step=1, size=(17, 31))[0]) == pytest.approx(
        expected, abs=1e-7
    )


@pytest.mark.parametrize(
    ("frames", "n_frames", "message"),
    [
        (torch.zeros(1, 4, 8, 8, 3), None, "uint8"),
        (torch.zeros(1, 4, 8, 8, 4, dtype=torch.uint8), None, r"\[T, H, W, 3\]"),
        (torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8), [5], "n_frames 5 of a clip of 4"),
        (torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8), [4, 4], "2 n_frames for 1 clips"),
        ([torch.zeros(4, 8, s, 3, dtype=torch.uint8) for s in (8, 9)], None, "differ in picture size"),
    ],
)
def test_wrong_input_is_refused(frames: torch.Tensor, n_frames: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        motion(frames, n_frames)


TRITON_CHECK = """
    import numpy as np, torch
    from ego2robot_kernels.motion import _clips, motion
    from ego2robot_kernels.motion_triton import motion_of

    rng = np.random.default_rng(3)
    for trial in range(6):
        batch, frames = int(rng.integers(1, 6)), int(rng.integers(1, 9))
        height, width = (int(v) for v in rng.integers(2, 200, 2))
        size = (90, 160) if trial < 2 else tuple(int(v) for v in rng.integers(1, 40, 2))
        x = torch.from_numpy(rng.integers(0, 256, (batch, frames, height, width, 3), dtype=np.uint8))
        if trial % 2:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1:]
        lengths = [int(n) for n in rng.integers(0, frames + 1, batch)]
        step = int(rng.integers(1, 4))
        got = motion_of(_clips(x, lengths, step), size)
        assert got.dtype == torch.float32 and got.shape == (batch,)
        torch.testing.assert_close(got, motion(x, lengths, step, size), rtol=0, atol=0)
    print("compared")
"""


def test_triton_kernel_equals_the_cpu_reference() -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRITON_CHECK)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "compared" in run.stdout


def test_triton_kernel_compiles_for_hopper_without_a_gpu() -> None:
    triton = pytest.importorskip("triton")
    from ego2robot_kernels.motion_triton import BLOCK, _motion_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = ("address_ptr", "t_stride_ptr", "row_stride_ptr", "used_ptr", "y_ptr", "x_ptr", "partial_ptr")
    types = ("*i64", "*i64", "*i64", "*i32", "*i32", "*i32", "*i64")
    signature = {
        **dict(zip(names, types, strict=True)),
        "height": "i32",
        "width": "i32",
        "BLOCK": "constexpr",
    }
    source = ASTSource(fn=_motion_kernel, signature=signature, constexprs={"BLOCK": BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ld.global" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_the_cpu_reference() -> None:
    frames = torch.from_numpy(np.stack([noise(36, 360, 640, seed=i) for i in range(3)]))
    lengths = [36, 1, 17]
    torch.testing.assert_close(motion(frames.cuda(), lengths).cpu(), motion(frames, lengths), rtol=0, atol=0)


def test_greys_that_a_decoder_made_give_the_same_score():
    generator = torch.Generator().manual_seed(4)
    frames = [
        torch.randint(0, 256, (n, 180, 320, 3), dtype=torch.uint8, generator=generator) for n in (7, 12)
    ]
    clips = [
        ClipFrames(Clip(str(len(f)), "v", 0, len(f), 6.0), f, np.arange(len(f)) / 6, (0, 40, 180, 240), greys)
        for f in frames
        for greys in (None, camera.small_greys(f))
    ]
    plain = motion_scores(clips)
    assert (motion_scores(clips, used_greys(clips)) == plain).all()
    assert plain[0] == plain[1] > 0 and plain[2] == plain[3]
