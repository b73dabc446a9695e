"""The camera's own motion: how much of a clip's motion it makes up, and hand actions without it.

First-person video moves because the head does. What is left when the scene is held still is what hands and
things do; a wrist that rests on the bench while the head turns has not moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ego2robot_kernels.camera import CameraMotion, camera_motion, compensated_difference, small_greys
from ego2robot_kernels.motion import SIZE, STEP

from ego2robot.stages.one_euro import OneEuro
from ego2robot.stages.tracks import RATE, Tracks
from ego2robot.types import SIDES, ClipFrames, Hand

# Below this confidence a pair of frames is taken to show no camera motion: cuts, blur, blank walls. On made
# footage unrelated pictures came to 0.26 at most (two benches laid out alike: 0.37); 95 % of the estimates
# right to a pixel to 0.6 and more, or 0.34 where a fifth of the picture jumped about and nobody said so.
MIN_CONFIDENCE = 0.3
NEAR = 2  # a hand that was looked for every few frames is taken to be where it was so many frames away


@dataclass(frozen=True)
class CameraPath:
    """How the scene moves across the picture from each frame to the next, T - 1 steps.

    What is at p is next at ``middle + s R (p - middle) + shift``, R a turn by ``roll``, clockwise on the
    screen; ``middle`` is that of the frame.

    Attributes:
        shift: float32 [T - 1, 2], to the right and down, shares of the frame's width and height.
        log_scale: float32 [T - 1], natural logarithm of s; positive when the camera comes nearer.
        roll: float32 [T - 1], radians.
        confidence: float32 [T - 1], 0 to 1, as in ``ego2robot_kernels.camera.CameraMotion``.
        aspect: width over height of the frame.
    """

    shift: np.ndarray
    log_scale: np.ndarray
    roll: np.ndarray
    confidence: np.ndarray
    aspect: float

    def __len__(self) -> int:
        return len(self.shift)

    @property
    def trusted(self) -> np.ndarray:
        """bool [T - 1]: where the estimate is used; elsewhere the camera is taken to rest."""
        return np.asarray(self.confidence >= MIN_CONFIDENCE)

    def carried(self, points: np.ndarray) -> np.ndarray:
        """Where still things that are at ``points`` in each frame but the last are in the next frame.

        Args:
            points: float [T - 1, 2], shares of the frame.

        Returns:
            float64 [T - 1, 2]; the same points where the estimate is not trusted.
        """
        p = (points.astype(np.float64) - 0.5) * (self.aspect, 1.0)
        turn = np.exp(self.log_scale.astype(np.float64) + 1j * self.roll)
        moved = turn * (p[:, 0] + 1j * p[:, 1])
        carried = np.stack([moved.real / self.aspect, moved.imag], 1) + 0.5 + self.shift
        return np.where(self.trusted[:, None], carried, points)

    def speed(self, times_s: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
        """How fast the picture moves as a whole.

        Args:
            times_s: float [T], of the frames.
            extent: of the picture (without bars) in the frame, shares of the frame's width and height.

        Returns:
            float64 [T - 1], picture widths per second: the root mean square way of all its points, which
            counts zoom and roll too; 0 where the estimate is not trusted or no time has passed.
        """
        turn = np.exp(self.log_scale.astype(np.float64) + 1j * self.roll)
        width, height = extent[0] * self.aspect, extent[1]
        # The mean square distance of a rectangle's points from its middle is (w² + h²) / 12.
        squared = np.abs(turn - 1) ** 2 * (width**2 + height**2) / 12
        squared = squared + (self.shift[:, 0] * self.aspect) ** 2 + self.shift[:, 1].astype(np.float64) ** 2
        seconds = np.diff(times_s)
        moving = self.trusted & (seconds > 0)
        return np.where(moving, np.sqrt(squared) / width, 0.0) / np.where(moving, seconds, 1.0)


def camera_path(
    clip: ClipFrames, hands: Sequence[Hand] = (), greys_Thw: torch.Tensor | None = None
) -> CameraPath:
    """The camera's motion between every two consecutive frames of a clip, as actions need it.

    Args:
        clip: T frames on any device.
        hands: detections in any of the frames; they are left out, there and in the frames near by.
        greys_Thw: the clip's ``small_greys`` if they are there already.

    Returns:
        T - 1 steps on the host.
    """
    return _paths([clip], [hands], None if greys_Thw is None else [greys_Thw], 1)[0][0]


def camera_scores(
    clips: Sequence[ClipFrames],
    hands: Sequence[Sequence[Hand]] | None = None,
    greys: Sequence[torch.Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """How much of each clip's motion is the camera's, from every second frame, as for the reference motion.

    Args:
        clips: frames of one size on one device; clips of different length may be mixed.
        hands: detections per clip, to be left out; ``Hand.frame`` counts the clip's frames.
        greys: ``small_greys`` of every second frame of each clip, if they are there already.

    Returns:
        float32 [B] each; 0 for a clip of fewer than two used frames:
        ``camera_motion``: mean speed of the picture as a whole, picture widths per second;
        ``residual_motion``: the reference motion (share of full scale) after the camera's is taken out, over
        what both pictures of a pair show; where that leaves more, or the estimate cannot be trusted, nothing
        is taken out;
        ``camera_confidence``: mean over the pairs, 0 to 1.

    Raises:
        ValueError: lists of different lengths, or clips that differ in size or device.
    """
    names = ("camera_motion", "residual_motion", "camera_confidence")
    scores = {name: np.zeros(len(clips), np.float32) for name in names}
    if not clips:
        return scores
    pixel_aspect, contents = _geometry(clips)
    paths, used, motions = _paths(clips, hands, greys, STEP)
    for index, (clip, path) in enumerate(zip(clips, paths, strict=True)):
        if not len(path):
            continue
        frame_height, frame_width = clip.frames_THWC.shape[1:3]
        extent = (clip.content[3] / frame_width, clip.content[2] / frame_height)
        speed = path.speed(np.asarray(clip.times_s)[::STEP], extent)
        difference = compensated_difference(
            used[index], _at_rest_where_doubtful(motions[index]), contents[index], pixel_aspect
        )
        scores["camera_motion"][index] = speed.mean()
        scores["residual_motion"][index] = float(difference.mean())
        scores["camera_confidence"][index] = path.confidence.mean()
    return scores


def compensated_wrist_action(
    followed: Tracks, camera: CameraPath, smooth: OneEuro | None = None, fps: float = RATE
) -> np.ndarray:
    """The motion of both wrists from each frame to the next less the camera's, in shares of the frame.

    What a wrist would have moved had it been part of the still scene is taken off.

    Args:
        followed: both hands through T frames, not smoothed: a smoothed wrist lags behind the camera, and
            would seem to move against it.
        camera: the T - 1 steps between those frames.
        smooth: filter for the wrist's way over the still scene, from where a hand appears to where it
            vanishes; speeds are in hand sizes per second. None takes wrists as they were detected.
        fps: frames per second, for ``smooth``.

    Returns:
        float32 [T, 4]: left dx, dy, right dx, dy; zero where the hand is not visible in both frames. The
        last row repeats the one before it. Not clipped. As ``tracks.wrist_action`` otherwise, and equal to
        it where the camera's motion is not known.

    Raises:
        ValueError: the steps are not those between the tracks' frames.
    """
    n = len(followed["left"].visible)
    if len(camera) != max(n - 1, 0):
        raise ValueError(f"{len(camera)} steps of the camera for tracks of {n} frames")
    action = np.zeros((n, 4), np.float32)
    for column, side in zip((0, 2), SIDES, strict=True):
        track = followed[side]
        both = track.visible[:-1] & track.visible[1:]
        way = (track.wrist[1:] - camera.carried(track.wrist[:-1])) * both[:, None]
        if smooth is not None:
            for first, end in _runs(both):
                way[first:end] = _smoothed(
                    way[first:end], track.landmarks[first : end + 1], camera, smooth, fps
                )
        action[:-1, column : column + 2] = way
    if n > 1:
        action[-1] = action[-2]
    return action


def _runs(true_T: np.ndarray) -> list[tuple[int, int]]:
    """First and end of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], true_T, [False]]).astype(np.int8)))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _smoothed(
    way_N2: np.ndarray, landmarks: np.ndarray, camera: CameraPath, smooth: OneEuro, fps: float
) -> np.ndarray:
    """The steps of a smoothed way, from the steps of an unbroken one."""
    isotropic = np.array([camera.aspect, 1.0])
    unit = float(np.median(np.ptp(landmarks[..., :2] * isotropic, axis=1).max(1)))
    way = np.concatenate([np.zeros((1, 2)), np.cumsum(way_N2 * isotropic, axis=0)])
    return np.asarray(np.diff(smooth(way, fps, max(unit, 1e-6)), axis=0) / isotropic)


def _paths(
    clips: Sequence[ClipFrames],
    hands: Sequence[Sequence[Hand]] | None,
    greys: Sequence[torch.Tensor] | None,
    step: int,
) -> tuple[list[CameraPath], list[torch.Tensor], list[CameraMotion]]:
    """Per clip the path, the greys it was seen in, and the kernel's own words for it."""
    if greys is None:
        greys = [small_greys(clip.frames_THWC[::step]) for clip in clips]
    if len(greys) != len(clips) or (hands is not None and len(hands) != len(clips)):
        raise ValueError(f"{len(clips)} clips with greys or hands of another number of clips")
    for clip, grey in zip(clips, greys, strict=True):
        if len(grey) != len(range(0, len(clip.frames_THWC), step)):
            raise ValueError(f"{len(grey)} greys of a clip of {len(clip.frames_THWC)} frames")
    pixel_aspect, contents = _geometry(clips)
    boxes = None
    if hands is not None:
        boxes = [_boxes(found, len(grey), step) for found, grey in zip(hands, greys, strict=True)]
    motions = camera_motion(greys, boxes, contents, pixel_aspect)
    paths = []
    for clip, motion in zip(clips, motions, strict=True):
        height, width = clip.frames_THWC.shape[1:3]
        shift = motion.shift.cpu().numpy() / np.array([SIZE[1], SIZE[0]], np.float32)
        log_scale, roll, confidence = (
            part.cpu().numpy() for part in (motion.log_scale, motion.roll, motion.confidence)
        )
        paths.append(CameraPath(shift, log_scale, roll, confidence, width / height))
    return paths, list(greys), motions


def _geometry(clips: Sequence[ClipFrames]) -> tuple[float, list[tuple[float, float, float, float]]]:
    """Width over height of a grey pixel, and each clip's content in grey pixels."""
    frame_height, frame_width = clips[0].frames_THWC.shape[1:3]
    down, across = SIZE[0] / frame_height, SIZE[1] / frame_width
    contents = []
    for clip in clips:
        if clip.frames_THWC.shape[1:] != clips[0].frames_THWC.shape[1:]:
            raise ValueError("clips differ in picture size")
        top, left, height, width = clip.content
        # A frame smaller than the greys is scaled up: its edges blend into the bars over half a pixel.
        blend_y, blend_x = (max(0.0, scale - 1) / 2 + (scale > 1) / 2 for scale in (down, across))
        rims = (top > 0, left > 0, top + height < frame_height, left + width < frame_width)
        low_y, low_x = top * down + blend_y * rims[0], left * across + blend_x * rims[1]
        high_y = (top + height) * down - blend_y * rims[2]
        high_x = (left + width) * across - blend_x * rims[3]
        contents.append((low_y, low_x, high_y - low_y, high_x - low_x))
    return (frame_width / SIZE[1]) / (frame_height / SIZE[0]), contents


def _boxes(hands: Sequence[Hand], n_used: int, step: int) -> torch.Tensor:
    """float32 [U, 2, 4]: in each used frame each side's box of the nearest frame with one, NaN for none."""
    out = np.full((n_used, len(SIDES), 4), np.nan, np.float32)
    for column, side in enumerate(SIDES):
        mine = [hand for hand in hands if hand.side == side]
        frames = np.array([hand.frame for hand in mine])
        for index in range(n_used if mine else 0):
            away = np.abs(frames - index * step)
            nearest = int(away.argmin())
            if away[nearest] <= NEAR:
                out[index, column] = mine[nearest].box
    return torch.from_numpy(out)


def _at_rest_where_doubtful(motion: CameraMotion) -> CameraMotion:
    trusted = (motion.confidence >= MIN_CONFIDENCE).float()
    return CameraMotion(
        motion.shift * trusted[:, None], motion.log_scale * trusted, motion.roll * trusted, motion.confidence
    )
