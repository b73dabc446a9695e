"""What the benchmarks measured: two results compared, the newest one checked against the one before.

A result is ``benchmarks/results/<date>-<machine>.json`` as ``make bench`` and ``make gpu-proof`` write it,
with its comparisons under ``ratios``. Every ratio is the better the higher it is.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ego2robot.errors import UserError

RATIOS = {
    "cpu_end_to_end_vs_staged": "curation and both embedders against the staged way of the reference",
    "cpu_curation_vs_staged": "curation alone against the staged way of the reference",
    "cpu_curation_with_triage_vs_staged": "the same with triage, where a tenth is manipulation",
    "cpu_end_to_end_vs_staged_parallel": "curation and both embedders against it with a process a core",
    "cpu_curation_vs_staged_parallel": "curation alone against it with a process a core",
    "cpu_end_to_end_vs_daft": "curation and both embedders against Daft",
    "cpu_end_to_end_vs_ray": "curation and both embedders against Ray Data",
    "cpu_decode_vs_libav": "our decoding against libav decoding only",
    "triage_speedup": "with triage against without",
    "triage_recall": "share of kept clips that triage lets through",
    "decisions_agree": "share of clips that the staged way decides the same",
    "gpu_share_of_decode_ceiling": "end to end as a share of decoding alone",
    "gpu_video_hours_per_hour_hevc": "hours of 1080p30 HEVC per GPU-hour",
    "gpu_video_hours_per_hour_h264": "hours of 1080p30 H.264 per GPU-hour",
    "gpu_videomae_clips_per_s": "VideoMAE-B clips/s from frames on the device",
    "gpu_hands_frames_per_s": "frames/s that hands are looked for in",
}
# What must hold on the machines that the figures are meant for: two CPU cores, one H200.
FLOORS = {
    "cpu_end_to_end_vs_staged": 2.5,
    "cpu_curation_vs_staged": 3.0,
    "cpu_end_to_end_vs_daft": 1.0,
    "cpu_end_to_end_vs_ray": 1.0,
    "cpu_decode_vs_libav": 0.9,
    "triage_speedup": 3.0,
    "triage_recall": 0.99,
    "decisions_agree": 0.99,
    "gpu_share_of_decode_ceiling": 0.85,
    "gpu_video_hours_per_hour_hevc": 300.0,
    "gpu_video_hours_per_hour_h264": 150.0,
    "gpu_videomae_clips_per_s": 800.0,
}
WORST_DROP = 0.10  # share of a ratio that may be noise
FAILED = "failed"  # what the reason begins with when a ratio is missing through a fault


@dataclass(frozen=True)
class Result:
    """One file of results.

    Attributes:
        machine: its kind, as in the file's name: results of different kinds do not compare.
        ratios: by name, those that were measured.
        skipped: why the others were not.
    """

    name: str
    date: str
    machine: str
    commit: str | None
    ratios: dict[str, float]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Change:
    """One ratio in two results; ``before`` or ``after`` is None where it was not measured."""

    ratio: str
    before: float | None
    after: float | None
    reason: str | None = None  # why it was not measured

    @property
    def share(self) -> float | None:
        """Change as a share of ``before``; None where there is nothing to compare."""
        if self.before is None or self.after is None or self.before == 0:
            return None
        return self.after / self.before - 1

    @property
    def dropped(self) -> bool:
        """More than noise was lost, or what was measured before failed now."""
        if self.before is not None and self.after is None:
            return (self.reason or FAILED).startswith(FAILED)
        return self.share is not None and self.share < -WORST_DROP

    def text(self) -> str:
        """One line for a person."""
        if self.share is None:
            return f"{self.ratio} is missing: {self.reason or 'no reason given'}"
        figures = f"{_figure(self.before)} to {_figure(self.after)}"
        return f"{self.ratio} changed by {100 * self.share:+.1f} %, {figures}"


def read(path: Path) -> Result:
    """Reads a file of results.

    Raises:
        UserError: not there, or not such a file.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a file of benchmarks/results") from None


def parse(text: str, path: Path) -> Result:
    """A result from the text of the file ``path``. Raises UserError where it is none."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); measure again with `make bench`") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("ratios"), dict):
        raise UserError(f"{path}: has no ratios; give a file that `make bench` or `make gpu-proof` wrote")
    ratios = {name: value for name, value in tree["ratios"].items() if name in RATIOS and _is_number(value)}
    date, machine = path.stem[:10], path.stem[11:]
    about, skipped = tree.get("machine"), tree.get("skipped")
    return Result(
        path.name,
        date,
        machine,
        about.get("commit") if isinstance(about, dict) else None,
        ratios,
        {str(k): str(v) for k, v in skipped.items()} if isinstance(skipped, dict) else {},
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def compare(before: Result, after: Result) -> list[Change]:
    """Every ratio that either result has, in the order of ``RATIOS``."""
    return [
        Change(
            name,
            before.ratios.get(name),
            after.ratios.get(name),
            after.skipped.get(name) if name not in after.ratios else before.skipped.get(name),
        )
        for name in RATIOS
        if name in before.ratios or name in after.ratios
    ]


def table(changes: Sequence[Change]) -> list[str]:
    """Lines for a person: ratio, before, after, change in %, and what went wrong."""
    width = max((len(change.ratio) for change in changes), default=0)
    lines = []
    for change in changes:
        figures = [_figure(value) for value in (change.before, change.after)]
        end = f"{100 * change.share:+7.1f} %" if change.share is not None else f"  {change.reason or 'new'}"
        mark = "  DROPPED" if change.dropped else ""
        lines.append(f"{change.ratio:<{width}}  {figures[0]:>9}  {figures[1]:>9}  {end}{mark}")
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.3f}"


def results(folder: Path) -> list[Result]:
    """All results in a folder, oldest first; files without ratios are other benchmarks' own."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(read(path))
        except UserError:
            continue
    return found


@dataclass(frozen=True)
class Verdict:
    """The newest result of a machine beside the one before; ``before`` is None for the first one."""

    before: Result | None
    after: Result
    changes: tuple[Change, ...]

    @property
    def drops(self) -> list[Change]:
        return [change for change in self.changes if change.dropped]


def check(folder: Path) -> list[Verdict]:
    """For every kind of machine with a result of the newest date: that one beside the committed one before.

    Of a file that was written over since it was committed, the committed text is the one before.

    Raises:
        UserError: the folder holds no results.
    """
    found = results(folder)
    if not found:
        raise UserError(f"{folder}: no results; measure with `make bench` first")
    newest = max(result.date for result in found)
    verdicts = []
    for after in (result for result in found if result.date == newest):
        earlier = [r for r in found if r.machine == after.machine and r.date < newest]
        committed = [r for r in earlier if _committed(folder, r.name) is not None]
        before = next(reversed(committed or earlier), None)
        text = _committed(folder, after.name)
        if text is not None and text != (folder / after.name).read_text(encoding="utf-8"):
            before = parse(text, folder / after.name)
        changes = tuple(compare(before, after)) if before else ()
        verdicts.append(Verdict(before, after, changes))
    return verdicts


def _committed(folder: Path, name: str) -> str | None:
    """The text of a file in the last commit; None where it is not in it, or this is no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "show", f"HEAD:./{name}"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
    except OSError:  # no git here
        return None
    return done.stdout if done.returncode == 0 else None


def trend(found: Sequence[Result]) -> Mapping[str, Mapping[str, list[tuple[str, float]]]]:
    """Ratio to kind of machine to (date, value), oldest first: what the chart draws."""
    lines: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for name in RATIOS:
        for result in sorted(found, key=lambda r: r.date):
            if name in result.ratios:
                points = lines.setdefault(name, {}).setdefault(result.machine, [])
                points.append((result.date, result.ratios[name]))
    return lines


def summary(ratios: Mapping[str, float], skipped: Mapping[str, str]) -> list[str]:
    """Lines for a person at the end of a measurement: each ratio and its floor, or why there is none."""
    width = max(len(name) for name in RATIOS)
    lines = []
    for name, what in RATIOS.items():
        if name in ratios:
            floor = FLOORS.get(name)
            mark = "" if floor is None else f"{'ok' if ratios[name] >= floor else 'BELOW'} {floor:g}"
            lines.append(f"{name:<{width}}  {_figure(ratios[name]):>9}  {mark:<10}  {what}")
        elif name in skipped:
            lines.append(f"{name:<{width}}  {'-':>9}  {'':<10}  {skipped[name]}")
    return lines
