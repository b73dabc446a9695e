"""A verdict as one SVG: how the networks learnt, and how well each dimension is predicted, by whom."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ego2robot.check import Verdict
from ego2robot.report.charts import PALETTE, el, short, ticks

WIDTH, HEIGHT = 940, 330
LEFT, MIDDLE, RIGHT, TOP, BOTTOM = 56, 470, 20, 64, 46
MOST_DIMENSIONS = 12
LOWEST = -1.0  # R² below is drawn at the edge
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.soft{fill:#777;font-size:12px}.title{font-size:17px;"
    "font-weight:600;fill:#111}.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#e6e6e6}"
    ".axis{stroke:#999}.stroke{fill:none;stroke-width:2}.thin{stroke-width:1;stroke-dasharray:3 3}"
)
# What each predictor is drawn with in the right half.
SAYING = {"zero": "zero", "mean": "the mean"}
MARKS = {"network": PALETTE[0], "last action": PALETTE[1], "zero": "#9a9a9a", "mean": "#4a4a4a"}


def svg(verdict: Verdict) -> str:
    """The picture, complete: it needs no page around it."""
    word = "learnable" if verdict.learnable else "not learnable"
    gain = verdict.network
    head = (
        f"{word}: on held-out {'videos' if verdict.by_video else 'episodes'}, pictures take "
        f"{100 * gain.mean:.1f} % (± {100 * gain.spread:.1f}) off the squared error of saying "
        f"{SAYING[gain.against]}"
    )
    style = el("style", Markup(STYLE))
    drawing = el(
        "svg",
        style,
        el("rect", x=0, y=0, width=WIDTH, height=HEIGHT, fill="#fff"),
        el("text", head, x=14, y=26, class_="title"),
        *_curves(verdict),
        *_dimensions(verdict),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=WIDTH,
        height=HEIGHT,
        role="img",
        aria_label=head,
    )
    return f"{drawing}\n"


def _y(value: float, low: float, high: float) -> float:
    floor = HEIGHT - BOTTOM
    return floor - (floor - TOP) * (min(max(value, low), high) - low) / max(1e-9, high - low)


def _grid(low: float, high: float, left: float, right: float) -> list[Markup]:
    parts = []
    for value in ticks(high, 5, low):
        at = _y(value, low, high)
        parts.append(el("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(el("text", short(value), x=left - 6, y=at + 4, class_="end soft"))
    return parts


def _curves(verdict: Verdict) -> list[Markup]:
    """Errors while training, as shares of the mean's: validation solid, training dashed."""
    right, floor = MIDDLE - 60, HEIGHT - BOTTOM
    values = [v for looks in verdict.curves for k in looks for v in (k.training, k.validation)]
    sound = [v for v in values if math.isfinite(v)]
    high = min(2.0, max([1.1, *sound]))
    last = max([1, *(k.step for looks in verdict.curves for k in looks)])

    def path(points: Sequence[tuple[int, float]]) -> str:
        steps = ((LEFT + (right - LEFT) * x / last, _y(y, 0, high)) for x, y in points if math.isfinite(y))
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in steps)

    parts = _grid(0, high, LEFT, right)
    parts += [
        el("text", short(t), x=LEFT + (right - LEFT) * t / last, y=floor + 18, class_="mid soft")
        for t in ticks(last, 5)
    ]
    parts.append(el("line", x1=LEFT, x2=right, y1=_y(1, 0, high), y2=_y(1, 0, high), class_="axis"))
    for i, looks in enumerate(verdict.curves):
        if looks:
            shade = PALETTE[i % len(PALETTE)]
            parts.append(el("path", d=path([(k.step, k.training) for k in looks]), stroke=shade, opacity=0.8,
                            class_="stroke thin"))  # fmt: skip
            parts.append(
                el("path", d=path([(k.step, k.validation) for k in looks]), stroke=shade, class_="stroke")
            )
    parts += [
        el("text", "squared error, 1 is who always says the mean", x=14, y=TOP - 14, class_="soft"),
        el(
            "text",
            "steps; one colour a seed, dashed: training part",
            x=right,
            y=HEIGHT - 8,
            class_="end soft",
        ),
    ]
    return parts


def _dimensions(verdict: Verdict) -> list[Markup]:
    """R² of each dimension: the network with its spread over the seeds, the baselines as lines beside it."""
    n = min(MOST_DIMENSIONS, len(verdict.names))
    table = {name: np.nanmean(verdict.r2[name][:, :n], 0) for name in MARKS}
    spread = np.nanstd(verdict.r2["network"][:, :n], 0)
    values = [v for row in table.values() for v in row if math.isfinite(v)]
    low = max(LOWEST, math.floor(10 * min([0.0, *values])) / 10)
    high = max(0.2, math.ceil(10 * min(1.0, max([0.0, *values]))) / 10)
    right = WIDTH - RIGHT
    parts = _grid(low, high, MIDDLE + 30, right)
    parts.append(
        el("line", x1=MIDDLE + 30, x2=right, y1=_y(0, low, high), y2=_y(0, low, high), class_="axis")
    )
    step = (right - MIDDLE - 30) / max(1, n)
    for d in range(n):
        centre = MIDDLE + 30 + step * (d + 0.5)
        if math.isfinite(table["network"][d]):
            ends = (_y(table["network"][d] + s, low, high) for s in (-spread[d], spread[d]))
            top, bottom = sorted(ends)
            parts.append(el("line", x1=centre, x2=centre, y1=top, y2=bottom, stroke=MARKS["network"],
                            stroke_width=2))  # fmt: skip
        for name, shade in MARKS.items():
            value = table[name][d]
            if not math.isfinite(value):
                continue
            at = _y(value, low, high)
            said = f"{verdict.names[d]}, {name}: R² {value:.3f}"
            if name == "network":
                parts.append(el("circle", el("title", said), cx=centre, cy=at, r=5, fill=shade))
            else:
                wide = min(18.0, step / 3)
                parts.append(el("line", el("title", said), x1=centre - wide, x2=centre + wide, y1=at, y2=at,
                                stroke=shade, stroke_width=3))  # fmt: skip
        label = verdict.names[d] if len(verdict.names[d]) <= max(3, step / 6.5) else str(d)
        parts.append(el("text", label, x=centre, y=HEIGHT - BOTTOM + 18, class_="mid soft"))
    at = float(MIDDLE + 30)
    parts.append(el("text", "R² on what was held out:", x=at, y=TOP - 14, class_="soft"))
    at += 160
    for name, shade in MARKS.items():
        parts.append(el("rect", x=at, y=TOP - 23, width=10, height=10, fill=shade))
        parts.append(el("text", name, x=at + 15, y=TOP - 14, class_="soft"))
        at += 27 + 6 * len(name)
    more = f"the first {n} of {len(verdict.names)} dimensions" if n < len(verdict.names) else "dimension"
    if low == LOWEST:
        more += f"; what lies below {LOWEST:g} is drawn there"
    parts.append(el("text", more, x=right, y=HEIGHT - 8, class_="end soft"))
    return parts
