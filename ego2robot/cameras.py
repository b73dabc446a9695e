"""Cameras: the fisheye model of OpenCV (Kannala and Brandt, 2006), and pictures and points without its bend.

A ray at the angle θ from the optical axis meets the picture at a radius of ``f · θ_d``, where
``θ_d = θ (1 + k1 θ² + k2 θ⁴ + k3 θ⁶ + k4 θ⁸)``. Egocentric-10K and -100K give one such camera a worker.

Undistorted pictures are those of a pinhole camera of the same focal length and centre: the middle keeps its
scale, straight lines are straight, what lies far from the axis falls outside. Egocentric-100K's example of a
camera sees 131° × 86°; 118° × 85° are left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import grid_sample

from ego2robot.types import FrameSpec

META = "intrinsics"  # in a video's meta: JSON text
MODEL = "fisheye"
STEPS = 20  # of Newton's method, at most; from θ = θ_d it takes 3 to 6
CONVERGED = 1e-12  # radians
BATCH_BYTES = 64 << 20  # float32 pixels that are made of frames at once
_FIELDS = ("fx", "fy", "cx", "cy")


@dataclass(frozen=True)
class Fisheye:
    """A camera of ``width`` x ``height`` pixels; pixel centres at whole numbers, as in OpenCV.

    Attributes:
        k: of the powers of θ, see the module.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    k: tuple[float, float, float, float]

    def project(self, points_N3: np.ndarray) -> np.ndarray:
        """Pixels of points in the camera's frame (x right, y down, z forward): float64 [..., 2].

        NaN for the camera's own centre, and beyond the angle up to which θ_d grows.
        """
        points = np.asarray(points_N3, np.float64)
        across = np.hypot(points[..., 0], points[..., 1])
        theta = np.arctan2(across, points[..., 2])
        bent = np.where(theta <= self.max_theta, self._bent(theta), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.where(across > 0, bent / across, np.where(points[..., 2] > 0, 0.0, np.nan))
        return np.stack(
            [self.fx * points[..., 0] * scale + self.cx, self.fy * points[..., 1] * scale + self.cy], -1
        )

    def unproject(self, pixels_N2: np.ndarray) -> np.ndarray:
        """Unit rays of pixels in the camera's frame: float64 [..., 3].

        θ is found by Newton's method from θ_d, to 1e-12 rad, which takes 3 to 6 steps where the polynomial
        grows; NaN where it does not reach that far, or the method has not arrived after 20.
        """
        pixels = np.asarray(pixels_N2, np.float64)
        x, y = (pixels[..., 0] - self.cx) / self.fx, (pixels[..., 1] - self.cy) / self.fy
        bent = np.hypot(x, y)
        limit = self.max_theta
        theta = np.minimum(bent, limit)
        step = np.zeros_like(theta)
        for _ in range(STEPS):
            with np.errstate(invalid="ignore", divide="ignore"):
                step = (self._bent(theta) - bent) / self._slope(theta)
            theta = np.clip(theta - step, 0.0, limit)
            if not np.any(np.abs(step) > CONVERGED):
                break
        arrived = np.abs(self._bent(theta) - bent) <= 1e-9 * np.maximum(1.0, bent)
        theta = np.where(arrived, theta, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            across = np.where(bent > 0, np.sin(theta) / bent, 0.0)
        return np.stack([x * across, y * across, np.cos(theta)], -1)

    def undistort(self, pixels_N2: np.ndarray) -> np.ndarray:
        """Where points of the picture lie in the undistorted one, pixels: float64 [..., 2].

        NaN for what is 90° or more from the axis.
        """
        ray = self.unproject(pixels_N2)
        with np.errstate(invalid="ignore", divide="ignore"):
            ahead = np.where(ray[..., 2] > 1e-9, ray[..., 2], np.nan)
            return np.stack(
                [self.fx * ray[..., 0] / ahead + self.cx, self.fy * ray[..., 1] / ahead + self.cy], -1
            )

    def distort(self, pixels_N2: np.ndarray) -> np.ndarray:
        """Where pixels of the undistorted picture come from: float64 [..., 2]. Undoes :meth:`undistort`."""
        pixels = np.asarray(pixels_N2, np.float64)
        x, y = (pixels[..., 0] - self.cx) / self.fx, (pixels[..., 1] - self.cy) / self.fy
        return self.project(np.stack([x, y, np.ones_like(x)], -1))

    @property
    def max_theta(self) -> float:
        """The angle, radians, up to which θ_d grows: further out the model means nothing."""
        k1, k2, k3, k4 = self.k
        roots = np.roots([9 * k4, 7 * k3, 5 * k2, 3 * k1, 1.0]) if any(self.k) else np.zeros(0)
        squares = [root.real for root in roots if abs(root.imag) < 1e-12 and root.real > 0]
        return min([math.sqrt(min(squares))] if squares else [math.pi], default=math.pi)

    def _bent(self, theta: np.ndarray) -> np.ndarray:
        k1, k2, k3, k4 = self.k
        s = theta * theta
        return np.asarray(theta * (1 + s * (k1 + s * (k2 + s * (k3 + s * k4)))))

    def _slope(self, theta: np.ndarray) -> np.ndarray:
        k1, k2, k3, k4 = self.k
        s = theta * theta
        return np.asarray(1 + s * (3 * k1 + s * (5 * k2 + s * (7 * k3 + s * 9 * k4))))


def camera_of(meta: Mapping[str, str]) -> Fisheye | None:
    """The camera of a video's meta; None where there is none, of another model, or with absurd numbers.

    Takes the names of Egocentric-10K's ``intrinsics.json``: ``image_width, image_height, fx, fy, cx, cy,
    k1 … k4``.
    """
    try:
        value = json.loads(meta.get(META, "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or str(value.get("model", MODEL)) != MODEL:
        return None
    width, height = (_number(value.get(f"image_{name}")) for name in ("width", "height"))
    numbers = [_number(value.get(name)) for name in _FIELDS]
    bend = [_number(value.get(f"k{i}", 0.0)) for i in range(1, 5)]
    if not all(map(math.isfinite, (width, height, *numbers, *bend))):
        return None
    fx, fy, cx, cy = numbers
    sane = 2 <= width <= 1e5 and 2 <= height <= 1e5 and 0 < fx < 1e6 and 0 < fy < 1e6
    if not (sane and abs(cx) < 1e6 and abs(cy) < 1e6 and max(map(abs, bend)) < 1e3):
        return None
    k1, k2, k3, k4 = bend
    return Fisheye(int(width), int(height), fx, fy, cx, cy, (k1, k2, k3, k4))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e12 else math.nan


class Undistorter:
    """Takes the bend out of frames and of points in them; call it with frames.

    Args:
        camera: of the whole picture, before it was scaled into the frame.
        spec: of the frames; where the picture lies in them follows from it.
    """

    def __init__(self, camera: Fisheye, spec: FrameSpec) -> None:
        self._camera, self._spec = camera, spec
        self._content = spec.content(camera.width, camera.height)
        self._grids: dict[torch.device, torch.Tensor] = {}

    def __call__(self, frames_THWC: torch.Tensor) -> torch.Tensor:
        """uint8 [T, H, W, 3] of the same size and device; bilinear. Around the picture stays black."""
        top, left, height, width = self._content
        device = frames_THWC.device
        if device not in self._grids:
            self._grids[device] = torch.from_numpy(self._grid()).to(device, torch.float32)[None]
        straight_THWC = torch.zeros_like(frames_THWC)
        n = max(1, BATCH_BYTES // (12 * height * width))
        for at in range(0, len(frames_THWC), n):
            bent_THWC = frames_THWC[at : at + n, top : top + height, left : left + width]
            grid = self._grids[device].expand(len(bent_THWC), -1, -1, -1)
            bent_TCHW = bent_THWC.permute(0, 3, 1, 2).float()
            # A pixel's centre is at half of it for torch, as in the grid.
            found_TCHW = grid_sample(bent_TCHW, grid, "bilinear", "zeros", align_corners=False)
            rounded_THWC = found_TCHW.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            straight_THWC[at : at + n, top : top + height, left : left + width] = rounded_THWC
        return straight_THWC

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Points as shares of the frame's width and height, such as landmarks: float64 [..., 2] of the
        undistorted frame; NaN for what no pinhole camera sees."""
        return self._shares(self._camera.undistort(self._pixels(np.asarray(xy, np.float64))))

    def _pixels(self, shares: np.ndarray) -> np.ndarray:
        """Of the camera's picture, of shares of the frame."""
        top, left, height, width = self._content
        inside = shares * (self._spec.width, self._spec.height) - (left, top)
        return np.asarray(inside * (self._camera.width / width, self._camera.height / height) - 0.5)

    def _shares(self, pixels: np.ndarray) -> np.ndarray:
        top, left, height, width = self._content
        inside = (pixels + 0.5) * (width / self._camera.width, height / self._camera.height)
        return np.asarray((inside + np.array([left, top])) / (self._spec.width, self._spec.height))

    def _grid(self) -> np.ndarray:
        """float64 [height, width, 2]: for each pixel of the undistorted content its place in the bent one,
        -1 to 1 from edge to edge."""
        _, _, height, width = self._content
        y, x = np.mgrid[0:height, 0:width] + 0.5
        camera = self._camera
        straight = np.stack([x * (camera.width / width), y * (camera.height / height)], -1) - 0.5
        bent = (camera.distort(straight) + 0.5) / (camera.width, camera.height)
        return np.asarray(np.nan_to_num(2 * bent - 1, nan=-2.0))


def undistorter(meta: Mapping[str, str], spec: FrameSpec) -> Undistorter | None:
    """What undistorts the frames of a video, None where its dataset gives no fisheye camera.

    Args:
        meta: of the video (:func:`camera_of`).
        spec: of its frames.
    """
    camera = camera_of(meta)
    return Undistorter(camera, spec) if camera else None
