"""The clips nearest to a text or to a clip: an exact scan over the stored vectors, a block at a time."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch

from ego2robot.errors import UserError
from ego2robot.skills.assignment import unit_rows
from ego2robot.skills.cluster import choose_embedding
from ego2robot.skills.vectors import Vectors
from ego2robot.stages.clip import CLIP
from ego2robot.store.rundir import RunDir

CLIP_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Found:
    """One clip, as near as ``cosine`` says; None for what is not known of it."""

    clip_id: str
    cosine: float
    name: str | None
    start_s: float | None
    end_s: float | None
    label: str | None
    skill: int | None
    skill_name: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """What was looked for, in which embedding, and the nearest clips, best first.

    Attributes:
        random: the weights are random, so the order means nothing.
    """

    query: str
    by: str
    embedding: str
    random: bool
    clips: tuple[Found, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "clips": [clip.to_dict() for clip in self.clips]}


def search(run: RunDir, query: str, top: int = 10, embedding: str = "auto") -> Answer:
    """The ``top`` clips with the largest cosine; between equals the lower id.

    Args:
        query: the id of a clip (16 hex digits), which is left out of its own answer, or a text for the run's
            CLIP. A text says what a picture shows, so its cosines are far below those between clips.
        embedding: in which a clip's neighbours are looked for; ``auto``: as skills are. Texts are always
            looked for in ``clip``.

    Raises:
        UserError: no such clip, embedding or weights.
    """
    if not query.strip():
        raise UserError("search: nothing to look for; give a text or the id of a clip")
    if CLIP_ID.fullmatch(query):
        return _by_clip(run, query, top, embedding)
    if embedding not in ("auto", "clip"):
        raise UserError(f"search: texts are looked for among clip embeddings, not {embedding}")
    if "clip" not in run.embeddings():
        there = ", ".join(run.embeddings()) or "none"
        raise UserError(
            f"{run.path}: no clip embeddings (it has: {there}), which a text needs; give the id of a clip, "
            "or make them in a new run (embed.clip)"
        )
    vectors = Vectors.of_run(run, "clip")
    vector_D = _text(run, vectors, query)
    return _answer(run, query, "text", "clip", vectors, vector_D, top)


def _by_clip(run: RunDir, clip_id: str, top: int, embedding: str) -> Answer:
    name, _ = choose_embedding(run, embedding, n_kept=1)
    if name is None:
        raise UserError(f"{run.path}: the run has no embeddings; there is nothing to search")
    vectors = Vectors.of_run(run, name)
    vector_D = vectors.vector(clip_id)
    if vector_D is None:
        raise UserError(
            f"{run.path}: no {name} vector of a clip {clip_id}; only kept clips have one "
            "(clip_id in clips/, decision kept)"
        )
    return _answer(run, clip_id, "clip", name, vectors, vector_D, top)


def _text(run: RunDir, vectors: Vectors, text: str) -> torch.Tensor:
    """float32 [D] by the text tower of the weights that made the run's vectors."""
    cfg = run.config
    clip = CLIP.load(cfg.embed.clip, "cpu", cfg.seed)
    made_by = (run.fingerprint.get("clip") or {}).get("sha256")
    if clip.dim != vectors.dim or (made_by and made_by != clip.fingerprint):
        raise UserError(
            f"embed.clip.weights={cfg.embed.clip.weights}: other weights than those that made the run's "
            "vectors; put those in place, or search by the id of a clip"
        )
    try:
        return clip.embed_text([text])[0]
    except FloatingPointError as error:
        raise UserError(f"{clip.weights}: {error}; check the weights, or use others") from None


def nearest(
    vectors: Vectors, vector_D: torch.Tensor, top: int, leave_out: str | None = None
) -> list[tuple[str, float]]:
    """Ids and cosines of the ``top`` nearest, best first; reads every vector once, holds a few blocks."""
    wanted_D = unit_rows(vector_D[None])[0]
    ids = np.zeros(0, "U1")
    best = np.zeros(0, np.float32)
    for block in vectors.read():
        cosines = torch.cat([unit_rows(rows_ND) @ wanted_D for rows_ND in block.x_ND.split(4096)]).numpy()
        if leave_out is not None:
            cosines[pc.equal(block.clip_ids, leave_out).to_numpy(zero_copy_only=False)] = -np.inf
        # All that reach the worst of the best, so that equals are told apart by their ids.
        least = np.partition(cosines, -top)[-top] if len(cosines) > top else -np.inf
        at = np.flatnonzero(cosines >= max(least, -1.5))
        ids = np.concatenate(
            [ids, block.clip_ids.take(pa.array(at)).to_numpy(zero_copy_only=False).astype("U")]
        )
        best = np.concatenate([best, cosines[at]])
        order = np.lexsort((ids, -best))[:top]
        ids, best = ids[order], best[order]
    return list(zip(ids.tolist(), best.tolist(), strict=True))


def _answer(
    run: RunDir, query: str, by: str, name: str, vectors: Vectors, vector_D: torch.Tensor, top: int
) -> Answer:
    hits = nearest(vectors, vector_D, top, query if by == "clip" else None)
    ids = pa.array([clip_id for clip_id, _ in hits], pa.string())
    columns = ["clip_id", "name", "start_s", "end_s", "label"]
    rows = run.dataset("clips").to_table(columns, filter=ds.field("clip_id").isin(ids)).to_pylist()
    about = {row["clip_id"]: row for row in rows}
    skills = _skills(run, ids)
    found = []
    for clip_id, cosine in hits:
        row, (skill, skill_name) = about.get(clip_id, {}), skills.get(clip_id, (None, None))
        found.append(
            Found(
                clip_id=clip_id,
                cosine=cosine,
                name=row.get("name"),
                start_s=row.get("start_s"),
                end_s=row.get("end_s"),
                label=row.get("label"),
                skill=skill,
                skill_name=skill_name,
            )
        )
    return Answer(query, by, name, vectors.metadata.get("random") == "true", tuple(found))


def _skills(run: RunDir, ids: pa.Array) -> dict[str, tuple[int | None, str | None]]:
    """Number and name of each clip's skill, where skills were found."""
    about, path = run.skills(), run.path / "skills" / "assignment.parquet"
    if not about or not path.is_file():
        return {}
    names = {skill["skill"]: skill["name"] for skill in about["skills"]}
    rows = ds.dataset(path).to_table(["clip_id", "skill"], filter=ds.field("clip_id").isin(ids))
    return {row["clip_id"]: (row["skill"], names.get(row["skill"])) for row in rows.to_pylist()}
