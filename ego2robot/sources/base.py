"""What a source is: something that lists videos. Adding one is a module here and a line in SOURCES."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ego2robot import config
from ego2robot.blobs import open_blob
from ego2robot.errors import UserError, VideoError
from ego2robot.remote import RemoteObject, is_remote, shown
from ego2robot.types import Blob, Span, Trajectory, Video, short_id

DEFAULTS = config.Source()
SAMPLED_BLOCKS, BLOCK = 16, 1 << 16


@dataclass(frozen=True)
class Candidate:
    """A video that a source lists; nobody has looked inside yet.

    Attributes:
        name: unique within the source, for people.
        blob: where its bytes are.
        meta: the source's own fields.
        problem: what is wrong with its metadata, when the video itself can still be used.
        spans: what the dataset annotates of it, in any order; ``clips.policy`` says what becomes of them.
    """

    name: str
    blob: Blob
    meta: Mapping[str, str] = field(default_factory=dict)
    problem: VideoError | None = None
    spans: tuple[Span, ...] = ()


class Source(Protocol):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        """Lists the videos under ``path`` in a stable order; never reads pictures.

        Args:
            path: a file, a folder, a glob or an address that fsspec opens (``s3://``, ``hf://`` …).
            skip: a folder that is not looked into (the run directory).
            options: the rest of the recipe's ``source``.

        Yields:
            A candidate, or the error that stands in its place.

        Raises:
            UserError: ``path`` does not exist or holds nothing of this kind.
        """
        ...

    def trajectory(
        self, video: Video, times_s: np.ndarray, options: config.Source = DEFAULTS
    ) -> Trajectory | None:
        """What the dataset itself measured at some moments of one of its videos; None: nothing.

        Args:
            times_s: float64 [T], ascending, seconds from the video's first frame.

        Raises:
            VideoError: the file that should hold it cannot be read.
        """
        return None


def find_files(path: str, suffixes: tuple[str, ...], skip: Path | None, what: str) -> list[Path]:
    """Files with one of ``suffixes`` under a folder (recursively), matching a glob, or the one named.

    Sorted by path; hidden files and folders are left out. A file that is named outright is taken
    whatever its suffix.
    """
    if not path:
        raise UserError("source.path is not set; add source.path=/a/folder/of/videos")
    if is_remote(path):
        raise UserError(f"source.path={shown(path)}: this kind of source reads folders of this machine only")
    root = Path(path).expanduser()
    if root.is_dir():
        found = _walk(root, suffixes, skip)
        looked = f"looked for {' '.join('*' + s for s in suffixes)} in it and below"
    elif root.exists():
        return [root]
    else:
        matches = [Path(match) for match in glob.glob(str(root), recursive=True)]  # noqa: PTH207 — absolute patterns
        if not matches:
            raise UserError(
                f"source.path={path}: "
                + ("nothing matches" if glob.has_magic(path) else "no such file or folder")
                + "; check the path (quote a glob, so that the shell leaves it alone)"
            )
        found = [m for m in matches if m.is_file() and m.suffix.lower() in suffixes]
        for folder in (m for m in matches if m.is_dir()):
            found += _walk(folder, suffixes, skip)
        looked = f"{len(matches)} paths match, none is one of {' '.join('*' + s for s in suffixes)}"
    if not found:
        raise UserError(f"source.path={path}: no {what} there ({looked})")
    return sorted(set(found))


def _walk(root: Path, suffixes: tuple[str, ...], skip: Path | None) -> list[Path]:
    skipped = skip.resolve() if skip else None
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (here / f).resolve() != skipped)
        found += [here / f for f in files if not f.startswith(".") and Path(f).suffix.lower() in suffixes]
    return found


def display_name(path: Path, root: str) -> str:
    """``path`` below the source's folder, or its file name when the source is a file or a glob."""
    base = Path(root).expanduser()
    if base.is_dir():
        return path.relative_to(base).as_posix()
    fixed = Path(glob.escape(root)) if not glob.has_magic(root) else _fixed_part(root)
    try:
        return path.relative_to(fixed).as_posix() if fixed.is_dir() else path.name
    except ValueError:
        return path.name


def _fixed_part(pattern: str) -> Path:
    """The folder of a glob that has no wildcard: ``/a/b*/c.mp4`` → ``/a``."""
    parts = []
    for part in Path(pattern).expanduser().parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def storable(text: str) -> str:
    """``text`` with what UTF-8 cannot hold spelled out: half surrogate pairs, as JSON or a name may have."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_name(path: Path | str) -> None:
    """Raises VideoError for a path that is not UTF-8: a plan could not name it."""
    if storable(str(path)) != str(path):
        cause = "its path is not UTF-8"
        raise VideoError(storable(Path(path).name), cause, "rename the file or folder", "unsupported")


def file_blob(path: Path) -> Blob:
    """The whole of a file. Raises VideoError when it cannot be read."""
    check_name(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise VideoError(str(path), error.strerror or str(error), "check the path", "missing") from None
    return Blob(str(path.absolute()), 0, size)


def identity(blob: Blob) -> str:
    """16 hex digits that name the bytes: their number, and 16 blocks of 64 KiB spread over them.

    Small files are read whole. Where a store has a checksum of a remote object that is taken instead, with
    the place in it: nothing is read, but the name is not that of a copy on a disk.

    Raises OSError when the file cannot be read.
    """
    remote = RemoteObject(blob.path) if is_remote(blob.path) else None
    if remote and remote.stat.checksum:
        return short_id("remote", remote.stat.checksum, remote.size, blob.offset, blob.size)
    digest = hashlib.blake2b(str(blob.size).encode(), digest_size=8)
    spread = [0]
    length = blob.size
    if blob.size > SAMPLED_BLOCKS * BLOCK:
        spread = [(blob.size - BLOCK) * i // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)]
        length = BLOCK
    if remote:
        for data in remote.ranges([(blob.offset + at, blob.offset + at + length) for at in spread]):
            digest.update(data)
        return digest.hexdigest()
    with open_blob(blob) as file:
        for at in spread:
            file.seek(at)
            digest.update(file.read(length))
    return digest.hexdigest()
