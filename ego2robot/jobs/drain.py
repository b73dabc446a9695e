"""Being asked to stop: Slurm warns before it takes a node away, or before a time limit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Drained(Exception):
    """This process was asked to stop; what was complete is committed."""


class Drain:
    """Whether this worker is to stop: to commit what is complete and give back its claims, within seconds."""

    def __init__(self) -> None:
        self.wanted = False

    def ask(self, *_: object) -> None:
        self.wanted = True

    @contextmanager
    def on(self, *signals: signal.Signals) -> Iterator[Drain]:
        """Asks at any of these signals; sets what was there before at the end."""
        before = {number: signal.signal(number, self.ask) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
