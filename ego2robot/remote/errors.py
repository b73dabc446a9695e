"""What a store answered, told apart: gone, forbidden, not possible, or worth another try."""

from __future__ import annotations

import errno
import re
from typing import Literal

# ``io`` may be otherwise at the next try, the others not: nothing there, no access, cannot be read so.
Kind = Literal["missing", "denied", "unsupported", "io"]
CODES: dict[Kind, int] = {
    "missing": errno.ENOENT,
    "denied": errno.EACCES,
    "unsupported": errno.EOPNOTSUPP,
    "io": errno.EIO,
}
AGAIN = (408, 409, 423, 425, 429)  # and every 5xx
# Names of exceptions of packages that need not be installed: no credentials at all.
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError")
NETWORK = ("Timeout", "Connection", "Connect", "Disconnected", "Payload", "Protocol", "Incomplete", "DNS")
SECRETS = re.compile(
    r"hf_\w+|(?i:authorization[=: ]+)?(?i:bearer|basic|token)[=: ]+\S+|(?i:authorization)[=: ]+\S+"
    r"|(?<=://)[^/\s@]+@|\?\S*|\b(?:AKIA|ASIA)\w+"
)


class RemoteError(OSError):
    """What is wrong with remote bytes, in words; an OSError, so that who reads files knows it.

    Attributes:
        kind: ``missing``, ``denied``, ``unsupported`` or ``io`` (may be otherwise at the next try).
        hint: the next step.
    """

    def __init__(self, kind: Kind, cause: str, hint: str = "") -> None:
        super().__init__(CODES[kind], cause)
        self.kind, self.cause, self.hint = kind, cause, hint

    def __reduce__(self) -> tuple[type[RemoteError], tuple[Kind, str, str]]:
        return RemoteError, (self.kind, self.cause, self.hint)


def explain(error: BaseException, address: str) -> RemoteError:
    """What an exception of a store means. Its own words are only used without what may be a secret.

    Packages of stores have no common base of errors: HTTP statuses are looked for in it and in what
    caused it, then types, then names.
    """
    chain = _chain(error)
    for one in chain:
        if isinstance(one, RemoteError):
            return one
    status = next((s for one in chain if (s := _status(one))), None)
    names = [cls.__name__ for one in chain for cls in type(one).__mro__]
    if status in (401, 403, 407) or "GatedRepoError" in names or any(n in names for n in NO_CREDENTIALS):
        return RemoteError("denied", f"access denied{f' ({status})' if status else ''}", _login(address))
    if status in AGAIN or (status or 0) >= 500:
        return RemoteError("io", f"the store answers {status}", "try again later")
    if status in (404, 410):
        return RemoteError("missing", f"not there ({status})", _hint_missing(address))
    if status == 416:
        return RemoteError("io", "shorter than it was", "plan again if it was replaced")
    if any(isinstance(one, PermissionError) for one in chain):
        return RemoteError("denied", "access denied", _login(address))
    network = [n for n in names if n.startswith(NETWORK) or n.endswith(("Timeout", "TimeoutError"))]
    if any(isinstance(one, (TimeoutError, ConnectionError)) for one in chain) or network:
        text = _plain(chain[-1])
        return RemoteError("io", f"the connection fails ({text})", "check the network")
    if any(isinstance(one, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) for one in chain):
        return RemoteError("missing", "not there", _hint_missing(address))
    if any("range request" in str(one) for one in chain):
        return RemoteError("unsupported", "its server gives no byte ranges", "download it")
    kind: Kind = "io" if isinstance(error, OSError) else "unsupported"
    return RemoteError(kind, f"cannot be read ({_plain(error)})", "check the address")


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        value = getattr(response, "status_code", None) or getattr(error, "status", None)
        value = value or getattr(error, "code", None)
    return value if isinstance(value, int) and 400 <= value < 600 else None


def _plain(error: BaseException) -> str:
    text = " ".join(SECRETS.sub("…", str(error)).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _login(address: str) -> str:
    scheme, _, rest = address.partition("://")
    if scheme == "hf":
        repo = "/".join(rest.split("/")[:3]).partition("@")[0]
        return (
            f"accept its terms at https://huggingface.co/{repo} if it is gated, and log in with "
            "`hf auth login` or HF_TOKEN"
        )
    where = {
        "s3": "AWS credentials",
        "s3a": "AWS credentials",
        "gs": "`gcloud auth application-default login`",
    }
    return f"check {where.get(scheme, 'your rights there')}"


def _hint_missing(address: str) -> str:
    if address.startswith("hf://"):
        return "check the address; if it is private, log in with `hf auth login`"
    return "check the address"
