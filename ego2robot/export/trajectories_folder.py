"""The folder that holds trajectories: its parts, its card, and where it all came from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from ego2robot import __version__
from ego2robot.errors import UserError
from ego2robot.export.card import license_of
from ego2robot.export.privacy import SALT_FILE, Stripper, salt_at
from ego2robot.store import atomic
from ego2robot.trajectories import ACTION_NAMES

STATE = "export.json"  # of a part
PROVENANCE = "meta/ego2robot.json"  # of the folder
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,95}")  # of a part
RESERVED = ("meta",)


def read_state(folder: Path) -> dict[str, Any] | None:
    """What was written down of a part; None where the folder is none."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / STATE}: cannot be read ({error}); remove the folder, export again"
        ) from None
    return state if isinstance(state, dict) else {}


def parts(out: Path) -> dict[str, dict[str, Any]]:
    """The parts of a folder by name, with what was written down of them."""
    found = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and NAME.fullmatch(path.name)):
        if (state := read_state(folder)) is not None:
            found[folder.name] = state
    return found


def check_folder(out: Path) -> None:
    """Raises UserError where ``out`` holds something that is not ours."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another one")
    ours = {*parts(out), "README.md", "meta"}
    others = sorted(path.name for path in out.iterdir() if path.name not in ours and path.name[0] != ".")
    if others and not (out / PROVENANCE).is_file():
        raise UserError(f"{out}: holds something else ({others[0]}); choose another folder")


def stripper(out: Path) -> Stripper:
    """What names become in all parts of a folder. Its secret lies beside ``out``, not in what is published.

    Raises:
        UserError: parts were made with another secret, or with one that is gone.
    """
    out = out.resolve()
    path = out.with_name(f"{out.name}.{SALT_FILE}")
    out.parent.mkdir(parents=True, exist_ok=True)
    made_with = {s["pseudonyms"] for s in (parts(out) if out.is_dir() else {}).values() if "pseudonyms" in s}
    strip = None if made_with and not path.exists() else Stripper(salt_at(path))
    if strip is None or made_with - {mark(strip)}:
        raise UserError(
            f"{path}: {'gone' if strip is None else 'another one'}, but parts of {out.name} have pseudonyms "
            "that were made with it; put it back, or choose another folder"
        )
    return strip


def mark(strip: Stripper) -> str:
    """Tells a secret from others without telling it."""
    return strip.pseudonym("salt", "")


def write_card(out: Path) -> None:
    """README.md, whose head tells ``datasets`` which parts there are, and the provenance beside it."""
    found = parts(out)
    license_ = license_of((state["settings"]["kind"], None) for state in found.values())
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*.parquet"}]}
        for name in found
    ]
    head = {
        "license": (license_ or "other").lower(),
        "task_categories": ["robotics", "video-classification"],
        "tags": ["egocentric", "reward-model", "trajectories", "RFM"],
        "configs": configs,
    }
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    atomic.write_text(out / "README.md", f"---\n{front}---\n\n{_text(found, license_)}")
    about = {
        "made_by": "ego2robot",
        "version": __version__,
        "exporter": "trajectories",
        "sources": sorted({state["settings"]["kind"] for state in found.values()}),
        "parts": {
            name: {key: value for key, value in state.items() if key != "failed"}
            | {"failed": len(state.get("failed", {}))}
            for name, state in found.items()
        },
    }
    atomic.write_json(out / PROVENANCE, about)


def _covered(found: dict[str, dict[str, Any]]) -> str:
    """What the card says of faces."""
    looked = {name: s["covered"] for name, s in found.items() if "covered" in s}
    if not looked:
        return ""
    each = ", ".join(f"in {n} frames of `{name}`" for name, n in looked.items())
    return f"\nFaces that a detector found are covered, {each}. It misses some.\n"


def _named(found: dict[str, dict[str, Any]]) -> str:
    """What the card says of names."""
    stripped = [f"`{name}`" for name, s in found.items() if s["settings"].get("strip_metadata")]
    if not stripped:
        return ""
    return (
        f"\nIn {', '.join(stripped)} recordings, and the folders that name their tasks, have pseudonyms; "
        "`task` is as it was written. Pictures may tell more: this is no promise of anonymity.\n"
    )


def _text(found: dict[str, dict[str, Any]], license_: str | None) -> str:
    rows = "".join(
        f"| `{name}` | {s['settings']['kind']} | {s['trajectories']} | {s['frames']} "
        f"| {s['without_actions']} | {s['with_unknown_actions']} | {len(s.get('failed', {}))} |\n"
        for name, s in found.items()
    )
    return f"""# Trajectories

Few frames of each recording, its task in words and an action for each frame, for reward models.

| configuration | source | trajectories | frames | without actions | with unknown ones | left out |
|---|---|---|---|---|---|---|
{rows}
`frames` are the bytes of an H.264 mp4 whose frame `k` belongs to `actions[k]` and was shown at
`timestamps[k]` seconds of `video`, a recording of `source_fps` frames/s. They were taken evenly from all
of its frames, so the rate at which the mp4 plays (`fps`) says nothing of how fast things happened.

`actions` of EgoDex: {", ".join(f"`{name}`" for name in ACTION_NAMES)}; metres, positions at that frame (not
differences), in the recording's own world or, where the settings say `frame: camera`, the hands in the
camera's. NaN: not known. Other sources: their own actions, or none.

`quality_label` is `successful` throughout: nobody judged it. `preference_group_id`, `preference_rank` and
`partial_success` are empty. RFM's `lang_vector` is not here; it is an embedding of `task`.
{_covered(found)}{_named(found)}
## Licence

Of the recordings: {license_ or "not known to the exporter; see their source"}.
"""
