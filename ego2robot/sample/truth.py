"""What is true of generated footage, and how well a gate agrees with it.

The truth of ``NAME.mp4`` is ``NAME.json``. Times are seconds from the first frame, places are shares of the
frame's width and height (0, 0 is the upper left corner), sides are the wearer's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ego2robot.errors import UserError

FORMAT = "ego2robot-sample"
VERSION = 1  # of the generator: another version makes other pictures of the same seed
POSITIVE_SHARE = 0.5  # of a clip that is manipulating: from here on it should be kept
MIXED = (0.25, 0.75)  # shares strictly between these are neither: reported, not scored
Truth = dict[str, Any]


@dataclass(frozen=True)
class GateScore:
    """How a gate's decisions agree with the truth.

    Attributes:
        clips: rows that were looked at; the next four and ``mixed`` and ``failed`` add up to it.
        true_positive, false_positive, false_negative, true_negative: clips by truth and decision.
        mixed: clips whose manipulating share lies strictly between 0.25 and 0.75, left out of the score.
        mixed_kept: how many of those the gate kept.
        failed: clips without a decision, left out of the score.
    """

    clips: int
    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int
    mixed: int
    mixed_kept: int
    failed: int

    @property
    def precision(self) -> float | None:
        """Share of the kept clips that are manipulating; None when nothing was kept."""
        kept = self.true_positive + self.false_positive
        return self.true_positive / kept if kept else None

    @property
    def recall(self) -> float | None:
        """Share of the manipulating clips that were kept; None when there are none."""
        positive = self.true_positive + self.false_negative
        return self.true_positive / positive if positive else None

    def text(self) -> str:
        """One line for a person; what was left out is said."""
        scored = self.clips - self.mixed - self.failed
        precision, recall = (
            "undefined" if value is None else f"{value:.3f}" for value in (self.precision, self.recall)
        )
        return (
            f"gate against truth: precision {precision}, recall {recall} on {scored} clips "
            f"({self.true_positive} rightly kept, {self.false_positive} wrongly kept, "
            f"{self.true_negative} rightly dropped, {self.false_negative} wrongly dropped); left out: "
            f"{self.mixed} clips 25 to 75 % manipulating ({self.mixed_kept} kept), {self.failed} failed"
        )


def load_truth(path: Path) -> Truth:
    """Reads one truth file.

    Raises:
        UserError: not there, not JSON, or not the truth of generated footage.
    """
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no truth file; `ego2robot sample` writes one beside each video") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as truth: {error}; make the footage again") from None
    if not isinstance(truth, dict) or truth.get("format") != FORMAT:
        raise UserError(f"{path}: not the truth of generated footage; give the JSON beside a generated video")
    if truth.get("version") != VERSION:
        raise UserError(
            f"{path}: truth of version {truth.get('version')}, this generator is {VERSION}; make it again"
        )
    return truth


def load_truths(folder: Path) -> dict[str, Truth]:
    """Every truth in ``folder``, by the stem of its video's name. Other JSON files are an error."""
    found = {path.stem: load_truth(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise UserError(f"{folder}: no truth files; `ego2robot sample` writes one beside each video")
    return found


def truth_of_clip(truth: Truth, start_s: float, end_s: float) -> dict[str, Any]:
    """What is true of a span of one video.

    Returns:
        ``shares``: seconds of each kind over the span's length (their sum is below 1 past the video's
        end); ``manipulating``: at least half of the span; ``skill``: the one that fills most of it, or None.

    Raises:
        ValueError: the span is empty.
    """
    if end_s <= start_s:
        raise ValueError(f"empty span {start_s}..{end_s}")
    shares = {"idle": 0.0, "walking": 0.0, "manipulating": 0.0}
    skills: dict[str, float] = {}
    for span in truth["spans"]:
        overlap = min(end_s, span["end_s"]) - max(start_s, span["start_s"])
        if overlap <= 0:
            continue
        share = overlap / (end_s - start_s)
        shares[span["kind"]] += share
        if span["skill"]:
            skills[span["skill"]] = skills.get(span["skill"], 0.0) + share
    return {
        "shares": shares,
        # A span that ends on a frame may miss a half by rounding.
        "manipulating": shares["manipulating"] >= POSITIVE_SHARE - 1e-9,
        "skill": max(skills, key=lambda name: skills[name]) if skills else None,
    }


def hands_at(truth: Truth, time_s: float) -> dict[str, tuple[float, float]]:
    """The wrists of the hands on screen at ``time_s``: side to (x, y), shares of the frame.

    Raises:
        ValueError: the time is outside the video.
    """
    frame = int(time_s * truth["fps"] + 1e-6)
    if not 0 <= frame < truth["n_frames"]:
        raise ValueError(f"{time_s} s is outside a video of {truth['duration_s']} s")
    span = next(s for s in truth["spans"] if s["first_frame"] <= frame < s["end_frame"])
    segment = truth["segments"][span["segment"]]
    index = (frame - span["first_frame"]) % segment["n_frames"]
    return {side: (wrists[index][0], wrists[index][1]) for side, wrists in segment["wrists"].items()}


def score_gate(clips: Any, truths: Mapping[str, Truth]) -> GateScore:
    """Compares a gate's decisions with the truth.

    A clip is positive when at least half of it is manipulating. Clips with a manipulating share strictly
    between 0.25 and 0.75 are neither: they are counted as ``mixed`` and left out of precision and recall.

    Args:
        clips: a pyarrow table with ``name``, ``start_s``, ``end_s`` and ``decision``.
        truths: by the stem of the video's name, as :func:`load_truths` returns them.

    Raises:
        UserError: a clip's video has no truth.
    """
    count = dict.fromkeys(("tp", "fp", "fn", "tn", "mixed", "mixed_kept", "failed"), 0)
    rows = clips.select(["name", "start_s", "end_s", "decision"]).to_pylist()
    for row in rows:
        truth = truths.get(Path(row["name"]).stem)
        if truth is None:
            raise UserError(f"{row['name']}: no truth for this video; score runs on generated footage only")
        kept = row["decision"] == "kept"
        here = truth_of_clip(truth, row["start_s"], row["end_s"])
        if row["decision"] == "failed":
            count["failed"] += 1
        elif MIXED[0] < here["shares"]["manipulating"] < MIXED[1]:
            count["mixed"] += 1
            count["mixed_kept"] += kept
        else:
            count[("tp" if kept else "fn") if here["manipulating"] else ("fp" if kept else "tn")] += 1
    return GateScore(
        clips=len(rows),
        true_positive=count["tp"],
        false_positive=count["fp"],
        false_negative=count["fn"],
        true_negative=count["tn"],
        mixed=count["mixed"],
        mixed_kept=count["mixed_kept"],
        failed=count["failed"],
    )
