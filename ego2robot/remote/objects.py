"""Remote objects in ranges: a block at a time through the cache, more at once where they are read in order.

A fetch that stalls or breaks is made again, after a while, for the range that is lacking alone; what stays
broken is one :class:`RemoteError`.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ego2robot.models import cache_folder
from ego2robot.remote.address import filesystem
from ego2robot.remote.cache import DiskCache
from ego2robot.remote.errors import RemoteError, explain

BLOCK = 1 << 20
MAX_AHEAD = 8  # blocks in one request, where a file is read in order
KEPT = 2 * MAX_AHEAD  # blocks in memory for each open file
AT_ONCE = 8  # requests for ranges that lie apart
TRIES, FIRST_WAIT_S, STALL_S = 4, 0.5, 30.0
STAT_S, STATS_KEPT = 30.0, 4096  # how long what a store said of an object is believed
GIB = 1 << 30
T = TypeVar("T")

_cache: DiskCache | None = None
_stats: OrderedDict[str, tuple[float, Stat]] = OrderedDict()
_lock = threading.Lock()


def configure(cache_gib: float) -> None:
    """Sets how much this process lets the cache hold on disk, GiB; 0: nothing."""
    global _cache  # noqa: PLW0603 — one cache for all readers of a process
    _cache = DiskCache(cache_folder() / "remote", int(cache_gib * GIB))


def cache() -> DiskCache:
    if _cache is None:
        configure(20.0)
    assert _cache is not None
    return _cache


@dataclass(frozen=True)
class Stat:
    """What a store says of an object.

    Attributes:
        size: bytes.
        version: changes when the bytes do; may be empty.
        checksum: names the bytes (a hash of them all), empty where the store has none.
    """

    size: int
    version: str
    checksum: str


def stat(address: str) -> Stat:
    """Asks the store, at most once in ``STAT_S``. Raises RemoteError."""
    now = time.monotonic()
    with _lock:
        at, known = _stats.get(address, (-STAT_S, None))
    if known is not None and now - at < STAT_S:
        return known
    system, path = filesystem(address)
    found = stat_of(retried(address, lambda: system.info(path)), address)
    with _lock:
        _stats[address] = now, found
        while len(_stats) > STATS_KEPT:
            _stats.popitem(last=False)
    return found


VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Content-MD5", "xet_hash", "blob_id", "Last-Modified")
MORE_VERSIONS = ("LastModified", "updated", "mtime", "modified", "created")


def stat_of(info: dict[str, Any], address: str) -> Stat:
    """What a listing's entry says. Raises RemoteError for a folder, or without a size."""
    if info.get("type") == "directory":
        raise RemoteError("missing", "a folder, not a file", "check the address")
    size = info.get("size")
    if not isinstance(size, int) or size < 0:
        raise RemoteError("unsupported", "its store does not say how long it is", "download it")
    checksum = ""
    lfs = info.get("lfs")
    if lfs and lfs.get("sha256"):
        checksum = f"sha256:{lfs['sha256']}"
    elif address.startswith(("s3://", "s3a://")) and info.get("ETag"):
        # Of the bytes, or of the parts that they were sent in. A web server's ETag may be a date: not used.
        checksum = f"etag:{info['ETag']}"
    elif info.get("md5Hash"):
        checksum = f"md5:{info['md5Hash']}"
    version = checksum or next((f"{k}:{info[k]}" for k in VERSIONS + MORE_VERSIONS if info.get(k)), "")
    return Stat(size, version, checksum)


class RemoteObject:
    """One remote object. Raises RemoteError where it is not there."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stat = stat(address)
        self.size = self.stat.size
        name = f"{address}\x1f{self.stat.version}\x1f{self.size}"
        self.key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self._system, self._path = filesystem(address)

    def blocks(self, first: int, n: int) -> list[bytes]:
        """Blocks ``first`` to ``first + n``: those that the cache lacks in one request for each stretch."""
        found = [cache().get(self.key, first + k) for k in range(n)]
        k = 0
        while k < n:
            if found[k] is not None:
                k += 1
                continue
            end = k
            while end < n and found[end] is None:
                end += 1
            data = self.fetch((first + k) * BLOCK, min(self.size, (first + end) * BLOCK))
            for at in range(k, end):
                block = data[(at - k) * BLOCK : (at - k + 1) * BLOCK]
                cache().put(self.key, first + at, block)
                found[at] = block
            k = end
        return [block for block in found if block is not None]

    def ranges(self, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some (start, stop) that lie apart, several at once; not kept, but taken from kept blocks."""
        found: list[Future[bytes]] = []
        for at in range(0, len(wanted), AT_ONCE):
            some = [started(self._range, *one) for one in wanted[at : at + AT_ONCE]]
            for future in some:
                future.exception()
            found += some
        return [future.result() for future in found]

    def _range(self, start: int, stop: int) -> bytes:
        first, last = start // BLOCK, (stop - 1) // BLOCK
        kept = [cache().get(self.key, k) for k in range(first, last + 1)]
        if all(block is not None for block in kept):
            data = b"".join(block for block in kept if block is not None)
            return data[start - first * BLOCK : stop - first * BLOCK]
        return self.fetch(start, stop)

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` from the store, tried again where that may help."""
        if stop <= start:
            return b""

        def once() -> bytes:
            data = _read(self._system, self._path, start, stop, self.size)
            if len(data) != stop - start:
                cause = f"{len(data)} of {stop - start} bytes came"
                raise RemoteError("io", cause, "plan again if it was replaced")
            return data

        return retried(self.address, once)

    def local(self, offset: int, size: int) -> Path:
        """A part of it as a file in the cache. Raises RemoteError, and OSError where there is no room."""

        def chunks() -> Iterator[bytes]:
            step = MAX_AHEAD * BLOCK
            for at in range(offset, offset + size, step):
                yield self.fetch(at, min(offset + size, at + step))

        key = hashlib.blake2b(f"{self.key}\x1f{offset}\x1f{size}".encode(), digest_size=16).hexdigest()
        return cache().file(key, size, chunks)


def _read(system: Any, path: str, start: int, stop: int, size: int) -> bytes:
    """One request for a range, whatever the store."""
    from fsspec.asyn import AsyncFileSystem

    protocols = (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)
    web = "http" in protocols
    if isinstance(system, AsyncFileSystem) and not web:
        return bytes(system.cat_file(path, start=start, end=stop))
    # A web server may ignore what part was asked for: its file object looks at the answer.
    more = {"size": size} if web or "hf" in protocols else {}
    with system.open(path, "rb", cache_type="none", block_size=stop - start, **more) as file:
        file.seek(start)
        return bytes(file.read(stop - start))


def retried(address: str, call: Callable[[], T], stall_s: float | None = None) -> T:
    """``call()``, tried again after a while where that may help.

    Args:
        stall_s: how long it may take; default: ``STALL_S``.

    Raises:
        RemoteError: whatever it raised, told apart.
    """
    wait = FIRST_WAIT_S
    for tries_left in reversed(range(TRIES)):
        try:
            return _within(call, stall_s or STALL_S)
        except Exception as error:  # noqa: BLE001 — a store's package raises what it likes
            found = explain(error, address)
            if found.kind != "io" or not tries_left:
                raise found from None
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait *= 2
    raise AssertionError


def _within(call: Callable[[], T], stall_s: float) -> T:
    """``call`` in a thread of its own, which is left behind when it stalls."""
    future = started(call)
    try:
        return future.result(stall_s)
    except TimeoutError:
        if future.done():
            raise
        raise RemoteError("io", f"nothing came for {stall_s:g} s", "check the network") from None


def started(call: Callable[..., T], *args: Any) -> Future[T]:
    """Runs in a daemon thread: a stalled one does not keep the process from ending."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # noqa: BLE001 — handed to who asked
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class RangedFile(io.RawIOBase):
    """A part of a remote object as a file. Reading in order fetches ahead, in growing requests.

    Attributes:
        failure: what reading failed with; then every further read fails with it.
    """

    def __init__(self, remote: RemoteObject, offset: int = 0, size: int | None = None) -> None:
        self._remote, self._offset = remote, offset
        self._size = max(0, min(size if size is not None else remote.size, remote.size - offset))
        self._at = 0
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._ahead: tuple[int, int, Future[list[bytes]]] | None = None  # first block, end, blocks
        self._last, self._window = -2, 1
        self.failure: RemoteError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, less only at the end. Raises RemoteError."""
        left = max(0, self._size - self._at)
        n = left if size is None or size < 0 else min(size, left)
        parts = []
        while n:
            place = self._offset + self._at
            block, start = place // BLOCK, place % BLOCK
            part = self._block(block)[start : start + n]
            parts.append(part)
            self._at += len(part)
            n -= len(part)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _block(self, k: int) -> bytes:
        if self.failure:
            raise self.failure
        try:
            if k not in self._recent:
                self._load(k)
            if k == self._last + 1:
                self._fetch_ahead(k)
            self._last = k
        except RemoteError as error:
            self.failure = error
            raise
        self._recent.move_to_end(k)
        return self._recent[k]

    def _load(self, k: int) -> None:
        first, n = k, 1
        if self._ahead and self._ahead[0] <= k < self._ahead[1]:
            first, _, future = self._ahead
            self._ahead = None
            blocks = future.result()
        else:
            if k != self._last + 1:
                self._window = 1
            blocks = self._remote.blocks(first, n)
        for i, block in enumerate(blocks):
            self._recent[first + i] = block
        while len(self._recent) > KEPT:
            self._recent.popitem(last=False)

    def _fetch_ahead(self, k: int) -> None:
        """Starts on the blocks behind those at hand, twice as many as the last time."""
        end = (self._offset + self._size + BLOCK - 1) // BLOCK
        first = k + 1
        while first in self._recent:
            first += 1
        if self._ahead or first >= end or first - k > MAX_AHEAD:
            return
        self._window = min(MAX_AHEAD, 2 * self._window)
        n = min(self._window, end - first)
        self._ahead = first, first + n, started(self._remote.blocks, first, n)
