"""The dataset card: what is in the dataset, how it was made, and what it is not."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ego2robot.errors import UserError
from ego2robot.export.licences import Licence, identifier_of

EMPTY = "> **Empty.**"
# A card that ``push`` wrote for a repository of several parts has a row for each between these.
_PARTS_BEGIN, _PARTS_END = "<!-- ego2robot parts -->", "<!-- end of parts -->"
STATE_TEXT = {
    "hands": "for the left and then the right hand: visible (0 or 1), interpolated (1 where it was "
    "not detected but lies in a short gap between detections), box (x_min, y_min, x_max, y_max) and "
    "21 landmarks (x, y); 96 numbers, coordinates as shares of the picture's width and height, zeros while "
    "the hand is not seen",
    "reference": "the box (x_min, y_min, x_max, y_max) of one hand as shares of the picture's width and "
    "height, zeros while it is not seen",
    "native": "what the dataset itself measured; the columns are named in `meta/info.json`. What it does not "
    "know is the value known last before (the first one known, at the beginning; 0 where it never is): "
    "`observation.known` says which shares of the state's and of the action's columns were known in a frame",
}
ACTION_TEXT = {
    "compensated": "motion (dx, dy) of the left and then the right wrist to the next frame over the still "
    "scene: the camera's own motion, estimated from the picture, is taken off; shares of the picture's "
    "width and height; zero where a wrist is not seen in both frames; the last one is repeated",
    "wrist": "motion (dx, dy) of the left and then the right wrist to the next frame, as shares of the "
    "picture's width and height; zero where a wrist is not seen in both frames; the last one is repeated",
    "reference": "motion (dx, dy) of one wrist to the next frame, as shares of the picture's width and "
    "height, clipped to [-1, 1]; zero where it is not seen in both frames; the last one is repeated",
    "native": "the dataset's own; where it has none, the state of the next frame, the last one repeated",
}


PSEUDO = (
    "> **Pseudo-actions, not robot actions.** Nobody drove a robot here. `observation.state` and "
    "`action` are positions and motions of *detected* hands in the *picture* (2D, in shares of its "
    "width and height). They see the head move as well as the hands, know nothing of depth, grip or "
    "force, and cannot be executed by any robot. Use them to pre-train representations, not to control."
)
MEASURED = (
    "> **Measured states.** `observation.state` and `action` are what the dataset that the footage is from "
    "gives for these moments, not what ego2robot saw in the pictures. Units: {units}."
)


@dataclass(frozen=True)
class Facts:
    """What the card reports. ``tasks`` and ``videos`` count episodes by task text and by video."""

    schema: str
    action: str  # of ACTION_TEXT
    codec: str
    fps: int
    height: int
    width: int
    frames: int
    tasks: Mapping[str, int]
    videos: Mapping[str, int]
    kept: int  # clips that passed the gates, exported or not
    considered: int  # clips planned
    hand_frames: int  # frames in which a hand is seen
    skipped: int
    ranked_by: str
    random_models: Sequence[str]
    license: str | None
    version: str
    units: str = ""  # of the columns of a native state
    blurred: int | None = None  # frames in which faces were covered; None: faces were not looked for
    stripped: bool = False  # names of people, places and videos became pseudonyms


def license_of(pairs: Iterable[tuple[str, str | None]]) -> str | None:
    """The one licence that all episodes share, from pairs of source and ``license`` field; else None."""
    found = {said or identifier_of(source) for source, said in pairs}
    return found.pop() if len(found) == 1 else None


def card(facts: Facts) -> str:
    """README.md of the dataset: YAML front matter, then Markdown. All foreign text is escaped."""
    head: dict[str, Any] = {
        "license": facts.license.lower() if facts.license else "other",
        "task_categories": ["robotics"],
        "tags": ["LeRobot", "egocentric", "hands", *([] if facts.schema == "native" else ["pseudo-actions"])],
        "configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}],
    }
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{_body(facts)}"


def _body(facts: Facts) -> str:
    episodes = sum(facts.videos.values())
    seconds = facts.frames / facts.fps
    seen = (
        f"{facts.hand_frames / facts.frames:.0%} of the frames"
        if facts.frames
        else "no frame (there is none)"
    )
    license_text = (
        f"The footage is under `{inline(facts.license)}`, as its source says."
        if facts.license
        else "**Unknown.** The source does not say, or its videos differ: ask whoever recorded them."
    )
    parts = [
        "# First-person hand work as robot-learning episodes",
        f"Made by ego2robot {facts.version} from first-person video, in the LeRobot dataset format v3.0.",
        MEASURED.format(units=inline(facts.units)) if facts.schema == "native" else PSEUDO,
        *_warnings(facts),
        "## Figures",
        _table(
            ("", ""),
            [
                ("episodes", f"{episodes:,}"),
                ("frames", f"{facts.frames:,} ({seconds:,.1f} s at {facts.fps} frames/s)"),
                ("tasks", f"{len(facts.tasks):,}"),
                ("videos", f"{len(facts.videos):,}"),
                ("clips planned → kept → exported", f"{facts.considered:,} → {facts.kept:,} → {episodes:,}"),
                ("left out at export", f"{facts.skipped:,}"),
                *([] if facts.schema == "native" else [("a hand is seen in", seen)]),
                ("picture", f"{facts.height} × {facts.width} RGB, {facts.codec.upper()} (lossy)"),
            ],
        ),
        f"Episodes are the kept clips that rank highest by {facts.ranked_by}; ties go to the one with more "
        "motion, then to the smaller id. They are stored by video and time.",
        "## Features",
        _table(
            ("feature", "meaning"),
            [
                ("`observation.images.top`", "the picture, on a regular grid of times"),
                ("`observation.state`", STATE_TEXT[facts.schema]),
                ("`action`", ACTION_TEXT[facts.action]),
            ],
        ),
        "`timestamp` is the frame's place on the grid; the real time of the picture in its video lies up to "
        "one frame of the video before it. `meta/episodes` says for every episode which clip of which video "
        "it is (`clip_id`, `video`, `start_s`, `end_s`), its skill and its scores. `meta/ego2robot.json` has "
        "the configuration and the fingerprint of everything that made it. Statistics are exact: all "
        "pixels and all rows, before video compression.",
    ]
    if facts.tasks:
        common = sorted(facts.tasks.items(), key=lambda item: (-item[1], item[0]))
        parts += ["## Tasks", _table(("task", "episodes"), [(inline(t), f"{n:,}") for t, n in common[:50]])]
        if len(common) > 50:
            parts.append(f"… and {len(common) - 50:,} more in `meta/tasks.parquet`.")
    parts += [
        "## Loading",
        "```python\nfrom lerobot.datasets.lerobot_dataset import LeRobotDataset\n\n"
        'dataset = LeRobotDataset("local/dataset", root="path/to/this/folder")\n'
        'frame = dataset[0]  # frame["observation.images.top"]: float32 [3, H, W] in [0, 1]\n```',
        "## Privacy",
        privacy(facts.blurred, facts.frames, facts.stripped),
        "## Licence",
        license_text,
    ]
    return "\n\n".join(parts) + "\n"


def privacy(blurred: int | None, frames: int, stripped: bool) -> str:
    """What was taken out of the pictures and the texts, and what was not."""
    faces = (
        "Faces were not looked for: people may be recognisable."
        if blurred is None
        else f"Faces that a detector found were covered, in {blurred:,} of {frames:,} frames. It misses "
        "some, above all small, turned and hidden ones; hands, clothes, rooms and screens are as they were."
    )
    names = (
        "Videos, people and places have pseudonyms instead of names; task texts are as they were written."
        if stripped
        else "Names of videos, and what their source says of them, are as they were."
    )
    return f"{faces} {names} This is no promise of anonymity."


# -- for the hub ------------------------------------------------------------------------------------


def parted(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and the rest.

    Raises:
        UserError: the front matter is not YAML.
    """
    if not text.startswith("---\n") or "\n---\n" not in text:
        return {}, text
    head, body = text[4:].split("\n---\n", 1)
    try:
        front = yaml.safe_load(head)
    except (yaml.YAMLError, RecursionError):
        raise UserError("README.md: its front matter is not YAML; export the dataset again") from None
    return (front if isinstance(front, dict) else {}), body.lstrip("\n")


def joined(front: Mapping[str, Any], body: str) -> str:
    """The opposite of :func:`parted`."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n\n{body}"


def published(text: str, licence: str, known: Sequence[Licence]) -> str:
    """A dataset's own card with the licence that it is published under, and the terms of its sources."""
    front, body = parted(text)
    front = {"license": licence, **{key: value for key, value in front.items() if key != "license"}}
    if licence == "other" and known:
        front["license_name"] = "-and-".join("-".join(one.name.lower().split()) for one in known)
    said = [f"Published under `{inline(licence)}`."]
    said += [f"{one.terms} (Licence of the footage: {one.name}; read in {one.source}.)" for one in known]
    before, mark, _ = body.partition("## Licence\n")
    head = f"{before}{mark}" if mark else f"{body.rstrip()}\n\n## Licence\n"
    return joined(front, head + "\n" + "\n\n".join(said) + "\n")


def parts_of(text: str) -> dict[str, str]:
    """The rows of a card of several parts, by the name of the part."""
    _, _, rest = text.partition(_PARTS_BEGIN)
    rows = rest.partition(_PARTS_END)[0].splitlines()
    return {row[3:].partition("]")[0]: row for row in rows if row.startswith("| [")}


def with_part(repository: str | None, part: str, text: str) -> str:
    """The card of a repository of several parts with one more, or with this one as it is now.

    Args:
        repository: its card until now; None: there is none.
        part: the folder of the part, and its configuration's name.
        text: the part's own card.
    """
    front, body = parted(text)
    before = parted(repository)[0] if repository else {}
    others = [
        c
        for c in before.get("configs") or ()
        if isinstance(c, dict) and str(c.get("config_name")).partition(".")[0] != part
    ]
    own = [c for c in front.get("configs") or () if isinstance(c, dict)]
    own = own or [{"config_name": "default", "data_files": "**"}]
    for config in own:  # of a dataset that has several itself: part.name
        name = part if len(own) == 1 else f"{part}.{config.get('config_name')}"
        others.append({**config, "config_name": name, "data_files": _below(part, config.get("data_files"))})
    configs = others
    rows = parts_of(repository or "")
    licences = {str(before["license"]), str(front["license"])} if rows and "license" in before else set()
    tags = [*dict.fromkeys([*(before.get("tags") or ()), *(front.get("tags") or ())])]
    head: dict[str, Any] = {
        "license": "other" if len(licences) > 1 else front["license"],
        "task_categories": front.get("task_categories") or before.get("task_categories") or ["robotics"],
        "tags": tags,
        "configs": sorted(configs, key=lambda c: str(c["config_name"])),
    }
    title = next((line[2:] for line in body.splitlines() if line.startswith("# ")), "dataset")
    rows[part] = f"| [{part}]({part}/README.md) | {title} | `{inline(str(front['license']))}` |"
    lines = [
        "# First-person hand work in parts",
        "",
        "Made by ego2robot. Each part is a dataset of its own, with a card that has its figures, its limits "
        "and its licence.",
        "",
        _PARTS_BEGIN,
        "| part | what it is | licence |",
        "|---|---|---|",
        *(rows[name] for name in sorted(rows)),
        _PARTS_END,
        "",
        f'Loading: `datasets.load_dataset("OWNER/NAME", "{part}")`.',
        "",
    ]
    return joined(head, "\n".join(lines))


def _below(part: str, files: Any) -> Any:
    """The ``data_files`` of a configuration, one folder further down."""
    if isinstance(files, list):
        return [_below(part, one) for one in files]
    if isinstance(files, dict):
        return {k: _below(part, v) if k == "path" else v for k, v in files.items()}
    return f"{part}/{files}" if isinstance(files, str) else f"{part}/**"


def _warnings(facts: Facts) -> list[str]:
    found = []
    if not facts.videos:
        found.append(
            f"{EMPTY} No clip could be exported; the files only show the format. LeRobot itself opens "
            "no dataset without episodes."
        )
    if facts.random_models:
        names = ", ".join(facts.random_models)
        found.append(
            f"> **Random weights.** {names} ran with random weights: labels, embeddings and skills that come "
            "from them mean nothing."
        )
    return found


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines)


def inline(text: str) -> str:
    """Text from outside, safe in a Markdown table: no markup, no line breaks."""
    flat = html.escape(" ".join(text.split()), quote=False)
    return "".join("\\" + c if c in "\\`*_{}[]|#!" else c for c in flat)
