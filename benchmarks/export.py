"""How fast are kept clips written as a LeRobot dataset, by one process, by two, and by lerobot's own writer?

Three parts. The same clips exported from 1080p video by one and by two processes, by turns, bytes compared.
The same episodes out of memory written by us and, where LEROBOT_PYTHON names a Python with lerobot 0.4.4, by
its ``add_frame`` and ``save_episode``, by turns: both encode libsvtav1, yuv420p, every 2nd frame a keyframe,
crf 30 (ours one thread a process; theirs its default threads), or x264; both make statistics. Of ``ordinary``
footage, whose frames take as many bytes as those of hands at work (2 to 11 kB of AV1, 2 to 17 of H.264), and
of ``dense`` footage, whose grain keeps an encoder so long that the rest of the work hardly counts.
10,000 short episodes: how many files, and the most memory of all processes together.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow as pa
import torch
from common import RESULTS, machine, write_result

from ego2robot import config, decode
from ego2robot.export import lerobot, lerobot_unit
from ego2robot.export.footage import Begun, Footage
from ego2robot.export.staging import Item, Task
from ego2robot.jobs.cutting import clips_of, units_of
from ego2robot.sources import SOURCES, Source
from ego2robot.sources.base import identity
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_table
from ego2robot.types import Blob, Clip, ClipFrames, Trajectory, Unit, Video, VideoInfo, clip_id, short_id

FPS = 6
DENSE, ORDINARY = 24, 10
PACKAGES = ("av", "numpy", "pyarrow", "torch")


# -- runs to export -------------------------------------------------------------------------------


def scene(index: int, width: int, height: int, grain: float = DENSE) -> np.ndarray:
    """uint8 RGB: a textured scene that pans, with blobs that move over it.

    Args:
        grain: of the texture, in grey levels.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x = x - 2.5 * index
    waves = sum(np.sin(x / a + y / b) for a, b in ((37, 51), (11, -23), (5, 7)))
    texture = ((np.sin(x * 12.9898 + y * 78.233) * 43758.5453) % 1) * grain
    picture = np.stack([118 + 28 * waves * k + texture for k in (1.0, 0.8, 0.6)], -1)
    for i in range(2):
        cx, cy = (
            width * (0.35 + 0.3 * i + 0.08 * np.sin(index / 9 + i)),
            height * (0.6 + 0.1 * np.cos(index / 7)),
        )
        near = ((x + 2.5 * index - cx) ** 2 + (y - cy) ** 2) < (height / 7) ** 2
        picture[near] = picture[near] * 0.3 + np.array([150, 105, 85])
    return picture.clip(0, 255).astype(np.uint8)


def film(path: Path, seconds: float, start: int) -> None:
    """1080p30 H.264; drawn at a quarter of the size, for speed."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 30, 0
        for k in range(round(30 * seconds)):
            picture = av.VideoFrame.from_ndarray(scene(start + k, 480, 270), format="rgb24")
            frame = picture.reformat(1920, 1080, "yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base = k, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def hands_of(clip: Clip) -> list[dict[str, Any]]:
    """Both hands in every frame, drifting."""
    draw = np.random.default_rng(clip.first)
    found = []
    for side, x in (("left", 0.3), ("right", 0.6)):
        shape = draw.uniform(0, 0.1, (21, 3)).astype(np.float32)
        for frame in range(clip.n_frames):
            marks = shape + np.array([x + 0.002 * frame, 0.5 - 0.001 * frame, 0], np.float32)
            box = [*marks.min(0)[:2], *marks.max(0)[:2]]
            found.append(
                {
                    "clip_id": clip.clip_id, "frame": frame, "time_s": clip.start_s + frame / FPS,
                    "side": side, "score": 0.95, "presence": 0.99, "box": box, "landmarks": marks.ravel(),
                    "world": marks.ravel(),
                }
            )  # fmt: skip
    return found


def row_of(unit: Unit, clip: Clip) -> dict[str, Any]:
    info = unit.video.info
    assert info is not None
    return {
        "clip_id": clip.clip_id, "video_id": clip.video_id, "source": "folder", "name": unit.video.name,
        "start_s": clip.start_s, "end_s": clip.end_s, "n_frames": clip.n_frames, "fps": info.fps,
        "width": info.width, "height": info.height, "codec": info.codec, "motion": 0.2,
        "hand_visibility": 1.0, "decision": "kept", "meta": [("task", f"task {clip.first % 7}")],
    }  # fmt: skip


def make_run(folder: Path, units: list[Unit], tree: dict[str, Any], hands: bool = True) -> RunDir:
    """A run directory as curation leaves it: the plan and rows of kept clips."""
    run = RunDir.create_or_resume(folder, config.build(tree), {"weights": "none"})
    atomic.write_parquet(folder / "plan" / "units.parquet", units_table(units))
    for begin in range(0, len(units), 64):
        some = units[begin : begin + 64]
        tables = {
            "clips": pa.Table.from_pylist([row_of(u, c) for u in some for c in u.clips], schema=schema.CLIPS)
        }
        if hands:
            rows = [row for u in some for c in u.clips for row in hands_of(c)]
            tables["hands"] = pa.Table.from_pylist(rows, schema=schema.HANDS)
        run.commit([u.unit_id for u in some], tables)
    return run


def imagined(n_videos: int, clips_each: int, n_frames: int) -> list[Unit]:
    """Units of videos that are nowhere: their frames come out of memory."""
    info = VideoInfo(640, 360, 0, 30.0, clips_each * n_frames / FPS, 0.0, 1, "h264", "yuv420p", 8)
    found = []
    for i in range(n_videos):
        video_id = short_id("video", i)
        clips = tuple(
            Clip(
                clip_id(video_id, k * n_frames, n_frames, float(FPS)),
                video_id,
                k * n_frames,
                n_frames,
                float(FPS),
            )
            for k in range(clips_each)
        )
        video = Video(video_id, f"{i:05d}.mp4", "folder", Blob("nowhere.mp4", 0, 1), {}, info)
        found.append(Unit(short_id("unit", i), video, clips, 1.0))
    return found


class FromMemory(Footage):
    """Serves frames that lie in files of the page cache, in place of decoded ones."""

    folder = Path()

    def read(self, rows: Any, avoid: Any) -> Iterator[Any]:
        yield Begun(rows[0]["video_id"])
        paths = sorted(self.folder.glob("*.npy"))
        for row in rows:
            clip = self.clip(row)
            frames = np.load(paths[row["first"] // row["n_frames"] % len(paths)])
            times_s = clip.start_s + np.arange(clip.n_frames) / FPS
            yield row, ClipFrames(clip, torch.from_numpy(frames), times_s, (0, 0, *frames.shape[1:3]))


class Given(Source):
    """States and actions that lie beside the frames, as lerobot's writer is given them."""

    def __init__(self, path: Path) -> None:
        self._vectors = np.load(path)

    def candidates(self, path: str, skip: Path | None, options: Any = None) -> Iterator[Any]:
        yield from ()

    def trajectory(self, video: Video, times_s: np.ndarray, options: Any = None) -> Trajectory:
        state, action = (self._vectors[name][: len(times_s)] for name in ("state", "action"))
        names = [
            tuple(f"{name}_{i}" for i in range(v.shape[1]))
            for name, v in (("state", state), ("action", action))
        ]
        return Trajectory(state, action, *names, "none")


def given(order: lerobot_unit.Order) -> Callable[[Task], Iterator[Item]]:
    """The export's own worker, but for where frames, states and actions come from."""
    SOURCES["folder"] = Given(order.run.parent / "frames" / "vectors.npz")
    return from_memory(order)


def from_memory(order: lerobot_unit.Order) -> Callable[[Task], Iterator[Item]]:
    """The export's own worker, but for where frames come from."""
    FromMemory.folder = order.run.parent / "frames"
    lerobot_unit.Footage = FromMemory  # type: ignore[misc]
    return lerobot_unit.worker(order)


# -- the parts ------------------------------------------------------------------------------------


class Watch:
    """Wall and processor seconds, and the most memory, of this process and its children together.

    Args:
        memory: looking at it takes a tenth of a core.
    """

    def __init__(self, memory: bool = False) -> None:
        self._memory = memory

    def __enter__(self) -> Watch:
        self.began, self.peak, self.cpu, self._stop = time.perf_counter(), 0, 0.0, threading.Event()
        self._seen: dict[int, float] = {}
        self._before = self._own()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    @staticmethod
    def _own() -> float:
        times = psutil.Process().cpu_times()
        return times.user + times.system

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss if self._memory else 0
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                if process.pid != me.pid:
                    self._seen[process.pid] = times.user + times.system
            self.peak = max(self.peak, total)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self._stop.set()
        self._thread.join()
        self.cpu = self._own() - self._before + sum(self._seen.values())


def two_processes(scratch: Path, quick: bool) -> dict[str, Any]:
    """One child process against two, on clips of 1080p video, by turns."""
    tree = {"clips": {"duration_s": 6.0, "stride_s": 6.0, "sample_fps": float(FPS)}}
    n, seconds = (2, 12.0) if quick else (4, 36.0)
    units = []
    for i in range(n):
        path = scratch / f"{i}.mp4"
        film(path, seconds, 5000 * i)
        blob = Blob(str(path), 0, path.stat().st_size)
        info = decode.probe(path.name, blob)
        video = Video(identity(blob), path.name, "folder", blob, {}, info)
        units += units_of(video, clips_of(video.video_id, info, config.build(tree).clips))
    run = make_run(scratch / "run", units, tree)
    lerobot.worker = lerobot_unit.worker
    found: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    frames = 0
    for turn in range(1 if quick else 2):
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            out = scratch / f"out{workers}"
            with Watch() as watch:
                frames = lerobot.export_lerobot(run, out, None, workers=workers).frames
            found[workers].append(watch.seconds)
            cpu[workers].append(watch.cpu)
    differ = [p for p in files_of(scratch / "out1") if p not in files_of(scratch / "out2")]
    differ += [
        p for p, data in files_of(scratch / "out1").items() if files_of(scratch / "out2").get(p) != data
    ]
    best = {workers: min(times) for workers, times in found.items()}
    return {
        "what": f"{n} videos of {seconds:.0f} s, 1080p30 H.264, clips of 6 s at {FPS} frames/s, 360x640, av1",
        "frames": frames,
        "seconds": found,
        "cpu_s": cpu,
        "ratio": round(best[1] / best[2], 2),
        "files_that_differ": differ,
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def beside_lerobot(scratch: Path, quick: bool) -> dict[str, Any]:
    """The same episodes out of memory, by us and by lerobot's own writer, by turns, in both codecs."""
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        return {"skipped": "LEROBOT_PYTHON is not set; `make test-lerobot` makes .venv-lerobot"}
    found: dict[str, Any] = {
        "what": "episodes of 36 frames, 360x640; state [96] and action [4] are given; ours: two processes of "
        "one thread, their start counted; theirs: image_writer_threads=4, and as many threads as its "
        "encoder takes; both once by turns, av1 on ordinary footage twice"
    }
    for name, grain, n_episodes in (("ordinary", ORDINARY, 64), ("dense", DENSE, 24)):
        here = scratch / name
        here.mkdir()
        found[name] = _by_turns(here, grain, 8 if quick else n_episodes, python, quick or name == "dense")
    return found


def _by_turns(scratch: Path, grain: float, n_episodes: int, python: str, once: bool) -> dict[str, Any]:
    frames = scratch / "frames"
    frames.mkdir()
    for i in range(n_episodes):
        episode = np.stack([scene(900 * i + 5 * k, 640, 360, grain) for k in range(36)])
        np.save(frames / f"{i:03d}.npy", episode)
    run = make_run(scratch / "run", imagined(1, n_episodes, 36), {"clips": {"sample_fps": float(FPS)}}, False)
    rng = np.random.default_rng(0)
    sizes = {"state": 96, "action": 4}
    vectors = {name: rng.normal(size=(36, n)).astype(np.float32) for name, n in sizes.items()}
    np.savez(frames / "vectors.npz", **vectors)
    SOURCES["folder"] = Given(frames / "vectors.npz")
    lerobot.worker = given
    found: dict[str, Any] = {"episodes": n_episodes, "grain": grain}
    for codec in ("av1", "h264"):
        turns: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for turn in range(1 if once or codec == "h264" else 2):
            for who in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
                out = scratch / f"{codec}-{who}-{turn}"
                write = _ours if who == "ours" else _theirs
                turns[who].append(write(scratch, run, out, codec, python))
                video = sum(path.stat().st_size for path in (out / "videos").rglob("*.mp4"))
                turns[who][-1]["video_bytes_per_frame"] = round(video / turns[who][-1]["frames"])
                shutil.rmtree(out)
        rate = {who: max(t["frames"] / t["seconds"] for t in some) for who, some in turns.items()}
        cpu = {who: min(1000 * t["cpu_s"] / t["frames"] for t in some) for who, some in turns.items()}
        found[codec] = {
            **turns,
            "frames_per_s": {who: round(value, 1) for who, value in rate.items()},
            "ratio": round(rate["ours"] / rate["theirs"], 2),
            "cpu_ms_per_frame": {who: round(value, 1) for who, value in cpu.items()},
            "cpu_ratio": round(cpu["theirs"] / cpu["ours"], 2),
        }
    return found


def _ours(scratch: Path, run: RunDir, out: Path, codec: Any, python: str) -> dict[str, float]:
    with Watch() as watch:
        made = lerobot.export_lerobot(run, out, None, "native", codec, workers=2)
    return {"frames": made.frames, "seconds": watch.seconds, "cpu_s": watch.cpu}


def _theirs(scratch: Path, run: RunDir, out: Path, codec: Any, python: str) -> dict[str, float]:
    script = Path(__file__).with_name("lerobot_writer.py")
    name = {"av1": "libsvtav1", "h264": "h264"}[codec]
    done = subprocess.run(
        [python, script, scratch / "frames", out, "--fps", str(FPS), "--codec", name],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"lerobot's writer failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def many_episodes(scratch: Path, quick: bool) -> dict[str, Any]:
    """10,000 short episodes at a small picture: files and memory; a tenth of them beside it."""
    found = {}
    for n_videos in (10,) if quick else (10, 100):
        here = scratch / str(n_videos)
        (here / "frames").mkdir(parents=True)
        for i in range(4):
            np.save(here / "frames" / f"{i}.npy", np.stack([scene(50 * i + k, 96, 64) for k in range(8)]))
        frames = {"height": 64, "width": 96}
        tree = {"clips": {"sample_fps": float(FPS), "min_frames": 4}, "frames": frames}
        # In a process of its own: what making the rows takes is not the export's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_run, args=(here / "run", imagined(n_videos, 100, 8), tree)
        )
        maker.start()
        maker.join()
        run = RunDir.open(here / "run")
        lerobot.worker = from_memory
        with Watch(memory=True) as watch:
            made = lerobot.export_lerobot(run, here / "out", None, codec="h264", action="wrist", workers=2)
        paths = [p for p in (here / "out").rglob("*") if p.is_file()]
        found[f"{made.episodes} episodes"] = {
            "frames": made.frames,
            "seconds": round(watch.seconds, 1),
            "files": len(paths),
            "peak_MiB": round(watch.peak / 2**20),
            "dataset_MB": round(made.bytes / 1e6, 1),
        }
        shutil.rmtree(here)
    return {
        "what": "8 frames each, 64x96, h264, hands followed; two processes; memory: PSS of all together",
        **found,
    }


PARTS = {"two_processes": two_processes, "beside_lerobot": beside_lerobot, "many_episodes": many_episodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything; nothing is kept")
    parser.add_argument("--only", choices=PARTS, nargs="*", help="the others' figures of today stay")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name in args.only or PARTS:
        before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = PARTS[name](Path(scratch), args.quick)
        found[name]["commit"] = machine(())["commit"]
        found[name]["load"] = {"before": round(before, 1), "after": round(os.getloadavg()[0], 1)}
        print(name, json.dumps(found[name], indent=1), flush=True)
    if not args.quick:
        earlier = sorted(RESULTS.glob(f"{datetime.date.today().isoformat()}-*-export.json"))
        old = json.loads(earlier[-1].read_text()) if args.only and earlier else {}
        kept = {name: old[name] for name in PARTS if name in old and name not in found}
        print(write_result("export", __doc__, {**kept, **found}, PACKAGES))


if __name__ == "__main__":
    main()
