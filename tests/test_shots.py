"""Footage with known cuts: rooms that a head looks around in, with all that must not be taken for a cut."""

from functools import cache

import numpy as np
import pytest
from PIL import Image

from ego2robot import decode
from ego2robot.decode.keyframes import keyframes_before
from ego2robot.decode.shots import HEIGHT, WIDTH, cuts_between, find_cuts
from ego2robot.types import Blob
from tests.footage import remux, write_video

W, H, FPS = 320, 180, 30


@cache
def room(seed):
    """uint8 [540, 1600]: a wall of furniture: boxes of many sizes on a mottled ground."""
    draw = np.random.default_rng(seed)
    wall = np.zeros((540, 1600), np.float32)
    for cells in (6, 20, 70):
        coarse = draw.uniform(-1, 1, (cells, 3 * cells)).astype(np.float32)
        wall += np.asarray(Image.fromarray(coarse).resize((1600, 540), Image.Resampling.BICUBIC)) * 26
    for _ in range(160):
        y, x, h, w = (int(draw.integers(0, 520)), int(draw.integers(0, 1560)), *draw.integers(8, 130, 2))
        wall[y : y + h, x : x + w] = draw.uniform(-100, 100) + 0.3 * wall[y : y + h, x : x + w]
    return np.clip(wall + 120, 0, 255).astype(np.float32)


TURN = 15  # pictures, half a second


def looking(seed, n, turns=True):
    """n pictures [180, 320] of one room: the head sways and, now and then, turns by up to 90 degrees (of a
    picture's 128) in half a second, blurred by its own speed; hands move in front; the light goes on and off
    and flickers."""
    draw = np.random.default_rng(seed + 1000)
    wall = room(seed)
    eased = np.linspace(0, 1, TURN + 1)
    eased = eased**3 * (10 - 15 * eased + 6 * eased**2)  # minimum jerk, as heads turn (Flash and Hogan, 1985)
    centre, turn = 600.0, 0.0
    light, skin = 1.0, float(draw.uniform(150, 220))
    for i in range(n):
        at = (i - 15) % 40 if turns and i >= 15 else TURN
        if at == 0:
            turn = float(np.clip(centre + draw.choice([-225, -120, 120, 225]), 60, 1180)) - centre
        if i % 55 == 35:
            light = float(draw.choice([0.45, 0.7, 1.0, 1.3]))
        step = turn * (eased[at + 1] - eased[at]) if at < TURN else 0.0
        x = centre + 3 * np.sin(i / 7) + draw.normal(0, 0.4)
        centre += step
        y = 180 + 12 * np.sin(i / 11)
        smear = range(6) if abs(step) > 2 else (0,)
        picture = np.mean([_window(wall, x + step * k / 6, y) for k in smear], 0)
        u, v = int(160 + 90 * np.sin(i / 5)), int(120 + 30 * np.cos(i / 4))
        picture[v : v + 60, u - 30 : u + 30] = skin
        yield np.clip(picture * light * (1 + 0.03 * (i % 2)) + draw.normal(0, 3, picture.shape), 0, 255)


def _window(wall, x, y):
    return wall[int(y) : int(y) + H, int(x) : int(x) + W]


@cache
def shots(lengths):
    return [p.astype(np.uint8) for seed, n in enumerate(lengths) for p in looking(seed, n)]


def write_shots(path, lengths, **options):
    """A video of rooms, one after the other; returns the numbers of the first pictures after the cuts."""

    def picture(i, *_):
        return np.repeat(shots(tuple(lengths))[i][..., None], 3, -1)

    write_video(path, sum(lengths), W, H, FPS, picture=picture, crf=26, **options)
    return np.cumsum(lengths)[:-1]


def cuts_of(path):
    blob = Blob(str(path), 0, path.stat().st_size)
    return find_cuts(path.name, blob, decode.probe(path.name, blob))


ENCODERS = {
    "cuts made keyframes by the encoder": {"gop": 250},
    "keyframes at fixed places": {"gop": 30, "options": {"sc_threshold": "0"}},
    "long groups, B-frames": {"gop": 250, "bframes": 3, "options": {"sc_threshold": "0"}},
    "hevc": {"codec": "hevc", "gop": 60},
    "constant rate": {
        "gop": 60,
        "options": {"sc_threshold": "0", "b": "600k", "maxrate": "600k", "bufsize": "300k"},
    },
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_hard_cuts_are_found_to_the_picture_and_nothing_else(tmp_path, kind):
    lengths = [30, 50, 70, 30, 79, 33, 61]  # some cuts fall on fixed keyframes, most do not
    truth = write_shots(tmp_path / "cuts.mp4", lengths, **ENCODERS[kind]) / FPS
    np.testing.assert_allclose(cuts_of(tmp_path / "cuts.mp4"), truth, atol=1e-3)


def test_a_container_without_an_index_gives_the_same_cuts(tmp_path):
    truth = write_shots(tmp_path / "cuts.mp4", [50, 61, 45], gop=30)
    path = remux(tmp_path / "cuts.mp4", tmp_path / "cuts.ts")
    np.testing.assert_allclose(cuts_of(path), truth / FPS, atol=1e-3)


def test_turning_heads_moving_hands_and_lights_are_no_cuts(tmp_path):
    write_shots(tmp_path / "one.mp4", [450], gop=30, options={"sc_threshold": "0"})
    assert cuts_of(tmp_path / "one.mp4") == []


def small(pictures):
    for i, p in enumerate(pictures):
        grey = Image.fromarray(np.asarray(p, np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        yield i / FPS, np.asarray(grey)


def test_of_many_cuts_between_many_rooms_99_of_100_are_found_and_of_as_many_turns_none():
    found = missed = wrong = 0
    for seed in range(0, 105, 5):
        pictures = [p for k in range(5) for p in looking(seed + k, 31)]  # some turn until the cut
        cuts = {round(t * FPS) for t in cuts_between(small(pictures))}
        truth = {31, 62, 93, 124}
        found += len(cuts & truth)
        missed += len(truth - cuts)
        wrong += len(cuts - truth)
    assert found >= 0.99 * (found + missed) and wrong == 0


def test_a_flash_a_dark_moment_and_a_still_picture_are_no_cuts():
    pictures = list(looking(3, 60, turns=False))
    flash = [np.full((H, W), 255.0) if i in (20, 21) else p for i, p in enumerate(pictures)]
    dark = [p * (0.0 if 20 <= i < 30 else 1.0) for i, p in enumerate(pictures)]
    for case in (flash, dark, [pictures[0]] * 20, [np.zeros((H, W))] * 20, pictures[:1], []):
        assert cuts_between(small(case)) == []
    through_black = [*pictures[:20], *[np.zeros((H, W))] * 5, *looking(4, 20, turns=False)]
    assert [round(t * FPS) for t in cuts_between(small(through_black))] == [25]


def test_keyframes_come_from_the_index_and_are_those_of_the_stream(tmp_path):
    path = write_video(tmp_path / "a.mp4", 300, 160, 96, gop=40, bframes=2, options={"sc_threshold": "0"})
    blob = Blob(str(path), 0, path.stat().st_size)
    info = decode.probe("a", blob)
    times = np.array([0.0, 1.3, 1.34, 5.0, 9.9])
    found = keyframes_before("a", blob, info, times)
    np.testing.assert_allclose(found, np.floor(times * 30 / 40 + 1e-9) * 40 / 30, atol=1e-3)
    other = remux(path, tmp_path / "a.ts")
    blob = Blob(str(other), 0, other.stat().st_size)
    assert keyframes_before("a", blob, decode.probe("a", blob), times) is None
