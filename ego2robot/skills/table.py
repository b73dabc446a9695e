"""Coarse label × fine cluster: the two-level hierarchy, and what a skill is called because of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("label", pa.string(), metadata={"description": "best prompt; null: clips without a label"}),
        pa.field("skill", pa.int32(), nullable=False),
        pa.field("n", pa.int64(), nullable=False, metadata={"description": "clips with both"}),
        pa.field(
            "share_of_label", pa.float64(), nullable=False, metadata={"description": "n / label's clips"}
        ),
        pa.field(
            "share_of_skill", pa.float64(), nullable=False, metadata={"description": "n / skill's clips"}
        ),
    ]
)


@dataclass(frozen=True)
class SkillLabel:
    """The most frequent label of a skill (None: no clip has one) and its share of the skill's clips."""

    label: str | None
    share: float | None


def hierarchy(labels: Sequence[str | None], skills: np.ndarray) -> pa.Table:
    """One row per pair of label and skill that occurs (``SCHEMA``), by label, then skill; null last.

    Args:
        labels: one per clip, None where it has none.
        skills: int [N], the skill of each clip.
    """
    return hierarchy_of(Counter(zip(labels, skills.tolist(), strict=True)))


def hierarchy_of(pairs: Mapping[tuple[str | None, int], int]) -> pa.Table:
    """The same from the number of clips of each pair."""
    of_label, of_skill = Counter[str | None](), Counter[int]()
    for (label, skill), n in pairs.items():
        of_label[label] += n
        of_skill[skill] += n
    rows = [
        {
            "label": label,
            "skill": skill,
            "n": n,
            "share_of_label": n / of_label[label],
            "share_of_skill": n / of_skill[skill],
        }
        for (label, skill), n in sorted(
            pairs.items(), key=lambda i: (i[0][0] is None, i[0][0] or "", i[0][1])
        )
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def top_labels(table: pa.Table, n_skills: int) -> list[SkillLabel]:
    """The label that most clips of each skill have; between equals the first in the alphabet."""
    best: list[SkillLabel] = [SkillLabel(None, None)] * n_skills
    for row in table.to_pylist():  # by label, so the first of equals stays
        share = best[row["skill"]].share
        if row["label"] is not None and (share is None or row["share_of_skill"] > share):
            best[row["skill"]] = SkillLabel(row["label"], row["share_of_skill"])
    return best


def names(labels: Sequence[str | None]) -> list[str]:
    """What to call skills whose top labels are ``labels``: each name once.

    A label that several skills share is numbered in their order, ``wiping #1``, ``wiping #2``; a skill
    without one is ``skill 7``, by its number.
    """
    shared, seen, found = Counter(labels), Counter[str](), []
    for skill, label in enumerate(labels):
        if label is None:
            found.append(f"skill {skill}")
        elif shared[label] == 1:
            found.append(label)
        else:
            seen[label] += 1
            found.append(f"{label} #{seen[label]}")
    return found
