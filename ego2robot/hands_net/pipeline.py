"""Hands of many frames at once: MediaPipe's hand landmarker in image mode as one tensor program.

Palms in the letterboxed frame, a rotated crop around each, landmarks in the crop, landmarks in the frame.
Everything stays on the device of the frames and no step looks at single frames or hands in Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from ego2robot_kernels import crops as kernels
from torch import nn

from ego2robot.errors import UserError
from ego2robot.hands_net import landmark, onednn, palm, sampling, staged, tflite
from ego2robot.types import N_LANDMARKS

_POINTS = 3 * N_LANDMARKS
_COLUMNS = 2 + 2 * _POINTS


@dataclass(frozen=True)
class FoundHands:
    """K slots for the hands of each of B frames, the surest palm first; on the device of the frames.

    Attributes:
        present_BK: bool, whether there is a hand; the rest of a slot means nothing where there is none.
        palm_BK: float32, score of the palm detector.
        presence_BK: float32, score of the landmark network that its crop shows a hand.
        left_BK: float32, probability that it is the person's own left hand.
        landmarks_BKL3: float32 [B, K, 21, 3], x and y in pixels of the frame, z likewise, from the wrist.
        world_BKL3: float32 [B, K, 21, 3], metres, from the hand's centre.
    """

    present_BK: torch.Tensor
    palm_BK: torch.Tensor
    presence_BK: torch.Tensor
    left_BK: torch.Tensor
    landmarks_BKL3: torch.Tensor
    world_BKL3: torch.Tensor

    def packed(self) -> torch.Tensor:
        """All of it in one tensor, so that one copy brings it to the host: float32 [B, K, 130]."""
        single = (self.present_BK.to(torch.float32), self.palm_BK, self.presence_BK, self.left_BK)
        points = (self.landmarks_BKL3.flatten(2), self.world_BKL3.flatten(2))
        return torch.cat((*(values[..., None] for values in single), *points), -1)

    @staticmethod
    def unpacked(table_BKC: torch.Tensor) -> FoundHands:
        """What :meth:`packed` gives, apart again; views of it."""
        present, palm, presence, left, *points = table_BKC.split([1, 1, 1, 1, _POINTS, _POINTS], -1)
        landmarks, world = (p.unflatten(-1, (N_LANDMARKS, 3)) for p in points)
        return FoundHands(present[..., 0] > 0, palm[..., 0], presence[..., 0], left[..., 0], landmarks, world)

    def cpu(self) -> FoundHands:
        return FoundHands.unpacked(self.packed().cpu())


class HandNet(nn.Module):
    """Both networks and what lies between them.

    Args:
        palm_path: ``palm_detection_full.tflite`` or ``…_lite``.
        landmark_path: ``hand_landmark_full.tflite`` or ``…_lite``.
        device: where it runs.
        dtype: what the networks compute in: float32, float16 or bfloat16. Coordinates are float32 always.
            Where it is bfloat16 the palm detector stays in float32: it alone would move landmarks by 0.4
            pixels on average (of 640 x 360, on the mixer clip), its last third by 0.3, the other network
            moves them by 0.14. float16 moves them by 0.1 throughout.
        max_hands: K, slots for hands in a frame.
        min_detection: score from which the detector's boxes count, 0 to 1.
        min_presence: score above which a crop shows a hand, 0 to 1.
        every_slot: look for landmarks in every slot, found or not. Wasteful where hands are few, but then
            shapes depend on the input's alone and nothing waits for the device, so that the whole can be
            captured in a CUDA graph. Otherwise the host asks once a call how many palms there are.

    Raises:
        UserError: a file is missing, is not such a network, or cannot be translated.
    """

    anchors_A2: torch.Tensor

    def __init__(
        self,
        palm_path: str | Path,
        landmark_path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_hands: int = 2,
        min_detection: float = 0.5,
        min_presence: float = 0.5,
        every_slot: bool = False,
    ) -> None:
        super().__init__()
        self.max_hands, self.min_detection, self.min_presence = max_hands, min_detection, min_presence
        self.every_slot = every_slot
        # Activations of more crops than that do not fit a core's share of the caches.
        self.hands_per_pass = 8 if torch.device(device).type == "cpu" else None
        place = torch.device(device)
        self.dtype = dtype
        self.palm_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.palm = network(palm_path, palm.SIZE, place, self.palm_dtype)
        self.landmark = network(landmark_path, landmark.SIZE, place, dtype)
        self.register_buffer("anchors_A2", palm.anchors(device))
        if place.type == "cpu":
            # glibc gives blocks of some MB back to the system when they are freed and asks for them page by
            # page again, until a larger one was freed once (mallopt(3), M_MMAP_THRESHOLD): 2 ms a frame.
            torch.empty(31 << 20, dtype=torch.uint8)

    @torch.inference_mode()
    def forward(self, frames_BHWC: torch.Tensor) -> FoundHands:
        """The hands of B frames.

        Args:
            frames_BHWC: RGB [B, H, W, 3] of 0 to 255, uint8 or floating, any strides, on the module's device.
                Frames that hold NaN or infinity have no hands.
        """
        n_frames, height, width = frames_BHWC.shape[:3]
        if _has_kernels(frames_BHWC):
            pictures = kernels.letterbox(frames_BHWC, palm.SIZE, self.palm_dtype)
        else:
            frames_BHWC = sampling.sound(frames_BHWC)
            pictures = sampling.letterbox(frames_BHWC, palm.SIZE)
        raw, logits = self.palm(pictures)
        palms = palm.find(raw, logits, self.anchors_A2, (height, width), self.max_hands, self.min_detection)
        rect_N4 = palms.rect_BK4.flatten(0, 1)
        frame_N = torch.arange(n_frames * self.max_hands, device=rect_N4.device) // self.max_hands
        found_BK = palms.score_BK > 0
        if self.every_slot:
            table = self._look(frames_BHWC, frame_N, rect_N4)
        else:
            slots = found_BK.flatten().nonzero()[:, 0]
            table = rect_N4.new_zeros(len(rect_N4), _COLUMNS)
            table = table.index_copy(0, slots, self._look(frames_BHWC, frame_N[slots], rect_N4[slots]))
        presence_BK, left_BK, *points_BK = table.unflatten(0, (n_frames, self.max_hands)).split(
            [1, 1, _POINTS, _POINTS], -1
        )
        landmarks_BKL3, world_BKL3 = (p.unflatten(-1, (N_LANDMARKS, 3)) for p in points_BK)
        present_BK = landmark.first_of_each(
            landmarks_BKL3[..., :2], found_BK & (presence_BK[..., 0] > self.min_presence)
        )
        return FoundHands(
            present_BK, palms.score_BK, presence_BK[..., 0], left_BK[..., 0], landmarks_BKL3, world_BKL3
        )

    @torch.inference_mode()
    def follow(self, frames_NHWC: torch.Tensor, landmarks_NL2: torch.Tensor) -> FoundHands:
        """One hand in each of N frames, where it was in a frame beside it; the palm detector is not asked.

        Args:
            frames_NHWC: as for :meth:`forward`.
            landmarks_NL2: float32 [N, 21, 2], there, in pixels.

        Returns:
            One slot a frame; its palm score is 0.
        """
        frames_NHWC = frames_NHWC if _has_kernels(frames_NHWC) else sampling.sound(frames_NHWC)
        frame_N = torch.arange(len(frames_NHWC), device=frames_NHWC.device)
        table = self._look(frames_NHWC, frame_N, landmark.rects(landmarks_NL2))
        presence_BK, left_BK, *points = table.split([1, 1, _POINTS, _POINTS], 1)
        landmarks_BKL3, world_BKL3 = (p.unflatten(1, (1, N_LANDMARKS, 3)) for p in points)
        return FoundHands(
            presence_BK > self.min_presence,
            torch.zeros_like(presence_BK),
            presence_BK,
            left_BK,
            landmarks_BKL3,
            world_BKL3,
        )

    def _look(self, frames_BHWC: torch.Tensor, frame_N: torch.Tensor, rect_N4: torch.Tensor) -> torch.Tensor:
        """Presence, left, landmarks and world landmarks of each rectangle: float32 [N, 128]."""
        if not len(rect_N4):
            return rect_N4.new_zeros(0, _COLUMNS)
        fused = _has_kernels(frames_BHWC)
        planes_CLW = None if fused else sampling.planes(frames_BHWC)
        tables = []
        n = self.hands_per_pass or len(rect_N4)
        for frame, rect in zip(frame_N.split(n), rect_N4.split(n), strict=True):
            if planes_CLW is None:
                picture = kernels.crops(frames_BHWC, frame, rect, landmark.SIZE, self.dtype)
            else:
                picture = sampling.crops(planes_CLW, frames_BHWC.shape[1], frame, rect, landmark.SIZE)
            points, presence, right, metres = self.landmark(picture)
            points, metres = landmark.project(points, rect), landmark.world(metres, rect)
            tables.append(torch.cat((presence, 1 - right, points.flatten(1), metres.flatten(1)), 1))
        return torch.cat(tables)


def _has_kernels(frames_BHWC: torch.Tensor) -> bool:
    """Whether fused kernels read these frames as they are: bytes, on a GPU."""
    return frames_BHWC.is_cuda and frames_BHWC.dtype == torch.uint8


def network(path: str | Path, size: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network that takes pictures of ``size`` x ``size``, made ready for its device.

    Raises:
        UserError: the file is missing, is not such a network, or cannot be translated.
    """
    module = tflite.load(path)
    if module.meta["input_size"] != (size, size):
        raise UserError(f"{path}: takes pictures of {module.meta['input_size']}, not {size} x {size}")
    if dtype != torch.float32:
        module = tflite.half(module, dtype)
    module = module.to(device)
    if device.type != "cpu" or not onednn.available(dtype):
        for name, constant in module.named_buffers():
            if constant.ndim == 4:
                setattr(module, name, constant.contiguous(memory_format=torch.channels_last))
        return module
    return staged.Staged(onednn.fuse(module), torch.zeros(1, 3, size, size))
