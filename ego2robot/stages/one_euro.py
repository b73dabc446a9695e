"""The One-Euro filter: smooth where little moves, quick where much does.

Casiez, Roussel and Vogel, "1€ Filter: A Simple Speed-based Low-pass Filter for Noisy Input in Interactive
Systems", CHI 2012. A first-order low-pass whose cutoff grows with the (itself smoothed) speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OneEuro:
    """What the filter is told.

    Attributes:
        min_cutoff: Hz, of a thing at rest; lower is smoother.
        beta: Hz more per unit of speed; higher lags less.
        d_cutoff: Hz, of the speed's own smoothing.
    """

    min_cutoff: float = 1.0
    beta: float = 1.0
    d_cutoff: float = 1.0

    def __post_init__(self) -> None:
        if not (self.min_cutoff > 0 and self.beta >= 0 and self.d_cutoff > 0):
            raise ValueError(f"cutoffs are above 0 and beta is not below 0, got {self}")

    def __call__(self, values_TD: np.ndarray, fps: float, unit: float = 1.0) -> np.ndarray:
        """Smooths D signals, each by its own speed, and only from what came before.

        Args:
            values_TD: float [T, ...], evenly spaced.
            fps: samples per second.
            unit: length that speeds are measured in, such as the size of a hand.

        Returns:
            Same shape and dtype. The first sample stays as it is.

        Raises:
            ValueError: ``fps`` or ``unit`` is not above 0.
        """
        if not (fps > 0 and unit > 0):
            raise ValueError(f"fps and unit are above 0, got {fps} and {unit}")
        out = np.array(values_TD, np.float64)
        speed = np.zeros_like(out[:1])[0] if len(out) else out
        for t in range(1, len(out)):
            rate = (out[t] - out[t - 1]) * fps / unit
            speed = speed + _share(self.d_cutoff, fps) * (rate - speed)
            share = _share(self.min_cutoff + self.beta * np.abs(speed), fps)
            out[t] = out[t - 1] + share * (out[t] - out[t - 1])
        return out.astype(values_TD.dtype)


def _share(cutoff: np.ndarray | float, fps: float) -> np.ndarray | float:
    """Of a new sample in the smoothed one: 1 / (1 + tau / Te) with tau = 1 / (2 pi cutoff)."""
    return 1 / (1 + fps / (2 * np.pi * cutoff))
