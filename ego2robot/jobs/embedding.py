"""Batches across clips and videos, and the rows that come of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ego2robot.errors import VideoError
from ego2robot.jobs.plan import Refusal, quarantine_table
from ego2robot.jobs.worker import ScoredClip, rows_of
from ego2robot.stages import hand_motion
from ego2robot.stages.base import Embedder
from ego2robot.stages.inference import embed_finite
from ego2robot.stages.labels import PromptLabels
from ego2robot.store import schema
from ego2robot.types import Unit

Vectors = dict[str, np.ndarray]


@dataclass
class PendingClip:
    """A scored clip's rows, and the embeddings that it still waits for."""

    row: dict[str, Any]
    hands: list[dict[str, Any]]
    vectors: Vectors = field(default_factory=dict)
    waiting_for: set[str] = field(default_factory=set)

    def fail(self, reason: str) -> None:
        self.row |= {
            "decision": "failed",
            "reason": reason,
            "label": None,
            "label_score": None,
            "labels": None,
        }
        self.vectors.clear()
        self.hands.clear()


@dataclass
class PendingUnit:
    """A unit from its first clip until everything about it is known."""

    unit: Unit
    attempt: int = 1
    clips: dict[str, PendingClip] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    ended: bool = False

    @property
    def complete(self) -> bool:
        return self.ended and not any(clip.waiting_for for clip in self.clips.values())

    def add(self, scored: ScoredClip, embedders: Sequence[str]) -> PendingClip:
        row, hands = rows_of(scored, self.unit)
        clip = PendingClip(row, hands)
        if scored.decision == "kept":
            clip.waiting_for = set(embedders) - set(scored.vectors)
            if scored.hand_motion is not None:
                clip.vectors[hand_motion.NAME] = scored.hand_motion
        elif scored.decision == "failed" and not scored.scores and not self.refusals:
            # It was never seen; one line a unit is enough.
            name, reason = self.unit.video.name, scored.reason or ""
            self.refuse("decode", VideoError(name, reason, "its other clips are used", "truncated"))
        self.clips[scored.clip.clip_id] = clip
        return clip

    def refuse(self, stage: str, error: VideoError) -> None:
        named = error if error.name else VideoError(self.unit.video.name, error.cause, error.hint, error.kind)
        video_id = self.unit.video.video_id
        self.refusals.append((self.unit.unit_id, video_id, stage, named, self.attempt))

    def end(self, stage: str = "", error: VideoError | None = None) -> None:
        """Nothing more will come. Planned clips that never came are failed, with the reason."""
        if error:
            self.refuse(stage, error)
        for clip in self.unit.clips:
            if clip.clip_id not in self.clips:
                reason = error.cause if error else "no frames came of it"
                self.add(ScoredClip(clip, "failed", reason), ())
        self.ended = True


class Batches:
    """Waiting pictures of one embedder; full batches are embedded at once."""

    def __init__(self, embedder: Embedder, labels: PromptLabels | None, seconds: dict[str, float]) -> None:
        self._embedder, self._labels, self._seconds = embedder, labels, seconds
        self._waiting: list[tuple[PendingClip, np.ndarray]] = []
        self._proven = False

    @property
    def name(self) -> str:
        return self._embedder.name

    def add(self, clip: PendingClip, prepared: np.ndarray) -> None:
        self._waiting.append((clip, prepared))
        if len(self._waiting) >= self._embedder.batch_size:
            self.flush()

    def forget(self, clips: Mapping[str, PendingClip]) -> None:
        """Drops what waits for clips that will be scored again."""
        gone = {id(clip) for clip in clips.values()}
        self._waiting = [pair for pair in self._waiting if id(pair[0]) not in gone]

    def flush(self) -> None:
        """Embeds what waits. A clip whose vector is not finite fails alone.

        Raises:
            UserError: a whole first batch is not finite: the weights are at fault, not the clips.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        began = time.perf_counter()
        vectors = embed_finite(
            self._embedder, [torch.from_numpy(prepared) for _, prepared in waiting], self._proven
        )
        for (clip, _), vector in zip(waiting, vectors, strict=True):
            clip.waiting_for.discard(self.name)
            if vector is None:
                clip.fail(f"{self.name} embedding not finite")
            else:
                self.accept(clip, vector)
        self._seconds[self.name] += time.perf_counter() - began

    def accept(self, clip: PendingClip, vector: np.ndarray) -> None:
        """Takes a clip's vector, float32 [dim]; labels come of CLIP's."""
        self._proven = True
        if clip.row["decision"] != "kept":  # another embedder failed it
            return
        clip.vectors[self.name] = vector
        if self._labels:
            top = self._labels.labels(torch.from_numpy(vector)[None])[0]
            clip.row["label"], clip.row["label_score"] = top[0]
            clip.row["labels"] = [{"label": label, "score": score} for label, score in top]


def tables(units: Sequence[PendingUnit], schemas: Mapping[str, pa.Schema]) -> dict[str, pa.Table]:
    """All rows of some complete units, by table; ``schemas`` are those of the embeddings."""
    clips = [clip for unit in units for clip in unit.clips.values()]
    found = {
        "clips": pa.Table.from_pylist([clip.row for clip in clips], schema=schema.CLIPS),
        "hands": pa.Table.from_pylist([row for clip in clips for row in clip.hands], schema=schema.HANDS),
        "quarantine": quarantine_table([refusal for unit in units for refusal in unit.refusals]),
    }
    for name, columns in schemas.items():
        have = [clip for clip in clips if name in clip.vectors]
        ids = pa.array([clip.row["clip_id"] for clip in have], pa.string())
        dim = columns.field("embedding").type.list_size
        flat = (
            np.concatenate([clip.vectors[name] for clip in have]).astype(np.float16)
            if have
            else np.zeros(0, np.float16)
        )
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), dim)
        found[f"embeddings/{name}"] = pa.Table.from_arrays([ids, vectors], schema=columns)
    return found
