"""A GPU's process, run on the CPU: the rows of one process per core, and what may go wrong in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, VideoMAEConfig, VideoMAEModel

from ego2robot import config, decode, pipeline
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs import lane as lanes
from ego2robot.jobs.pool import Broken, Pool
from ego2robot.jobs.verify import verify
from ego2robot.jobs.worker import SCORES, Scoring
from ego2robot.stages import inference
from ego2robot.stages.gate import Gate
from ego2robot.stages.preprocess import VideoMAEPreprocess
from ego2robot.stages.videomae import VideoMAE
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_from_table
from ego2robot.types import ClipFrames, Unit
from tests.footage import write_video
from tests.test_clip import byte_vocabulary
from tests.test_pipeline import BASE, rows

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    VideoMAEModel(VideoMAEConfig(**TINY)).save_pretrained(folder / "videomae")
    vocabulary = byte_vocabulary()
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder / "clip")
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    words = {**TINY, **ends, "vocab_size": len(vocabulary)}
    CLIPModel(CLIPConfig(text_config=words, vision_config=TINY, projection_dim=24)).save_pretrained(
        folder / "clip"
    )
    return {name: folder / name for name in ("videomae", "clip")}


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    for i in range(3):
        write_video(folder / f"{i}.mp4", n_frames=200 + 60 * i, gop=30)
    data = (folder / "2.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) * 3 // 5])
    return folder


def recipe(footage: Path, run_dir: Path, models: dict[str, Path], *more: str) -> config.Config:
    weights = (
        "embed.videomae.weights=" + str(models["videomae"]),
        "embed.clip.weights=" + str(models["clip"]),
    )
    return config.load("folder", [*BASE, *weights, f"source.path={footage}", f"run_dir={run_dir}", *more])


@pytest.fixture(scope="module")
def clean(footage: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("clean")
    return pipeline.run(recipe(footage, folder / "run", {**models})).run


def in_lanes(width: int) -> Any:
    """In place of ``pipeline._pool``: two lanes on the CPU."""

    def pool(work: Scoring, n_units: int) -> tuple[Pool, dict[str, int]]:
        threads = {"decode": 2 * width, "score": 2, "embed": 2, "write": 1}
        return Pool(lanes.lane, (work,), 2, 120.0, width=width), threads

    return pool


def test_lanes_give_the_rows_of_processes(
    footage: Path, clean: RunDir, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_pool", in_lanes(3))
    run = pipeline.run(recipe(footage, tmp_path / "run", models)).run
    assert verify(run).ok
    for ours, theirs in zip(rows(run), rows(clean), strict=True):
        exact = {key for key, value in theirs.items() if not isinstance(value, float | list)}
        assert {k: ours[k] for k in exact} == {k: theirs[k] for k in exact}
        for key in SCORES:
            if theirs[key] is not None:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    for name in ("videomae", "clip"):
        ours, theirs = rows(run, f"embeddings/{name}"), rows(clean, f"embeddings/{name}")
        assert [row["clip_id"] for row in ours] == [row["clip_id"] for row in theirs] and ours
        a, b = (torch.tensor([row["embedding"] for row in each]) for each in (ours, theirs))
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    last = [line for line in run.metrics() if line.get("stall_seconds")][-1]
    assert {"score waits for decode", "embed waits for score", "write waits for decode"} <= set(
        last["stall_seconds"]
    )
    assert {"decode", "motion", "camera", "prepare", "videomae", "clip", "write"} <= set(
        last["stage_seconds"]
    )


@pytest.fixture
def units(clean: RunDir) -> list[Unit]:
    return units_from_table(clean.units())


@pytest.fixture
def work(clean: RunDir) -> Scoring:
    return Scoring(clean.config, Gate(0.001, 0.0), (VideoMAEPreprocess(),))


def tiny(models: dict[str, Path], **changes: Any) -> VideoMAE:
    loaded = VideoMAE.load(config.VideoMAE(weights=str(models["videomae"])), "cpu", 0, torch.float32)
    return dataclasses.replace(loaded, **changes)


def test_batches_are_filled_across_videos(
    units: list[Unit], work: Scoring, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = lanes.embed_finite

    def counted(embedder: Any, prepared: Any, proven: bool) -> Any:
        sizes.append(len(prepared))
        return original(embedder, prepared, proven)

    monkeypatch.setattr(lanes, "embed_finite", counted)
    lane = lanes.Lane(work, [tiny(models, batch_size=4)])
    found = list(lane.score(units[0])) + list(lane.score(units[1]))
    assert all(one.vectors["videomae"].shape == (32,) for one in found if one.decision == "kept")
    assert max(sizes) == 4 and sum(sizes) == sum(one.decision == "kept" for one in found)


def test_a_pass_that_does_not_fit_the_memory_is_made_in_halves(
    units: list[Unit], work: Scoring, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = lanes.score_clips
    passes: list[int] = []

    def tight(clips: list[ClipFrames], *rest: Any) -> Any:
        if len(clips) > 1:
            raise torch.OutOfMemoryError("tried to allocate a lot")
        passes.append(len(clips))
        return original(clips, *rest)

    monkeypatch.setattr(lanes, "score_clips", tight)
    monkeypatch.setattr(lanes, "GATHER_S", 0.5)
    found = list(lanes.Lane(work, [tiny(models)]).score(units[0]))
    assert len(found) == len(units[0].clips) and set(passes) == {1}


def test_vectors_are_made_in_smaller_batches_where_memory_is_short() -> None:
    graphed = inference.Graphed()
    tried: list[int] = []

    def run(some: torch.Tensor) -> torch.Tensor:
        tried.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("tried to allocate a lot")
        return some.float().flatten(1)[:, :3]

    clips = torch.arange(9 * 12, dtype=torch.uint8).reshape(9, 1, 2, 2, 3)
    found = inference.in_batches(run, clips, 8, "cpu", 3, "some model", graphed)
    assert torch.equal(found, clips.flatten(1)[:, :3].float())
    assert tried == [8, 4, 2, 2, 2, 2, 2] and graphed.most == 2
    with pytest.raises(torch.OutOfMemoryError):
        inference.in_batches(lambda some: run(some.repeat(3, 1, 1, 1, 1)), clips, 1, "cpu", 3, "m", graphed)


def test_a_clip_whose_vector_is_not_finite_fails_alone(
    units: list[Unit], work: Scoring, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = tiny(models)
    original, seen = VideoMAE._run, []

    def broken(self: VideoMAE, prepared: torch.Tensor) -> torch.Tensor:
        seen.append(prepared)
        vectors = original(self, prepared)
        second = len(seen) > 1 and torch.equal(prepared, seen[1])
        return vectors * float("nan") if second else vectors

    monkeypatch.setattr(VideoMAE, "_run", broken)
    unit = max(units, key=lambda u: len(u.clips))
    found = list(lanes.Lane(work, [embedder]).score(unit))
    failed = [one for one in found if one.decision == "failed"]
    assert len(failed) == 1 and failed[0].reason == "videomae embedding not finite" and not failed[0].hands
    assert all("videomae" in one.vectors for one in found if one.decision == "kept")


def test_weights_that_give_nothing_finite_end_the_run(
    units: list[Unit], work: Scoring, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VideoMAE, "_run", lambda self, prepared: torch.full((len(prepared), 32), torch.nan))
    lane = lanes.Lane(work, [tiny(models)])
    with pytest.raises(UserError, match="not finite for every clip"):
        list(lane.score(units[0]))
    with pytest.raises(UserError, match="not finite for every clip"):
        list(lane.score(units[1]))


def test_a_thread_that_ends_ends_every_unit_of_the_process(
    units: list[Unit], work: Scoring, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> Any:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(lanes, "score_clips", bug)
    lane = lanes.Lane(work, [tiny(models)])
    for unit in units[:2]:
        with pytest.raises(Broken):
            list(lane.score(unit))


def test_a_stream_that_breaks_off_still_gives_what_came_before(
    units: list[Unit], work: Scoring, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = decode.read_clips

    def cut(*args: Any, **options: Any) -> Any:
        for n, found in enumerate(original(*args, **options)):
            if n == 2:
                raise VideoError("a.mp4", "cut", "fetch it again", "truncated")
            yield found

    monkeypatch.setattr(lanes.decode, "read_clips", cut)
    unit = max(units, key=lambda u: len(u.clips))
    found = []
    with pytest.raises(VideoError, match="cut"):
        for one in lanes.Lane(work, [tiny(models)]).score(unit):
            found.append(one)
    assert [one.decision for one in found] == ["kept", "kept"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_frames_stay_on_the_gpu(units: list[Unit], work: Scoring, models: dict[str, Path]) -> None:
    from tests.transfers import device_to_host

    embedder = VideoMAE.load(config.VideoMAE(weights=str(models["videomae"])), "cuda:0", 0)
    lane = lanes.Lane(dataclasses.replace(work, device="cuda:0"), [embedder])
    list(lane.score(units[0]))  # first calls set things up
    with device_to_host() as moved:
        found = list(lane.score(units[1]))
    rows_of_a_clip = 36 * 2 * 21 * 6 * 4 + 4096  # landmarks of two hands in every frame, and the rest
    assert moved.bytes / len(found) <= rows_of_a_clip
