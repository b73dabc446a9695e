"""What does it cost to share a run among many workers, and does that grow with the run or the workers?

Five questions, a process each: planning as many videos as Egocentric-10K has (besides probing them);
`status` over a ledger of 1.2 million units; `verify` over as many clips, vectors and landmarks included;
claims and commits on this machine's file system; and the simulation of the real scheduling code
(jobs/simulate.py): 1 to 512 workers of unequal speed, unequal units.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import RESULTS, Part, run_part, write_result

from ego2robot import config
from ego2robot.jobs import plan as planning
from ego2robot.jobs.claims import Board, Presence, Terms
from ego2robot.jobs.cutting import clips_of, units_of
from ego2robot.jobs.simulate import fleet, heavy_tailed, simulate
from ego2robot.jobs.status import status
from ego2robot.jobs.verify import verify
from ego2robot.store import atomic, schema
from ego2robot.store.ledger import Ledger, Record
from ego2robot.store.rundir import RunDir
from ego2robot.store.shared import SharedFolder, SystemClock
from ego2robot.store.units import ROW_GROUP, VIDEOS
from ego2robot.types import Blob, Video, VideoInfo, clip_id, short_id

N_VIDEOS = 192_900  # of Egocentric-10K
UNITS = 1_200_000
UNITS_A_COMMIT = 51  # 512 clips of 10 a unit
UNIT_S = 10.0


class Hasty(SharedFolder):
    """Does not wait for the disk: for making what is measured, not for measuring."""

    def create(self, name: str, data: bytes, durable: bool = True) -> bool:
        return super().create(name, data, durable=False)


def peak_MiB() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def planning_part(quick: bool) -> dict[str, Any]:
    """Everything of a plan but listing and probing."""
    n = N_VIDEOS // (20 if quick else 1)
    before = peak_MiB()
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(180), 0.3, n), 20, 3000)
    problems: list[Any] = []
    clips = config.Clips()
    began = time.process_time()
    rows = planning._Rows(problems)
    for i, length in enumerate(lengths.tolist()):
        info = VideoInfo(1920, 1080, 0, 30.0, length, 0.0, round(30 * length), "hevc", "yuv420p", 8)
        blob = Blob(
            f"/data/factory_001/workers/worker_{i // 1000:03}/part{i // 60:05}.tar",
            i * 512,
            85_000_000,
            False,
        )
        meta = {"factory_id": "factory_001", "worker_id": f"worker_{i // 1000:03}", "video_index": str(i)}
        name = f"part{i // 60:05}.tar::{i:08}.mp4"
        video = Video(short_id("video", i), name, "egocentric10k", blob, meta, info)
        # Cut in this process; a run's probing children do it.
        rows.add(planning.Probed(video, tuple(units_of(video, clips_of(video.video_id, info, clips)))))
    table, added = planning._merged(None, rows.table(), problems)
    with tempfile.TemporaryDirectory() as folder:
        atomic.write_parquet(Path(folder) / "units.parquet", table, ROW_GROUP)
        stored = (Path(folder) / "units.parquet").stat().st_size
    return {
        "videos": added,
        "units": table.num_rows,
        "cpu_seconds": round(time.process_time() - began, 2),
        "peak_MiB": peak_MiB(),
        "peak_MiB_of_the_imports": before,
        "plan_MB": round(stored / 1e6, 1),
    }


def plan_table(n: int) -> pa.Table:
    """A plan of ``n`` units, made without an object each."""
    ids = np.char.mod("%016x", np.arange(n, dtype=np.uint64) * np.uint64(11400714819323198485))
    constant = {
        "name": "part.tar::x.mp4", "source": "e10k", "path": "/data/part.tar", "offset": 0, "size": 1,
        "whole_file": False, "width": 1920, "height": 1080, "rotation": 0, "fps": 30.0, "duration_s": 300.0,
        "video_start_s": 0.0, "n_frames": 9000, "codec": "hevc", "pix_fmt": "yuv420p", "bit_depth": 8,
        "sample_fps": 6.0,
    }  # fmt: skip
    lists = pa.array(np.arange(0, n + 1, dtype=np.int32))
    columns = {
        "unit_id": pa.array(ids),
        "video_id": pa.array(ids),
        "first": pa.ListArray.from_arrays(lists, pa.array(np.zeros(n, np.int64))),
        "length": pa.ListArray.from_arrays(lists, pa.array(np.full(n, 36, np.int32))),
        "cost_s": pa.array(np.full(n, UNIT_S)),
        "meta": pa.nulls(n, schema.META),
        "clip_meta": pa.nulls(n, schema.UNITS.field("clip_meta").type),
    }
    for name, value in constant.items():
        columns[name] = pa.repeat(pa.scalar(value, schema.UNITS.field(name).type), n)
    return pa.table([columns[name] for name in schema.UNITS.names], schema=schema.UNITS)


def status_part(quick: bool) -> dict[str, Any]:
    """`status` and a worker's start over ledgers of several sizes."""
    found = {}
    for n in (UNITS // 100,) if quick else (UNITS // 100, UNITS // 10, UNITS):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            cfg = config.load("folder", ["source.path=x"])
            run = RunDir.create_or_resume(path, cfg, {})
            table = plan_table(n)
            atomic.write_parquet(run.plan_path, table.replace_schema_metadata({VIDEOS: str(n)}), ROW_GROUP)
            ids = table["unit_id"].to_pylist()
            ledger = Ledger(Hasty(path / "ledger"))
            for i in range(0, n - n // 10, UNITS_A_COMMIT):
                units = tuple(ids[i : i + UNITS_A_COMMIT])
                files = {f"{t}/part-{ids[i]}.parquet": {"rows": 9, "sha256": 64 * "0"}
                         for t in ("clips", "hands", "embeddings/videomae", "embeddings/clip")}  # fmt: skip
                info = {"worker": "w", "counts": {"clips": {"kept": 3, "dropped": 48}}}
                ledger.append(Record(ids[i], units, files, info))
            times = []
            for _ in range(3):
                began = time.process_time()
                s = status(RunDir.open(path))
                times.append(time.process_time() - began)
            assert s.units_done == len(ledger.owner)
            found[str(n)] = {
                "commits": ledger.n,
                "ledger_files": sum(1 for _ in (path / "ledger").iterdir()),
                "status_cpu_seconds": round(statistics.median(times), 3),
            }
            del table, ids, ledger
    return {"by_units": found, "peak_MiB": peak_MiB()}


CLIPS_A_UNIT, KEPT_SHARE, HANDS_A_CLIP, DIM = 10, 0.1, 12, 768


def verify_part(quick: bool) -> dict[str, Any]:
    """`verify` over a run in which nothing is wrong, and over the same run with one damaged file."""
    n_clips = UNITS // (100 if quick else 1)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        run = RunDir.create_or_resume(path, config.load("folder", ["source.path=x"]), {})
        table = clips_plan(n_clips // CLIPS_A_UNIT)
        atomic.write_parquet(run.plan_path, table, ROW_GROUP)
        ledger = Ledger(Hasty(path / "ledger"))
        for at in range(0, table.num_rows, UNITS_A_COMMIT):
            some = table.slice(at, UNITS_A_COMMIT)
            units = tuple(some["unit_id"].to_pylist())
            files = {}
            for name, rows in rows_of_units(some, draw).items():
                relative = f"{name}/part-{units[0]}.parquet"
                (path / relative).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(rows, path / relative, compression="zstd")
                files[relative] = {"rows": rows.num_rows, "sha256": atomic.sha256(path / relative)}
            ledger.append(Record(units[0], units, files, {"worker": "w"}))
        stored = sum(f.stat().st_size for f in path.rglob("*.parquet"))
        began, wall = time.process_time(), time.perf_counter()
        found = verify(RunDir.open(path))
        seconds = time.process_time() - began, time.perf_counter() - wall
        assert found.ok, found.problems[:3]
        assert found.planned == found.kept + found.dropped == n_clips
        victim = next((path / "embeddings" / "videomae").glob("*.parquet"))
        victim.write_bytes(victim.read_bytes()[:-1] + b"!")
        damaged = verify(RunDir.open(path))
        assert len(damaged.problems) == 1, damaged.problems[:3]
        assert set(damaged.broken) == {victim.stem.removeprefix("part-")}
    return {
        "clips": n_clips,
        "rows": found.rows,
        "files": found.files,
        "read_MB": round(stored / 1e6),
        "cpu_seconds": round(seconds[0], 1),
        "wall_seconds": round(seconds[1], 1),
        "peak_MiB": peak_MiB(),
    }


def clips_plan(n: int) -> pa.Table:
    """A plan of ``n`` units of ten clips of 6 s, one every 30 s."""
    table = plan_table(n)
    of_clips = pa.array(CLIPS_A_UNIT * np.arange(n + 1, dtype=np.int32))
    first = np.tile(180 * np.arange(CLIPS_A_UNIT), n)
    length = np.full(n * CLIPS_A_UNIT, 36, np.int32)
    for name, values in (("first", pa.array(first)), ("length", pa.array(length))):
        column = pa.ListArray.from_arrays(of_clips, values)
        table = table.set_column(schema.UNITS.get_field_index(name), schema.UNITS.field(name), column)
    return table


def rows_of_units(units: pa.Table, draw: np.random.Generator) -> dict[str, pa.Table]:
    """What curating some units leaves: rows of clips, and vectors and landmarks of those that are kept."""
    rows, kept = [], []
    for video, firsts in zip(units["video_id"].to_pylist(), units["first"].to_pylist(), strict=True):
        for first in firsts:
            clip = clip_id(video, first, 36, 6.0)
            chosen = draw.random() < KEPT_SHARE
            kept += [clip] if chosen else []
            rows.append(
                {
                    "clip_id": clip, "video_id": video, "source": "e10k", "name": "part.tar::x.mp4",
                    "start_s": first / 6, "end_s": (first + 36) / 6, "n_frames": 36, "fps": 30.0,
                    "width": 1920, "height": 1080, "codec": "hevc", "motion": 0.1,
                    "hand_visibility": 1.0 if chosen else 0.0,
                    "decision": "kept" if chosen else "dropped", "reason": None if chosen else "hands",
                    "meta": [],
                }
            )  # fmt: skip
    n = len(kept) * HANDS_A_CLIP

    def vectors(rows: int, width: int, kind: type) -> pa.Array:
        values = pa.array(draw.random(rows * width, np.float32).astype(kind))
        return pa.FixedSizeListArray.from_arrays(values, width)

    hands = {
        "clip_id": np.repeat(kept, HANDS_A_CLIP), "frame": np.zeros(n, np.int32), "time_s": np.zeros(n),
        "side": ["left"] * n, "score": np.ones(n, np.float32), "presence": np.ones(n, np.float32),
        "box": vectors(n, 4, np.float32), "landmarks": vectors(n, 63, np.float32),
        "world": vectors(n, 63, np.float32),
    }  # fmt: skip
    made_by = schema.embedding(DIM, "videomae", "x", False)
    found = {
        "clips": pa.Table.from_pylist(rows, schema=schema.CLIPS),
        "embeddings/videomae": pa.table([kept, vectors(len(kept), DIM, np.float16)], schema=made_by),
        "hands": pa.table([hands[name] for name in schema.HANDS.names], schema=schema.HANDS),
    }
    return {name: table for name, table in found.items() if table.num_rows}


def files_part(quick: bool) -> dict[str, Any]:
    """Claims and commits of one worker on this machine's disk, at several sizes of the plan."""
    found = {}
    for n in (2_000, 20_000) if quick else (2_000, 20_000, 200_000):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            clock = SystemClock()
            presence = Presence(SharedFolder(path / "workers"), "w", clock, 60.0)
            presence.beat()
            ids = np.array([f"{i:016x}" for i in range(n)], "S16")
            board = Board(
                ids, np.full(n, UNIT_S), np.zeros(n, np.int64), Ledger(SharedFolder(path / "ledger")),
                SharedFolder(path / "claims"), presence, Terms(), clock=clock,
            )  # fmt: skip
            cpu, wall, done = time.process_time(), time.perf_counter(), 0
            waiting: list[int] = []
            while done < 1_000:
                unit = board.next()
                assert unit is not None
                board.ended(unit, UNIT_S)
                waiting.append(unit)
                done += 1
                if len(waiting) == 3:  # 30 s of units of 10 s
                    names = tuple(ids[i].decode() for i in waiting)
                    board.ledger.append(Record(names[0], names, {}, {}))
                    board.committed()
                    waiting = []
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found[str(n)] = {
                "cpu_ms_a_unit": round(1e3 * cpu / done, 3),
                "wall_ms_a_unit": round(1e3 * wall / done, 3),
                "cpu_share_of_a_10_s_unit": round(cpu / done / UNIT_S, 6),
            }
    return {"by_units_of_the_plan": found}


def simulation_part(quick: bool) -> dict[str, Any]:
    """The last worker against the mean, and the engine's share, a file operation costing 2 ms."""
    found = {}
    for workers, each in ((1, 40), (2, 40), (8, 40), (64, 40)) if quick else (
        (1, 100), (2, 100), (4, 100), (8, 100), (16, 80), (64, 50), (128, 40), (512, 20),
    ):  # fmt: skip
        costs, errors = heavy_tailed(workers * each, UNIT_S, 40.0, seed=1)
        ending = simulate(costs, fleet(workers), errors=errors)
        assert len(ending.committed) == len(costs)
        assert set(ending.committed.values()) == {1}
        found[str(workers)] = {
            "units": len(costs),
            "last_over_mean": round(ending.tail, 4),
            "makespan_over_ideal": round(ending.makespan_s / ending.ideal_s, 4),
            "done_twice_share": round(float(ending.done_twice_s / ending.worked_s.sum()), 4),
            "engine_share": round(ending.engine_share, 5),
            "claims_a_worker": round(ending.claims / workers, 1),
            "commits": ending.records,
        }
        print(workers, found[str(workers)], flush=True)
    return {"operation_ms": 2.0, "by_workers": found}


PARTS = (
    Part("plan", "scaling", 900, "planning_part"),
    Part("status", "scaling", 900, "status_part"),
    Part("verify", "scaling", 1800, "verify_part"),
    Part("files", "scaling", 900, "files_part"),
    Part("simulation", "scaling", 3600, "simulation_part"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller, for a look")
    parser.add_argument("--only", choices=[part.name for part in PARTS], action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    body: dict[str, Any] = {}
    for part in PARTS:
        if args.only and part.name not in args.only:
            continue
        outcome = run_part(part, args.quick)
        body[part.name] = outcome.figures or {"failed": outcome.reason}
        print(part.name, body[part.name], flush=True)
    path = write_result("scaling", __doc__, body, ("pyarrow", "numpy"), args.out)
    print(path.name)
    return 1 if any("failed" in figures for figures in body.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
