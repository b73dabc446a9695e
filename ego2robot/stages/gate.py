"""Which clips are worth keeping: enough motion, and hands in sight. Says "yes", or "no, because"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ego2robot import config


@dataclass(frozen=True)
class Gate:
    """Thresholds in force, all absolute (quantiles are resolved).

    Attributes:
        min_motion: share of full scale.
        min_hand_visibility: share of looked-at frames.
        calibrated_on: clips that quantiles were taken over, 0 when none was asked for.
        min_residual_motion: share of full scale.
        max_camera_motion: picture widths per second; None: any.
    """

    min_motion: float
    min_hand_visibility: float
    calibrated_on: int = 0
    min_residual_motion: float = 0.0
    max_camera_motion: float | None = None

    # Scores are stored as float32; deciding on the stored value keeps every later look in agreement.

    def refuses_motion(self, motion: float) -> str | None:
        """The reason to drop a clip of this motion, or None. The cheap gate: hands are looked for after."""
        if np.float32(motion) >= np.float32(self.min_motion):
            return None
        return f"motion below {self.min_motion:.4g}"

    def refuses_hands(self, visibility: float) -> str | None:
        """The reason to drop a clip of this hand visibility, or None."""
        if np.float32(visibility) >= np.float32(self.min_hand_visibility):
            return None
        return f"hand visibility below {self.min_hand_visibility:.4g}"

    def refuses_camera(self, residual_motion: float, camera_motion: float) -> str | None:
        """The reason to drop a clip whose motion is (too much) the camera's, or None."""
        if np.float32(residual_motion) < np.float32(self.min_residual_motion):
            return f"residual motion below {self.min_residual_motion:.4g}"
        if self.max_camera_motion is None or np.float32(camera_motion) <= np.float32(self.max_camera_motion):
            return None
        return f"camera motion above {self.max_camera_motion:.4g}"


def needs_calibration(gate: config.Gate) -> bool:
    thresholds = (
        gate.min_motion,
        gate.min_hand_visibility,
        gate.min_residual_motion,
        gate.max_camera_motion,
    )
    return any(isinstance(threshold, config.Quantile) for threshold in thresholds)


def resolve(gate: config.Gate, scores: Mapping[str, Sequence[float]] | None = None) -> Gate:
    """Thresholds from a configuration and, where it asks for quantiles, from scores of sampled clips.

    A quantile over no clips at all keeps everything.

    Args:
        scores: ``motion``, ``hand_visibility``, ``residual_motion`` and ``camera_motion`` of the clips.
    """
    scores = scores or {}

    def quantile(wanted: config.Quantile, name: str, method: str, otherwise: float) -> float:
        values = np.asarray(scores.get(name, ()), np.float32)
        # A value that occurs is taken, so that ties and float32 rounding fall on the kept side.
        return float(np.quantile(values, wanted.quantile, method=method)) if len(values) else otherwise  # type: ignore[call-overload]

    def at_least(wanted: float | config.Quantile, name: str) -> float:
        return quantile(wanted, name, "higher", 0.0) if isinstance(wanted, config.Quantile) else wanted

    camera = gate.max_camera_motion
    if isinstance(camera, config.Quantile):
        camera = quantile(camera, "camera_motion", "lower", np.inf)
        camera = None if np.isinf(camera) else camera
    return Gate(
        at_least(gate.min_motion, "motion"),
        at_least(gate.min_hand_visibility, "hand_visibility"),
        len(scores.get("motion", ())) if needs_calibration(gate) else 0,
        at_least(gate.min_residual_motion, "residual_motion"),
        camera,
    )
