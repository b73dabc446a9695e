"""Where a job stands, as the one who does it tells the one who shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it.

    Attributes:
        stage: what is being done.
        done: clips decided so far (videos while planning), this start and earlier ones.
        total: clips planned; 0 when not known.
        kept: clips of ``done`` that were kept.
        rate: clips/s of this start.
        video_rate: hours of source video per hour, of this start.
        eta_s: None when not known.
    """

    stage: str
    done: int = 0
    total: int = 0
    kept: int = 0
    rate: float = 0.0
    video_rate: float = 0.0
    eta_s: float | None = None


Show = Callable[[Progress], None]
Tell = Callable[[str], None]
