"""Listing files, here and at addresses that fsspec opens, for every source that can read both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ego2robot.blobs import UNKNOWN, open_blob
from ego2robot.errors import UserError
from ego2robot.remote import RemoteError, is_remote, shown
from ego2robot.remote.address import filesystem, local_path
from ego2robot.remote.objects import retried, started
from ego2robot.sources.base import display_name, file_blob, find_files, storable
from ego2robot.types import Blob

LISTING_S = 900.0  # how long a store may be silent while it lists
AT_ONCE = 16  # objects that are looked into at the same time: each answer takes a while
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Listed:
    """A file that a listing found.

    Attributes:
        address: its path, or its URI.
        name: below the source's folder, for people; holds no password and no query.
        size: bytes; -1 where nobody has asked yet.
    """

    address: str
    name: str
    size: int = UNKNOWN

    def blob(self) -> Blob:
        """The whole of it. Raises VideoError for a local file that cannot be read."""
        if is_remote(self.address):
            return Blob(self.address, 0, self.size)
        return file_blob(Path(self.address))


def list_files(path: str, suffixes: tuple[str, ...], skip: Path | None, what: str) -> list[Listed]:
    """Files with one of ``suffixes`` under a folder (recursively), matching a glob, or the one named; sorted
    by name, hidden ones left out.

    Args:
        path: of this machine, or an address; a web server's folder ends in ``/``.
        skip: a local folder that is not looked into.
        what: what is looked for, in the plural.

    Raises:
        UserError: nothing of the kind there, no access, or the package for such addresses is missing.
    """
    if not is_remote(path):
        path = local_path(path)
        return [
            Listed(str(file), display_name(file, path)) for file in find_files(path, suffixes, skip, what)
        ]
    try:
        found = retried(path, lambda: _list(path, suffixes), LISTING_S)
    except RemoteError as error:
        raise UserError(f"source.path={shown(path)}: {error.cause}; {error.hint}") from None
    if not found:
        raise UserError(
            f"source.path={shown(path)}: no {what} there (looked for {' '.join('*' + s for s in suffixes)})"
        )
    return sorted(found, key=lambda file: (file.name, file.address))


def _list(address: str, suffixes: tuple[str, ...]) -> list[Listed]:
    system, root = filesystem(address)
    web = address.lower().startswith(("http://", "https://"))
    if any(c in address for c in ("*[" if web else "*?[")):
        entries = dict(system.glob(root, detail=True))
        for name in [n for n, info in entries.items() if info["type"] == "directory"]:
            entries |= system.find(name, detail=True)
        fixed = root[: min(root.find(c) for c in "*?[" if c in root)]
        base = fixed[: fixed.rfind("/") + 1]
    elif (web and not root.endswith("/")) or (not web and system.info(root)["type"] != "directory"):
        size = system.info(root).get("size")
        return [Listed(address, shown(address).rpartition("/")[2], size if size is not None else UNKNOWN)]
    else:
        entries = dict(system.find(root, detail=True))
        base = root.rstrip("/") + "/"
    found = []
    for name, info in entries.items():
        below = name.removeprefix(base)
        hidden = any(part.startswith(".") for part in below.split("/"))
        if info["type"] == "directory" or hidden or not below.lower().endswith(suffixes):
            continue
        uri = name if is_remote(name) else str(system.unstrip_protocol(name))
        size = info.get("size")
        found.append(Listed(uri, storable(shown(below)), size if isinstance(size, int) else UNKNOWN))
    return found


def read_whole(address: str, limit: int) -> bytes | None:
    """A small file beside others, such as a camera's JSON; None where there is none.

    Raises:
        OSError: it is there and cannot be read, or is longer than ``limit`` bytes.
    """
    try:
        with open_blob(Blob(address, 0, UNKNOWN)) as file:
            data = file.read(limit + 1)
    except RemoteError as error:
        if error.kind == "missing":
            return None
        raise
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > limit:
        raise OSError(f"longer than {limit:,} bytes")
    return data


def several_at_once(call: Callable[[T], R], items: Iterable[T], remote: bool) -> Iterator[R]:
    """``map`` that asks for the next ``AT_ONCE`` results meanwhile, where the items lie far away."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        if not remote:
            yield call(item)
            continue
        waiting.append(started(call, item))
        if len(waiting) >= AT_ONCE:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
