"""Where a job stands, as the one who does it tells the one who shows it."""

from __future__ import annotations

import time
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
        unit: what ``done``, ``total`` and ``rate`` count.
    """

    stage: str
    done: int = 0
    total: int = 0
    kept: int = 0
    rate: float = 0.0
    video_rate: float = 0.0
    eta_s: float | None = None
    unit: str = "clips"


Show = Callable[[Progress], None]
Tell = Callable[[str], None]


def paced(stage: str, show: Show) -> Callable[[int, int], None]:
    """A function that shows (clips done, clips to do) with the rate since it was first told, and an ETA."""
    began: tuple[float, int] | None = None

    def tell(done: int, total: int) -> None:
        nonlocal began
        now = time.monotonic()
        if began is None:
            began = now, done
        elapsed, new = now - began[0], done - began[1]
        rate = new / elapsed if elapsed > 0 and new > 0 else 0.0
        show(Progress(stage, done, total, rate=rate, eta_s=(total - done) / rate if rate else None))

    return tell
