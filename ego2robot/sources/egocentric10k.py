"""Egocentric-10K (and -100K): WebDataset tars, read in place, on a disk or at an address.

``factory_001/workers/worker_001/factory001_worker001_part00.tar`` holds ``<key>.mp4`` and ``<key>.json``;
``intrinsics.json`` lies beside the tars of a worker. Member names never become paths: a video is a
byte range of its tar. Of a tar far away only the headers of its members are read, several tars at once:
``hf://datasets/builddotai/Egocentric-10K`` is worked on without a download.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ego2robot import config
from ego2robot.blobs import UNKNOWN, container_size, open_blob, read_error
from ego2robot.errors import VideoError
from ego2robot.remote import RemoteError, is_remote, shown
from ego2robot.sources.base import DEFAULTS, Candidate, Source, check_name, storable
from ego2robot.sources.remote import Listed, list_files, read_whole, several_at_once
from ego2robot.types import Blob

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
INTRINSICS = "intrinsics.json"
MAX_JSON_BYTES = 1 << 20
KEY = re.compile(r"(factory)_?(\d+)_(worker)_?(\d+)")


class Egocentric10K(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        folder, camera = "", None
        tars = list_files(path, (".tar",), skip, "tars")
        for tar, members in zip(tars, several_at_once(_members, tars, is_remote(path)), strict=True):
            here = tar.address.rpartition("/")[0]
            if here != folder:  # the tars of a worker are neighbours in the list
                folder = here
                camera, problem = _intrinsics(f"{here}/{INTRINSICS}", shown(f"{here}/{INTRINSICS}"))
                if problem:
                    yield problem
            for found in members:
                if isinstance(found, Candidate) and camera:
                    found = replace(found, meta={**found.meta, "intrinsics": camera})  # noqa: PLW2901
                yield found


def _members(tar: Listed) -> Iterable[Candidate | VideoError]:
    found = tar_members(tar.address, tar.name)
    return list(found) if is_remote(tar.address) else found


def _intrinsics(address: str, name: str) -> tuple[str | None, VideoError | None]:
    """The worker's camera as compact JSON text, None where there is no such file."""
    try:
        data = read_whole(address, MAX_JSON_BYTES)
        if data is None:
            return None, None
        return storable(json.dumps(json.loads(data), separators=(",", ":"))), None
    except OSError as error:
        cause = f"cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError) as error:
        cause = f"not JSON: {error}"
    return None, VideoError(name, cause, "its videos are used without camera intrinsics", "metadata")


def tar_members(tar: str | Path, name: str) -> Iterator[Candidate | VideoError]:
    """The videos of one tar as byte ranges, with the fields of the JSON that shares their key.

    A tar that breaks off yields what is whole before the break, then the error.

    Args:
        tar: a path, or an address.
        name: the tar as the user knows it.
    """
    address = str(tar) if is_remote(str(tar)) else str(Path(tar).absolute())
    whole = Blob(address, 0, UNKNOWN)
    videos: list[tuple[str, int, int]] = []
    metas: dict[str, dict[str, str] | VideoError] = {}
    broken: VideoError | None = None
    try:
        check_name(address)
    except VideoError as error:
        yield error
        return
    try:
        size = container_size(whole)
        if size == 0:
            yield VideoError(name, "empty file (0 bytes)", "fetch it again", "empty")
            return
        with open_blob(whole) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            end = 0
            for member in archive:
                end = member.offset_data + member.size
                if not member.isreg() or member.issparse():
                    continue
                key, dot, suffix = member.name.rpartition(".")
                if end > size:
                    broken = _cut(storable(f"{name}::{member.name}"), size)
                elif dot + suffix.lower() in VIDEO_SUFFIXES:
                    videos.append((member.name, member.offset_data, member.size))
                elif suffix.lower() == "json":
                    raw.seek(member.offset_data)
                    data = raw.read(min(member.size, MAX_JSON_BYTES))
                    metas[key] = _fields(storable(f"{name}::{member.name}"), data)
            # A whole tar ends in blocks of zeros; tarfile itself takes a cut header for the end.
            raw.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            if broken is None and raw.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                broken = _cut(name, size)
    except tarfile.TarError as error:
        text = "breaks off" if videos else "not a tar"
        broken = VideoError(
            name, f"{text}: {error}", "fetch it again", "truncated" if videos else "not_a_video"
        )
    except RemoteError as error:
        broken = read_error(name, error)
    except OSError as error:
        broken = VideoError(name, error.strerror or str(error), "check the file", "missing")
    for member_name, offset, length in videos:
        full = storable(f"{name}::{member_name}")
        key = member_name.rpartition(".")[0]
        meta = metas.get(key, VideoError(full, f"no {key}.json beside it in the tar", "", "metadata"))
        problem = None
        if isinstance(meta, VideoError):
            hint = "used all the same, its fields read off its name"
            problem = VideoError(meta.name, meta.cause, hint, "metadata")
            meta = {}
        yield Candidate(full, Blob(address, offset, length, False), _with_key(meta, storable(key)), problem)
    if broken:
        yield broken


def _cut(name: str, size: int) -> VideoError:
    return VideoError(name, f"the tar breaks off at byte {size:,}", "fetch it again", "truncated")


def _fields(name: str, data: bytes) -> dict[str, str] | VideoError:
    """The flat fields of a video's JSON as text."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        return VideoError(name, f"not JSON: {error}", "", "metadata")
    if not isinstance(value, dict):
        return VideoError(name, f"a mapping was expected, this is a {type(value).__name__}", "", "metadata")
    return {
        storable(str(key)): storable(item) if isinstance(item, str) else json.dumps(item)
        for key, item in value.items()
        if item is not None
    }


def _with_key(meta: dict[str, str], key: str) -> dict[str, str]:
    """Adds ``factory_id`` and ``worker_id`` from the key where the JSON lacks them."""
    match = KEY.search(key)
    named = (
        {f"{match[1]}_id": f"{match[1]}_{match[2]}", f"{match[3]}_id": f"{match[3]}_{match[4]}"}
        if match
        else {}
    )
    return named | meta
