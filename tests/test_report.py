"""The report on real run directories: its numbers are the tables' numbers, its pictures the clips'."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.report import Funnel, charts, funnel, html, reason_group, thumbnails, write_report
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir
from ego2robot.types import FrameSpec, clip_id, short_id
from tests.footage import frame_number, write_video

FPS, SAMPLE_FPS, CLIP_FRAMES = 30, 6.0, 12
SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"
VOID = {"meta", "link", "input", "br", "img", "hr"}
MINIMAL = ["embed.videomae.weights=none", "embed.clip.weights=none"]


# -- a run directory, made of real videos and real commits -----------------------------------------


def hand_shape(x: float, y: float, size: float) -> np.ndarray:
    """float64 [21, 3] like an open right hand, wrist at (x, y), shares of the frame."""
    points = np.zeros((21, 3))
    for finger in range(5):
        angle = np.pi * (0.82 - 0.16 * finger)
        for joint in range(4):
            reach = size * (0.45 + 0.2 * joint)
            points[1 + 4 * finger + joint, :2] = reach * np.cos(angle), -reach * np.sin(angle)
    points[:, :2] += x, y
    return points


def hand_row(key: str, frame: int, time_s: float, side: str, landmarks: np.ndarray) -> dict[str, Any]:
    xy = landmarks[:, :2]
    return {
        "clip_id": key,
        "frame": frame,
        "time_s": time_s,
        "side": side,
        "score": 0.97,
        "box": [*xy.min(0), *xy.max(0)],
        "landmarks": landmarks.reshape(-1).tolist(),
        "presence": 0.99,
        "world": (landmarks * 0.1).reshape(-1).tolist(),
    }


@dataclass
class Built:
    run: RunDir
    clips: list[dict[str, Any]] = field(default_factory=list)
    units: list[dict[str, Any]] = field(default_factory=list)

    def plan(
        self, path: Path, name: str, n_clips: int, width: int, height: int, frames: int
    ) -> dict[str, Any]:
        video_id = short_id(name)
        unit = {
            "unit_id": short_id("unit", name), "video_id": video_id, "name": name, "source": "folder",
            "path": str(path), "offset": 0, "size": path.stat().st_size, "whole_file": True,
            "width": width, "height": height, "rotation": 0, "fps": float(FPS), "duration_s": frames / FPS,
            "video_start_s": 0.0, "n_frames": frames, "codec": "h264", "pix_fmt": "yuv420p", "bit_depth": 8,
            "first": [CLIP_FRAMES * i for i in range(n_clips)], "length": [CLIP_FRAMES] * n_clips,
            "sample_fps": SAMPLE_FPS, "cost_s": 1.0, "meta": [("factory_id", "factory_001")],
        }  # fmt: skip
        self.units.append(unit)
        return unit

    def row(self, unit: dict[str, Any], first: int, **values: Any) -> dict[str, Any]:
        row = {
            "clip_id": clip_id(unit["video_id"], first, CLIP_FRAMES, SAMPLE_FPS),
            **{key: unit[key] for key in ("video_id", "source", "name", "width", "height", "codec", "fps")},
            "start_s": first / SAMPLE_FPS, "end_s": (first + CLIP_FRAMES) / SAMPLE_FPS,
            "n_frames": CLIP_FRAMES, "motion": 0.2, "residual_motion": 0.1,
            "camera_motion": 0.3, "camera_confidence": 0.8, "hand_visibility": 1.0, "decision": "kept",
            "reason": None, "label": None, "label_score": None, "labels": None, "meta": [],
            **values,
        }  # fmt: skip
        self.clips.append(row)
        return row

    def commit(
        self,
        rows: Sequence[dict[str, Any]] = (),
        hands: Sequence[dict[str, Any]] = (),
        quarantine: Sequence[dict[str, Any]] = (),
        more: dict[str, pa.Table] | None = None,
    ) -> None:
        units = [f"{len(self.units)}-{len(self.clips)}-{len(quarantine)}"]
        tables = {
            "clips": pa.Table.from_pylist(list(rows), schema=schema.CLIPS),
            "hands": pa.Table.from_pylist(list(hands), schema=schema.HANDS),
            "quarantine": pa.Table.from_pylist(list(quarantine), schema=schema.QUARANTINE),
        }
        self.run.commit(units, {**tables, **(more or {})})

    def write_plan(self) -> None:
        atomic.write_parquet(
            self.run.path / "plan" / "units.parquet", pa.Table.from_pylist(self.units, schema=schema.UNITS)
        )


def start(path: Path, *overrides: str) -> Built:
    settings = ["clips.duration_s=2", "clips.stride_s=2", *(overrides or MINIMAL)]
    cfg = config.load("folder", settings)
    return Built(RunDir.create_or_resume(path, cfg, {"rows_version": 1, "made_with": {"numpy": "2"}}))


SKILLS = ("reach & grasp", "turn <left>", "carry")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Two videos, 20 clips: 9 kept, 4 dropped for motion, 3 for hands, 3 failed, 1 not done yet."""
    folder = tmp_path_factory.mktemp("report")
    name = "<script>alert(1)</script>.mp4"
    wide = write_video(folder / "wide.mp4", 20 * FPS, 320, 180, FPS)
    tall = write_video(folder / "tall.mp4", 20 * FPS, 180, 320, FPS)
    built = start(
        folder / "run", "embed.videomae.weights=random", "embed.clip.weights=none",
        'labels.prompts=["<b>pick</b> it up", "put it down"]', "gate.min_motion={quantile: 0.3}",
    )  # fmt: skip
    first = built.plan(wide, name, 10, 320, 180, 20 * FPS)
    second = built.plan(tall, "tall.mp4", 10, 180, 320, 20 * FPS)
    built.write_plan()
    hands: list[dict[str, Any]] = []
    for unit in (first, second):
        for i in range(10):
            grid = CLIP_FRAMES * i
            if i in (0, 1):
                reason = "motion below 0.05"
                built.row(unit, grid, motion=0.01 + 0.01 * i, hand_visibility=None, decision="dropped",
                          reason=reason)  # fmt: skip
            elif i == 2 or (i == 3 and unit is first):
                built.row(unit, grid, motion=0.12, hand_visibility=0.25, decision="dropped",
                          reason="hand visibility below 0.3")  # fmt: skip
            elif i == 9 or (i == 8 and unit is second):
                reason = "the stream ends at 19.1 s" if i == 9 else "corrupt frames at 16.4 s"
                built.row(unit, grid, motion=None, hand_visibility=None, decision="failed", reason=reason)
            elif not (i == 7 and unit is second):
                row = built.row(unit, grid, motion=0.1 + 0.02 * i, hand_visibility=0.75,
                                label="<b>pick</b> it up", label_score=0.61)  # fmt: skip
                for frame, sides in ((2, ["left"]), (9, ["left", "right"])):
                    for n, side in enumerate(sides):
                        time_s = (grid + frame) / SAMPLE_FPS
                        shape = hand_shape(0.4 + 0.2 * n, 0.7, 0.2)
                        hands.append(hand_row(row["clip_id"], frame, time_s, side, shape))
    kept = [row["clip_id"] for row in built.clips if row["decision"] == "kept"]
    vectors = pa.Table.from_arrays(
        [pa.array(kept), pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * len(kept), np.float16)), 4)],
        schema=schema.embedding(4, "videomae", "random", True),
    )
    refused = {"unit_id": None, "video_id": None, "stage": "plan", "attempts": 1}
    rows = [
        {**refused, "name": f"bad {i}.mp4", "error_class": "truncated", "message": "moov & more is missing"}
        for i in range(250)
    ]
    built.commit(built.clips, hands, rows, {"embeddings/videomae": vectors})
    atomic.write_json(built.run.path / "plan" / "gate.json", {"min_motion": 0.05, "min_hand_visibility": 0.3})
    write_skills(built, kept)
    metrics = {"decode": 3.0, "<i>motion": 0.5, "hands": 1.5}
    for clips, elapsed, event in ((4, 2.0, "progress"), (8, 4.0, "stopped"), (5, 5.0, "progress"),
                                  (11, 6.0, "stopped"), (11, 6.0, "done")):  # fmt: skip
        built.run.add_metrics(
            {"event": event, "clips": clips, "kept": 3, "video_s": 2.0 * clips, "elapsed_s": elapsed,
             "stage_seconds": metrics, "rss_bytes": 1_500_000_000}
        )  # fmt: skip
    atomic.write_json(
        built.run.path / "dataset" / "meta" / "info.json",
        {"codebase_version": "v3.0", "total_episodes": 9, "total_frames": 108, "total_tasks": 1, "fps": 6},
    )
    return built


def write_skills(built: Built, kept: Sequence[str]) -> None:
    folder = built.run.path / "skills"
    n = len(kept)
    skill = np.arange(n) % 3
    angle = 2 * np.pi * skill / 3
    x = np.cos(angle) + 0.05 * np.arange(n)
    assignment = pa.table(
        {
            "clip_id": list(kept), "skill": pa.array(skill, pa.int32()), "distance": np.zeros(n, np.float32),
            "tsne_x": pa.array(x, pa.float32()), "tsne_y": pa.array(np.sin(angle), pa.float32()),
            "umap_x": pa.array(x, pa.float32()), "umap_y": pa.array([None] + [1.0] * (n - 1), pa.float32()),
        }
    )  # fmt: skip
    atomic.write_parquet(folder / "assignment.parquet", assignment)
    atomic.write_parquet(
        folder / "table.parquet",
        pa.table({"label": ["<b>pick</b> it up"] * 3, "skill": [0, 1, 2], "n": [3, 3, 3],
                  "share_of_label": [1 / 3] * 3, "share_of_skill": [1.0] * 3}),
    )  # fmt: skip
    atomic.write_json(
        folder / "skills.json",
        {
            "embedding": "videomae", "weights": "random", "random": True, "k": 3, "requested_k": 10,
            "n_clips": n, "silhouette": 0.4321, "stability": None, "imbalance": 1.0,
            "projections": ["tsne", "umap"], "warnings": ["only 9 clips <i>were</i> kept"],
            "skills": [
                {"skill": i, "name": SKILLS[i], "n": 3, "share": 1 / 3, "label": "<b>pick</b> it up",
                 "label_share": 1.0, "medoid": kept[i], "examples": [kept[i + 3], kept[i + 6]]}
                for i in range(3)
            ],
        },
    )  # fmt: skip


# -- reading a page back ---------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags nest, and keeps what a test wants to see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.by_id: dict[str, list[str]] = {}
        self.symbols: dict[str, dict[str, Any]] = {}
        self.scripts: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "symbol":
            self.symbols[str(found["id"])] = {"box": found["viewbox"], "image": None, "hands": []}
        symbol = self.inside("symbol")
        if symbol and tag == "image":
            self.symbols[symbol]["image"] = found["href"]
        if symbol and tag == "path" and found.get("class") == "bone":
            side = next(a["class"] for t, a in reversed(self.open) if t == "g")
            self.symbols[symbol]["hands"].append((side, found["d"]))
        if tag not in VOID:
            self.open.append((tag, found))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1][0] != "style":
            self.words.append(data)
            for _, attributes in self.open:
                if attributes.get("id"):
                    self.by_id.setdefault(str(attributes["id"]), []).append(data)

    def inside(self, tag: str) -> str | None:
        return next((str(a["id"]) for t, a in reversed(self.open) if t == tag), None)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, name: str) -> str:
        return " ".join(" ".join(self.by_id.get(name, [])).split())

    def picture(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3] of a symbol's picture."""
        data = str(self.symbols[name]["image"]).removeprefix("data:image/webp;base64,")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def card(self, kind: str, i: int) -> str:
        """The symbol that the i-th card of a contact sheet uses."""
        section = re.search(rf'id="{kind}">(.*?)<div class="subhead">|id="{kind}">(.*)', self.source, re.S)
        assert section
        return re.findall(r'<use href="#(t\d+)"', section[0])[i]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(full: Built) -> Page:
    return read(write_report(full.run))


# -- numbers ---------------------------------------------------------------------------------------


def test_the_funnel_counts_every_clip_once_with_its_reason(full: Built) -> None:
    assert funnel(full.run) == Funnel(
        planned=20,
        kept=9,
        dropped={"motion below 0.05": 4, "hand visibility below 0.3": 3},
        failed={"the stream ends": 2, "corrupt frames": 1},
    )
    counts = funnel(full.run)
    assert (counts.scored, counts.n_dropped, counts.n_failed, counts.pending) == (16, 7, 3, 1)


@pytest.mark.parametrize(
    ("decision", "reason", "group"),
    [
        ("failed", "the stream ends at 52.1 s", "the stream ends"),
        ("failed", "corrupt frames at 12.3 s", "corrupt frames"),
        ("failed", "frame 7 of 36 is 0.25 s late", "frame … of … is … s late"),
        ("failed", "h264 decoder gone", "h264 decoder gone"),
        ("failed", None, "no reason given"),
        ("dropped", "motion below 0.1", "motion below 0.1"),
    ],
)
def test_failed_reasons_are_counted_without_their_numbers(
    decision: str, reason: str | None, group: str
) -> None:
    assert reason_group(decision, reason) == group


def test_numbers_on_the_page_are_those_of_the_tables(page: Page) -> None:
    assert [page.of(f"n-{key}") for key in ("videos", "planned", "kept", "dropped", "failed")] == [
        "2", "20", "9", "7", "3",
    ]  # fmt: skip
    assert "20 planned = 9 kept + 7 dropped + 3 failed + 1 to do" in page.text
    for lost in (
        "4 motion below 0.05",
        "3 hand visibility below 0.3",
        "2 the stream ends",
        "1 corrupt frames",
    ):
        assert lost in page.of("funnel")
    assert "9 episodes, 108 frames at 6 fps" in page.of("export")
    assert "Silhouette 0.432" in page.of("skills") and "Seed stability –" in page.of("skills")
    assert "3 clusters (10 asked for) of 9 kept clips, on videomae (random weights)" in page.of("skills")


def test_histograms_count_the_scores_and_draw_the_thresholds_in_force(full: Built, page: Page) -> None:
    scores = page.of("scores")
    bars = re.findall(r"(kept|dropped: \w+): (\d+) clips, ([\d.]+)–([\d.]+)", scores)
    total = sum(int(n) for _, n, _, _ in bars)
    # Every judged clip has three scores of motion; those dropped for motion were not looked at for hands.
    assert total == 3 * 16 + 12
    assert "4 clips were not looked at" in scores
    assert ("dropped: hands", "3", "0.25", "0.5") in bars  # 12 frames, every third: quarters
    assert ("kept", "9", "0.75", "1") in bars
    assert "≥ 0.05 kept" in scores and "≥ 0.3 kept" in scores
    assert "0.05 (quantile 0.3 of this run's clips)" in scores
    counts = np.cumsum([int(n) for _, n, _, _ in bars])
    for kind, n, low, high in bars[: int(np.searchsorted(counts, 16)) + 1]:
        if high not in ("0.5", "1"):
            inside = [r for r in full.clips if r["motion"] and float(low) <= r["motion"] + 1e-6 < float(high)]
            want = {"kept": "kept", "dropped: motion": "dropped", "dropped: hands": "dropped"}[kind]
            assert int(n) <= len([row for row in inside if row["decision"] == want])


def test_rates_add_up_over_the_starts_of_a_run(page: Page) -> None:
    # Two starts: 8 clips in 4 s, then 11 in 6 s; the stage seconds of both.
    assert "10.0 s wall time 1.90 clips/s" in page.text
    assert "in 2 starts" in page.text
    assert "decode 6.0 s · 60 %" in page.of("speed")
    assert "1.50 GB at most" in page.of("speed")


def test_the_highest_memory_is_the_highest_measured() -> None:
    """However short the peak, and however coarse the line that is drawn."""
    lines = [
        {"elapsed_s": 2.0 * i, "clips": i, "rss_bytes": 9e9 if i == 501 else 1e9} for i in range(1, 1000)
    ]
    work = html.Work.read(lines)
    assert work.peak_rss == 9e9 and len(work.rss) < 100
    assert "9.00 GB at most" in html.work_charts(work)[1][1]


def test_a_start_that_was_killed_is_a_start_of_its_own() -> None:
    lines = [
        {"event": "progress", "elapsed_s": 2.0, "clips": 2},
        {"event": "progress", "elapsed_s": 9.0, "clips": 7},
        {"event": "progress", "elapsed_s": 2.0, "clips": 1},
        {"event": "plan", "seconds": 3},
        {"event": "stopped", "elapsed_s": 4.0, "clips": 6},
    ]
    work = html.Work.read(lines)
    assert (work.starts, work.wall_s, work.clips) == (2, 13.0, 13)
    assert work.began is None and work.stages == {} and len(work.rss) == 0


# -- what it must say ------------------------------------------------------------------------------


def test_the_banner_names_what_was_random_missing_or_wrong(page: Page) -> None:
    for words in (
        "videomae: random weights.",
        "Skills are random.",
        "CLIP was switched off.",
        "The run is not finished. 1 of 20 planned clips",
        "Some clips failed. 3 of 20",
        "Some input was refused. 250 rows",
        "only 9 clips <i>were</i> kept",
    ):
        assert words in page.text, words


def test_random_is_said_wherever_its_output_is_shown(page: Page) -> None:
    section = re.search(r'id="kept">(.*?)<div class="subhead">', page.source, re.S)
    assert section and section[1].count("(random)</div>") == 9
    for words in ("t-SNE (random)", "UMAP (random)", "Skill (random)", "Coarse label × skill (random)"):
        assert words in page.of("skills"), words


def test_random_labels_are_called_random(tmp_path: Path) -> None:
    built = start(tmp_path / "run", "embed.videomae.weights=none", "embed.clip.weights=random")
    path = write_video(tmp_path / "a.mp4", 3 * FPS)
    row = built.row(built.plan(path, "a.mp4", 1, 320, 180, 3 * FPS), 0, label="pick", label_score=0.5)
    built.write_plan()
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4, np.float16)), 4)
    random = schema.embedding(4, "clip", "random", True)
    built.commit(
        [row], more={"embeddings/clip": pa.table([pa.array([row["clip_id"]]), vector], schema=random)}
    )
    page = read(write_report(built.run))
    assert "pick 50 % (random)" in page.text
    assert "clip: random weights. As asked for; its embeddings mean nothing. The labels" in page.text


def test_the_quarantine_is_listed_up_to_a_limit_and_counted(page: Page) -> None:
    listed = page.of("quarantine")
    assert "bad 199.mp4" in listed and "bad 200.mp4" not in listed
    assert "250 in quarantine: 250 truncated" in page.text and "200 of 250 rows" in page.text


# -- safety ----------------------------------------------------------------------------------------


def test_text_from_files_is_shown_and_never_run(page: Page) -> None:
    assert "<script>alert(1)</script>.mp4" in page.text
    assert "<b>pick</b> it up" in page.text and "turn <left>" in page.text
    assert "moov & more is missing" in page.text
    assert "<i>motion 1.0 s" in page.of("speed")
    assert len(page.scripts) == 1 and "alert(1)" not in page.scripts[0]
    assert not any(key.startswith("on") for _, key, _ in page.attributes)


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    for tag, key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value is not None
            assert value.startswith(("#", "data:image/webp;base64,")), (tag, key, value[:80])
    assert not re.search(r"url\(|@import", page.source)
    assert "http://" not in page.source and "https://" not in page.source


def test_the_policy_in_the_page_allows_its_own_script_and_no_other(page: Page) -> None:
    policy = next(
        v for t, k, v in page.attributes if t == "meta" and k == "content" and "default-src" in str(v)
    )
    assert "default-src 'none'" in str(policy)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in str(policy)


# -- pictures --------------------------------------------------------------------------------------


def chosen(full: Built, page: Page, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The symbol and the row of each card, told by video and span."""
    section = re.search(rf'id="{kind}">(.*?)<div class="subhead">', page.source, re.S)
    assert section
    found = []
    pattern = r'aria-label="([^"]*), ([^",]*)"><use href="#(t\d+)"'
    for name, span, symbol in re.findall(pattern, section[1]):
        row = next(
            row
            for row in full.clips
            if charts.escape(row["name"]) == name
            and span == f"{html.clock(row['start_s'])} – {html.clock(row['end_s'])}"
        )
        found.append((symbol, row))
    return found


def test_pictures_show_the_frame_that_they_claim(full: Built, page: Page) -> None:
    kept, dropped = chosen(full, page, "kept"), chosen(full, page, "dropped")
    assert len(kept) == 9 and len(dropped) == 7
    for symbol, row in kept + dropped:
        # Kept: sampled frame 9, where both hands are; dropped: the middle one, 6.
        index = 9 if row["decision"] == "kept" else 6
        due = round((row["start_s"] + index / SAMPLE_FPS) * FPS)
        assert frame_number(page.picture(symbol)) == due


def test_pictures_of_upright_video_have_no_bars(full: Built, page: Page) -> None:
    symbol, _ = next(pair for pair in chosen(full, page, "kept") if pair[1]["name"] == "tall.mp4")
    height, width = page.picture(symbol).shape[:2]
    assert height / width == pytest.approx(320 / 180, rel=0.03)


def test_landmarks_lie_where_they_were_found(full: Built, page: Page) -> None:
    for symbol, row in chosen(full, page, "kept"):
        height, width = page.picture(symbol).shape[:2]
        # Landmarks are shares of the 640 × 360 frame, bars included; the picture is what is inside.
        top, left, h, w = FrameSpec().content(row["width"], row["height"])
        hands = page.symbols[symbol]["hands"]
        assert [side for side, _ in hands] == ["hand left", "hand right"]
        for n, (_, path) in enumerate(hands):
            first = [float(v) for v in re.findall(r"-?[\d.]+", path)[:2]]
            wrist = ((0.4 + 0.2 * n) * 640 - left) / w * width, (0.7 * 360 - top) / h * height
            assert first == pytest.approx(wrist, abs=0.06)
    for symbol, _ in chosen(full, page, "dropped"):
        assert page.symbols[symbol]["hands"] == []


def test_bones_join_neighbouring_landmarks_of_one_hand() -> None:
    joined = {joint for bone in charts.BONES for joint in bone}
    assert joined == set(range(21)) and len(charts.BONES) == 21
    tips = [4, 8, 12, 16, 20]
    assert all(sum(tip in bone for bone in charts.BONES) == 1 for tip in tips)


def test_a_placeholder_shows_its_reason_as_text() -> None:
    drawn = Page(html.picture("t0", thumbnails.Thumbnail(384, 216, None, "<b>no</b> stream & no frames")))
    assert "<b>no</b> stream & no frames" in drawn.text and drawn.symbols["t0"]["image"] is None


def test_both_projections_are_drawn_and_points_lead_to_pictures(page: Page) -> None:
    assert "t-SNE of 9 kept clips" in page.source
    assert "UMAP of 8 kept clips" in page.source  # one clip has no place in it
    targets = [value for tag, key, value in page.attributes if tag == "circle" and key == "data-t"]
    assert len(targets) == 9 + 8 and set(targets) <= set(page.symbols)


def test_a_source_that_is_gone_or_changed_leaves_a_note_in_its_place(tmp_path: Path) -> None:
    built = start(tmp_path / "run")
    for name in ("gone.mp4", "changed.mp4", "cut.mp4"):
        path = write_video(tmp_path / name, 3 * FPS)
        built.commit([built.row(built.plan(path, name, 1, 320, 180, 3 * FPS), 0)])
    built.write_plan()
    (tmp_path / "gone.mp4").unlink()
    (tmp_path / "changed.mp4").write_bytes(b"other bytes")
    (tmp_path / "cut.mp4").write_bytes(b"\0" * (tmp_path / "cut.mp4").stat().st_size)
    page = read(write_report(built.run))
    assert "source video not readable now" in page.text
    assert "source video changed since the run" in page.text
    assert "3 of 3 pictures are missing" in page.text
    assert all(symbol["image"] is None for symbol in page.symbols.values())


# -- edges -----------------------------------------------------------------------------------------


def test_a_run_in_which_nothing_happened_has_a_page(tmp_path: Path) -> None:
    page = read(write_report(start(tmp_path / "run").run, tmp_path / "elsewhere.html"))
    assert "Nothing was planned" in page.text and "No skills yet" in page.text
    assert page.of("n-planned") == "0"
    assert not (tmp_path / "run" / "report.html").exists()


NO_SKILLS = {"embedding": None, "weights": None, "random": False, "k": 0, "requested_k": 10, "n_clips": 0,
             "silhouette": None, "stability": None, "imbalance": None, "projections": [],
             "warnings": ["nothing to cluster"], "skills": []}  # fmt: skip


def test_a_run_that_kept_nothing_says_so(tmp_path: Path) -> None:
    built = start(tmp_path / "run")
    path = write_video(tmp_path / "still.mp4", 3 * FPS)
    unit = built.plan(path, "still.mp4", 1, 320, 180, 3 * FPS)
    built.write_plan()
    reason = "motion below 0.1"
    built.commit([built.row(unit, 0, motion=0.0, hand_visibility=None, decision="dropped", reason=reason)])
    atomic.write_json(built.run.path / "skills" / "skills.json", NO_SKILLS)
    page = read(write_report(built.run))
    assert "No clip was kept" in page.text and "nothing to cluster" in page.text
    assert "There was nothing to cluster" in page.text
    assert frame_number(page.picture(page.card("dropped", 0))) == FPS


@pytest.mark.parametrize("clustered", [False, True])
def test_kept_clips_are_shown_where_there_are_no_skills(clustered: bool, tmp_path: Path) -> None:
    built = start(tmp_path / "run")
    path = write_video(tmp_path / "a.mp4", 5 * FPS)
    unit = built.plan(path, "a.mp4", 2, 320, 180, 5 * FPS)
    built.write_plan()
    built.commit([built.row(unit, 0), built.row(unit, CLIP_FRAMES)])
    if clustered:  # without embeddings
        atomic.write_json(built.run.path / "skills" / "skills.json", NO_SKILLS)
    page = read(write_report(built.run))
    assert "2 of 2" in page.text
    assert ("nothing to cluster" if clustered else "No skills yet") in page.text
    # Nobody found a hand in them: the middle frame, without landmarks.
    assert {frame_number(page.picture(page.card("kept", i))) for i in (0, 1)} == {FPS, 3 * FPS}


def test_the_same_run_gives_the_same_page(full: Built, tmp_path: Path) -> None:
    pages = [write_report(full.run, tmp_path / f"{i}.html").read_text(encoding="utf-8") for i in (0, 1)]
    strip = [re.sub(r"Written [^·]*·", "", text) for text in pages]
    assert strip[0] == strip[1]


def test_a_large_run_gives_a_small_page(tmp_path: Path) -> None:
    """120,000 clips in ten commits, most of their sources gone."""
    built = start(tmp_path / "run")
    path = write_video(tmp_path / "a.mp4", 3 * FPS)
    unit = built.plan(path, "a.mp4", 1, 320, 180, 3 * FPS)
    built.units[0]["first"] = [0] * 120_000
    built.units[0]["length"] = [CLIP_FRAMES] * 120_000
    built.write_plan()
    random = np.random.default_rng(0)
    template = built.row(unit, 0)
    ids = []
    for part in range(10):
        n = 12_000
        keys = [f"{value:016x}" for value in random.integers(0, 2**63, n)]
        motion = random.random(n).astype(np.float32)
        kept = motion >= 0.1
        columns = {name: pa.array([template[name]] * n, schema.CLIPS.field(name).type) for name in template}
        columns |= {
            "clip_id": pa.array(keys), "motion": pa.array(motion),
            "decision": pa.array(np.where(kept, "kept", "dropped")),
            "reason": pa.array(np.where(kept, "", "motion below 0.1"), mask=kept),
        }  # fmt: skip
        table = pa.table([columns[name] for name in schema.CLIPS.names], schema=schema.CLIPS)
        built.run.commit([f"part {part}"], {"clips": table})
        ids += [key for key, good in zip(keys, kept, strict=True) if good]
    skill = np.arange(len(ids)) % 50
    xy = random.random((4, len(ids))).astype(np.float32)
    axes = dict(zip(("tsne_x", "tsne_y", "umap_x", "umap_y"), xy, strict=True))
    atomic.write_parquet(
        built.run.path / "skills" / "assignment.parquet",
        pa.table({"clip_id": ids, "skill": pa.array(skill, pa.int32()), "distance": xy[0], **axes}),
    )
    skills = [{"skill": i, "name": f"skill {i}", "n": int((skill == i).sum()), "share": 0.02, "label": None,
               "label_share": None, "medoid": ids[i], "examples": ids[i + 50 : i + 350 : 50]}
              for i in range(50)]  # fmt: skip
    about = {
        "embedding": "hand_motion", "weights": "none needed", "random": False, "k": 50, "requested_k": 50,
        "n_clips": len(ids), "projections": ["tsne", "umap"], "warnings": [], "skills": skills,
    }  # fmt: skip
    atomic.write_json(built.run.path / "skills" / "skills.json", about)
    report = write_report(built.run)
    assert report.stat().st_size < 10_000_000
    page = read(report)
    assert page.of("n-kept") == f"{len(ids):,}"
    assert len(page.symbols) <= html.N_KEPT + html.N_DROPPED + html.N_SKILL_PICTURES
    drawn = [int(n) for n in re.findall(r"(?:t-SNE|UMAP) of (\d+) kept clips", page.source)]
    assert len(drawn) == 2 and all(html.N_POINTS <= n <= html.N_POINTS + 160 for n in drawn)


def test_damage_is_one_line_that_names_the_file(full: Built, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(full.run.path, copy)
    part = next((copy / "clips").glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{part.name}: damaged") as caught:
        write_report(RunDir.open(copy))
    assert "\n" not in str(caught.value)
    part.unlink()
    with pytest.raises(UserError, match=f"{part.name}: missing"):
        funnel(RunDir.open(copy))


def test_progress_reaches_the_number_of_pictures(full: Built, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_report(full.run, tmp_path / "page.html", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (16, 16) and seen == sorted(seen)


def test_real_footage_gives_real_pictures(tmp_path: Path) -> None:
    video = SAMPLES / "two_hands_mixer_20s.mp4"
    if not video.is_file():
        pytest.skip("../shared/samples is not there")
    built = start(tmp_path / "run")
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        size = stream.width, stream.height
        truth = next(frame for frame in container.decode(stream) if frame.time >= 3.0 - 1e-6)
    unit = built.plan(video, video.name, 1, *size, 203)
    built.units[0]["fps"], built.units[0]["first"] = 10.0, [CLIP_FRAMES]
    built.write_plan()
    built.commit([built.row(unit, CLIP_FRAMES)])
    page = read(write_report(built.run))
    picture = page.picture(page.card("kept", 0)).astype(np.float64)
    height, width = picture.shape[:2]
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
    wanted = truth.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
    assert 10 * np.log10(255**2 / np.mean((picture - wanted) ** 2)) > 28


def test_the_parquet_of_a_plan_without_clips_is_fine(tmp_path: Path) -> None:
    built = start(tmp_path / "run")
    built.write_plan()
    assert pq.read_table(built.run.path / "plan" / "units.parquet").num_rows == 0
    assert funnel(built.run) == Funnel(0, 0, {}, {})
    assert json.dumps(read(write_report(built.run)).of("n-videos")) == '"0"'
