"""A finished dataset to the Hugging Face hub: what may be published, resumable, the token never shown."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ego2robot.errors import UserError
from ego2robot.export import card
from ego2robot.export.licences import LICENCES, forbids_derivatives
from ego2robot.progress import Progress, Show, Tell

PROVENANCE = ("meta/ego2robot.json", "ego2robot.json")  # by the form of the dataset
# Said last, so that a dataset that is only half there is not taken for one.
DESCRIBING = ("README.md", "meta/info.json", *PROVENANCE)
LOCK = ".lock"  # an exporter's own; empty
BATCH = 100  # files of a commit, where the library does not cut a large folder itself
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,63}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}")
_TOKEN = re.compile(r"hf_[A-Za-z0-9_\-]{6,}")
_MOST_TOKEN = 1024  # bytes


@dataclass(frozen=True)
class Published:
    """What a push did.

    Attributes:
        files: of the dataset, those that were already there too.
        removed: files of an earlier push that the dataset no longer has.
    """

    url: str
    files: int
    bytes: int
    removed: int
    licence: str


@dataclass(frozen=True)
class Checked:
    """A dataset that may be published.

    Attributes:
        files: relative paths, sorted.
        bytes: of all of them.
        licence: as the hub spells it.
        kinds: of the sources, as the dataset says.
    """

    folder: Path
    files: tuple[str, ...]
    bytes: int
    licence: str
    kinds: tuple[str, ...]


# -- before anything is sent ------------------------------------------------------------------------


def inspect(folder: Path, licence: str | None = None, permitted: bool = False) -> Checked:
    """Whether a folder is a dataset of ours that may be published.

    Args:
        licence: what the user says, where the source does not.
        permitted: the user has the permission that the source's licence does not give.

    Raises:
        UserError: not such a folder, empty, of unknown licence, or not to be published.
    """
    provenance = _provenance(folder)
    files = tuple(sorted(_files(folder)))
    if "README.md" not in files:
        raise UserError(f"{folder}: no README.md, the export is not complete; export again")
    front, body = card.parted((folder / "README.md").read_text(encoding="utf-8"))
    if card.EMPTY in body:
        raise UserError(f"{folder}: the dataset is empty; there is nothing to publish")
    kinds = tuple(_kinds(provenance))
    size = sum((folder / name).stat().st_size for name in files)
    return Checked(folder, files, size, _licence(folder, kinds, front, licence, permitted), kinds)


def _kinds(provenance: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of source that a dataset is made of: one, or those of its parts."""
    sources, settings = provenance.get("sources"), provenance.get("config")
    if isinstance(sources, list):
        yield from (str(kind) for kind in sources)
    elif isinstance(settings, dict) and isinstance(settings.get("source"), dict):
        yield str(settings["source"].get("kind"))


def _provenance(folder: Path) -> Mapping[str, Any]:
    for name in PROVENANCE:
        try:
            found = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error.strerror or error})") from None
        except (ValueError, RecursionError):
            raise UserError(f"{folder / name}: damaged; export the dataset again") from None
        if isinstance(found, dict) and found.get("made_by") == "ego2robot":
            return found
    raise UserError(
        f"{folder}: not a dataset that ego2robot exported (no {' or '.join(PROVENANCE)}); nothing is sent"
    )


def _files(folder: Path) -> Iterator[str]:
    for here, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(here) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise UserError(f"{path}: a link; only what lies in the dataset itself is published")
            if name == LOCK:
                continue
            if name.startswith("."):
                raise UserError(f"{path}: does not belong to the dataset; take it away, then push again")
            if name in names:
                yield relative


def _licence(
    folder: Path, kinds: Sequence[str], front: Mapping[str, Any], said: str | None, permitted: bool
) -> str:
    written = str(front.get("license") or "other").lower()
    asked = said.lower() if said else None
    if asked and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]{0,63}", asked):
        raise UserError(f"--license {said}: should be a name that the hub knows, such as cc-by-4.0 or other")
    for kind in kinds:
        known = LICENCES.get(kind)
        if known and not known.derivatives and not permitted:
            raise UserError(
                f"{folder}: made of {kind}, whose licence ({known.name}) does not allow what is made of it "
                f"to be published ({known.source}); with the owner's permission add --i-have-permission"
            )
        if known and asked and asked != known.identifier and not permitted:
            raise UserError(
                f"--license {said}: the footage of {kind} is under {known.name}; leave --license out, or add "
                "--i-have-permission if its owner gave you another one"
            )
    identifiers = [name for name in (asked, written if written != "other" else None) if name]
    for identifier in identifiers:
        if forbids_derivatives(identifier) and not permitted:
            raise UserError(
                f"{folder}: its licence ({identifier}) does not allow derivatives to be published; with the "
                "owner's permission add --i-have-permission"
            )
    if identifiers:
        return identifiers[0]
    found = {LICENCES[kind].identifier if kind in LICENCES else None for kind in kinds}
    if len(found) == 1 and (only := found.pop()) is not None:
        return only
    if found and None not in found:
        return "other"  # several, each known: the card has them all
    raise UserError(
        f"{folder}: nothing says under which licence its footage is; ask whoever recorded it, then add "
        "--license, such as --license cc-by-4.0"
    )


def read_token(file: Path | None) -> str:
    """The token of a file, else what the hub's own library knows (``HF_TOKEN``, ``hf auth login``).

    Raises:
        UserError: there is none; the message never has what the file holds.
    """
    if file is None:
        found = _library().get_token()
        if not found:
            raise UserError("no token for the hub; run `hf auth login`, set HF_TOKEN, or give --token-file")
        return str(found)
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MOST_TOKEN + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    try:
        text = raw.decode("ascii").strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(raw) > _MOST_TOKEN or len(text.split()) != 1 or not text.isprintable():
        raise UserError(f"{file}: should hold the token and nothing else")
    return text


# -- sending ----------------------------------------------------------------------------------------


def push(
    checked: Checked,
    repo: str,
    token: str,
    private: bool = False,
    part: str | None = None,
    show: Show = lambda _: None,
    tell: Tell = lambda _: None,
) -> Published:
    """Creates a dataset repository, or adds to one, and uploads what is not there yet.

    Interrupted, the same call goes on: what the hub has is not sent again. Files are sent first, what
    describes them last.

    Args:
        checked: of :func:`inspect`.
        repo: ``owner/name``.
        token: of :func:`read_token`; in no message, whatever goes wrong.
        part: a folder of the repository, and the name of a configuration of its card; None: all of it.

    Raises:
        UserError: a wrong name, no permission, no connection, or what the hub answers.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(f"{repo}: should be OWNER/NAME, such as me/my-dataset")
    if part is not None and not _PART.fullmatch(part):
        raise UserError(f"--part {part}: should be letters, digits, - and _, such as part1")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError("the token for the hub holds what no token can; run `hf auth login` again")
    try:
        with _logged_without(token):
            return _push(checked, repo, token, private, part, show, tell)
    except UserError as error:
        raise UserError(scrubbed(str(error), token)) from None
    # Whatever the libraries raise may quote a header: it is said without the token, or not at all.
    except Exception as error:  # noqa: BLE001
        raise UserError(_explained(error, repo, token)) from None


def _push(
    checked: Checked, repo: str, token: str, private: bool, part: str | None, show: Show, tell: Tell
) -> Published:
    hub = _library()
    api = hub.HfApi(token=token, library_name="ego2robot")
    url = str(api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True))
    info = api.repo_info(repo, repo_type="dataset")
    if private and not info.private:
        raise UserError(
            f"{repo}: is there already, and public; choose another name, or make it private first"
        )
    there = {sibling.rfilename for sibling in info.siblings or ()}
    prefix = f"{part}/" if part else ""
    old_card = _remote_text(hub, api, repo, "README.md") if "README.md" in there else None
    if part is None and old_card is not None and card.parts_of(old_card):
        raise UserError(f"{repo}: holds several parts; name this one with --part")
    if part is not None and there.intersection(PROVENANCE):
        raise UserError(f"{repo}: holds one dataset without a part's name; choose another repository")
    own = (checked.folder / "README.md").read_text(encoding="utf-8")
    text = card.published(own, checked.licence, [LICENCES[k] for k in checked.kinds if k in LICENCES])
    last: list[Any] = [_add(hub, prefix + "README.md", text.encode())]
    if part is not None:
        last.append(_add(hub, "README.md", card.with_part(old_card, part, text).encode()))
    described = [name for name in checked.files if name in DESCRIBING and name != "README.md"]
    last += [_add(hub, prefix + name, str(checked.folder / name)) for name in described]
    ours = there.intersection(prefix + name for name in PROVENANCE)
    stale = _stale(there, prefix, checked.files) if ours else []
    last += [hub.CommitOperationDelete(path_in_repo=name) for name in stale]
    data = [name for name in checked.files if name not in DESCRIBING]
    tell(f"{len(checked.files)} files, {checked.bytes / 1e6:.1f} MB to {repo}; interrupted, the same goes on")
    _send(hub, api, repo, checked.folder, data, part, show)
    api.create_commit(
        repo, last, repo_type="dataset", commit_message=f"ego2robot push: {part or 'dataset'} described"
    )
    return Published(url, len(checked.files), checked.bytes, len(stale), checked.licence)


def _send(
    hub: Any, api: Any, repo: str, folder: Path, names: Sequence[str], part: str | None, show: Show
) -> None:
    """Uploads files, in as many commits as that takes."""
    message = f"ego2robot push: files of {part or 'the dataset'}"
    if _streams_folders(hub):
        show(Progress("uploading", 0, len(names), unit="files"))
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            path_in_repo=part,
            repo_type="dataset",
            commit_message=message,
            ignore_patterns=[*DESCRIBING, f"*{LOCK}"],
        )
        return
    prefix = f"{part}/" if part else ""
    for start in range(0, len(names), BATCH):
        show(Progress("uploading", start, len(names), unit="files"))
        some = [_add(hub, prefix + name, str(folder / name)) for name in names[start : start + BATCH]]
        api.create_commit(repo, some, repo_type="dataset", commit_message=message)


def _streams_folders(hub: Any) -> bool:
    """Whether ``upload_folder`` uploads a large folder in several commits, and goes on where it was."""
    from huggingface_hub import constants

    # Since 1.20 it does, and took the place of upload_large_folder, which asks for ever when it is refused.
    recent = tuple(int(part) for part in hub.__version__.split(".")[:2]) >= (1, 20)
    return recent and importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _add(hub: Any, path: str, content: str | bytes) -> Any:
    return hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def _stale(there: set[str], prefix: str, files: Sequence[str]) -> list[str]:
    """What an earlier push left where the dataset now has other files: in its folders, and shards."""
    tops = {PurePosixPath(name).parts[0] for name in files if "/" in name}
    now = {prefix + name for name in files}
    found = []
    for name in there - now:
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or inner.startswith("."):
            continue
        shard = "/" not in inner and inner.endswith(".tar")
        if shard or ("/" in inner and PurePosixPath(inner).parts[0] in tops):
            found.append(name)
    return sorted(found)


def _remote_text(hub: Any, api: Any, repo: str, name: str) -> str:
    path = hub.hf_hub_download(
        repo, name, repo_type="dataset", token=api.token, endpoint=api.endpoint, force_download=True
    )
    return Path(path).read_text(encoding="utf-8")


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("huggingface_hub is not installed; pip install huggingface_hub") from None
    return huggingface_hub


# -- what is said -----------------------------------------------------------------------------------


def scrubbed(text: str, token: str) -> str:
    """``text`` without the token, or anything that looks like one."""
    for form in (token, repr(token)[1:-1]):
        text = text.replace(form, "hf_…") if form else text
    return _TOKEN.sub("hf_…", text)


@contextmanager
def _logged_without(token: str) -> Iterator[None]:
    """What the library itself logs meanwhile is scrubbed too: it quotes what the hub answers."""

    def scrub(record: logging.LogRecord) -> bool:
        record.msg, record.args = scrubbed(record.getMessage(), token), ()
        return True

    handlers = logging.getLogger("huggingface_hub").handlers
    for handler in handlers:
        handler.addFilter(scrub)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(scrub)


def _explained(error: Exception, repo: str, token: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).split())[:300]
    hints = {
        401: "the hub does not know this token; run `hf auth login`, or give another --token-file",
        403: "this token may not write there; give one with write access to it",
        404: "no such owner, or this token may not see it; check the name and the token",
        413: "the hub takes no files of that size; export with smaller ones",
        429: "too many requests; wait a while, then run the same command again: it goes on",
    }
    if status in hints:
        return f"{repo}: {hints[status]} (the hub answered {status})"
    if status is not None and status >= 500:
        return f"{repo}: the hub failed ({status}); run the same command again: it goes on"
    kind = type(error).__name__
    connection = isinstance(error, ConnectionError | TimeoutError) or any(
        word in kind for word in ("Connect", "Timeout", "Network", "Protocol", "Read", "Write")
    )
    cause = scrubbed(said, token) or kind
    if connection:
        return f"{repo}: no connection to the hub ({cause}); run the same command again: it goes on"
    return f"{repo}: not pushed ({kind}: {cause}); run the same command again, or report it"
