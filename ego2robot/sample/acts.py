"""What the wearer does: skills as loops of hand poses and the things they handle, and how the head moves.

Every movement is a sum of whole cycles over a loop, so that a loop can follow itself without a seam.
Coordinates are those of the view when the head is at rest; x counts from the middle of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ego2robot.sample.draw import RGB, Cone, Shape, Slab
from ego2robot.sample.hand import SKINS, HandPose, arm, joints
from ego2robot.sample.scene import Camera

STEEL: RGB = (176, 182, 190)
RED: RGB = (200, 62, 48)
YELLOW: RGB = (228, 176, 52)
BLUE: RGB = (60, 104, 176)
ELBOWS = {"left": (-0.62, 1.38), "right": (0.62, 1.38)}
GRASP = 0.80, 0.40  # from the wrist to what the fingers hold, share of the hand; less by this per curl
Scene = tuple[list[HandPose], list[Shape]]


@dataclass(frozen=True)
class Loop:
    """One loop: its length and the small things that make one take differ from the next.

    Attributes:
        seconds: length of the loop.
        phases: uniform in 0..1, one per source of movement.
        shift: of the whole action on the bench, view heights.
    """

    seconds: float
    phases: np.ndarray
    shift: tuple[float, float]

    def cycles(self, hertz: float) -> int:
        return max(1, round(hertz * self.seconds))

    def wave(self, t: float, hertz: float, source: int) -> float:
        """-1..1 at share ``t`` of the loop."""
        return math.sin(2 * math.pi * (self.cycles(hertz) * t + self.phases[source % len(self.phases)]))


def loop(seed: int, name: str, variant: int, seconds: float) -> Loop:
    """The same loop for the same arguments."""
    rng = np.random.default_rng([seed, variant, *name.encode()])
    shift = rng.uniform(-1, 1, 2) * (0.035, 0.025)
    return Loop(seconds, rng.uniform(0, 1, 16), (float(shift[0]), float(shift[1])))


# --- the head --------------------------------------------------------------------------------------------


def head_still(take: Loop, t: float) -> Camera:
    return Camera(0.0012 * take.wave(t, 0.25, 0), 0.0009 * take.wave(t, 0.5, 1))


def head_working(take: Loop, t: float) -> Camera:
    """Looks along with the work: faster and further than a tripod, slower than a walk."""
    return Camera(
        0.022 * take.wave(t, 0.5, 0) + 0.008 * take.wave(t, 1.25, 1),
        0.016 * take.wave(t, 0.75, 2) + 0.006 * take.wave(t, 1.5, 3),
        0.010 * take.wave(t, 0.5, 4),
        1.01 + 0.012 * take.wave(t, 0.25, 5),
    )


def head_walking(take: Loop, t: float) -> Camera:
    """Two steps a second: the head bobs with each step and sways with each second one."""
    return Camera(
        0.014 * take.wave(t, 1.0, 0), 0.018 * take.wave(t, 2.0, 1), 0.008 * take.wave(t, 1.0, 2), 1.0
    )


# --- the hands -------------------------------------------------------------------------------------------


def _hold(
    side: str,
    x: float,
    y: float,
    curl: float,
    *,
    twist: float = 0.0,
    lift: float = 0.06,
    pitch: float = 0.15,
    roll: float = 0.0,
    thumb: float | None = None,
    spread: float = 1.0,
) -> HandPose:
    """A hand whose fingers hold the point (x, y), its arm coming from the wearer's elbow."""
    ex, ey = ELBOWS[side]
    heading = math.atan2(x - ex, ey - y) + twist
    size = 0.31 * (1 + 0.5 * lift)
    reach = (GRASP[0] - GRASP[1] * curl) * size
    wrist = (x - reach * math.sin(heading), y + reach * math.cos(heading))
    first = curl if thumb is None else thumb
    return HandPose(
        side,
        wrist,
        heading,
        size,
        lift,
        pitch,
        roll,
        (first, curl, curl * 1.05, curl * 1.1, curl * 1.1),
        spread,
    )


def _ease(t: float, start: float, end: float) -> float:
    """0 before ``start``, 1 after ``end``, smooth between."""
    s = min(1.0, max(0.0, (t - start) / (end - start)))
    return s * s * (3 - 2 * s)


def reach_and_place(take: Loop, t: float) -> Scene:
    """The right hand picks blocks from a pile on the right and places them in the middle."""
    beats = take.cycles(0.25)
    t = (t * beats) % 1.0
    pile, spot = (0.44, 0.40), (-0.06, 0.36)
    away = _ease(t, 0.02, 0.32) - _ease(t, 0.46, 0.80)
    x, y = (s + away * (p - s) for p, s in zip(pile, spot, strict=True))
    arc = max(math.sin(math.pi * _ease(t, 0.02, 0.32)), math.sin(math.pi * _ease(t, 0.46, 0.80)))
    grip = _ease(t, 0.33, 0.44) - _ease(t, 0.81, 0.93)
    hand = _hold(
        "right",
        x,
        y - 0.03 * arc,
        0.12 + 0.30 * grip,
        lift=0.05 + 0.08 * arc,
        pitch=0.2,
        thumb=0.1 + 0.5 * grip,
    )
    things: list[Shape] = [
        Slab((px, py, 0), 0.034, 0.026, angle, 0.03, 0.006, colour)
        for px, py, angle, colour in (
            (0.45, 0.37, 0.3, YELLOW),
            (0.40, 0.42, -0.5, RED),
            (0.48, 0.44, 0.9, BLUE),
            (-0.07, 0.35, 0.05, RED),
            (-0.16, 0.36, 0.0, BLUE),
        )
    ]
    things.append(Slab((-0.09, 0.36, -0.02), 0.15, 0.075, 0.0, 0.012, 0.01, (226, 222, 210)))
    if 0.38 < t < 0.87:
        things.append(Slab((x, y - 0.03 * arc, hand.lift - 0.05), 0.034, 0.026, 0.2, 0.03, 0.006, YELLOW))
    return [hand], things


def screw_turning(take: Loop, t: float) -> Scene:
    """The left hand holds a plate, the right hand turns a screwdriver on it."""
    turn = take.wave(t, 1.25, 6)
    right = _hold(
        "right",
        0.13,
        0.40,
        0.52 + 0.05 * turn,
        twist=-0.15 + 0.30 * turn,
        roll=0.22 * turn,
        lift=0.08,
        pitch=0.2,
        thumb=0.7,
    )
    left = _hold("left", -0.22, 0.42 + 0.006 * take.wave(t, 0.5, 7), 0.30, lift=0.04, thumb=0.35)
    tip = (-0.02, 0.27)
    things: list[Shape] = [Slab((-0.12, 0.30, 0), 0.20, 0.12, 0.08, 0.02, 0.015, STEEL)]
    for sx, sy in (tip, (-0.24, 0.22), (-0.02, 0.38)):
        things.append(Cone((sx, sy, 0.015), (sx, sy, 0.016), 0.014, 0.014, (96, 98, 104), (96, 98, 104), 0.5))
    grip = (0.115, 0.395)
    things.append(Cone((*tip, 0.035), (0.06, 0.345, 0.05), 0.006, 0.007, STEEL, STEEL))
    things.append(Cone((0.05, 0.336, 0.05), (*grip, 0.05), 0.018, 0.022, RED, (150, 40, 34)))
    return [right, left], things


def wiping(take: Loop, t: float) -> Scene:
    """The flat right hand sweeps a cloth over the bench in wide ellipses."""
    angle = 2 * math.pi * take.cycles(0.75) * t
    x, y = 0.10 + 0.27 * math.sin(angle), 0.38 + 0.075 * math.cos(angle)
    hand = _hold(
        "right", x, y, 0.10, twist=0.12 * math.cos(angle), lift=0.03, pitch=0.05, thumb=0.12, spread=1.25
    )
    cloth: list[Shape] = [
        Slab((x - 0.015, y + 0.01, 0.0), 0.125, 0.085, 0.25 * math.cos(angle), 0.012, 0.03, (206, 214, 220)),
        Slab(
            (x + 0.02, y - 0.005, 0.004),
            0.10,
            0.065,
            0.35 + 0.2 * math.cos(angle),
            0.012,
            0.03,
            (178, 196, 212),
        ),
    ]
    return [hand], cloth


def assembling(take: Loop, t: float) -> Scene:
    """Two hands bring two parts together, twist them against each other and part again."""
    apart = 0.5 + 0.5 * take.wave(t, 0.5, 8)
    twist = (1 - apart) * 0.22 * take.wave(t, 1.5, 9)
    gap = 0.11 + 0.10 * apart
    y = 0.42 - 0.03 * apart
    right = _hold("right", gap, y, 0.42 - 0.10 * apart, twist=-0.20 + twist, lift=0.08, thumb=0.5)
    left = _hold("left", -gap, y, 0.42 - 0.10 * apart, twist=0.20 + twist, lift=0.08, thumb=0.5)
    inner = gap - 0.09
    things: list[Shape] = [
        Cone((-gap, y - 0.02, -0.01), (-inner, y - 0.05, 0.01), 0.034, 0.034, BLUE, (44, 78, 140), 0.7),
        Cone((-inner, y - 0.05, 0.02), (-inner + 0.02, y - 0.055, 0.02), 0.018, 0.018, STEEL, STEEL),
        Cone((gap, y - 0.02, -0.01), (inner, y - 0.05, 0.01), 0.038, 0.038, YELLOW, (196, 146, 40), 0.7),
    ]
    return [right, left], things


def lever_pressing(take: Loop, t: float) -> Scene:
    """The left hand pulls the lever of a press down and lets it rise again."""
    pull = 0.5 - 0.5 * math.cos(2 * math.pi * take.cycles(0.75) * t)
    x, y = -0.20 + 0.05 * pull, 0.30 + 0.17 * pull
    hand = _hold("left", x, y, 0.32, twist=0.02 - 0.06 * pull, lift=0.07, pitch=0.18, thumb=0.2, roll=-0.1)
    dark: RGB = (74, 82, 92)
    things: list[Shape] = [
        Slab((0.0, 0.27, 0.0), 0.085, 0.11, 0.0, 0.05, 0.015, (70, 112, 92)),
        Slab((0.0, 0.36 + 0.02 * pull, 0.03), 0.03, 0.05, 0.0, 0.04, 0.008, STEEL),
        Cone((0.03, 0.20, 0.05), (x + 0.01, y - 0.02, 0.01), 0.011, 0.010, dark, dark),
        Cone((x + 0.01, y - 0.02, 0.01), (x + 0.005, y - 0.016, 0.01), 0.020, 0.020, RED, RED),
    ]
    return [hand], things


SKILLS: dict[str, Callable[[Loop, float], Scene]] = {
    "reach_and_place": reach_and_place,
    "screw_turning": screw_turning,
    "wiping": wiping,
    "assembling": assembling,
    "lever_pressing": lever_pressing,
}


@dataclass(frozen=True)
class Staged:
    """One frame of an action as the camera sees it.

    Attributes:
        shapes: what to draw.
        joints: per side, float64 [21, 3] in view heights.
    """

    shapes: list[Shape]
    joints: dict[str, np.ndarray]


def stage(skill: str, take: Loop, t: float, camera: Camera, aspect: float, wearer: int) -> Staged:
    """The shapes of ``skill`` at share ``t`` of its loop, for a camera over the bench."""
    poses, things = SKILLS[skill](take, t)
    dx, dy = take.shift[0] + aspect / 2, take.shift[1]
    shapes = [_seen(thing, dx, dy, camera, aspect) for thing in things]
    found = {}
    for index, pose in enumerate(poses):
        # Nobody's hands are as steady as a sine.
        tremor = [0.003 * take.wave(t, hertz, 10 + 2 * index + i) for i, hertz in enumerate((1.75, 2.25))]
        placed = replace(pose, wrist=(pose.wrist[0] + dx + tremor[0], pose.wrist[1] + dy + tremor[1]))
        points = camera.seen(joints(placed), aspect)
        ex, ey = ELBOWS[pose.side]
        elbow = camera.seen(np.array([ex + dx, ey + dy]), aspect)
        shapes += arm(points, (float(elbow[0]), float(elbow[1])), placed.size, SKINS[wearer % len(SKINS)])
        found[pose.side] = points
    return Staged(shapes, found)


def _seen(shape: Shape, dx: float, dy: float, camera: Camera, aspect: float) -> Shape:
    offset = np.array([dx, dy, 0.0])
    if isinstance(shape, Slab):
        centre = camera.seen(np.array(shape.centre) + offset, aspect)
        return replace(shape, centre=centre, angle=shape.angle - camera.roll)
    return replace(
        shape,
        a=camera.seen(np.array(shape.a) + offset, aspect),
        b=camera.seen(np.array(shape.b) + offset, aspect),
    )
