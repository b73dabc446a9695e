"""HOT3D-Clips: five seconds of pictures, cameras, hands and objects in one tar.

``clip-<id>.tar`` holds for each frame ``<frame>.image_<stream>.jpg``, ``<frame>.cameras.json``,
``<frame>.info.json`` and, but for the test splits, ``<frame>.hands.json`` and ``<frame>.objects.json``; and
once ``__hand_shapes.json__``. The RGB stream ``214-1`` is used, or the first grey one of a Quest 3.
Member names are only looked up, never opened as paths.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ego2robot.blobs import open_blob
from ego2robot.errors import VideoError
from ego2robot.types import Blob

CODEC = "hot3d-clip"
FRAME = re.compile(r"(\d{6})\.(image_(\d+-\d+)\.jpg|(?:cameras|info|hands|objects|hand_crops)\.json)")
SHAPES = "__hand_shapes.json__"
STREAMS = ("214-1", "1201-1", "1201-2")  # the first that is there
RGB = "214-1"
MAX_MEMBERS, MAX_MEMBER = 100_000, 64 << 20
REDO = "re-download the file"


def looks_like(blob: Blob) -> bool:
    """Whether the first member of a tar is one of such a clip."""
    try:
        with open_blob(blob) as file:
            head = file.read(512)
    except OSError:
        return False
    name = head[:100].rstrip(b"\0").decode("ascii", "replace").removeprefix("./")
    return head[257:262] == b"ustar" and (name == SHAPES or FRAME.fullmatch(name) is not None)


def first_frame(name: str, blob: Blob) -> dict[str, Any]:
    """What the first frame of a clip says: the values of its JSON members by kind (``cameras``, ``info`` …).

    The tar is read up to its second frame. Raises VideoError where it is no tar, or breaks off before that.
    """
    found: dict[str, Any] = {}
    first = None
    try:
        with tarfile.open(Path(blob.path), "r:") as archive, Path(blob.path).open("rb") as file:
            for member in archive:
                match = FRAME.fullmatch(member.name.removeprefix("./"))
                if match is None:
                    continue
                first = first or match[1]
                if match[1] != first:
                    break
                if member.name.endswith(".json") and member.isreg() and member.size <= MAX_MEMBER:
                    file.seek(member.offset_data)
                    found[match[2].removesuffix(".json")] = _value(file.read(member.size))
    except (tarfile.TarError, OSError) as error:
        raise VideoError(name, f"not a tar, or damaged ({error})", REDO, "corrupt") from None
    return found


def _value(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def open_clip(name: str, blob: Blob) -> ClipTar:
    """Raises VideoError: no such tar, cut off, or without pictures and their times."""
    path = Path(blob.path)
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            size = path.stat().st_size
            for member in archive:
                if len(members) >= MAX_MEMBERS:
                    raise VideoError(
                        name, f"more than {MAX_MEMBERS:,} members", "give HOT3D's clips", "corrupt"
                    )
                if member.offset_data + member.size > size:
                    raise VideoError(name, "the tar breaks off", REDO, "truncated")
                if member.isreg() and not member.issparse():
                    members[member.name.removeprefix("./")] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise VideoError(name, f"not a tar, or damaged ({error})", REDO, "corrupt") from None
    return ClipTar(name, path, members)


class ClipTar:
    """See :class:`ego2robot.decode.stills.Recording`; and the frames' annotations."""

    def __init__(self, name: str, path: Path, members: dict[str, tuple[int, int]]) -> None:
        self._name, self._members = name, members
        self._file = path.open("rb")
        found = {m[1] for n in members if (m := FRAME.fullmatch(n)) and n.endswith(".info.json")}
        self.stream = next(
            (s for s in STREAMS if any(f"{frame}.image_{s}.jpg" in members for frame in found)), None
        )
        timed = []
        for frame in sorted(found):
            times = self._json_or_none(f"{frame}.info.json", "image_timestamps_ns")
            at = times.get(self.stream) if isinstance(times, dict) else None
            if (
                isinstance(at, int)
                and not isinstance(at, bool)
                and f"{frame}.image_{self.stream}.jpg" in members
            ):
                timed.append((at, frame))
        timed.sort()
        kept = [(t, f) for k, (t, f) in enumerate(timed) if k == 0 or t > timed[k - 1][0]]
        self.frames = [frame for _, frame in kept]
        self.times_ns = np.array([time for time, _ in kept], np.int64)
        info = self.json(f"{self.frames[0]}.info.json") if self.frames else None
        self.info: dict[str, Any] = info if isinstance(info, dict) else {}
        # Aria's first generation, which HOT3D was recorded with, carries its RGB camera sideways.
        self.rotation = 90 if self.stream == RGB else 0
        self.width = self.height = 0
        for index in range(len(self.frames)):
            picture = self.picture(index)
            if picture is not None:
                self.height, self.width = picture.shape[:2]
                break

    def picture(self, index: int) -> np.ndarray | None:
        data = self._bytes(f"{self.frames[index]}.image_{self.stream}.jpg")
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                picture = np.asarray(image if image.mode in ("RGB", "L") else image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
            return None
        if self.width and picture.shape[:2] != (self.height, self.width):
            return None
        return picture

    def json(self, member: str) -> Any:
        """The value of a JSON member; None where there is none, or it is damaged."""
        return _value(self._bytes(member)) if member in self._members else None

    def _json_or_none(self, member: str, key: str) -> Any:
        value = self.json(member)
        return value.get(key) if isinstance(value, dict) else None

    def _bytes(self, member: str) -> bytes:
        offset, size = self._members[member]
        self._file.seek(offset)
        return self._file.read(min(size, MAX_MEMBER))

    def close(self) -> None:
        self._file.close()
