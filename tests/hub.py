"""A stand-in for the Hugging Face hub: repositories of files, as much of its HTTP as an upload needs.

Routes and fields as ``huggingface_hub`` 2.4 sends them without Xet: create, repo info, preupload, Git LFS
batch and upload, commit, resolve. Xet's own protocol is spoken by ``hf_xet`` alone, so :class:`XetSession`
takes that library's place and leaves the same behind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_sesameOpenSesame"


@dataclass
class Repository:
    """``files``: content by path; ``commits``: the paths that each added and deleted, oldest first."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[list[str], list[str]]] = field(default_factory=list)


@dataclass
class Hub:
    """What a test sees of the stand-in.

    Attributes:
        uploads: sizes of objects that were really sent.
        fail: (method, part of a path, status): such requests fail, ``times`` more.
        xet_breaks_after: batches of files that get through Xet before the connection is lost; None: all.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[int] = field(default_factory=list)
    fail: tuple[str, str, int] | None = None
    times: int = 0
    xet_breaks_after: int | None = None
    tokens_seen: set[str] = field(default_factory=set)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class XetSession:
    """What ``upload_folder`` asks of a session of ``hf_xet``: batches of files, each uploaded whole."""

    hub: Hub

    def new_upload_commit(self, **told: Any) -> _XetCommit:
        return _XetCommit(self.hub)


@dataclass
class _XetFile:
    """The handle of a file, and the account of it that ``result`` gives."""

    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def xet_info(self) -> _XetFile:
        return self

    def result(self) -> _XetFile:
        return self


@dataclass
class _XetCommit:
    hub: Hub
    files: list[_XetFile] = field(default_factory=list)

    def start_upload_file(self, path: str, sha256: Any = None) -> _XetFile:
        self.files.append(_XetFile(Path(path).read_bytes()))
        return self.files[-1]

    def wait_to_finish(self) -> None:
        if self.hub.xet_breaks_after == 0:
            raise ConnectionError("connection reset by peer")
        if self.hub.xet_breaks_after is not None:
            self.hub.xet_breaks_after -= 1
        for file in self.files:
            if file.sha256 not in self.hub.objects:
                self.hub.objects[file.sha256] = file.data
                self.hub.uploads.append(len(file.data))

    def abort(self) -> None:
        self.files.clear()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        hub = self.state
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            hub.tokens_seen.add(token)
        if hub.fail and hub.times > 0 and method == hub.fail[0] and hub.fail[1] in path:
            hub.times -= 1
            return self._send(hub.fail[2], {"error": f"refused, said the hub to {token}"})
        if not path.startswith("/objects/") and token != TOKEN:
            return self._send(401, {"error": f"Invalid credentials: {token}"})
        for pattern, verb, act in (
            (r"/api/repos/create", "POST", self._create),
            (r"/api/datasets/([^/]+/[^/]+)/preupload/.+", "POST", self._preupload),
            (r"/api/datasets/([^/]+/[^/]+)/commit/.+", "POST", self._commit),
            (r"/api/datasets/([^/]+/[^/]+)(?:/revision/.+)?", "GET", self._info),
            (r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "POST", self._batch),
            (r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", method, self._resolve),
            (r"/objects/(.+)", "PUT", self._object),
            (r"/api/validate-yaml", "POST", self._yaml),
        ):
            found = re.fullmatch(pattern, path)
            if found and method == verb:
                return act(body, *found.groups())
        return self._send(404, {"error": f"no route {method} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        if name in self.state.repositories:
            return self._send(409, {"error": "You already created this dataset repo", "url": self._url(name)})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.state.repositories[name] = Repository(private)
        return self._send(200, {"url": self._url(name)})

    def _url(self, name: str) -> str:
        return f"{self.state.url}/datasets/{name}"

    def _info(self, body: bytes, name: str) -> None:
        if name not in self.state.repositories:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repository = self.state.repositories[name]
        return self._send(
            200,
            {
                "id": name,
                "private": repository.private,
                "sha": self._head(name),
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(repository.files)],
            },
        )

    def _preupload(self, body: bytes, name: str) -> None:
        files = []
        there = self.state.repositories[name].files
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith((".mp4", ".parquet", ".tar"))
            said = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in there:
                data = there[file["path"]]
                blob = b"blob %d\0" % len(data) + data
                said["oid"] = hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(blob).hexdigest()
            files.append(said)
        self._send(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            said: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.state.objects:
                said["actions"] = {
                    "upload": {"href": f"{self.state.url}/objects/{asked['oid']}", "header": {}}
                }
            objects.append(said)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "wrong content"})
        self.state.objects[oid] = body
        self.state.uploads.append(len(body))
        return self._send(200, {})

    def _commit(self, body: bytes, name: str) -> None:
        repository = self.state.repositories[name]
        added, deleted = [], []
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif item["key"] == "lfsFile":
                repository.files[value["path"]] = self.state.objects[value["oid"]]
                added.append(value["path"])
            elif item["key"] == "deletedFile":
                del repository.files[value["path"]]
                deleted.append(value["path"])
        repository.commits.append((added, deleted))
        oid = self._head(name)
        self._send(200, {"commitUrl": f"{self._url(name)}/commit/{oid}", "commitOid": oid})

    def _head(self, name: str) -> str:
        return f"{len(self.state.repositories[name].commits):040x}"

    def _resolve(self, body: bytes, name: str, path: str) -> None:
        files = self.state.repositories[name].files
        if path not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self._send(200, files[path], {"ETag": etag, "X-Repo-Commit": self._head(name)})

    def _yaml(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})
