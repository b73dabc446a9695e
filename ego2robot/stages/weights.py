"""Where a model's weights come from: a local folder, the Hugging Face cache or hub, or a seed.

Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ego2robot.errors import UserError

Kind = Literal["videomae", "clip"]
# Everything that is read from a repository: weights, configurations, tokenizer. No pickles.
PATTERNS = ("*.safetensors", "*.json", "merges.txt")
ANSWER_S = 5.0  # the hub says within this many seconds whether it has a repository
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Weights:
    """Weights that were found.

    Attributes:
        kind: the model they are for.
        name: folder or ``id@commit`` as it is stored beside the vectors, or ``random``.
        folder: holds ``config.json`` and ``*.safetensors``; None when random.
        fingerprint: sha256 of the weight file, or of the list of sha256 of several; names the seed when
            random.
        seed: of random weights.
    """

    kind: Kind
    name: str
    folder: Path | None
    fingerprint: str
    seed: int = 0

    @property
    def random(self) -> bool:
        return self.folder is None


def resolve(weights: str, kind: Kind, seed: int) -> Weights | None:
    """Finds weights; the local cache is asked before the hub, which must answer within seconds.

    Args:
        weights: local folder, hub id (``owner/name``, ``owner/name@revision``), ``random`` or ``none``.
        seed: for ``random``.

    Returns:
        None for ``none``.

    Raises:
        UserError: not found, not safetensors, or of another kind of model.
    """
    if weights == "none":
        return None
    if weights == "random":
        return Weights(kind, "random", None, f"random, seed {seed}", seed)
    given = Path(weights).expanduser()
    if given.is_dir():
        folder, name = given, weights
    elif given.exists():
        raise UserError(f"embed.{kind}.weights={weights}: a file; give the folder that holds config.json")
    elif HUB_ID.fullmatch(weights):
        folder, commit = _from_hub(weights, kind)
        name = f"{weights.partition('@')[0]}@{commit}"
    else:
        raise _missing(weights, kind, "no such folder, and not a hub id (owner/name)")
    _check_kind(folder, kind)
    return Weights(kind, name, folder, _fingerprint(folder, weights, kind))


def _from_hub(weights: str, kind: Kind) -> tuple[Path, str]:
    """Folder and commit of a repository, downloaded unless it is cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    repo, _, revision = weights.partition("@")
    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(PATTERNS)}
    # Weights that an earlier run took from a conversion are cached under that reference.
    references = [revision] if revision else [None, *_cached_conversions(repo)]
    for reference in references:
        try:
            folder = Path(snapshot_download(repo, **wanted | {"revision": reference}, local_files_only=True))
        except (OSError, ValueError):
            continue
        if _weight_files(folder):
            return folder, folder.name
    try:
        folder = Path(snapshot_download(repo, **wanted, etag_timeout=ANSWER_S))
        if not _weight_files(folder) and not revision and (conversion := _conversion(repo)):
            folder = Path(snapshot_download(repo, **wanted | {"revision": conversion}, etag_timeout=ANSWER_S))
    except (OSError, ValueError, HTTPError) as error:
        cause = error.__cause__ or error
        reason = (
            f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}" if str(cause) else repr(cause)
        )
        raise _missing(weights, kind, f"not in the Hugging Face cache, and the hub gave {reason}") from None
    return folder, folder.name


def _conversion(repo: str) -> str | None:
    """The pull request in which the hub's own bot converted a repository of pickles to safetensors."""
    from huggingface_hub import HfApi

    offers = HfApi().get_repo_discussions(repo, author="SFconvertbot", discussion_type="pull_request")
    found = [offer for offer in offers if offer.status != "closed" and "safetensors" in offer.title]
    return f"refs/pr/{found[0].num}" if found else None


def _cached_conversions(repo: str) -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / "refs" / "pr"
    return [f"refs/pr/{path.name}" for path in sorted(folder.glob("*"))]


def _missing(weights: str, kind: Kind, cause: str) -> UserError:
    hub_id = weights if HUB_ID.fullmatch(weights) else "OWNER/NAME"
    download = hub_id.replace("@", " --revision ")
    return UserError(
        f"embed.{kind}.weights={weights}: {cause}; three ways out: (1) a local folder with config.json and "
        f"*.safetensors: embed.{kind}.weights=FOLDER, (2) `hf download {download}` where there is a network, "
        f"and HF_HOME pointing at that cache here, (3) embed.{kind}.weights=random, or none to leave it out"
    )


def _weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the shards that its index names."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    names = set(_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    # A name is a file of this folder, never a path out of it.
    files = [folder / Path(str(name)).name for name in sorted(names)]
    return files if all(file.is_file() for file in files) else []


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a weights folder needs it: download the weights again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); download the weights again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a mapping of keys; download the weights again")
    return tree


def _check_kind(folder: Path, kind: Kind) -> None:
    found = _json(folder / "config.json").get("model_type")
    if found != kind:
        raise UserError(f"{folder}: weights of a {found!r} model; embed.{kind}.weights needs a {kind!r} one")


def _fingerprint(folder: Path, weights: str, kind: Kind) -> str:
    files = _weight_files(folder)
    if not files:
        pickles = sorted(
            p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{suffix}")
        )
        if pickles:
            raise UserError(
                f"{folder}: only a pickle ({pickles[0]}), which can run code and is not read; convert it to "
                "safetensors (https://huggingface.co/docs/safetensors/convert-weights) or use other weights"
            )
        raise _missing(weights, kind, "no model.safetensors, nor all the shards of one, in it")
    if len(files) == 1:
        return _sha256(files[0])
    listed = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256(path: Path) -> str:
    # The Hugging Face cache names large files by their sha256.
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(weights: Weights, model_class: Any, config_class: Any) -> Any:
    """The model, float32 on the CPU, in evaluation mode.

    Args:
        model_class, config_class: of transformers.

    Raises:
        UserError: the files cannot be read, or lack some of the model's weights.
    """
    if weights.folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights.seed)
            return model_class._from_config(config_class(), attn_implementation="sdpa").float().eval()
    from safetensors import SafetensorError

    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                weights.folder,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{weights.folder}: cannot be loaded ({reason}); download the weights again"
        ) from None
    if absent := sorted(info["missing_keys"]):
        raise UserError(
            f"{weights.folder}: lacks {len(absent)} of the model's weights (such as {absent[0]}); "
            "download the weights again, or use others"
        )
    return model.float().eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of unused weights (a pre-training decoder)."""
    from transformers.utils import logging as transformers_logging

    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
