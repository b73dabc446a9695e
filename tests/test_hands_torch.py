"""The batched hand detector: what MediaPipe finds, in batches, and nothing in pictures without hands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ego2robot import models
from ego2robot.errors import UserError
from ego2robot.hands_net import landmark, onednn, palm, sampling
from ego2robot.hands_net.captured import Captured
from ego2robot.hands_net.pipeline import FoundHands, HandNet
from ego2robot.sample import make_footage
from ego2robot.stages.hands import visibility
from ego2robot.stages.hands_torch import TorchHands, default_dtype
from ego2robot.types import Hand

if TYPE_CHECKING:
    from tests.mediapipe_reference import MediaPipeHands

SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples beside the project")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def networks() -> dict[str, Path]:
    try:
        return {
            n.file: models.network_path(n.file, pull_if_missing=True)
            for n in models.NETWORKS + models.OTHER_NETWORKS
        }
    except UserError as error:
        pytest.skip(f"the networks cannot be had: {error}")


@pytest.fixture(scope="module")
def detector(networks: dict[str, Path]) -> TorchHands:
    return TorchHands(dtype=torch.float32)


@pytest.fixture(scope="module")
def mediapipe(networks: dict[str, Path]) -> Iterator[MediaPipeHands]:
    pytest.importorskip("mediapipe", exc_type=ImportError)
    from tests.mediapipe_reference import MediaPipeHands

    with MediaPipeHands() as found:
        yield found


def net(networks: dict[str, Path], size: str = "full", **options: Any) -> HandNet:
    return HandNet(
        networks[f"palm_detection_{size}.tflite"], networks[f"hand_landmark_{size}.tflite"], **options
    )


def fit(image: Image.Image) -> np.ndarray:
    scale = min(640 / image.width, 360 / image.height)
    size = round(image.width * scale / 2) * 2, round(image.height * scale / 2) * 2
    return np.array(image.convert("RGB").resize(size, Image.Resampling.BOX))


def frames_of(path: Path, every: int) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [fit(f.to_image()) for i, f in enumerate(container.decode(video=0)) if i % every == 0]
    return torch.from_numpy(np.stack(frames))


@pytest.fixture(scope="module")
def mixer() -> torch.Tensor:
    """uint8 [21, 360, 524, 3]: two hands on a table."""
    if not SAMPLES.is_dir():
        pytest.skip("no ../shared/samples beside the project")
    return frames_of(SAMPLES / "two_hands_mixer_20s.mp4", 10)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """uint8 [T, 360, 640, 3] with drawn hands, and without any."""
    footage = make_footage(tmp_path_factory.mktemp("footage"), minutes=0.27, width=640, height=360, fps=5)
    return frames_of(footage.videos[0], 2)


def photograph(name: str) -> torch.Tensor:
    return torch.from_numpy(fit(Image.open(SAMPLES / name)))[None]


def copies(frames: torch.Tensor) -> dict[str, torch.Tensor]:
    tilted = [np.array(Image.fromarray(f.numpy()).rotate(25, Image.Resampling.BILINEAR)) for f in frames]
    return {
        "as they are": frames,
        "on the side": frames.rot90(1, (1, 2)),
        "upside down": frames.flip(1, 2),
        "tilted": torch.from_numpy(np.stack(tilted)),
        "mirrored": frames.flip(2),
        "half as large": frames[:, ::2, ::2],
        "darkened": (frames * 0.35).to(torch.uint8),
    }


class Agreement:
    """Sums over frames that two detectors looked at."""

    def __init__(self) -> None:
        self.presence: list[bool] = []
        self.sides: list[bool] = []
        self.errors_px: list[float] = []

    def add(self, found: list[list[Hand]], wanted: list[list[Hand]], height: int, width: int) -> None:
        scale = min(640 / width, 360 / height) * np.array([width, height])
        for ours, theirs in zip(found, wanted, strict=True):
            self.presence.append(bool(ours) == bool(theirs))
            for hand in ours:
                errors = [
                    float(np.linalg.norm((hand.landmarks - t.landmarks)[:, :2] * scale, axis=1).mean())
                    for t in theirs
                ]
                if errors and min(errors) < 40:
                    self.errors_px.append(min(errors))
                    self.sides.append(hand.side == theirs[int(np.argmin(errors))].side)


def compare(a: Any, b: Any, sets: list[torch.Tensor]) -> Agreement:
    total = Agreement()
    for frames in sets:
        every = np.arange(len(frames))
        total.add(a.detect(frames, every), b.detect(frames, every), *frames.shape[1:3])
    return total


# -- what MediaPipe finds ---------------------------------------------------------------------------


@needs_samples
def test_finds_what_mediapipe_finds(
    detector: TorchHands, mediapipe: MediaPipeHands, mixer: torch.Tensor
) -> None:
    sets = list(copies(mixer[::2]).values())
    for name in ("hand_call.jpg", "hand_four.jpg", "hand_rock.jpg"):
        sets += list(copies(photograph(name)).values())
    found = compare(detector, mediapipe, sets)
    assert len(found.presence) == 7 * (11 + 3)
    assert len(found.errors_px) > 140, "hands are missing, or elsewhere"
    assert np.mean(found.presence) >= 0.98
    assert np.mean(found.errors_px) <= 0.5, "1.5 pixels of 640 x 360 are allowed, 0.12 were measured"
    assert np.mean(found.sides) >= 0.98


def test_finds_drawn_hands_where_mediapipe_does(
    detector: TorchHands, mediapipe: MediaPipeHands, generated: torch.Tensor
) -> None:
    found = compare(detector, mediapipe, [generated])
    assert len(found.errors_px) > 10, "the footage shows no hands"
    assert np.mean(found.presence) >= 0.98
    assert np.mean(found.errors_px) <= 0.5
    assert np.mean(found.sides) >= 0.98


@needs_samples
@pytest.mark.parametrize(
    ("name", "side"), [("hand_call.jpg", "left"), ("hand_four.jpg", "left"), ("hand_rock.jpg", "right")]
)
def test_gestures_of_known_side(
    detector: TorchHands, mediapipe: MediaPipeHands, name: str, side: str
) -> None:
    picture = photograph(name)
    (hand,) = detector.detect(picture, np.array([0]))[0]
    (theirs,) = mediapipe.detect(picture, np.array([0]))[0]
    assert hand.side == theirs.side == side
    assert 0.5 < hand.presence < 1
    assert hand.score == pytest.approx(theirs.score, abs=0.02)
    np.testing.assert_allclose(hand.world, theirs.world, atol=0.008)
    np.testing.assert_allclose(hand.landmarks[:, :2], theirs.landmarks[:, :2], atol=0.006)
    np.testing.assert_allclose(hand.landmarks[:, 2], theirs.landmarks[:, 2], atol=0.02)
    np.testing.assert_allclose(hand.box, theirs.box, atol=0.006)
    (mirrored,) = detector.detect(picture.flip(2), np.array([0]))[0]
    assert mirrored.side != side


@needs_samples
@pytest.mark.parametrize("min_presence", [0.5, 0.98])
def test_thresholds_are_mediapipes(
    networks: dict[str, Path], mixer: torch.Tensor, min_presence: float
) -> None:
    pytest.importorskip("mediapipe", exc_type=ImportError)
    from tests.mediapipe_reference import MediaPipeHands

    every = np.arange(0, len(mixer), 3)
    ours = TorchHands(1, 0.8, min_presence).detect(mixer, every)
    with MediaPipeHands(1, 0.8, min_presence) as reference:
        theirs = reference.detect(mixer, every)
    assert max(map(len, ours)) == 1
    assert np.mean([len(a) == len(b) for a, b in zip(ours, theirs, strict=True)]) >= 0.85


# -- one frame, many frames -------------------------------------------------------------------------


def assert_same(found: list[list[Hand]], wanted: list[list[Hand]]) -> None:
    """To the last bit."""
    assert [[(h.frame, h.side) for h in f] for f in found] == [[(h.frame, h.side) for h in f] for f in wanted]
    for a, b in zip(found, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x.score, x.presence) == (y.score, y.presence)
            for name in ("box", "landmarks", "world"):
                np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


@needs_samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frame_does_not_depend_on_the_others(
    networks: dict[str, Path], mixer: torch.Tensor, generated: torch.Tensor, dtype: torch.dtype
) -> None:
    if not onednn.available(dtype):
        pytest.skip("without oneDNN a batch's size shows in the last bits")
    looked = np.array([3, 9, 7, 1, 0, 2, 11, 7, 5])
    wanted = [
        hands for i in looked for hands in TorchHands(dtype=dtype, frames_per_pass=1).detect(mixer, [i])
    ]
    assert sum(map(len, wanted)) > 12
    detector = TorchHands(dtype=dtype)
    assert_same(detector.detect(mixer, looked), wanted)
    assert_same(TorchHands(dtype=dtype, frames_per_pass=5).detect(mixer, looked), wanted)
    none = np.array([], np.int64)
    others = detector.detect(generated, np.arange(3))
    bars = (0, 6, 360, 512)  # another size of picture in frames of the same size
    within = detector.detect(mixer, looked[:2], bars)
    found = detector.detect_batch(
        [
            (mixer, looked[:3], None),
            (generated, np.arange(3), None),
            (mixer, none, None),
            (mixer, looked[:2], bars),
            (mixer, looked[3:], None),
            (mixer.to(torch.float32), looked[:1], None),
        ]
    )
    assert list(map(len, found)) == [3, 3, 0, 2, 6, 1]
    assert_same(found[0] + found[4], wanted)
    assert_same(found[1], others)
    assert_same(found[3], within)
    assert_same(found[5], wanted[:1])


def test_frames_of_many_clips_share_the_passes(
    networks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    forward = HandNet.forward

    def counted(self: HandNet, frames_BHWC: torch.Tensor) -> FoundHands:
        passes.append(len(frames_BHWC))
        return forward(self, frames_BHWC)

    monkeypatch.setattr(HandNet, "forward", counted)
    frames = torch.zeros((9, 36, 64, 3), dtype=torch.uint8)
    detector = TorchHands(networks="lite")
    clips = [(frames, np.arange(n), None) for n in (5, 1, 9, 0, 4)]
    assert [len(found) for found in detector.detect_batch(clips)] == [5, 1, 9, 0, 4]
    assert passes == [8, 8, 3]
    assert detector.detect_batch([]) == []


@needs_samples
def test_strides_and_kinds_of_numbers_make_no_difference(detector: TorchHands, mixer: torch.Tensor) -> None:
    view = mixer[2:4, 4:350, 10:500]
    planar = view.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    every = np.arange(2)
    wanted = detector.detect(view.clone(), every)
    assert sum(map(len, wanted)) >= 3
    for frames in (view, planar, view.to(torch.float32)):
        for a, b in zip(detector.detect(frames, every), wanted, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x.landmarks, y.landmarks)


@needs_samples
def test_bars_beside_the_picture_move_the_hands_and_hide_none(
    detector: TorchHands, mixer: torch.Tensor
) -> None:
    _, height, width, _ = mixer.shape
    padded = torch.full((len(mixer), 400, 640, 3), 200, dtype=torch.uint8)
    padded[:, 20 : 20 + height, 76 : 76 + width] = mixer
    some = np.arange(0, len(mixer), 4)
    bare = detector.detect(mixer, some)
    boxed = detector.detect(padded, some, (20, 76, height, width))
    assert visibility(bare) == 1.0
    for before, after in zip(bare, boxed, strict=True):
        assert [h.side for h in after] == [h.side for h in before]
        for a, b in zip(before, after, strict=True):
            x, y, z = a.landmarks.T
            expected = np.stack([(76 + x * width) / 640, (20 + y * height) / 400, z * width / 640], 1)
            np.testing.assert_allclose(b.landmarks, expected, atol=1e-6)
            np.testing.assert_array_equal(b.world, a.world)


@needs_samples
def test_looking_in_every_slot_finds_the_same(networks: dict[str, Path], mixer: torch.Tensor) -> None:
    frames = torch.cat([mixer[:3], torch.zeros_like(mixer[:1])])
    some, every = net(networks)(frames), net(networks, every_slot=True)(frames)
    assert some.present_BK.sum() >= 5 and not some.present_BK[3].any()
    torch.testing.assert_close(some.present_BK, every.present_BK)
    for name in ("presence_BK", "left_BK", "landmarks_BKL3", "world_BKL3"):
        a, b = getattr(some, name)[some.present_BK], getattr(every, name)[some.present_BK]
        torch.testing.assert_close(a, b, atol=0.2, rtol=0)


@needs_samples
def test_with_every_slot_nothing_waits_for_the_host(
    networks: dict[str, Path], mixer: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: without oneDNN. A graph that is whole has no value of a tensor read by Python in it.
    monkeypatch.setattr(onednn, "available", lambda dtype: False)
    whole = net(networks, "lite", every_slot=True)
    compiled = torch.compile(whole, fullgraph=True, backend="eager")
    wanted, found = whole(mixer[:2]), compiled(mixer[:2])
    assert isinstance(found, FoundHands)
    torch.testing.assert_close(found.landmarks_BKL3, wanted.landmarks_BKL3, atol=0.2, rtol=0)


@needs_samples
def test_the_lite_pair_finds_hands_too(networks: dict[str, Path], mixer: torch.Tensor) -> None:
    full, lite = net(networks)(mixer[:4]), net(networks, "lite")(mixer[:4])
    both = full.present_BK[:, 0] & lite.present_BK[:, 0]
    assert both.all()
    apart = (full.landmarks_BKL3[..., None, :, :2] - lite.landmarks_BKL3[:, None, ..., :2]).norm(dim=-1)
    assert apart.mean(-1).amin((1, 2)).max() < 15


def test_networks_in_each_others_place_are_refused(networks: dict[str, Path]) -> None:
    path = networks["face_detection_short_range.tflite"]
    with pytest.raises(
        UserError, match=r"face_detection_short_range\.tflite: takes pictures of \(128, 128\)"
    ):
        HandNet(path, path)


# -- half precision ---------------------------------------------------------------------------------


@needs_samples
def test_bfloat16_changes_little(
    networks: dict[str, Path], detector: TorchHands, mixer: torch.Tensor, generated: torch.Tensor
) -> None:
    if not onednn.available(torch.bfloat16):
        pytest.skip("this CPU multiplies no bfloat16")
    found = compare(TorchHands(dtype=torch.bfloat16), detector, [mixer, mixer.flip(1, 2), generated])
    assert np.mean(found.presence) >= 0.995
    assert np.mean(found.errors_px) <= 0.5
    assert np.mean(found.sides) >= 0.95  # upside down, hands of either side look alike
    assert max(found.errors_px) > 0, "it computed in float32"


@needs_samples
def test_float16_changes_next_to_nothing(networks: dict[str, Path], mixer: torch.Tensor) -> None:
    frames = mixer[::7]  # few: most CPUs have no arithmetic for it
    wanted = net(networks, "lite")(frames)
    found = net(networks, "lite", dtype=torch.float16)(frames)
    torch.testing.assert_close(found.present_BK, wanted.present_BK)
    apart = (found.landmarks_BKL3 - wanted.landmarks_BKL3)[wanted.present_BK][..., :2].norm(dim=-1)
    assert 0 < apart.mean() <= 0.5


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ((), torch.float32),
        (("_is_avx512_bf16_supported",), torch.bfloat16),
        (("_is_amx_tile_supported",), torch.bfloat16),
    ],
)
def test_precision_is_the_devices_own(
    instructions: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)
    assert default_dtype("cpu") == default_dtype(torch.device("cpu")) == dtype
    assert default_dtype("cuda") == default_dtype("cuda:1") == torch.float16


# -- without oneDNN ---------------------------------------------------------------------------------


@needs_samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_torch_without_onednn_finds_the_same(
    networks: dict[str, Path], mixer: torch.Tensor, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    wanted = net(networks, "lite")(mixer[:3])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn.available(dtype)
    plain = net(networks, "lite", dtype=dtype)
    assert not any("mkldnn" in str(node.target) for node in plain.landmark.graph.nodes)
    found = plain(mixer[:3])
    torch.testing.assert_close(found.present_BK, wanted.present_BK)
    apart = (found.landmarks_BKL3 - wanted.landmarks_BKL3)[wanted.present_BK][..., :2].norm(dim=-1)
    assert apart.mean() < (0.05 if dtype == torch.float32 else 1.0)


def test_onednn_is_used_for_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not onednn.available(torch.float64)

    class Operators:
        """Of a torch whose oneDNN has no fast bfloat16 and does not say whether it has float16."""

        _convolution_pointwise = _convolution_pointwise_ = _reorder_convolution_weight = None

        @staticmethod
        def _is_mkldnn_bf16_supported() -> bool:
            return False

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    assert onednn.available(torch.float32)
    assert not onednn.available(torch.bfloat16)
    assert not onednn.available(torch.float16)
    monkeypatch.delattr(Operators, "_convolution_pointwise")
    assert not onednn.available(torch.float32)


# -- on a GPU ---------------------------------------------------------------------------------------


def test_a_network_that_asks_the_host_is_not_captured(networks: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="asks the host"):
        Captured(net(networks, "lite"), 4)


@needs_samples
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_what_a_cpu_finds(detector: TorchHands, mixer: torch.Tensor) -> None:
    frames = mixer.cuda()
    on_gpu = TorchHands(device="cuda", frames_per_pass=8)
    found = compare(on_gpu, detector, [frames, frames.flip(1, 2)])
    assert np.mean(found.presence) >= 0.995
    assert len(found.errors_px) > 60
    assert np.mean(found.errors_px) <= 0.5
    # Filled up with other frames, in another place of the batch: the same to the last bit.
    assert_same(on_gpu.detect(frames, [7])[0:1], on_gpu.detect(frames, [3, 9, 7])[2:3])


# -- pictures without hands -------------------------------------------------------------------------


def test_pictures_without_hands(detector: TorchHands) -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((1, 1), (2, 3), (17, 31), (360, 640), (64, 2000)):
        frames = torch.stack(
            [
                torch.zeros((height, width, 3), dtype=torch.uint8),
                torch.full((height, width, 3), 255, dtype=torch.uint8),
                torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator),
            ]
        )
        assert detector.detect(frames, np.arange(3)) == [[], [], []]


def test_a_frame_of_8k_is_no_trouble(detector: TorchHands) -> None:
    frames = torch.full((1, 4320, 7680, 3), 90, dtype=torch.uint8)
    assert detector.detect(frames, np.arange(1)) == [[]]


@needs_samples
def test_what_is_not_a_number_is_no_hand_and_spoils_no_other_frame(
    detector: TorchHands, mixer: torch.Tensor
) -> None:
    frames = mixer[:5].to(torch.float32)
    frames[0] = torch.nan
    frames[2, 100, 100, 1] = torch.nan
    frames[4, 0, 0, 0] = torch.inf
    wanted = detector.detect(mixer, np.arange(5))
    found = detector.detect(frames, np.arange(5))
    assert [bool(hands) for hands in found] == [False, True, False, True, False]
    for i in (1, 3):
        assert [h.side for h in found[i]] == [h.side for h in wanted[i]]
        for a, b in zip(found[i], wanted[i], strict=True):
            np.testing.assert_allclose(a.landmarks, b.landmarks, atol=2e-3)


def test_no_frames_no_lists(detector: TorchHands) -> None:
    frames = torch.zeros((4, 36, 64, 3), dtype=torch.uint8)
    assert detector.detect(frames, np.array([], np.int64)) == []


def test_frames_of_another_kind_are_refused(detector: TorchHands) -> None:
    with pytest.raises(ValueError, match=r"int32 \(1, 8, 8, 3\)"):
        detector.detect(torch.zeros((1, 8, 8, 3), dtype=torch.int32), np.array([0]))
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        detector.detect(torch.zeros((1, 3, 8, 8), dtype=torch.uint8), np.array([0]))


def test_a_closed_detector_says_so(networks: dict[str, Path]) -> None:
    with TorchHands() as found:
        pass
    found.close()
    with pytest.raises(ValueError, match="closed"):
        found.detect_batch([])
    with pytest.raises(ValueError, match="closed"):
        found.detect(torch.zeros((1, 8, 8, 3), dtype=torch.uint8), np.array([0]))


def test_models_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="ego2robot models pull"):
        TorchHands()


def test_a_whole_life_of_a_detector_is_silent_and_without_mediapipe(networks: dict[str, Path]) -> None:
    program = (
        "import sys, numpy as np, torch\n"
        "from ego2robot.stages.hands_torch import TorchHands\n"
        "TorchHands().detect(torch.randint(0, 256, (2, 90, 160, 3), dtype=torch.uint8), np.arange(2))\n"
        "assert 'mediapipe' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- the steps one by one ---------------------------------------------------------------------------


def test_pictures_are_sampled_as_opencv_does() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for height, width in ((90, 160), (160, 90), (37, 200)):
        blobs = torch.from_numpy(rng.uniform(0, 255, (3, 3, height // 12, width // 12)))
        blobs = torch.nn.functional.interpolate(blobs, size=(height, width), mode="bicubic").clamp(0, 255)
        frames = blobs.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        planes = sampling.planes(torch.from_numpy(frames))
        side = max(height, width)
        # Centres inside, at the edge and outside; small, large, any rotation.
        rects = np.float32(
            [[80, 45, 60, 0.5], [3, 5, 40, 2], [width + 5, height / 2, 150, -2.5], [30, 30, 9, 3]]
        )
        owners = np.array([0, 2, 1, 2])
        pairs = [
            (frame, (width / 2, height / 2, side, 0.0), cv2.BORDER_CONSTANT, palm.SIZE) for frame in frames
        ]
        pairs += [
            (frames[i], r, cv2.BORDER_REPLICATE, landmark.SIZE) for i, r in zip(owners, rects, strict=True)
        ]
        found = list(sampling.letterbox(torch.from_numpy(frames), palm.SIZE))
        found += list(
            sampling.crops(planes, height, torch.from_numpy(owners), torch.from_numpy(rects), landmark.SIZE)
        )
        for (frame, rect, border, size), ours in zip(pairs, found, strict=True):
            x, y, length, rotation = rect
            corners = cv2.boxPoints(((x, y), (length, length), np.rad2deg(rotation)))
            target = np.float32([[0, size], [0, 0], [size, 0], [size, size]])
            matrix = cv2.getPerspectiveTransform(corners, target)
            theirs = cv2.warpPerspective(
                frame, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=border
            )
            off = np.abs(ours.permute(1, 2, 0).numpy() * 255 - theirs)
            # MediaPipe's OpenCV rounds positions to 1/32 pixel, newer ones do not: 255/32 at the black edge.
            # Half a pixel beside it would be 3 on average.
            assert off.max() <= 9
            assert off.mean() < 0.35


def test_anchors_are_mediapipes() -> None:
    anchors = palm.anchors()
    assert anchors.shape == (2016, 2)
    # Two a cell of 24 x 24, row by row, then six a cell of 12 x 12 (ssd_anchors_calculator.cc).
    np.testing.assert_allclose(
        anchors[[0, 1, 2, 48]], [[1 / 48, 1 / 48]] * 2 + [[3 / 48, 1 / 48], [1 / 48, 3 / 48]]
    )
    np.testing.assert_allclose(
        anchors[[1152, 1157, 1158, 2015]], np.float32([[1, 1], [1, 1], [3, 1], [23, 23]]) / 24
    )


def weighted_nms(boxes: np.ndarray, scores: np.ndarray, points: np.ndarray, limit: float) -> list[Any]:
    """non_max_suppression_calculator.cc, WEIGHTED, one box after the other."""
    left = sorted((i for i in range(len(scores)) if scores[i] >= limit), key=lambda i: -scores[i])
    found = []
    while left:
        best = left[0]
        same = []
        for i in left:
            low = np.maximum(boxes[i, :2], boxes[best, :2])
            high = np.minimum(boxes[i, 2:], boxes[best, 2:])
            shared = np.prod(np.maximum(high - low, 0))
            area = sum(np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (i, best))
            if shared / (area - shared) > 0.3:
                same.append(i)
        found.append((scores[best], np.average(points[same], axis=0, weights=scores[same])))
        left = [i for i in left if i not in same]
    return found


def test_overlapping_palms_are_merged_as_mediapipe_does() -> None:
    rng = np.random.default_rng(3)
    anchors = palm.anchors()
    raw = rng.normal(0, 12, (5, 2016, 18)).astype(np.float32)
    raw[..., 2:4] = rng.uniform(15, 60, (5, 2016, 2))
    logits = rng.normal(-6, 2.2, (5, 2016, 1)).astype(np.float32)
    logits[4] = -9  # nothing there
    found = palm.find(torch.from_numpy(raw), torch.from_numpy(logits), anchors, (360, 640), 3, 0.3)
    points = raw.reshape(5, 2016, 9, 2) / 192
    points = points + np.where(np.arange(9) == 1, 0, 1)[:, None] * anchors.numpy()[:, None]
    scores = 1 / (1 + np.exp(-logits[..., 0]))
    for b in range(5):
        centre, size = points[b, :, 0], points[b, :, 1]
        boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)
        wanted = weighted_nms(boxes, scores[b], points[b], 0.3)[:3]
        assert len(wanted) == (0 if b == 4 else 3)
        assert int((found.score_BK[b] > 0).sum()) == len(wanted)
        for k, (score, merged) in enumerate(wanted):
            assert float(found.score_BK[b, k]) == pytest.approx(score, abs=1e-6)
            # detections_to_rects_calculator.cc and rect_transformation_calculator.cc, in pixels of the frame
            x, y = (merged[0] - 0.5) * 640 + (320, 180)
            w, h = merged[1] * 640
            dx, dy = (merged[4] - merged[2]) * 640
            angle = 90 - np.arctan2(-dy, dx)
            angle -= 2 * np.pi * np.floor((angle + np.pi) / (2 * np.pi))
            expected = [x + 0.5 * h * np.sin(angle), y - 0.5 * h * np.cos(angle), 2.6 * max(w, h), angle]
            np.testing.assert_allclose(found.rect_BK4[b, k], expected, rtol=1e-4, atol=0.02)


def test_a_hand_seen_twice_counts_once() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.uniform(0, 100, (2, 21, 2)).astype(np.float32) + np.float32([[[0, 0]], [[200, 0]]])
    nudged = one + rng.normal(0, 2, one.shape).astype(np.float32)
    hands = torch.from_numpy(np.stack([[one, nudged, other], [one, other, nudged], [one, nudged, other]]))
    present = torch.tensor([[True, True, True], [True, True, True], [False, True, True]])
    assert landmark.first_of_each(hands, present).tolist() == [
        [True, False, True],
        [True, True, False],
        [False, True, True],  # the first is none, so the second is no repetition of it
    ]


def test_landmarks_go_back_to_where_they_were_cropped() -> None:
    """Dots are cropped, found in the crop by their brightness, and projected back."""
    frame = torch.zeros((1, 200, 300, 3), dtype=torch.uint8)
    places = torch.tensor([[120, 80], [160, 90], [140, 120]])
    for x, y in places.tolist():
        frame[0, y - 1 : y + 2, x - 1 : x + 2] = 255
    rect = torch.tensor([[140.0, 95.0, 110.0, 0.7]])
    (crop,) = sampling.crops(sampling.planes(frame), 200, torch.tensor([0]), rect, landmark.SIZE)
    rows_and_columns = (crop[0] > 0.5).nonzero()
    picked = rows_and_columns[torch.linspace(0, len(rows_and_columns) - 1, 21).long()].flip(1)
    raw = torch.cat([picked, torch.zeros(21, 1)], 1).reshape(1, 63)
    back = landmark.project(raw, rect)[0, :, :2]
    apart = (back[:, None] - places).norm(dim=-1)
    assert apart.amin(1).max() < 2.5, "a bright pixel of the crop is projected to where no dot is"
    assert apart.amin(0).max() < 0.8, "a dot is not hit"


# -- hands that were missed -------------------------------------------------------------------------


@needs_samples
def test_hands_are_found_again_where_they_were(detector: TorchHands, mixer: torch.Tensor) -> None:
    some = mixer[:20]
    direct = {(h.frame, h.side): h for frame in detector.detect(some, np.arange(20)) for h in frame}
    given = [hand for hand in direct.values() if hand.frame % 2 == 0]
    hidden = {key: hand for key, hand in direct.items() if key[0] % 2}
    (found,) = detector.refind([(some, given, None)], 1)
    again = {(hand.frame, hand.side): hand for hand in found}
    assert not again.keys() & {(hand.frame, hand.side) for hand in given}
    assert len(again.keys() & hidden.keys()) >= 0.8 * len(hidden)
    apart = [
        np.abs(again[k].landmarks[:, :2] - hidden[k].landmarks[:, :2]).mean() for k in again if k in hidden
    ]
    assert np.median(apart) < 0.01
    assert all(hand.presence > 0.5 for hand in found)


@needs_samples
def test_what_was_seen_once_is_followed_nowhere(detector: TorchHands, mixer: torch.Tensor) -> None:
    some = mixer[:12]
    found = [hand for frame in detector.detect(some, np.array([5])) for hand in frame]
    assert found and detector.refind([(some, found, None), (some, [], None)]) == [[], []]


@needs_samples
def test_bars_move_what_is_found_again(detector: TorchHands, mixer: torch.Tensor) -> None:
    some = mixer[:6]
    height, width = some.shape[1:3]
    framed = torch.zeros((6, height + 20, width + 60, 3), dtype=torch.uint8)
    content = (8, 40, height, width)
    framed[:, 8 : 8 + height, 40 : 40 + width] = some
    for frames, where in ((some, None), (framed, content)):
        known = [h for frame in detector.detect(frames, np.array([0, 1, 3, 4]), where) for h in frame]
        (found,) = detector.refind([(frames, known, where)], 1)
        assert {hand.frame for hand in found} == {2, 5}
        size = np.array([width, height]) if where is None else np.array([width + 60, height + 20])
        offset = np.zeros(2) if where is None else np.array([40, 8])
        places = {(h.frame, h.side): h.landmarks[:, :2] * size - offset for h in found}
        if where is None:
            plain = places
    assert places.keys() == plain.keys()
    assert all(np.abs(places[key] - plain[key]).max() < 1.0 for key in plain)
