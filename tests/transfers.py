"""Counts the bytes that torch copies from a GPU to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class Moved:
    bytes: int = 0


@contextmanager
def device_to_host() -> Iterator[Moved]:
    """All threads' copies, as the driver reports them (CUPTI)."""
    moved = Moved()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        yield moved
    events = profiler.profiler.kineto_results.events() if profiler.profiler else []
    copies = [event for event in events if "Memcpy DtoH" in event.name()]
    moved.bytes = sum(event.nbytes() for event in copies)
