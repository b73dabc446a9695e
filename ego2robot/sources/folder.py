"""A file, a folder (recursively) or a glob of videos, here or at an address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ego2robot import config
from ego2robot.errors import VideoError
from ego2robot.sources.base import DEFAULTS, Candidate, Source
from ego2robot.sources.remote import list_files

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg")


class Folder(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        for file in list_files(path, SUFFIXES, skip, "videos"):
            try:
                yield Candidate(file.name, file.blob())
            except VideoError as error:
                yield error
