"""Which clips are worth keeping: enough motion, and hands in sight. Says "yes", or "no, because"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ego2robot import config


@dataclass(frozen=True)
class Gate:
    """Thresholds in force, both absolute (quantiles are resolved).

    Attributes:
        min_motion: share of full scale.
        min_hand_visibility: share of looked-at frames.
        calibrated_on: clips that quantiles were taken over, 0 when both were given.
    """

    min_motion: float
    min_hand_visibility: float
    calibrated_on: int = 0

    def refuses_motion(self, motion: float) -> str | None:
        """The reason to drop a clip of this motion, or None. The cheap gate: hands are looked for after."""
        # Scores are stored as float32; deciding on the stored value keeps every later look in agreement.
        if np.float32(motion) >= np.float32(self.min_motion):
            return None
        return f"motion below {self.min_motion:.4g}"

    def refuses_hands(self, visibility: float) -> str | None:
        """The reason to drop a clip of this hand visibility, or None."""
        if np.float32(visibility) >= np.float32(self.min_hand_visibility):
            return None
        return f"hand visibility below {self.min_hand_visibility:.4g}"


def needs_calibration(gate: config.Gate) -> bool:
    thresholds = (gate.min_motion, gate.min_hand_visibility)
    return any(isinstance(threshold, config.Quantile) for threshold in thresholds)


def resolve(gate: config.Gate, motion: Sequence[float] = (), visibility: Sequence[float] = ()) -> Gate:
    """Thresholds from a configuration and, where it asks for quantiles, from scores of sampled clips.

    A quantile over no clips at all keeps everything.
    """

    def threshold(wanted: float | config.Quantile, scores: Sequence[float]) -> float:
        if not isinstance(wanted, config.Quantile):
            return wanted
        values = np.asarray(scores, np.float32)
        # `higher` takes a value that occurs, so that ties and float32 rounding fall on the kept side.
        return float(np.quantile(values, wanted.quantile, method="higher")) if len(values) else 0.0

    calibrated_on = len(motion) if needs_calibration(gate) else 0
    return Gate(
        threshold(gate.min_motion, motion), threshold(gate.min_hand_visibility, visibility), calibrated_on
    )
