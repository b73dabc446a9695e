"""Hands in frames, by MediaPipe's own networks run with torch: many frames at once, on a CPU or a GPU.

Finds what MediaPipe's hand landmarker finds, without needing it; left and right are the person's own. How
close the two are is measured by ``benchmarks/hands.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ego2robot import models
from ego2robot.hands_net.captured import Captured
from ego2robot.hands_net.pipeline import FoundHands, HandNet
from ego2robot.stages.inference import compute_dtype
from ego2robot.stages.sides import Candidate, one_per_side, same_hand, within
from ego2robot.types import Hand, Side

# Frames in one pass, by device. On a CPU what eight hands' crops take fits a core's share of the caches. On a
# GPU a frame takes some 12 MB (its float planes, two crops, the widest maps of either network in float16), so
# a pass takes 0.8 GB, and the smallest maps still have 64 x 36 positions for 132 multiprocessors.
_FRAMES = {"cpu": 8, "cuda": 64}
# Larger frames go in smaller passes. Pixels of a frame of 640 x 360.
_PIXELS = 640 * 360
# Frames, which of them, and where in them the picture is; see TorchHands.detect.
Request = tuple[torch.Tensor, np.ndarray, tuple[int, int, int, int] | None]


def default_dtype(device: torch.device | str) -> torch.dtype:
    """float16 on a GPU, bfloat16 on a CPU that multiplies it (AVX512-BF16, AMX), else float32."""
    return torch.float16 if torch.device(device).type == "cuda" else compute_dtype("cpu")


class TorchHands:
    """Hands of single frames: no frame depends on another, so any subset gives the same result.

    Args:
        max_hands: at most so many are looked for; at most one per side is reported.
        min_detection: confidence of the palm detector, 0..1.
        min_presence: confidence of the landmark network that there is a hand, 0..1.
        device: where the networks run; frames that are elsewhere are copied there.
        dtype: what the networks compute in, see :class:`HandNet`; None: :func:`default_dtype`.
        networks: ``full``, or ``lite``: smaller, faster, less sure.
        frames_per_pass: how many frames of 640 x 360 go through the networks together, fewer where they are
            larger; the most that is held of them. None: by device. The result does not depend on it, but
            for the last bits on a GPU.

    Raises:
        UserError: the networks are missing or damaged.
    """

    def __init__(
        self,
        max_hands: int = 2,
        min_detection: float = 0.5,
        min_presence: float = 0.5,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        networks: models.Networks = "full",
        frames_per_pass: int | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._per_pass = frames_per_pass or _FRAMES[self._device.type]
        self._passes: dict[int, Captured] = {}
        self._net: HandNet | None = HandNet(
            *models.hand_networks(networks),
            self._device,
            dtype or default_dtype(device),
            max_hands,
            min_detection,
            min_presence,
            every_slot=self._on_gpu,
        )

    def detect(
        self,
        frames_THWC: torch.Tensor,
        indices: np.ndarray,
        content: tuple[int, int, int, int] | None = None,
    ) -> list[list[Hand]]:
        """The hands in ``frames_THWC[indices]``.

        Args:
            frames_THWC: RGB [T, H, W, 3] of 0 to 255, uint8 or floating, on any device and with any strides.
                Frames that hold NaN or infinity have no hands.
            indices: int [N], which frames to look at.
            content: (top, left, height, width) of the picture inside the frame, in pixels; None is the
                whole frame. See ``MediaPipeHands``.

        Returns:
            N lists of at most two hands, left before right, at most one per side, as ``MediaPipeHands``
            gives them.

        Raises:
            ValueError: not such frames, or the detector was closed.
        """
        return self.detect_batch([(frames_THWC, indices, content)])[0]

    def detect_batch(self, clips: Sequence[Request]) -> list[list[list[Hand]]]:
        """:meth:`detect` with the arguments of each of some clips, whose frames share the passes.

        A frame's hands are the same whatever comes with it. Pictures of one size, kind and device go
        together. The host waits for a GPU once, when all is done.
        """
        if self._net is None:
            raise ValueError("the hand detector was closed")
        pictures = [_picture(frames_THWC, content) for frames_THWC, _, content in clips]
        alike: dict[object, list[int]] = {}
        for i, picture_THWC in enumerate(pictures):
            key = (*picture_THWC.shape[1:], picture_THWC.dtype, picture_THWC.device)
            alike.setdefault(key, []).append(i)
        found: list[list[list[Hand]]] = [[[] for _ in indices] for _, indices, _ in clips]
        tables: list[torch.Tensor] = []
        order: list[tuple[int, int]] = []  # clip, and place in its list, of each frame
        for group in alike.values():
            order += [(i, n) for i in group for n in range(len(clips[i][1]))]
            wanted = [(pictures[i], clips[i][1]) for i in group]
            for frames_BHWC in _passes(wanted, self._frames_of(pictures[group[0]])):
                tables.append(self._look(frames_BHWC.to(self._device)).packed())
        if not tables:
            return found
        hands = FoundHands.unpacked(torch.cat(tables).cpu())
        sizes = [(pictures[i].shape[1], pictures[i].shape[2]) for i, _ in order]
        for (i, n), each in zip(order, _candidates(hands, sizes), strict=True):
            frames_THWC, indices, content = clips[i]
            _, height, width, _ = frames_THWC.shape
            candidates = each if content is None else [within(c, content, (height, width)) for c in each]
            found[i][n] = one_per_side(candidates, int(indices[n]))
        return found

    def refind(
        self,
        clips: Sequence[tuple[torch.Tensor, Sequence[Hand], tuple[int, int, int, int] | None]],
        rounds: int = 2,
    ) -> list[list[Hand]]:
        """Hands that the palm detector missed beside frames in which it found them.

        They are looked for where they were, as MediaPipe does in videos; in the next frame to either side,
        ``rounds`` times over. What is found counts when the network is as sure as always, sees the same side
        and not the clip's other hand. A detection alone, that came and went, is followed nowhere.

        Args:
            clips: frames and content as for :meth:`detect`, and what was found in any of them.

        Returns:
            The additional hands of each clip.
        """
        if self._net is None:
            raise ValueError("the hand detector was closed")
        known = [{(hand.frame, hand.side): hand for hand in hands} for _, hands, _ in clips]
        added: list[list[Hand]] = [[] for _ in clips]
        fresh = [list(hands) for _, hands, _ in clips]
        for _ in range(rounds):
            wanted = [_beside(fresh[i], known[i], len(clips[i][0]), rounds + 1) for i in range(len(clips))]
            fresh = [[] for _ in clips]
            for i, beside in enumerate(wanted):
                for hand in self._followed(clips[i][0], clips[i][2], beside):
                    other = known[i].get((hand.frame, "right" if hand.side == "left" else "left"))
                    if other is None or not same_hand(hand.landmarks, other.landmarks):
                        known[i][hand.frame, hand.side] = hand
                        added[i].append(hand)
                        fresh[i].append(hand)
        return added

    def _followed(
        self,
        frames_THWC: torch.Tensor,
        content: tuple[int, int, int, int] | None,
        beside: Sequence[tuple[int, Hand]],
    ) -> Iterator[Hand]:
        assert self._net is not None
        pictures_THWC = _picture(frames_THWC, content)
        height, width = frames_THWC.shape[1:3]
        top, left, rows, columns = content or (0, 0, height, width)
        size = self._frames_of(pictures_THWC)
        for start in range(0, len(beside), size):
            some = beside[start : start + size]
            picked = pictures_THWC[torch.tensor([frame for frame, _ in some]).to(frames_THWC.device)]
            shares = np.stack([hand.landmarks[:, :2] for _, hand in some])
            pixels = torch.from_numpy(shares * (width, height) - (left, top)).float().to(self._device)
            near = self._net.follow(picked.to(self._device), pixels)
            # Once more from where it is now: the crop before was of where it had been.
            hands = self._net.follow(picked.to(self._device), near.landmarks_BKL3[:, 0, :, :2]).cpu()
            for (frame, hand), found in zip(
                some, _candidates(hands, [(rows, columns)] * len(some)), strict=True
            ):
                placed = found if content is None else [within(c, content, (height, width)) for c in found]
                yield from (one for one in one_per_side(placed, frame) if one.side == hand.side)

    def _frames_of(self, picture_THWC: torch.Tensor) -> int:
        """How many such pictures go together."""
        _, rows, columns, _ = picture_THWC.shape
        return max(1, min(self._per_pass, self._per_pass * _PIXELS // max(1, rows * columns)))

    def _look(self, frames_BHWC: torch.Tensor) -> FoundHands:
        assert self._net is not None
        if not self._on_gpu:
            return self._net(frames_BHWC)
        size = self._frames_of(frames_BHWC)
        if size not in self._passes:
            self._passes[size] = Captured(self._net, size)
        return self._passes[size](frames_BHWC)

    def close(self) -> None:
        """Lets go of the networks."""
        self._net = None
        self._passes.clear()

    def __enter__(self) -> TorchHands:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _beside(
    hands: Sequence[Hand], known: Mapping[tuple[int, Side], Hand], n_frames: int, near: int
) -> list[tuple[int, Hand]]:
    """Frames without a hand, each with the same hand in the frame before or, if not there, after it."""
    found: dict[tuple[int, Side], Hand] = {}
    for hand in sorted(hands, key=lambda hand: hand.frame):
        if not any((hand.frame + d, hand.side) in known for d in range(-near, near + 1) if d):
            continue
        for frame in (hand.frame + 1, hand.frame - 1):
            if 0 <= frame < n_frames and (frame, hand.side) not in known:
                found.setdefault((frame, hand.side), hand)
    return [(frame, hand) for (frame, _), hand in found.items()]


def _picture(frames_THWC: torch.Tensor, content: tuple[int, int, int, int] | None) -> torch.Tensor:
    kind = frames_THWC.dtype == torch.uint8 or frames_THWC.is_floating_point()
    if not kind or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
        shape = tuple(frames_THWC.shape)
        raise ValueError(f"frames are {frames_THWC.dtype} {shape}, not uint8 or floating [T, H, W, 3]")
    _, height, width, _ = frames_THWC.shape
    top, left, rows, columns = content or (0, 0, height, width)
    return frames_THWC[:, top : top + rows, left : left + columns]


def _passes(wanted: Sequence[tuple[torch.Tensor, np.ndarray]], size: int) -> Iterator[torch.Tensor]:
    """The wanted frames of each of some clips, ``size`` at a time and the rest."""
    parts: list[torch.Tensor] = []
    room = size
    for picture_THWC, indices in wanted:
        for chunk in np.array_split(indices, range(room, len(indices), size)):
            if len(chunk):
                parts.append(_taken(picture_THWC, chunk))
                room -= len(chunk)
            if not room:
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
                parts, room = [], size
    if parts:
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


def _taken(frames_THWC: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    """``frames_THWC[indices]``, a view where it can be: indices need no copy to a GPU then."""
    first, step = int(indices[0]), int(indices[1] - indices[0]) if len(indices) > 1 else 1
    if first >= 0 and step > 0 and (np.diff(indices) == step).all() and indices[-1] < len(frames_THWC):
        return frames_THWC[first : int(indices[-1]) + 1 : step]
    return frames_THWC[torch.from_numpy(np.asarray(indices, np.int64)).to(frames_THWC.device)]


def _candidates(found: FoundHands, sizes: Sequence[tuple[int, int]]) -> list[list[Candidate]]:
    """What was found in each frame, landmarks as shares of its picture of (height, width) pixels."""
    # z is in units of x.
    scale_B113 = torch.tensor([(width, height, width) for height, width in sizes])[:, None, None]
    landmarks_BKL3 = (found.landmarks_BKL3 / scale_B113).numpy()
    world_BKL3, left_BK, presence_BK, present_BK = (
        values.numpy() for values in (found.world_BKL3, found.left_BK, found.presence_BK, found.present_BK)
    )
    return [
        [
            Candidate(float(left_BK[b, k]), landmarks_BKL3[b, k], world_BKL3[b, k], float(presence_BK[b, k]))
            for k in slots.nonzero()[0]
        ]
        for b, slots in enumerate(present_BK)
    ]
