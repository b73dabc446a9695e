"""Curating with a first look: what cannot survive the gate is ruled out before it is decoded.

In this order, each step the same however many workers there are and wherever it was interrupted:

1. Look at the packet sizes of every clip.
2. Decode and gate some clips of each kind of footage, the second half of them chosen by the first; fit a
   rule to their decisions.
3. Decode the clips that the rule does not rule out, and a random share of the others.
4. Estimate from that share what was lost. Where it is too much, decode the rest of that kind too.
5. Only then are the clips that stay ruled out written as rows, so that no row is ever replaced.

The plan is stored anew as its units are split, so that every unit is one that is either decoded or not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot import remote
from ego2robot.jobs.cutting import unit_of
from ego2robot.jobs.embedding import PendingUnit, tables
from ego2robot.jobs.pool import Pool
from ego2robot.jobs.worker import ScoredClip
from ego2robot.progress import Progress, Show, Tell
from ego2robot.stages import triage
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_table
from ego2robot.types import Unit

LOOKS = "plan/looks.parquet"
RULES = "plan/triage.json"
COMMIT_CLIPS = 4096
LOOKS_PER_CHILD = 32  # units; a process takes longer to start than to look at these
NOTHING_TO_SEE = "keyframes too far apart (decode.triage.max_keyframe_gap_s), or nothing but keyframes"
SHAPE = (triage.WINDOWS, len(triage.NAMES))
SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("group", pa.string()),
        pa.field("part", pa.string()),
        pa.field("look", pa.list_(pa.float64(), SHAPE[0] * SHAPE[1])),
    ]
)
Decode = Callable[[Sequence[Unit]], None]


def looking(max_keyframe_gap_s: float, cache_gib: float) -> Callable[[Unit], Iterator[np.ndarray]]:
    """The work of a looking child: a unit to the features of its clips, float64 [n, WINDOWS, F]."""
    remote.configure(cache_gib)

    def look(unit: Unit) -> Iterator[np.ndarray]:
        video = unit.video
        assert video.info is not None
        yield triage.features(video.name, video.blob, video.info, unit.clips, max_keyframe_gap_s)

    return look


def curate(
    run: RunDir, units: Sequence[Unit], decode: Decode, workers: int, show: Show, tell: Tell
) -> list[Unit]:
    """Decodes what has to be decoded and writes the rows of all clips, see the module.

    Args:
        units: the run's plan.
        decode: scores, embeds and commits those of some units that are not committed yet.
        workers: processes that look.

    Returns:
        The units that the plan has now.
    """
    cfg = run.config.decode.triage
    looks = Looks.of(run, units, workers, show)
    # What is committed stays as it is, whoever did it: a unit's id must not vanish from the plan.
    committed = run.committed_units()
    done = [unit for unit in units if unit.unit_id in committed]
    others = [unit for unit in units if unit.unit_id not in committed]
    state = run.read_json(RULES) or {}
    if "calibration" not in state:
        chosen = looks.calibration(cfg.calibrate_clips, run.config.seed)
        first, others = split(others, chosen)
        _replan(run, done, first, others)
        decode(first)
        done += first
        state["calibration"] = looks.more_calibration(chosen, decisions(run), cfg.calibrate_clips)
        atomic.write_json(run.path / RULES, state)
    weights: dict[str, float] = state["calibration"]
    second, others = split(others, weights)
    _replan(run, done, second, others)
    decode(second)
    done += second

    if "rules" not in state:
        rules = looks.rules(decisions(run), weights, cfg.recall)
        state["rules"] = {group: asdict(rule) for group, rule in rules.items()}
        atomic.write_json(run.path / RULES, state)
    rules = {group: triage.Rule(**rule) for group, rule in state["rules"].items()}
    for group, rule in sorted(rules.items()):
        tell(f"triage of {group}: {rule_text(rule)}")
    ruled_out = looks.ruled_out(rules) - weights.keys()
    audit = {clip for clip in ruled_out if triage.audited(clip, cfg.audit)}
    out, needed = split(others, ruled_out - audit)
    units = _replan(run, done, needed, out)
    decode(needed)

    if "recall" not in state:
        undecoded = {clip.clip_id for unit in out for clip in unit.clips}
        recalls = looks.recalls(decisions(run), undecoded, audit, rules)
        state["recall"] = {group: asdict(recall) for group, recall in recalls.items()}
        state["refused"] = sorted(
            g for g, recall in recalls.items() if _refused(recall, cfg.recall, cfg.audit)
        )
        atomic.write_json(run.path / RULES, state)
    for group, recall in sorted(state["recall"].items()):
        tell(f"triage of {group}: {recall_text(triage.Recall(**recall), group in state['refused'])}")
    again = [unit for unit in out if triage.group_of(unit.video) in state["refused"]]
    decode(again)
    _write_ruled_out(run, [unit for unit in out if triage.group_of(unit.video) not in state["refused"]])
    return units


def _refused(recall: triage.Recall, wanted: float, audit: float) -> bool:
    """Without an audit the calibration's word is taken; with one that looked at nothing, nobody's."""
    if recall.estimate is None:
        return audit > 0
    return recall.estimate < wanted


def split(units: Iterable[Unit], chosen: Iterable[str]) -> tuple[list[Unit], list[Unit]]:
    """The clips that are chosen and those that are not, each as units. Whole units keep their ids."""
    ids = set(chosen)
    found: tuple[list[Unit], list[Unit]] = ([], [])
    for unit in units:
        for k, inside in enumerate((True, False)):
            if clips := [c for c in unit.clips if (c.clip_id in ids) == inside]:
                found[k].append(unit_of(unit.video, clips))
    for part in found:
        part.sort(key=lambda unit: (-unit.cost_s, unit.unit_id))
    return found


def _replan(run: RunDir, *parts: Sequence[Unit]) -> list[Unit]:
    units = [unit for part in parts for unit in part]
    if {unit.unit_id for unit in units} != set(run.units()["unit_id"].to_pylist()):
        atomic.write_parquet(run.plan_path, units_table(units))
    return units


def decisions(run: RunDir) -> dict[str, bool]:
    """Clip to whether it was kept, of those that have been scored."""
    scored = run.dataset("clips").to_table(
        columns=["clip_id", "decision"], filter=pc.field("decision") != "failed"
    )
    return {row["clip_id"]: row["decision"] == "kept" for b in scored.to_batches() for row in b.to_pylist()}


@dataclass
class Looks:
    """What the first look saw of every clip.

    Attributes:
        clips: ids, in the order of the rows.
        groups: the kind of footage of each.
        parts: the stretch of a video that each is of.
        features: float64 [n, WINDOWS, F].
    """

    clips: list[str]
    groups: np.ndarray
    parts: list[str]
    features: np.ndarray

    @classmethod
    def of(cls, run: RunDir, units: Sequence[Unit], workers: int, show: Show) -> Looks:
        """Looks at every clip, or reads what an earlier start saw."""
        path = run.path / LOOKS
        if not path.is_file():
            atomic.write_parquet(path, _look(run, units, workers, show))
        table = pq.read_table(path)
        return cls(
            table["clip_id"].to_pylist(),
            np.array(table["group"].to_pylist(), object),
            table["part"].to_pylist(),
            np.asarray(table["look"].combine_chunks().flatten()).reshape(-1, *SHAPE),
        )

    def calibration(self, n: int, seed: int) -> dict[str, float]:
        """The first half of the clips to calibrate on, ``n`` in all of each group, and their weights. None
        of a group so small that little would be left to rule out."""
        found: dict[str, float] = {}
        for rows in self._groups():
            if len(rows) >= 2 * n:
                found |= triage.choose([self.clips[i] for i in rows], self.features[rows], n // 2, seed)
        return found

    def more_calibration(
        self, first: Mapping[str, float], kept: Mapping[str, bool], n: int
    ) -> dict[str, float]:
        """All clips to calibrate on and their weights, from the decisions on the first."""
        found: dict[str, float] = {}
        for rows in self._groups():
            ids = [self.clips[i] for i in rows]
            if here := {clip: first[clip] for clip in ids if clip in first}:
                found |= triage.choose_more(ids, self.features[rows], here, kept, n - len(here))
        return found

    def _groups(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.groups == group) for group in sorted(set(self.groups.tolist()))]

    def rules(
        self, kept: Mapping[str, bool], weights: Mapping[str, float], recall: float
    ) -> dict[str, triage.Rule]:
        """The rule of each group, fitted to its calibration clips."""
        found = {}
        for group in sorted(set(self.groups.tolist())):
            rows = [
                i for i in np.flatnonzero(self.groups == group)
                if self.clips[i] in weights and self.clips[i] in kept
            ]  # fmt: skip
            if not rows:
                few = np.isfinite(self.features[self.groups == group]).all((1, 2)).any()
                text = "too few clips to fit a rule and gain by it" if few else NOTHING_TO_SEE
                found[group] = triage.Rule(text)
                continue
            found[group] = triage.fit(
                self.features[rows],
                np.array([kept[self.clips[i]] for i in rows], bool),
                np.array([weights[self.clips[i]] for i in rows]),
                [self.parts[i] for i in rows],
                recall,
            )
        return found

    def ruled_out(self, rules: Mapping[str, triage.Rule]) -> set[str]:
        found: set[str] = set()
        for group, rule in rules.items():
            rows = np.flatnonzero(self.groups == group)
            found |= {self.clips[i] for i in rows[rule.rules_out(self.features[rows])]}
        return found

    def recalls(
        self,
        kept: Mapping[str, bool],
        ruled_out: set[str],
        audit: set[str],
        rules: Mapping[str, triage.Rule],
    ) -> dict[str, triage.Recall]:
        """The recall of each group whose rule is in force.

        Args:
            ruled_out: clips that were not decoded.
            audit: clips that were decoded though the rule ruled them out.
        """
        count: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for clip, group in zip(self.clips, self.groups.tolist(), strict=True):
            count[group]["found"] += kept.get(clip, False)
            count[group]["ruled_out"] += clip in ruled_out
            if clip in audit and clip in kept:
                count[group]["audited"] += 1
                count[group]["audited_kept"] += kept[clip]
        return {
            group: triage.estimate_recall(
                *(count[group][name] for name in ("found", "ruled_out", "audited", "audited_kept"))
            )
            for group, rule in rules.items()
            if rule.off is None
        }


def _look(run: RunDir, units: Sequence[Unit], workers: int, show: Show) -> pa.Table:
    found: dict[str, np.ndarray] = {}
    total = sum(len(unit.clips) for unit in units)
    cfg = run.config.decode
    n = max(1, min(workers, len(units) // LOOKS_PER_CHILD))
    args = cfg.triage.max_keyframe_gap_s, run.config.source.cache_gib
    pool = Pool(looking, args, n, cfg.timeout_s)
    with closing(pool.run(units)) as events:
        for event in events:  # a video that cannot be looked at is not ruled out: decoding will say why
            if event.kind == "item":
                found |= {c.clip_id: f for c, f in zip(event.task.clips, event.value, strict=True)}
                show(Progress("looking at packet sizes", len(found), total))
    nothing = np.full(SHAPE, np.nan)
    rows = [
        {
            "clip_id": clip.clip_id,
            "group": triage.group_of(unit.video),
            "part": f"{clip.video_id} {int(clip.start_s // 300)}",
            "look": found.get(clip.clip_id, nothing).ravel().tolist(),
        }
        for unit in units
        for clip in unit.clips
    ]
    rows.sort(key=lambda row: str(row["clip_id"]))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _write_ruled_out(run: RunDir, units: Sequence[Unit]) -> None:
    """Commits the clips that stay ruled out: dropped, with the reason and without scores."""
    committed = run.committed_units()
    batch: list[PendingUnit] = []
    for unit in units:
        if unit.unit_id in committed:
            continue
        pending = PendingUnit(unit)
        for clip in unit.clips:
            pending.add(ScoredClip(clip, "dropped", triage.REASON), ())
        pending.end()
        batch.append(pending)
        if sum(len(p.clips) for p in batch) >= COMMIT_CLIPS:
            _commit(run, batch)
            batch = []
    if batch:
        _commit(run, batch)


def _commit(run: RunDir, batch: Sequence[PendingUnit]) -> None:
    info = {"clips": sum(len(pending.clips) for pending in batch), "triage": True}
    run.commit([pending.unit.unit_id for pending in batch], tables(batch, {}), info)


# -- words ----------------------------------------------------------------------------------------


def rule_text(rule: triage.Rule) -> str:
    """A rule in one line for a person."""
    if rule.off is not None:
        return f"off, all of it is decoded: {rule.off}"
    assert rule.recall is not None
    assert rule.recall_low is not None
    return (
        f"rules out about {100 * rule.ruled_out:.0f} % of the clips; tried on {rule.kept} kept ones it finds "
        f"{100 * rule.recall:.1f} % (95 % interval from {100 * rule.recall_low:.1f})"
    )


def recall_text(recall: triage.Recall, refused: bool) -> str:
    """What an audit found, in one line for a person."""
    if recall.estimate is None:
        text = f"{recall.ruled_out} clips ruled out, none of them looked at"
    else:
        text = (
            f"{100 * recall.estimate:.1f} % of the clips worth keeping were found "
            f"(95 % interval {100 * recall.low:.1f} to {100 * recall.high:.1f}; {recall.audited_kept} of "
            f"{recall.audited} audited clips were worth keeping, {recall.ruled_out} were not decoded)"
        )
    return text + ("; too few: the others are decoded after all" if refused else "")
