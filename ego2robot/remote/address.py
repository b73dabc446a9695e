"""Addresses such as ``s3://bucket/a.mp4``: which are remote, how they are shown, what opens them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from ego2robot.remote.errors import RemoteError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
LOCAL = ("file", "local")
# Packages that fsspec's error does not name as they are installed.
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}


def is_remote(path: str) -> bool:
    """Whether ``path`` is an address and not a path of this machine (``file://`` is one)."""
    match = SCHEME.match(path)
    return match is not None and match[1].lower() not in LOCAL


def local_path(path: str) -> str:
    """A path of this machine without its ``file://``, where it has one."""
    match = SCHEME.match(path)
    return unquote(path[match.end() :]) if match and match[1].lower() in LOCAL else path


def shown(address: str) -> str:
    """An address as it may be printed: without user, password and query, which may hold secrets."""
    match = SCHEME.match(address)
    if not match:
        return address
    host, slash, rest = address[match.end() :].partition("/")
    return f"{match[0]}{host.rpartition('@')[2]}{slash}{rest.partition('?')[0].partition('#')[0]}"


def joined(base: str, relative: str) -> str | None:
    """``relative`` beside the object at ``base``; None where it would leave the store."""
    match = SCHEME.match(base)
    assert match
    host, *folders = base[match.end() :].partition("?")[0].split("/")
    parts = folders[:-1]
    for part in relative.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return f"{match[0]}{host}/{'/'.join(parts)}"


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, one per store and process, and the path in it.

    Raises:
        RemoteError: no such protocol, or its package is not installed.
    """
    match = SCHEME.match(address)
    assert match, address
    if "::" in address:
        raise RemoteError("unsupported", "chained addresses (::) are not read", "give the plain address")
    host = address[match.end() :].partition("/")[0]
    system = _system(match[1].lower(), f"{match[0]}{host}/")
    return system, str(system._strip_protocol(address))


@lru_cache(256)
def _system(protocol: str, root: str) -> Any:
    extra = "pip install 'ego2robot[remote]'"
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError:
        raise RemoteError("unsupported", f"{protocol}:// needs the package fsspec", extra) from None
    try:
        return url_to_fs(root, **_options(protocol))[0]
    except ImportError as error:
        package = PACKAGES.get(protocol) or error.name or protocol
        hint = extra if package in ("s3fs", "gcsfs", "aiohttp") else f"pip install {package}"
        raise RemoteError("unsupported", f"{protocol}:// needs the package {package}", hint) from None
    except ValueError:
        known = protocol in fsspec.available_protocols()
        cause = "not an address" if known else f"no protocol {protocol}://"
        raise RemoteError("unsupported", cause, "s3, gs, hf and http are among those known") from None


def _options(protocol: str) -> dict[str, Any]:
    # Ranges of a compressed answer would be ranges of something else.
    return {"headers": {"Accept-Encoding": "identity"}} if protocol in ("http", "https") else {}
