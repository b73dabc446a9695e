"""A verdict in words, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ego2robot.check import Verdict
from ego2robot.check.rule import Comparison

MOST_DIMENSIONS = 16


def text(verdict: Verdict) -> str:
    """The verdict last, what it rests on before it; columns aligned."""
    return "\n".join(_lines(verdict))


def _lines(verdict: Verdict) -> Iterator[str]:
    videos = f" of {verdict.videos} videos" if verdict.videos is not None else ""
    by = "source video" if verdict.by_video else "episode"
    held = ", ".join(f"{episodes} episodes" for episodes, _ in verdict.held_out)
    yield f"{verdict.episodes} episodes{videos}, {verdict.moments} moments; held out by {by}: {held}"
    yield from _table(verdict)
    if verdict.constant:
        yield f"left out, constant: {', '.join(verdict.constant[:MOST_DIMENSIONS])}"
    yield _compared("pictures against", verdict.network)
    adds = "pictures add to it" if verdict.beside_last.holds else "pictures add nothing to it"
    yield f"{_compared('with pictures against', verdict.beside_last, 'the last action alone')}: {adds}"
    yield "learnable" if verdict.learnable else "not learnable"


def _table(verdict: Verdict) -> Iterator[str]:
    predictors = [name for name in verdict.r2 if name != "line and network"]
    shown = verdict.names[:MOST_DIMENSIONS]
    rows = [["R² on what was held out", *predictors]]
    for d, name in enumerate(shown):
        cells = []
        for predictor in predictors:
            values = verdict.r2[predictor][:, d]
            values = values[np.isfinite(values)]
            mean = f"{values.mean():.3f}" if len(values) else "-"
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 and predictor == "network" else ""
            cells.append(mean + spread)
        rows.append([name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest])
    if len(verdict.names) > len(shown):
        yield f"… and {len(verdict.names) - len(shown)} more dimensions"


def _compared(what: str, found: Comparison, against: str | None = None) -> str:
    share, spread, low, high = (100 * value for value in (found.mean, found.spread, found.low, found.high))
    return (
        f"{what} {against or found.against}: {share:+.1f} % of the squared error taken away "
        f"(± {spread:.1f} over {len(found.gains)} seeds, 95 % {low:+.1f} to {high:+.1f})"
    )
