"""What is taken out of a dataset before others get it: faces in pictures, names in what describes them.

Neither is a promise of anonymity. The detector misses faces (``benchmarks/faces.py`` measures how many of
which size), hands, clothes, rooms and screens stay, and a task text is kept as it was written.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ego2robot import models
from ego2robot.errors import UserError
from ego2robot.hands_net.faces import LOOKS, FaceNet, Look
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.types import ClipFrames

# Hands on a table look like a large face, now and then, to the network for faces near the camera. With these
# no frame of the film of benchmarks/faces.py has a sure face; real faces lose nothing from 20 pixels on.
DOUBTS: dict[Look, float] = {"near": 0.1, "far": 0.05}
MIN_SCORE = 0.7  # of a face, in one of the frames it is followed through
MIN_LINKED = 0.5  # in the others
MAX_GAP = 3  # frames in which a face that is found before and after may be missed
LONGER = 1  # frames before the first and after the last in which it is found
GROWN = 1.6  # times the detector's box, which ends at brows and chin
RAISED = 0.1  # of the box's height: there is more head above than below
CELLS = 4  # along each side of a grown box: all that is left of it
_PER_PASS = {"cpu": 4, "cuda": 32}
_PIXELS = 640 * 360


@dataclass(frozen=True)
class Privacy:
    """What a run asks for. Pickles.

    Attributes:
        blur_faces: cover the faces that are found.
        salt: of the pseudonyms; None: names stay.
    """

    blur_faces: bool = False
    salt: bytes | None = field(default=None, repr=False)

    @property
    def stripper(self) -> Stripper | None:
        return Stripper(self.salt) if self.salt is not None else None

    def cover(self) -> Callable[[ClipFrames], int]:
        """A function that covers the faces in a clip's frames, in place, and says in how many of them; where
        that is not asked for, it does nothing."""
        if not self.blur_faces:
            return lambda found: 0
        net = face_net()
        return lambda found: blur_faces(found.frames_THWC, net, found.content)[1]


def of_run(run: RunDir) -> Privacy:
    """What ``export.blur_faces`` and ``export.strip_metadata`` of a run say, made ready.

    Raises:
        UserError: the face detector is not there and cannot be fetched.
    """
    asked = run.config.export
    if asked.blur_faces:
        require_networks()
    return Privacy(asked.blur_faces, salt_of(run.path) if asked.strip_metadata else None)


# -- faces ----------------------------------------------------------------------------------------


def face_net(device: torch.device | str = "cpu") -> FaceNet:
    """The detector that :func:`blur_faces` takes.

    Raises:
        UserError: the networks are missing or damaged.
    """
    return FaceNet(*_networks(), device, min_score=MIN_LINKED, looks=LOOKS, doubts=DOUBTS)


def require_networks() -> None:
    """Fetches the networks of :func:`face_net` where they are missing. Raises UserError where it cannot."""
    _networks(pull_if_missing=True)


def _networks(pull_if_missing: bool = False) -> tuple[Path, Path]:
    near, far = (
        models.network_path(f"face_detection_{name}.tflite", pull_if_missing)
        for name in ("short_range", "full_range_sparse")
    )
    return near, far


def blur_faces(
    frames_THWC: torch.Tensor, net: FaceNet, content: tuple[int, int, int, int] | None = None
) -> tuple[torch.Tensor, int]:
    """Replaces every face that is found by ``CELLS`` x ``CELLS`` flat patches, in place.

    A face is followed from frame to frame: where it is missed in up to ``MAX_GAP`` frames between two in
    which it is found, and ``LONGER`` frames before and after, it is covered too. A patch is the mean of what
    was there, so nothing finer can be brought back from one frame.

    Args:
        frames_THWC: uint8 RGB [T, H, W, 3], consecutive frames of one clip, on the device of ``net``.
        net: of :func:`face_net`.
        content: (top, left, height, width) of the picture inside the frame; None: all of it.

    Returns:
        ``frames_THWC``, and in how many of its frames something was covered.

    Raises:
        ValueError: not such frames.
    """
    if frames_THWC.dtype != torch.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
        raise ValueError(f"frames are {frames_THWC.dtype} {tuple(frames_THWC.shape)}, not uint8 [T, H, W, 3]")
    height, width = frames_THWC.shape[1:3]
    top, left, rows, columns = content or (0, 0, height, width)
    picture_THWC = frames_THWC[:, top : top + rows, left : left + columns]
    score_TK, box_TK4 = _find(picture_THWC, net)
    changed = set()
    for frame, box in follow(score_TK, box_TK4):
        if _cover(picture_THWC[frame], box):
            changed.add(frame)
    return frames_THWC, len(changed)


def _find(frames_THWC: torch.Tensor, net: FaceNet) -> tuple[np.ndarray, np.ndarray]:
    """Scores [T, K] and boxes [T, K, 4] on the host, in one copy."""
    height, width = frames_THWC.shape[1:3]
    size = max(1, min(_PER_PASS[frames_THWC.device.type], 4 * _PIXELS // max(1, height * width)))
    tables = []
    for some in frames_THWC.split(size):
        found = net(some)
        tables.append(torch.cat((found.score_BK[..., None], found.box_BK4), -1))
    table = torch.cat(tables).cpu().numpy() if tables else np.zeros((0, net.max_faces, 5), np.float32)
    return table[..., 0], table[..., 1:]


@dataclass
class _Track:
    """One face through the frames of a clip."""

    boxes: dict[int, np.ndarray] = field(default_factory=dict)
    best: float = 0.0

    @property
    def last(self) -> int:
        return max(self.boxes)

    def way_to(self, frame: int, box: np.ndarray) -> float | None:
        """How far a box of a later frame lies from this face, in pixels; None where it cannot be this face:
        not about as large, or further than a face's size a frame."""
        apart = frame - self.last
        if not 0 < apart <= MAX_GAP + 1:
            return None
        before = self.boxes[self.last]
        sizes = sorted(float(np.mean(b[2:] - b[:2])) for b in (before, box))
        way = float(np.abs((before[:2] + before[2:]) / 2 - (box[:2] + box[2:]) / 2).max())
        return way if sizes[1] <= 2 * sizes[0] and way <= apart * sizes[1] else None


def follow(score_TK: np.ndarray, box_TK4: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Which box of which frame is to be covered: (frame, float [4]) as ``box_TK4``, before it is grown.

    Args:
        score_TK: float [T, K], 0 where there is no face.
        box_TK4: float [T, K, 4], x_min, y_min, x_max, y_max.
    """
    tracks: list[_Track] = []
    for frame in range(len(score_TK)):
        for k in np.argsort(-score_TK[frame], kind="stable"):
            score, box = float(score_TK[frame, k]), box_TK4[frame, k]
            if score < MIN_LINKED:
                break
            # The nearest, but rather a face that is sure than what may be none.
            near = [(t.best < MIN_SCORE, way, i) for i, t in enumerate(tracks)
                    if (way := t.way_to(frame, box)) is not None]  # fmt: skip
            if near:
                known = tracks[min(near)[2]]
            else:
                known = _Track()
                tracks.append(known)
            known.boxes[frame] = box
            known.best = max(known.best, score)
    return [
        item for track in tracks if track.best >= MIN_SCORE for item in _filled(track.boxes, len(score_TK))
    ]


def _filled(boxes: Mapping[int, np.ndarray], n_frames: int) -> Iterator[tuple[int, np.ndarray]]:
    frames = sorted(boxes)
    table = np.stack([boxes[frame] for frame in frames])
    for frame in range(max(0, frames[0] - LONGER), min(n_frames, frames[-1] + LONGER + 1)):
        yield frame, np.array([np.interp(frame, frames, table[:, i]) for i in range(4)])


def _cover(picture_HWC: torch.Tensor, box: np.ndarray) -> bool:
    """Covers a grown box of a picture; False where all of it lies outside."""
    height, width, _ = picture_HWC.shape
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * GROWN
    centre[1] -= RAISED * (box[3] - box[1])
    x0, y0 = (
        int(np.clip(np.floor(c - h), 0, n)) for c, h, n in zip(centre, half, (width, height), strict=True)
    )
    x1, y1 = (
        int(np.clip(np.ceil(c + h), 0, n)) for c, h, n in zip(centre, half, (width, height), strict=True)
    )
    if x0 >= x1 or y0 >= y1:
        return False
    there = picture_HWC[y0:y1, x0:x1]
    planes = there.permute(2, 0, 1)[None].to(torch.float32)
    cells = min(CELLS, y1 - y0), min(CELLS, x1 - x0)
    means = F.adaptive_avg_pool2d(planes, cells)
    flat = F.interpolate(means, size=(y1 - y0, x1 - x0), mode="nearest")[0].permute(1, 2, 0)
    there.copy_(flat.round_().to(torch.uint8))
    return True


# -- names ----------------------------------------------------------------------------------------

SALT_FILE = "privacy-salt"
SALT_BYTES = 16
# Fields of a source that say what is done or how the picture was taken, not by whom or where.
KEPT_FIELDS = frozenset(
    (
        *("task", "task_index", "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes"),
        *("narration", "llm_type", "llm_verbs", "llm_objects", "object", "license", "split", "part", "parts"),
        *("fps", "width", "height", "codec", "duration_sec", "size_bytes", "intrinsics", "episode_index"),
        *("start_s", "end_s"),
    )
)
# What tells recordings of one person, place or device from those of another: kept apart, not named.
_TELLS_APART = re.compile(r"(^|_)(id|ids|uid|uuid|participant|person|subject|worker|factory|site|session|"
                          r"session_name|environment|device|serial|scene|kitchen)$")  # fmt: skip


def salt_of(run: Path) -> bytes:
    """The secret of a run that its pseudonyms are made with; made at the first call.

    It lies in the run directory, not in datasets: with it a pseudonym can be found again, without it names
    cannot be tried one by one. Give several runs one file to have the same pseudonyms in all.

    Raises:
        UserError: the file is damaged.
    """
    return salt_at(run / SALT_FILE)


def salt_at(path: Path) -> bytes:
    """As :func:`salt_of`, of any file. It is there whole or not at all, however many processes make it."""
    if not path.exists():
        _make_salt(path)
    try:
        salt = bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError:
        salt = b""
    if not SALT_BYTES <= len(salt) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise UserError(
            f"{path}: not the secret that pseudonyms are made with ({2 * SALT_BYTES} hex digits); put that "
            "back, or remove the file for other pseudonyms"
        )
    return salt


def _make_salt(path: Path) -> None:
    aside = path.with_name(f"{atomic.TEMPORARY_PREFIX}{path.name}.{secrets.token_hex(6)}")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(SALT_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        atomic.settle(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    atomic.sync_folder(path.parent)


@dataclass(frozen=True)
class Stripper:
    """Takes names out of what a dataset says of its episodes. ``salt``: of :func:`salt_of`."""

    salt: bytes

    def pseudonym(self, kind: str, value: str) -> str:
        """16 hex digits after ``kind``: the same for the same value, in this run alone."""
        digest = hashlib.blake2b(f"{kind}\x1f{value}".encode("utf-8", "surrogatepass"), digest_size=8,
                                 key=self.salt)  # fmt: skip
        return f"{kind}-{digest.hexdigest()}"

    def video(self, name: str) -> str:
        """What a video is called instead of its file name."""
        return self.pseudonym("video", name)

    def clip(self, clip_id: str) -> str:
        """16 hex digits instead of a clip's id, which whoever has the footage could find again."""
        return self.pseudonym("clip", clip_id).removeprefix("clip-")

    def meta(self, fields: Mapping[str, str]) -> dict[str, str]:
        """The fields of a source without names: what is done stays, who and where become pseudonyms, the
        rest goes."""
        found = {}
        for key, value in fields.items():
            if key in KEPT_FIELDS:
                found[key] = value
            elif apart := _TELLS_APART.search(key):
                kind = key[: apart.start()] or apart.group(2)
                found[key] = self.pseudonym(re.sub(r"[^a-z0-9_]", "", kind.lower()) or "name", value)
        return found

    def line(self, text: str, name: str) -> str:
        """A message about a video, such as why it was left out, without its name and without paths."""
        return re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^\s:;,'\"]+)+", "…", text.replace(name, self.video(name)))


def public_config(tree: Mapping[str, Any], strip: bool = False) -> dict[str, Any]:
    """A configuration without the folders of the machine: datasets are made to be given away.

    Args:
        tree: of ``config.to_dict``.
        strip: leave out what the source's folder is called, too.
    """
    public = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    public["run_dir"] = ""
    public["export"]["path"] = ""
    for key in ("path", "annotations"):
        public["source"][key] = "" if strip else _last(public["source"].get(key) or "")
    for name, model in public["embed"].items():
        if isinstance(model, Mapping) and Path(model["weights"]).is_absolute():
            public["embed"][name] = {**model, "weights": _last(model["weights"])}
    return public


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
