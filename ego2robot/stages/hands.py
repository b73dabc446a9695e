"""What the hands that were found say of a clip."""

from __future__ import annotations

from collections.abc import Sequence

from ego2robot.types import Hand


def visibility(hands_per_looked_at_frame: Sequence[Sequence[Hand]]) -> float:
    """Share of looked-at frames with at least one hand, 0 to 1; 0 when none was looked at."""
    looked = len(hands_per_looked_at_frame)
    return sum(bool(hands) for hands in hands_per_looked_at_frame) / looked if looked else 0.0
