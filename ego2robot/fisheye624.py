"""Project Aria's and HOT3D's camera model: a fisheye with six radial, two tangential, four thin-prism terms.

``projectaria_tools`` calls it FISHEYE624 and FisheyeRadTanThinPrism. Parameters, in its order:
f, c_x, c_y, k_0 … k_5, p_0, p_1, s_0 … s_3 (15 numbers; 16 where f_x and f_y differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

N_PARAMS = 15
# A picture turned clockwise by a quarter: what was right is down, what was down is left.
CLOCKWISE = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])


@dataclass(frozen=True)
class Fisheye624:
    """A camera and the size of its picture.

    Attributes:
        params: 15 numbers, or 16 with f_y after f_x.
        width, height: pixels; pixel (0, 0) has its centre at (0, 0).
    """

    params: tuple[float, ...]
    width: int
    height: int

    def __post_init__(self) -> None:
        if len(self.params) not in (N_PARAMS, N_PARAMS + 1) or not np.isfinite(self.params).all():
            raise ValueError(f"{N_PARAMS} or {N_PARAMS + 1} finite numbers, not {len(self.params)}")

    @property
    def focal(self) -> tuple[float, float]:
        return self.params[0], self.params[len(self.params) - N_PARAMS]

    @property
    def rest(self) -> tuple[float, ...]:
        return self.params[len(self.params) - N_PARAMS + 1 :]

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 3] in the camera's frame, metres, as pixels [..., 2]; NaN behind the camera."""
        p = np.asarray(points, np.float64)
        z = np.where(p[..., 2] > 0, p[..., 2], np.nan)
        ab = p[..., :2] / z[..., None]
        r = np.linalg.norm(ab, axis=-1)
        angle = np.arctan(r)
        cx, cy, *more = self.rest
        k, tangential, prism = more[:6], np.array(more[6:8]), np.array(more[8:]).reshape(2, 2)
        bent = angle * (1 + sum(c * angle ** (2 * i + 2) for i, c in enumerate(k)))
        uv = ab * np.where(r > 0, bent / np.where(r > 0, r, 1), 1.0)[..., None]
        square = (uv**2).sum(-1, keepdims=True)
        out = uv + uv * (2 * uv @ tangential)[..., None] + square * tangential
        out = out + square * prism[:, 0] + square**2 * prism[:, 1]
        return out * self.focal + (cx, cy)

    def clockwise(self) -> Fisheye624:
        """The camera whose picture is this one's turned clockwise by a quarter.

        Its frame is :data:`CLOCKWISE` times this one's.
        """
        cx, cy, *more = self.rest
        k, (p0, p1), (s0, s1, s2, s3) = more[:6], more[6:8], more[8:]
        focal = self.focal[::-1] if len(self.params) > N_PARAMS else self.focal[:1]
        turned = (*focal, self.height - 1 - cy, cx, *k, -p1, p0, -s2, -s3, s0, s1)
        return Fisheye624(turned, self.height, self.width)


def describe(camera: Fisheye624, T_device_camera: np.ndarray, **more: object) -> dict[str, object]:
    """What is written down of a camera, as JSON has it."""
    return {
        "model": "fisheye624",
        "image_width": camera.width,
        "image_height": camera.height,
        "params": list(camera.params),
        "T_device_camera": np.asarray(T_device_camera).tolist(),
        **more,
    }


def camera_of(params: Sequence[float], width: int, height: int) -> Fisheye624:
    """Raises ValueError for what is no such camera."""
    return Fisheye624(tuple(float(p) for p in params), int(width), int(height))
