"""A web server with byte ranges over a folder, which misbehaves as it is told; and a hub's API beside it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Store:
    """What the server serves, how it behaves, and what it was asked for.

    Attributes:
        trouble: called with each GET's path, and how many GETs came before; says what to do instead:
            ``None``, an HTTP status, ``"cut"`` (half of the bytes, then the connection ends), ``"stall"``.
        asked: method, path and range of each request.
        ranges: whether ranges are honoured.
        tokens: what is gated needs one of these.
    """

    root: Path
    url: str = ""
    trouble: Callable[[str, int], int | str | None] = lambda path, n: None
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    ranges: bool = True
    gated: bool = False
    tokens: tuple[str, ...] = ()
    done: threading.Event = field(default_factory=threading.Event)

    def gets(self) -> list[tuple[str, str, str]]:
        return [one for one in self.asked if one[0] == "GET"]

    def bytes_asked(self) -> int:
        spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", one[2]) for one in self.gets()]
        return sum(int(m[2]) - int(m[1]) + 1 for m in spans if m)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.store.asked.append(("POST", path, ""))
        if re.fullmatch(r"/api/datasets/[^/]+/[^/]+/paths-info/[^/]+", path):
            text = asked.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]*)", text)
            self._json([e for e in (self._entry(unquote(p)) for p in wanted) if e])
        else:
            self.send_error(404)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        span = self.headers.get("Range", "")
        before = len(self.store.gets())
        self.store.asked.append((self.command, path, span))
        if path.startswith("/api/datasets/"):
            self._api(path)
            return
        resolved = re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.*)", path)
        file = self.store.root / (resolved[1] if resolved else path.lstrip("/"))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.store.gated and token not in self.store.tokens:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        what = self.store.trouble(path, before) if with_body else None
        if isinstance(what, int):
            self.send_error(what)
            return
        if what == "stall":
            self.store.done.wait(30)
            self.close_connection = True
            return
        if file.is_dir():
            self._listing(file)
            return
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", span) if self.store.ranges else None
        start, stop = (
            (int(match[1]), int(match[2]) + 1 if match[2] else len(data)) if match else (0, len(data))
        )
        body = data[start:stop]
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        self.end_headers()
        if not with_body:
            return
        self.wfile.write(body[: len(body) // 2] if what == "cut" else body)
        if what == "cut":
            self.close_connection = True

    def _listing(self, folder: Path) -> None:
        names = [p.name + ("/" if p.is_dir() else "") for p in sorted(folder.iterdir())]
        self._send("".join(f'<a href="{n}">{n}</a>\n' for n in names).encode(), "text/html")

    def _entry(self, path: str) -> dict[str, object] | None:
        file = self.store.root / path
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40}
        if not file.is_file():
            return None
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        size = file.stat().st_size
        lfs = {"oid": sha, "size": size, "pointerSize": 130}
        return {"type": "file", "path": path, "size": size, "oid": sha[:40], "lfs": lfs}

    def _api(self, path: str) -> None:
        tree = re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/[^/]+/?(.*)", path)
        if tree:
            top = self.store.root / tree[1]
            recursive = "recursive=true" in self.path.lower()
            found = sorted(top.rglob("*") if recursive else top.glob("*"))
            self._json([self._entry(p.relative_to(self.store.root).as_posix()) for p in found])
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._json({"id": match[1], "sha": "1" * 40, "siblings": [], "private": False, "tags": []})
        else:
            self.send_error(404)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(root: Path) -> Iterator[Store]:
    """Serves a folder at ``store.url`` until it is left."""
    store = Store(root)
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield store
    finally:
        store.done.set()
        server.shutdown()
        server.server_close()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
