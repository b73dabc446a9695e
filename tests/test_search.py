"""The nearest clips by text and by clip: exact, by the run's own weights, in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from ego2robot import cli
from ego2robot.errors import UserError
from ego2robot.search import nearest, search
from ego2robot.skills import cluster, vectors
from ego2robot.skills.vectors import Vectors
from ego2robot.store.rundir import RunDir
from tests.test_clip import folder as clip_folder  # noqa: F401  # a fixture
from tests.test_clip import load
from tests.test_skills import blobs, ids, make_run, one_thread, skills  # noqa: F401  # a fixture

TEXTS = ["tightening a screw", "wiping a table", "packing a box"]


def text_run(path: Path, weights: Path, **about: Any) -> tuple[RunDir, np.ndarray]:
    """Clips whose vectors lie around the vectors of three texts."""
    clip = load(weights)
    centres = clip.embed_text(TEXTS).numpy()
    x = np.repeat(centres, 30, axis=0) + np.random.default_rng(0).normal(scale=0.02, size=(90, clip.dim))
    settings = {"device": "cpu", "embed": {"clip": {"weights": str(weights)}}}
    prints = {"clip": {"weights": str(weights), "sha256": clip.fingerprint, "random": False}}
    return make_run(path, {"clip": x.astype(np.float32)}, settings=settings, fingerprint=prints, **about), x


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_finds_the_clips_that_look_like_it(tmp_path: Path, clip_folder: Path, text: str) -> None:  # noqa: F811
    run, x = text_run(tmp_path, clip_folder)
    answer = search(run, text, top=30)
    assert (answer.by, answer.embedding, answer.random) == ("text", "clip", False)
    at = TEXTS.index(text)
    assert {found.clip_id for found in answer.clips} == set(ids(90)[30 * at : 30 * at + 30])
    wanted = load(clip_folder).embed_text([text])[0].numpy()
    stored = x.astype(np.float16).astype(np.float64)
    exact = dict(zip(ids(90), stored @ wanted / np.linalg.norm(stored, axis=1), strict=True))
    assert [found.cosine for found in answer.clips] == pytest.approx(
        [exact[found.clip_id] for found in answer.clips],
        abs=0.01,  # the text tower may run in bfloat16
    )
    assert [found.cosine for found in answer.clips] == sorted((f.cosine for f in answer.clips), reverse=True)


def test_a_clip_finds_its_neighbours_and_not_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "UNIT_ROWS", 16)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)).astype(np.float32)
    run = make_run(tmp_path, {"videomae": x, "clip": x[:, ::-1].copy()}, ["wiping"] * 200, n_parts=9)
    cluster(run, skills(k=4, embedding="videomae"), seed=1)
    stored = x.astype(np.float16).astype(np.float64)
    unit = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    for clip in (0, 57, 199):
        answer = search(run, ids(200)[clip], top=7)
        assert (answer.by, answer.embedding) == ("clip", "videomae")
        order = [i for i in np.argsort(-(unit @ unit[clip])) if i != clip][:7]
        assert [found.clip_id for found in answer.clips] == [ids(200)[i] for i in order]
        assert [f.cosine for f in answer.clips] == pytest.approx(
            (unit @ unit[clip])[order].tolist(), abs=1e-5
        )
        skill_of = dict(
            zip(
                *pq.read_table(run.path / "skills" / "assignment.parquet", columns=["clip_id", "skill"])
                .to_pydict()
                .values(),
                strict=True,
            )
        )
        for found in answer.clips:
            assert (found.name, found.start_s, found.end_s, found.label) == ("a.mp4", 0.0, 6.0, "wiping")
            assert found.skill == skill_of[found.clip_id]
            assert found.skill_name == (run.skills() or {})["skills"][found.skill]["name"]
    assert search(run, ids(200)[0], top=500).clips[-1].cosine < 0
    assert len(search(run, ids(200)[0], top=500).clips) == 199
    assert search(run, ids(200)[0], top=3, embedding="clip").embedding == "clip"


def test_equally_near_clips_go_by_their_ids_whatever_the_files(tmp_path: Path) -> None:
    x = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)
    for n_parts in (1, 5):
        order = np.random.default_rng(n_parts).permutation(120).tolist()
        run = make_run(tmp_path / str(n_parts), {"clip": x}, n_parts=n_parts, order=order)
        hits = nearest(Vectors.of_run(run, "clip"), torch.tensor([1.0, 0.0, 0.0]), 10)
        assert [clip for clip, _ in hits] == sorted(ids(120)[:40])[:10]


def test_what_cannot_be_searched_is_one_line(tmp_path: Path, clip_folder: Path) -> None:  # noqa: F811
    run, _ = text_run(tmp_path / "a", clip_folder)
    hands = make_run(tmp_path / "b", {"hand_motion": blobs()[0]})
    other, _ = text_run(tmp_path / "c", clip_folder)
    record = json.loads((other.path / "fingerprint.json").read_text())
    record["clip"]["sha256"] = "0" * 64
    (other.path / "fingerprint.json").write_text(json.dumps(record))
    none = make_run(tmp_path / "d", {}, n_kept=3)
    for made, query, embedding, message in (
        (run, " ", "auto", "nothing to look for"),
        (run, "f" * 16, "auto", "no clip vector of a clip ffffffffffffffff"),
        (run, "a screw", "videomae", "not videomae"),
        (hands, "a screw", "auto", r"no clip embeddings \(it has: hand_motion\)"),
        (hands, ids(1)[0], "clip", "no clip embeddings"),
        (other, "a screw", "auto", "other weights than those that made"),
        (none, ids(1)[0], "auto", "nothing to search"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            search(made, query, embedding=embedding)
        assert "\n" not in str(caught.value)


def test_the_command_prints_a_table_and_json(tmp_path: Path, clip_folder: Path) -> None:  # noqa: F811
    run, _ = text_run(tmp_path, clip_folder, random=["clip"])
    shown = CliRunner().invoke(cli.app, ["search", str(run.path), TEXTS[0], "--top", "3"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].split() == ["cosine", "clip", "from", "to", "skill", "label", "video"]
    assert len(lines) >= 4
    assert lines[1].split()[1:4] == [search(run, TEXTS[0]).clips[0].clip_id, "0:00.0", "0:06.0"]
    assert "random weights: this order means nothing" in shown.output
    told = CliRunner().invoke(cli.app, ["search", str(run.path), TEXTS[0], "--top", "3", "--json"])
    answer = json.loads(told.stdout.splitlines()[0])
    assert answer["random"] is True
    assert [clip["clip_id"] for clip in answer["clips"]] == [line.split()[1] for line in lines[1:4]]


def test_shards_by_command(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"clip": blobs()[0]})
    overrides = ["skills.k=3", "skills.projections=[]"]
    command = ["cluster", str(run.path), *overrides]
    done = CliRunner().invoke(cli.app, [*command, "--shard", "0/2"])
    assert done.exit_code == 0, done.output
    assert "shard 0/2 done" in done.output
    assert run.skills() is None
    ended = CliRunner().invoke(cli.app, command)
    assert ended.exit_code == 0, ended.output
    assert "3 skills, 100 clips" in ended.output
    wrong = CliRunner().invoke(cli.app, [*command, "--shard", "2/2"])
    assert wrong.exit_code != 0
