"""Charts as inline SVG: numbers in, markup out. All text is escaped; colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 210  # of a small chart: narrow, so that its text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 34, 38
# Ten hues that hold on white and on near-black; more clusters walk the hue circle by the golden angle.
PALETTE = (
    *("#4269d0", "#e8a100", "#f2604c", "#43b39c", "#3ca951"),
    *("#f17fae", "#a463f2", "#62a0ea", "#9c6b4e", "#8d93a0"),
)

# The hand's bones as pairs of MediaPipe landmarks: thumb, four fingers, and across the palm.
BONES = (
    *((0, 1), (1, 2), (2, 3), (3, 4)),
    *((0, 5), (5, 6), (6, 7), (7, 8)),
    *((5, 9), (9, 10), (10, 11), (11, 12)),
    *((9, 13), (13, 14), (14, 15), (15, 16)),
    *((13, 17), (17, 18), (18, 19), (19, 20), (0, 17)),
)


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """One element. ``class_`` is ``class``, ``_`` in a name is ``-``, None leaves an attribute out."""
    text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(number(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{tag}{text}>{inner}</{tag}>")


def number(value: object) -> str:
    """A coordinate: at most two decimals."""
    if isinstance(value, float | np.floating):
        return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return str(value)


def colour(index: int) -> str:
    """The colour of a cluster."""
    if index < len(PALETTE):
        return PALETTE[index]
    return f"hsl({index * 137.508 % 360:.0f} 58% 56%)"


def ticks(high: float, wanted: int = 5, low: float = 0.0) -> list[float]:
    """About ``wanted`` round numbers from ``low`` to ``high``."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in (1, 2, 2.5, 5, 10) if power * s >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: 1.2 k, 3 M, 0.05."""
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def _svg(*children: object, label: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    return el(
        "svg", *children, viewBox=f"0 0 {number(width)} {number(height)}", role="img", aria_label=label,
        class_="chart",
    )  # fmt: skip


def _frame(
    x_ticks: Iterable[tuple[float, str]], y_ticks: Iterable[tuple[float, str]], x_label: str, y_label: str
) -> list[Markup]:
    """Grid lines, tick labels and titles; positions are pixels."""
    floor, parts = HEIGHT - BOTTOM, []
    for y, text in y_ticks:
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(el("text", text, x=LEFT - 6, y=y + 4, class_="end"))
    for x, text in x_ticks:
        parts.append(el("text", text, x=x, y=floor + 16, class_="mid"))
    parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=floor, y2=floor, class_="axis"))
    parts.append(el("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 4, class_="end soft"))
    parts.append(el("text", y_label, x=4, y=12, class_="soft"))
    return parts


@dataclass(frozen=True)
class Series:
    name: str
    style: str  # CSS class
    counts: np.ndarray  # int64 [bins]


def histogram(
    edges: np.ndarray,
    series: Sequence[Series],
    threshold: float | None,
    x_label: str,
    label: str,
    most: float,
    upper: bool = False,
) -> Markup:
    """Stacked bars over ``edges`` (float64 [bins + 1]) with a line at the threshold.

    Args:
        most: the largest possible score; a last bin that opens there has no tick at its end.
        upper: what lies below the threshold is kept, not what lies above.
    """
    low, high = float(edges[0]), float(edges[-1])
    if threshold is not None:
        high = max(high, threshold * 1.05)
    total = np.sum([s.counts for s in series], axis=0)
    peak = max(1, int(total.max(initial=0)))
    floor, width = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return LEFT + width * (value - low) / (high - low)

    def y(count: float) -> float:
        return floor - (floor - TOP) * count / peak

    parts = _frame(
        ((x(t), short(t)) for t in ticks(min(high, most), 6, low)),
        ((y(t), short(t)) for t in ticks(peak, 4) if t == int(t)),
        x_label,
        "clips",
    )
    base = np.zeros(len(total))
    for one in series:
        for i in np.flatnonzero(one.counts):
            left, right = x(float(edges[i])), x(float(edges[i + 1]))
            top, bottom = y(base[i] + one.counts[i]), y(base[i])
            span = f"{edges[i]:.4g}–{edges[i + 1]:.4g}"
            parts.append(
                el(
                    "rect", el("title", f"{one.name}: {one.counts[i]:,} clips, {span}"),
                    x=left + 0.5, y=top, width=max(0.6, right - left - 1), height=max(0.4, bottom - top),
                    class_=one.style,
                )
            )  # fmt: skip
        base += one.counts
    if threshold is not None:
        at = x(threshold)
        side = "end" if at > LEFT + width * 0.7 else "start"
        parts.append(el("line", x1=at, x2=at, y1=TOP - 24, y2=floor, class_="threshold"))
        text, beside = f"{'≤' if upper else '≥'} {threshold:.4g} kept", -6 if side == "end" else 6
        parts.append(el("text", text, x=at + beside, y=TOP - 14, class_=f"{side} strong"))
    return _svg(*parts, label=label)


def line(x: np.ndarray, y: np.ndarray, x_label: str, y_label: str, label: str, style: str = "kept") -> Markup:
    """One line over its filled area; float64 [N] each, x ascending, y from zero."""
    floor, width = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT
    high_x, high_y = max(float(x[-1]), 1e-9), max(float(y.max()) * 1.08, 1e-9)
    px = LEFT + width * x / high_x
    py = floor - (floor - TOP) * y / high_y
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(px, py, strict=True))
    area = f"{path}L{px[-1]:.1f} {floor}L{px[0]:.1f} {floor}Z"
    return _svg(
        *_frame(
            ((LEFT + width * t / high_x, short(t)) for t in ticks(high_x, 6)),
            ((floor - (floor - TOP) * t / high_y, short(t)) for t in ticks(high_y, 4)),
            x_label,
            y_label,
        ),
        el("path", d=area, class_=f"area {style}"),
        el("path", d=path, class_=f"stroke {style}"),
        label=label,
    )


def bars(rows: Sequence[tuple[str, float, str]], label: str, left: float = 92) -> Markup:
    """Horizontal bars: (name, value, text beside the bar); ``left``: room for the names."""
    step, room = 26, 108
    peak = max((value for _, value, _ in rows), default=0.0) or 1.0
    parts = []
    for i, (name, value, text) in enumerate(rows):
        y, length = i * step + 4, (WIDTH - left - room) * value / peak
        parts += [
            el("text", name, x=left - 8, y=y + 13, class_="end"),
            el("rect", x=left, y=y, width=max(1.0, length), height=18, rx=3, class_="kept"),
            el("text", text, x=left + max(1.0, length) + 7, y=y + 13, class_="soft"),
        ]
    return _svg(*parts, label=label, height=len(rows) * step + 6)


def flow(parts: Sequence[tuple[int, str]], total: int, label: str) -> Markup:
    """One row of the funnel: (clips, CSS class) side by side, as shares of ``total``. Stretches."""
    children, at = [], 0.0
    for count, style in parts:
        width = 1000 * count / max(1, total)
        if count:
            children.append(el("rect", x=at, y=0, width=max(2.0, width), height=10, class_=style))
        at += width
    return el("svg", *children, viewBox="0 0 1000 10", preserveAspectRatio="none", role="img",
              aria_label=label, class_="flow")  # fmt: skip


@dataclass(frozen=True)
class Points:
    """Clips in a plane: float64 [N, 2], skill int64 [N], and what is known of each."""

    xy: np.ndarray
    skill: np.ndarray
    clip_id: np.ndarray  # object [N]


def scatter(
    points: Points, pictures: Mapping[str, Mapping[str, Any]], names: Mapping[int, str], label: str
) -> Markup:
    """Clips in a plane, coloured by cluster; those with a picture have a ring and can be pointed at.

    Args:
        pictures: clip id to the ``data-*`` attributes of its point.
        names: cluster to the text at its middle; clusters that are not in it have none.
    """
    width, height, margin = 640.0, 460.0, 22.0
    low, high = points.xy.min(0), points.xy.max(0)
    span = np.where(high > low, high - low, 1.0)
    unit = (points.xy - low) / span
    xy = margin + unit * (width - 2 * margin, height - 2 * margin)
    xy[:, 1] = height - xy[:, 1]
    radius = 4.0 if len(xy) < 200 else 2.8 if len(xy) < 1500 else 1.8
    dots, ringed, texts = [], [], []
    for skill in np.unique(points.skill):
        chosen = points.skill == skill
        # Zero-length strokes with round ends: one element a cluster, however many points.
        plain = [
            f"M{a:.1f} {b:.1f}h0"
            for (a, b), key in zip(xy[chosen], points.clip_id[chosen], strict=True)
            if key not in pictures
        ]
        shade = colour(int(skill))
        if plain:
            dots.append(
                el("path", d="".join(plain), stroke=shade, stroke_width=2 * radius, class_="dots",
                   data_skill=int(skill))
            )  # fmt: skip
        for (a, b), key in zip(xy[chosen], points.clip_id[chosen], strict=True):
            if key in pictures:
                ringed.append(
                    el("circle", cx=a, cy=b, r=radius + 2.5, fill=shade, class_="pt", tabindex=0,
                       data_skill=int(skill), **pictures[key])
                )  # fmt: skip
        if int(skill) in names:
            x, y = np.median(xy[chosen], axis=0)
            texts.append(el("text", names[int(skill)], x=x, y=max(16.0, y - radius - 8), class_="mid tag"))
    return el("svg", *dots, *ringed, *texts, viewBox="0 0 640 460", role="group", aria_label=label,
              class_="chart scatter")  # fmt: skip


def hand(landmarks_xy: np.ndarray, side: str) -> Markup:
    """The bones and joints of one hand, float [21, 2] in pixels of the picture."""
    bones = "".join(
        "M{:.1f} {:.1f}L{:.1f} {:.1f}".format(*landmarks_xy[a], *landmarks_xy[b]) for a, b in BONES
    )
    joints = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in landmarks_xy)
    return el(
        "g",
        el("path", d=bones, class_="halo"),
        el("path", d=bones, class_="bone"),
        el("path", d=joints, class_="joint"),
        class_=f"hand {side}" if side in ("left", "right") else "hand",
    )


def placeholder(width: int, height: int, reason: str) -> Markup:
    """What stands where a picture could not be taken: an empty frame that says why."""
    words, lines = reason.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 34 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    lines = [text if len(text) <= 40 else text[:39] + "…" for text in lines[:4]]
    middle_x, middle_y = width / 2, height / 2
    return el(
        "g",
        el("rect", x=1, y=1, width=width - 2, height=height - 2, class_="void"),
        el("path", d=f"M{middle_x - 26} {middle_y - 52}h38v30h-38zM{middle_x + 12} {middle_y - 42}l14 -8v26"
           f"l-14 -8M{middle_x - 34} {middle_y - 14}l68 -46", class_="voidmark"),
        *(el("text", text, x=middle_x, y=middle_y + 16 + 19 * i, class_="mid voidtext")
          for i, text in enumerate(lines)),
    )  # fmt: skip
