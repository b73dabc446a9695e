"""Small pictures are Pillow's byte for byte, and pixels are what the Hugging Face processors give."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from ego2robot.errors import UserError
from ego2robot.stages.preprocess import (
    CLIP_PICTURE,
    VIDEOMAE_PICTURE,
    CLIPPreprocess,
    Picture,
    VideoMAEPreprocess,
    read_picture,
    resize_and_crop,
)

SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"
RNG = np.random.default_rng(11)
SIZES = [
    (360, 640),
    (640, 360),
    (224, 224),
    (224, 398),
    (100, 77),
    (223, 301),
    (1080, 1920),
    (225, 224),
    (60, 500),
]
# Not over twice as tall as wide: there Pillow 13 turned its two passes round.
SIZES += [(int(h), int(w)) for h, w in RNG.integers(20, 700, (12, 2)) if h <= 2 * w]


def noise(n: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(
        0, 256, (n, height, width, 3), dtype=np.uint8
    )


def pillow(frame: np.ndarray, picture: Picture) -> np.ndarray:
    image = Image.fromarray(frame)
    edge, (short, long) = picture.shortest_edge, sorted(image.size)
    longer = int(edge * long / short)
    size = (edge, longer) if image.width <= image.height else (longer, edge)
    resample = Image.Resampling.BICUBIC if picture.resample == "bicubic" else Image.Resampling.BILINEAR
    resized = np.asarray(image.resize(size, resample))
    top, left = (resized.shape[0] - picture.crop[0]) // 2, (resized.shape[1] - picture.crop[1]) // 2
    return resized[top : top + picture.crop[0], left : left + picture.crop[1]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_resize_is_pillows_byte_for_byte(size: tuple[int, int], resample: Any) -> None:
    frames = noise(2, *size)
    # Black and white stripes: bicubic overshoots, so both passes have to clamp.
    frames[1] = np.where(np.arange(size[1])[:, None] // 9 % 2, 255, 0)
    for picture in (Picture(resample=resample), Picture(97, (96, 64), resample)):
        small = resize_and_crop(torch.from_numpy(frames), picture)
        assert small.dtype == torch.uint8
        assert small.is_contiguous()
        np.testing.assert_array_equal(small.numpy(), [pillow(frame, picture) for frame in frames])


def test_views_and_no_frames_are_prepared_too() -> None:
    frames = torch.from_numpy(noise(6, 120, 200))
    view = frames[::2, 3:, 5:-4]
    np.testing.assert_array_equal(
        resize_and_crop(view, Picture()), resize_and_crop(view.contiguous(), Picture())
    )
    assert resize_and_crop(frames[:0], Picture()).shape == (0, 224, 224, 3)


@pytest.mark.parametrize("size", [(360, 640), (480, 270), (301, 223)])
def test_pixels_are_those_of_the_videomae_processor(size: tuple[int, int]) -> None:
    frames = noise(3, *size)
    expected = VideoMAEImageProcessorPil()(list(frames), return_tensors="pt")["pixel_values"][0]
    ours = VIDEOMAE_PICTURE.normalise(VideoMAEPreprocess().prepare(torch.from_numpy(frames)))
    assert ours.shape == (3, 3, 224, 224)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(360, 640), (480, 270), (301, 223)])
def test_pixels_are_those_of_the_clip_processor(size: tuple[int, int]) -> None:
    frames = noise(2, *size)
    expected = CLIPImageProcessorPil()(list(frames), return_tensors="pt")["pixel_values"]
    ours = CLIP_PICTURE.normalise(CLIPPreprocess().prepare(torch.from_numpy(frames)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_a_photograph_is_prepared_as_the_processors_do() -> None:
    path = SAMPLES / "hand_rock.jpg"
    if not path.is_file():
        pytest.skip("shared/samples is not here")
    frame = np.asarray(Image.open(path).convert("RGB"))
    expected = CLIPImageProcessorPil()(frame, return_tensors="pt")["pixel_values"]
    ours = CLIP_PICTURE.normalise(CLIPPreprocess().prepare(torch.from_numpy(frame.copy())[None]))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("n", [2, 10, 16, 35, 36, 100])
def test_videomae_looks_at_sixteen_frames_from_first_to_last(n: int) -> None:
    indices = VideoMAEPreprocess().indices(n)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices, np.linspace(0, n - 1, 16).astype(int))
    assert indices[0] == 0
    assert indices[-1] == n - 1


@pytest.mark.parametrize("n", [1, 2, 10, 35, 36])
def test_clip_looks_at_the_middle_or_at_frames_spread_evenly(n: int) -> None:
    assert CLIPPreprocess(n_frames=1).indices(n).tolist() == [n // 2]
    for parts in (2, 3, 8):
        indices = CLIPPreprocess(n_frames=parts).indices(n)
        assert len(indices) == parts
        assert indices.min() >= 0
        assert indices.max() < n
        middles = (np.arange(parts) + 0.5) * n / parts
        assert np.all(np.abs(indices - middles) <= 1)


def test_preprocessing_travels_to_the_decoding_process() -> None:
    ours = CLIPPreprocess(n_frames=3, picture=Picture(97, (96, 64), "bicubic"))
    assert len(pickle.dumps(ours)) < 1000
    assert pickle.loads(pickle.dumps(ours)) == ours


def test_pictures_are_read_from_what_transformers_saves(tmp_path: Path) -> None:
    assert read_picture(tmp_path, CLIP_PICTURE) == CLIP_PICTURE
    VideoMAEImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 192},
        image_mean=[0.1, 0.2, 0.3],
        resample=3,
    ).save_pretrained(tmp_path)
    found = read_picture(tmp_path, VIDEOMAE_PICTURE)
    assert found == Picture(256, (224, 192), "bicubic", (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_old_and_nested_configurations_are_understood(tmp_path: Path) -> None:
    old = {
        "size": 256,
        "crop_size": 224,
        "do_center_crop": True,
        "resample": 3,
        "feature_extractor_type": "X",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert read_picture(tmp_path, VIDEOMAE_PICTURE).shortest_edge == 256
    nested = {"image_processor": {"size": {"shortest_edge": 230}, "resample": 2}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_picture(tmp_path, CLIP_PICTURE).shortest_edge == 230
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert read_picture(tmp_path, CLIP_PICTURE).shortest_edge == 256


@pytest.mark.parametrize(
    "tree",
    [
        {"size": {"height": 224, "width": 224}},
        {"size": "big"},
        {"size": {"shortest_edge": 0}},
        {"size": {"shortest_edge": 200}},
        {"crop_size": {"height": 224}},
        {"resample": 1},
        {"resample": "bilinear"},
        {"do_center_crop": False},
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"rescale_factor": "x"},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_mean": ["a", "b", "c"]},
        [],
    ],
)
def test_a_step_that_is_not_done_here_is_refused_in_one_line(tmp_path: Path, tree: Any) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"preprocessor_config\.json") as error:
        read_picture(tmp_path, VIDEOMAE_PICTURE)
    assert "\n" not in str(error.value)


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not JSON"):
        read_picture(tmp_path, CLIP_PICTURE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bytes() -> None:
    frames = torch.from_numpy(noise(4, 360, 640))
    for preprocess in (VideoMAEPreprocess(), CLIPPreprocess()):
        assert torch.equal(preprocess.prepare(frames.cuda()).cpu(), preprocess.prepare(frames))
