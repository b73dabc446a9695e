"""What a person sees while a job runs: one line with a rate and an ETA, on standard error.

On a terminal it is redrawn in place; in a log file it is a new line every ten seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ego2robot.progress import Progress, Show, Tell
from ego2robot.report import Funnel

if TYPE_CHECKING:
    from ego2robot.search import Answer

LOG_SECONDS = 10.0


def duration(seconds: float) -> str:
    """``3725`` to ``1:02:05``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def line(progress: Progress) -> str:
    """One line, what matters most first, since a narrow terminal cuts its end.

    ``curating 120/480 clips · ETA 1:52 · 3.20 clips/s · 96.0 video-h/h · 34 kept``.
    """
    p = progress
    if p.stage != "curating":
        plain = p.stage + (f" {p.done}/{p.total}" if p.total else f" {p.done}" if p.done else "")
        if not p.rate or p.eta_s is None:
            return plain
        left = f" · ETA {duration(p.eta_s)}" if p.done < p.total else ""
        return f"{plain} {p.unit}{left} · {p.rate:.2f} {p.unit}/s"
    parts = [f"{p.stage} {p.done}/{p.total} clips"]
    if p.eta_s is not None and p.done < p.total:
        parts.append(f"ETA {duration(p.eta_s)}")
    if p.rate:
        parts += [f"{p.rate:.2f} clips/s", f"{p.video_rate:.1f} video-h/h"]
    return " · ".join([*parts, f"{p.kept} kept"])


def bar(progress: Progress, width: int = 12) -> str:
    if not progress.total:
        return ""
    full = round(width * min(1.0, progress.done / progress.total))
    return "━" * full + "╌" * (width - full) + " "


def funnel_text(funnel: Funnel) -> str:
    """What became of the planned clips, most frequent reasons first, with bars of one scale."""
    rows = [
        ("planned", funnel.planned, ""),
        ("scored", funnel.scored, ""),
        *(("  dropped", n, reason) for reason, n in funnel.dropped.items()),
        *(("  failed", n, reason) for reason, n in funnel.failed.items()),
        ("kept", funnel.kept, ""),
    ]
    if funnel.pending:
        rows.append(("left", funnel.pending, "not decided yet"))
    most = max(1, funnel.planned)
    width = len(str(most))
    lines = [
        f"{name:<10} {n:>{width}} {100 * n / most:5.1f} %  {'█' * round(24 * n / most):<24} {reason}".rstrip()
        for name, n, reason in rows
    ]
    return "\n".join(lines)


def found_text(answer: Answer) -> str:
    """The clips of a search, one a line, columns aligned."""
    rows: list[tuple[str, ...]] = [("cosine", "clip", "from", "to", "skill", "label", "video")]
    for clip in answer.clips:
        spans = [
            "" if s is None else f"{duration(int(s))}.{int(10 * (s % 1))}" for s in (clip.start_s, clip.end_s)
        ]
        rows.append(
            (
                f"{clip.cosine:.3f}",
                clip.clip_id,
                *spans,
                clip.skill_name or "",
                clip.label or "",
                "".join(c if c.isprintable() else "?" for c in clip.name or ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = ("from", "to")
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if head in right else cell.ljust(width)
            for cell, width, head in zip(row, widths, rows[0], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) if answer.clips else f"no other clip has a {answer.embedding} vector"


@contextmanager
def display() -> Iterator[tuple[Show, Tell]]:
    """Two functions: one shows a progress, one prints a line that stays."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            yield (
                lambda p: live.update(Text(bar(p) + line(p), overflow="ellipsis", no_wrap=True)),
                lambda text: console.print(Text(text)),
            )
        return
    last: dict[str, object] = {"stage": "", "at": 0.0}

    def show(progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != last["stage"] or now - float(str(last["at"])) >= LOG_SECONDS:
            last.update(stage=progress.stage, at=now)
            sys.stderr.write(line(progress) + "\n")
            sys.stderr.flush()

    def tell(text: str) -> None:
        sys.stderr.write(text + "\n")

    yield show, tell
