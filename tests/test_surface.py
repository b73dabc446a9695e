"""Surfaces become the frames that swscale makes of the same picture, and the grey levels of those frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from ego2robot_kernels.motion import grey_small
from ego2robot_kernels.surface import Geometry, area_taps, convert_surfaces, factors
from hypothesis import given, settings
from hypothesis import strategies as st

from ego2robot.decode.picture import QUALITY
from tests.footage import textured_frame, write_video
from tests.triton_kernels import UNSHRUNK, compile_for_hopper, device, on_device, on_gpu, run_interpreted

SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"
MATRIX = {"bt601": 5, "bt709": 1, "bt2020": 9}  # ITU-T H.273


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def planes_of(picture: av.VideoFrame) -> tuple[torch.Tensor, torch.Tensor]:
    """Luma [H, W] and chroma [H / 2, W / 2, 2] of an nv12 or p010le picture, its padding kept."""
    dtype = np.dtype(np.uint8 if picture.format.name == "nv12" else np.uint16)
    height, width = picture.height, picture.width
    half = (-(-height // 2), -(-width // 2))
    luma, chroma = (
        torch.from_numpy(
            np.frombuffer(memoryview(p), dtype).reshape(-1, p.line_size // dtype.itemsize).copy()
        )
        for p in picture.planes
    )
    return luma[:height, :width], chroma[: half[0], : 2 * half[1]].unflatten(1, (half[1], 2))


def swscale(picture: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """As ego2robot/decode/picture.py scales: uint8 RGB [height, width, 3]."""
    small = VideoReformatter().reformat(
        picture, width=width, height=height, format="gbrp", interpolation=QUALITY, threads=1
    )
    planes = [np.frombuffer(memoryview(p), np.uint8).reshape(-1, p.line_size) for p in small.planes]
    return np.stack([plane[:height, :width] for plane in planes], -1)[..., [2, 0, 1]]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9)))


def tagged(kind: str, matrix: str, full: bool, width: int, height: int) -> av.VideoFrame:
    """A picture with every legal level of every plane in it; where levels are not, swscale overflows."""
    rng = np.random.default_rng(width)
    source = av.VideoFrame.from_ndarray(textured_frame(3, width, height), format="rgb24")
    picture = VideoReformatter().reformat(source, format=kind)
    for plane in picture.planes:
        samples = np.frombuffer(memoryview(plane), np.uint16 if kind == "p010le" else np.uint8).copy()
        low, high = (0, 256) if full else (16, 236)
        noise = rng.integers(low, high, len(samples) // 2)
        if kind == "p010le":
            noise = (noise << 8) | (rng.integers(0, 4, len(noise)) << 6)  # ten bits count
        samples[len(samples) // 2 :][: len(noise)] = noise
        plane.update(samples.tobytes())
    picture.colorspace, picture.color_range = MATRIX[matrix], 2 if full else 1
    return picture


@pytest.mark.parametrize("kind", ["nv12", "p010le"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_are_ffmpegs(kind: str, matrix: Any, full: bool) -> None:
    """To a level on pictures, to two where half of it is noise at full contrast: weights have 10 and 11 bits
    here, 14 and 12 in swscale, and the matrix doubles what that makes of chroma."""
    picture = tagged(kind, matrix, full, 320, 180)
    luma, chroma = planes_of(picture)
    for height, width in ((180, 320), (60, 96), (270, 400)):
        frames, _ = convert_surfaces(
            [luma], [chroma], height=height, width=width, content=(0, 0, height, width), matrix=matrix,
            full_range=full, siting="center",
        )  # fmt: skip
        expected = swscale(picture, height, width)
        difference = np.abs(frames[0].numpy().astype(int) - expected)
        assert difference.max() <= (1 if width == 320 else 2)
        assert difference[: height // 2 - 4].max() <= 1
        assert psnr(frames[0].numpy(), expected) > 58


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_decoded_video_becomes_what_the_cpu_decoders_give(tmp_path: Path, codec: str) -> None:
    path = write_video(tmp_path / "x.mp4", 3, 642, 362, codec=codec)
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    for picture in pictures:
        luma, chroma = planes_of(VideoReformatter().reformat(picture, format="nv12"))
        frames, _ = convert_surfaces(
            [luma],
            [chroma],
            height=200,
            width=320,
            content=(10, 0, 180, 320),
            matrix="bt601",
            full_range=False,
        )
        assert psnr(frames[0, 10:190].numpy(), swscale(picture, 180, 320)) > 60
        assert not frames[0, :10].any()
        assert not frames[0, 190:].any()


def test_frames_of_the_mixer_clip_are_those_of_the_cpu_decoders() -> None:
    path = SAMPLES / "two_hands_mixer_20s.mp4"
    if not path.is_file():
        pytest.skip("shared/samples is not here")
    with av.open(str(path)) as container:
        pictures = [picture for i, picture in enumerate(container.decode(video=0)) if i % 60 == 0]
    assert len(pictures) > 3
    converted = [planes_of(VideoReformatter().reformat(picture, format="nv12")) for picture in pictures]
    frames, _ = convert_surfaces(
        [luma for luma, _ in converted], [chroma for _, chroma in converted], height=360, width=640,
        content=(0, 58, 360, 524), matrix="bt601", full_range=False,
    )  # fmt: skip
    for frame, picture in zip(frames[:, :, 58:582].numpy(), pictures, strict=True):
        assert psnr(frame, swscale(picture, 360, 524)) > 65


def noise(shape: tuple[int, ...], deep: bool, seed: int = 0) -> torch.Tensor:
    dtype = np.uint16 if deep else np.uint8
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    )


BASE: dict[str, Any] = {
    "height": 48, "width": 64, "content": (4, 8, 40, 48), "matrix": "bt709", "full_range": False
}  # fmt: skip


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_surfaces_are_turned_frames(turns: int) -> None:
    luma, chroma = noise((70, 90), False), noise((35, 45, 2), False, 1)
    sideways = turns % 2 == 1
    content = (4, 8, 32, 48)
    turned, _ = convert_surfaces([luma], [chroma], **{**BASE, "content": content, "rotation": 90 * turns})
    size = (48, 32) if sideways else (32, 48)
    upright, _ = convert_surfaces(
        [luma], [chroma], **{**BASE, "height": size[0], "width": size[1], "content": (0, 0, *size)}
    )
    np.testing.assert_array_equal(turned[0, 4:36, 8:56].numpy(), np.rot90(upright[0].numpy(), -turns))


def test_a_crop_is_the_surface_without_its_margin_and_lists_are_batches() -> None:
    luma, chroma = noise((3, 70, 90), True), noise((3, 35, 45, 2), True, 1)
    cropped, grey = convert_surfaces(luma, chroma, **BASE, crop=(2, 4, 61, 83))
    inner = [y[2:63, 4:87] for y in luma], [uv[1:32, 2:44] for uv in chroma]
    out = torch.full((3, 60, 64, 3), 9, dtype=torch.uint8)
    drawn, same_grey = convert_surfaces(*inner, **BASE, out=out[:, 6:54])
    assert drawn.data_ptr() == out[:, 6:].data_ptr()
    assert torch.equal(drawn, cropped)
    assert torch.equal(same_grey, grey)
    assert bool((out[:, :6] == 9).all())
    assert bool((out[:, 54:] == 9).all())
    empty, no_grey = convert_surfaces([], [], **BASE)
    assert empty.shape == (0, 48, 64, 3)
    assert no_grey.shape == (0, 90, 160)


def test_greys_are_those_of_the_frames() -> None:
    luma, chroma = noise((2, 70, 90), False), noise((2, 35, 45, 2), False, 1)
    for height, width in ((48, 64), (360, 640)):
        where = {"height": height, "width": width, "content": (4, 8, height - 8, width - 16)}
        frames, grey = convert_surfaces(luma, chroma, **{**BASE, **where})
        np.testing.assert_array_equal(grey.numpy(), grey_small(frames))


@given(
    n=st.integers(1, 2000),
    target=st.integers(1, 700),
    at=st.sampled_from([0.25, 0.5]),
    bits=st.integers(8, 11),
)
@settings(max_examples=60, deadline=None)
def test_taps_add_up_and_stay_inside(n: int, target: int, at: float, bits: int) -> None:
    first, *weights = area_taps(n, target, at, bits)
    assert first.min() >= 0
    assert (first + len(weights)).max() <= n
    np.testing.assert_array_equal(np.sum(weights, axis=0), 1 << bits)
    assert np.min(weights) >= 0
    # The middle of mass is the middle of the pixel, but for the ends and rounding.
    middle = ((first + np.arange(len(weights))[:, None] + at) * weights).sum(0) / (1 << bits)
    pixel = (np.arange(target) + 0.5) * n / target
    slack = 0.5 + n / target * 2.0**-bits * 4
    assert np.abs(middle - pixel).max() <= slack + max(0.0, 0.5 - at)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"luma": torch.zeros(1, 8, 8)}, "luma is uint8"),
        ({"chroma": torch.zeros(1, 4, 5, 2, dtype=torch.uint8)}, "chroma of luma"),
        ({"luma": torch.zeros(2, 8, 8, dtype=torch.uint8)}, "2 planes of luma and 1"),
        ({"chroma": torch.zeros(1, 4, 4, 2, dtype=torch.uint16)}, "chroma is"),
        ({"rotation": 45}, "rotation"),
        ({"matrix": "srgb"}, "matrix"),
        ({"siting": "right"}, "siting"),
        ({"content": (0, 0, 49, 64)}, "content"),
        (
            {
                "luma": torch.zeros(1, 2, 70000, dtype=torch.uint8),
                "chroma": torch.zeros(1, 1, 35000, 2, dtype=torch.uint8),
            },
            "too large",
        ),
        ({"crop": (0, 1, 4, 4)}, "crop"),
        ({"crop": (0, 0, 9, 8)}, "crop"),
        ({"out": torch.zeros(1, 48, 63, 3, dtype=torch.uint8)}, "out is uint8"),
        ({"out": torch.zeros(1, 3, 48, 64, dtype=torch.uint8).permute(0, 2, 3, 1)}, "packed"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    planes = {
        "luma": torch.zeros(1, 8, 8, dtype=torch.uint8),
        "chroma": torch.zeros(1, 4, 4, 2, dtype=torch.uint8),
    }
    arguments = {**planes, **BASE, **change}
    with pytest.raises(ValueError, match=message):
        convert_surfaces(arguments.pop("luma"), arguments.pop("chroma"), **arguments)


def test_surfaces_of_a_batch_are_alike() -> None:
    luma = [torch.zeros(8, s, dtype=torch.uint8) for s in (8, 6)]
    chroma = [torch.zeros(4, s, 2, dtype=torch.uint8) for s in (4, 3)]
    with pytest.raises(ValueError, match="differ in size"):
        convert_surfaces(luma, chroma, **BASE)


def converted_by_kernel(luma: Any, chroma: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """On a GPU the public way; in the interpreter, whose tensors are on the CPU, the kernel by name."""
    if device() == "cuda":
        planes = [
            on_gpu(p) if isinstance(p, torch.Tensor) else [on_gpu(q) for q in p] for p in (luma, chroma)
        ]
        frames, grey = convert_surfaces(*planes, **arguments)
        return frames.cpu(), grey.cpu()
    from ego2robot_kernels import surface_triton

    n, (height, width) = len(luma), (arguments["height"], arguments["width"])
    frames = torch.full((n, height, width, 3), 77, dtype=torch.uint8)
    grey = torch.full((n, 90, 160), 77, dtype=torch.uint8)
    crop = arguments["crop"] or (0, 0, *luma[0].shape)
    geometry = Geometry(
        crop[2:], (height, width), arguments["content"], arguments["rotation"] // 90, arguments["siting"]
    )
    colour = factors(arguments["matrix"], arguments["full_range"])
    surface_triton.convert(luma, chroma, crop[:2], geometry, colour, frames, grey)
    return frames, grey


@st.composite
def calls(draw: Any) -> tuple[Any, Any, dict[str, Any]]:
    n = draw(st.integers(1, 3))
    deep, odd = draw(st.booleans()), draw(st.booleans())
    high, wide = draw(st.integers(1, 20)), draw(st.integers(1, 30))
    pitch = draw(st.integers(0, 5))
    luma = noise((n, high + 2, wide + 2 + pitch), deep, draw(st.integers(0, 9)))[:, :, : wide + 2]
    half = (-(-(high + 2) // 2), -(-(wide + 2) // 2))
    # Pairs that begin at an odd sample cannot be read as one.
    flat = noise((n, half[0], 2 * half[1] + 2 * pitch + odd), deep, 3)[:, :, odd : odd + 2 * half[1]]
    chroma = flat.unflatten(2, (half[1], 2))
    height, width = draw(st.integers(8, 24)), draw(st.integers(8, 140))
    top, left = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    content = (top, left, height - top - draw(st.integers(0, 2)), width - left - draw(st.integers(0, 2)))
    crop = draw(st.sampled_from([None, (0, 2, high, wide), (2, 0, high, wide)]))
    arguments = {
        "height": height, "width": width, "content": content, "crop": crop,
        "rotation": draw(st.sampled_from([0, 90, 180, 270])),
        "siting": draw(st.sampled_from(["left", "center"])),
        "matrix": draw(st.sampled_from(list(MATRIX))), "full_range": draw(st.booleans()),
    }  # fmt: skip
    return (luma, chroma, arguments) if draw(st.booleans()) else (list(luma), list(chroma), arguments)


@on_device
@given(call=calls())
@settings(max_examples=4, deadline=None, derandomize=True, **UNSHRUNK)
def test_kernel_equals_the_reference_on_device(call: tuple[Any, Any, dict[str, Any]]) -> None:
    luma, chroma, arguments = call
    expected = convert_surfaces(luma, chroma, **arguments)
    for ours, reference in zip(converted_by_kernel(luma, chroma, **arguments), expected, strict=True):
        assert torch.equal(ours, reference)


@on_device
def test_many_tiny_surfaces_on_device() -> None:
    n = 512 if device() == "cuda" else 24
    luma, chroma = noise((n, 4, 6), False), noise((n, 2, 3, 2), False, 1)
    arguments = {**BASE, "height": 8, "width": 128, "content": (0, 0, 8, 12), "crop": None, "rotation": 0}
    arguments["siting"] = "topleft"
    expected = convert_surfaces(luma, chroma, **arguments)
    for ours, reference in zip(converted_by_kernel(luma, chroma, **arguments), expected, strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deep", [False, True])
def test_full_size_on_device(deep: bool) -> None:
    luma, chroma = noise((4, 1088, 2048), deep)[:, :, :1920], noise((4, 544, 1024, 2), deep, 1)[:, :, :960]
    arguments = {
        **BASE, "height": 360, "width": 640, "content": (0, 0, 360, 640), "crop": (0, 0, 1080, 1920),
        "rotation": 0, "siting": "left",
    }  # fmt: skip
    expected = convert_surfaces(luma, chroma, **arguments)
    for ours, reference in zip(converted_by_kernel(luma, chroma, **arguments), expected, strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel's own tests run on the GPU")
def test_kernel_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize(("deep", "pairs", "turns"), [(False, True, 0), (True, False, 3)])
def test_kernel_compiles_for_hopper(deep: bool, pairs: bool, turns: int) -> None:
    pytest.importorskip("triton")
    from ego2robot_kernels.surface_triton import _surface_kernel

    packs = ("surface_ptr", "luma_y", "luma_x", "chroma_y", "chroma_x")
    tables = ("colour_ptr", "grey_y", "grey_x")
    pointers = {"out_ptr": "*u8", "grey_ptr": "*u8"}
    pointers |= {**dict.fromkeys(packs, "*i64"), **dict.fromkeys(tables, "*i32")}
    taps = {"LY": 3, "LX": 3, "CY": 2, "CX": 3}
    tile = {"ROWS": 8, "COLUMNS": 128, "GREY_ROWS": 2, "GREY_COLUMNS": 32}
    how = {"TURNS": turns, "PAIRS": pairs, "DEEP": deep}
    assert "ld.global" in compile_for_hopper(_surface_kernel, pointers, {**taps, **tile, **how}).asm["ptx"]
