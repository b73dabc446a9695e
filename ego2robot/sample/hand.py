"""A hand with 21 joints, seen by its owner: its back up, the thumb on the inner side.

Joints are numbered as in MediaPipe: 0 wrist, 1-4 thumb, 5-8 index, 9-12 middle, 13-16 ring, 17-20 little
finger, each from the palm outwards. Proportions are an adult's, as shares of the distance from the wrist
to the straight middle finger's tip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ego2robot.sample.draw import RGB, Cone, Shape

# A right hand's knuckles and phalanges: x to the right, y towards the fingers.
KNUCKLES = np.array([[-0.144, 0.455], [-0.035, 0.48], [0.075, 0.455], [0.172, 0.40]])
PHALANGES = np.array([[0.22, 0.13, 0.10], [0.24, 0.153, 0.103], [0.223, 0.144, 0.102], [0.172, 0.102, 0.093]])
FAN = np.radians([-7.0, -1.0, 5.0, 12.0])  # of the relaxed fingers, clockwise as seen
FINGER_RADIUS = np.array([0.059, 0.060, 0.056, 0.049])
THUMB_ROOT = np.array([-0.115, 0.115, -0.02])
THUMB_BONES = (0.23, 0.175, 0.145)
THUMB_OPEN = np.array([[-0.72, 0.66, -0.15], [-0.52, 0.84, -0.12], [-0.38, 0.92, -0.10]])
THUMB_CLOSED = np.array([[-0.50, 0.78, -0.35], [-0.02, 0.95, -0.30], [0.22, 0.94, -0.25]])
FULL_CURL = np.radians([62.0, 78.0, 48.0])  # of the three joints of a finger at curl 1
BONES = [(a, a + 1) for root in (1, 5, 9, 13, 17) for a in range(root, root + 3)]


@dataclass(frozen=True)
class Skin:
    """Colours of an arm, RGB 0..255."""

    base: RGB
    knuckle: RGB
    nail: RGB
    sleeve: RGB


SKINS = (
    Skin((222, 170, 138), (216, 158, 130), (230, 183, 158), (58, 82, 124)),
    Skin((198, 142, 108), (189, 130, 99), (210, 158, 129), (92, 98, 78)),
    Skin((232, 186, 158), (227, 173, 148), (238, 197, 175), (120, 58, 48)),
)


@dataclass(frozen=True)
class HandPose:
    """Where a hand is and what it does. Lengths in view heights, angles in radians."""

    side: str  # left or right
    wrist: tuple[float, float]
    heading: float  # of the middle finger, 0 up, clockwise
    size: float = 0.33  # wrist to the tip of the straight middle finger
    lift: float = 0.06  # of the wrist over the bench
    pitch: float = 0.15  # fingers dip towards the bench
    roll: float = 0.0  # positive: thumb side down
    curl: tuple[float, float, float, float, float] = (0.2, 0.2, 0.2, 0.2, 0.2)  # thumb to little, 0..1
    spread: float = 1.0  # of the relaxed fan


def joints(pose: HandPose) -> np.ndarray:
    """float64 [21, 3]: x, y, z of the joints, view heights."""
    local = np.zeros((21, 3))
    mix = pose.curl[0]
    local[1] = THUMB_ROOT
    for bone, (length, wide, closed) in enumerate(zip(THUMB_BONES, THUMB_OPEN, THUMB_CLOSED, strict=True)):
        direction = (1 - mix) * wide + mix * closed
        local[2 + bone] = local[1 + bone] + length * direction / np.linalg.norm(direction)
    for finger in range(4):
        first = 5 + 4 * finger
        local[first, :2] = KNUCKLES[finger]
        fan, bend = FAN[finger] * pose.spread, 0.0
        for bone in range(3):
            bend += FULL_CURL[bone] * pose.curl[1 + finger]
            flat = math.cos(bend)
            step = np.array([math.sin(fan) * flat, math.cos(fan) * flat, -math.sin(bend)])
            local[first + 1 + bone] = local[first + bone] + PHALANGES[finger, bone] * step
    cr, sr = math.cos(pose.roll), math.sin(pose.roll)
    cp, sp = math.cos(pose.pitch), math.sin(pose.pitch)
    turned = local @ np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
    turned = turned @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    if pose.side == "left":
        turned[:, 0] *= -1
    ch, sh = math.cos(pose.heading), math.sin(pose.heading)
    x = turned[:, 0] * ch + turned[:, 1] * sh
    y = turned[:, 0] * sh - turned[:, 1] * ch
    out = np.stack([x, y, turned[:, 2]], -1) * pose.size
    out += (*pose.wrist, pose.lift)
    return out


def arm(points: np.ndarray, elbow: tuple[float, float], size: float, skin: Skin) -> list[Shape]:
    """The shapes of a hand with ``points`` [21, 3] and the forearm that comes from ``elbow``."""
    shapes: list[Shape] = []
    wrist = points[0]
    elbow3 = np.array([*elbow, wrist[2]])
    cuff = wrist + 0.42 * size * (elbow3 - wrist) / np.linalg.norm(elbow3[:2] - wrist[:2])
    shapes.append(Cone(wrist, cuff, 0.145 * size, 0.17 * size, skin.base, skin.base, 0.7))
    shade = tuple(0.82 * c for c in skin.sleeve)
    shapes.append(Cone(cuff, elbow3, 0.205 * size, 0.30 * size, skin.sleeve, shade, 0.8))  # type: ignore[arg-type]
    hem = cuff + 0.04 * size * (elbow3 - cuff) / np.linalg.norm(elbow3 - cuff)
    shapes.append(Cone(cuff, hem, 0.218 * size, 0.218 * size, shade, shade, 0.85))  # type: ignore[arg-type]
    # The back of the hand: metacarpals wide enough to merge, and the ball of the thumb.
    for finger in range(4):
        knuckle = points[5 + 4 * finger]
        root = wrist + 0.22 * (knuckle - wrist)
        shapes.append(Cone(root, knuckle, 0.105 * size, 0.078 * size, skin.base, skin.knuckle, 0.8))
    for a, b in ((5, 9), (9, 13), (13, 17)):
        middle = 0.5 * (points[a] + points[b]) * 0.8 + wrist * 0.2
        shapes.append(Cone(wrist, middle, 0.12 * size, 0.085 * size, skin.base, skin.base, 0.75))
    shapes.append(Cone(points[1], points[2], 0.095 * size, 0.066 * size, skin.base, skin.base, 0.8))
    web = 0.5 * (points[2] + points[5])
    shapes.append(Cone(points[1], web, 0.085 * size, 0.05 * size, skin.base, skin.base, 0.6))
    for a, b in BONES:
        bone = (a - 1) % 4
        radius = 0.056 if a < 5 else FINGER_RADIUS[(a - 5) // 4]
        near, far = radius * (1.0, 0.93, 0.86)[bone] * size, radius * (0.93, 0.86, 0.74)[bone] * size
        if a == 1:
            continue
        # The skin reddens over the joints and towards the tip.
        middle = 0.5 * (points[a] + points[b])
        centre = 0.5 * (near + far)
        shapes.append(Cone(points[a], middle, near, centre, skin.knuckle, skin.base))
        shapes.append(Cone(middle, points[b], centre, far, skin.base, skin.knuckle))
        if bone == 2:
            tip = points[b] - points[a]
            if np.linalg.norm(tip[:2]) > 0.045 * size:
                lift = np.array([0, 0, 0.55 * far])
                start, end = points[a] + 0.62 * tip + lift, points[a] + 1.08 * tip + lift
                shapes.append(Cone(start, end, 0.62 * far, 0.56 * far, skin.nail, skin.nail, 0.9))
    return shapes
