"""Does a run whose workers are killed at random instants end with the rows of an undisturbed one?

Several workers at once share one run directory; each is ended by SIGKILL at a random instant, while it looks
for work, decodes, writes or commits, and another takes its place, until there were so many kills. The rest
is done in peace. The rows of every table must equal those of a clean run bit for bit, `verify` must pass, and
nothing may be left over. Exit 0 only then.

Workers are forks of a process that has everything imported, and decode in themselves, so that their lives are
spent on work; the processes of a pool have tests of their own (tests/test_pool.py, tests/test_pipeline.py).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write_result

from ego2robot import config, pipeline
from ego2robot.jobs import plan as planning
from ego2robot.jobs.verify import verify
from ego2robot.jobs.work import Member, settle, work
from ego2robot.jobs.worker import Scoring, scoring
from ego2robot.store.rundir import RunDir
from tests.footage import write_video
from tests.inline_pool import InlinePool

WORKERS = 3
SHORTEST_S = 0.03  # lives are log-uniform from here on: some end at once, some after many commits
SETTINGS = (
    "hands.detector=none",
    "gate.min_motion=0.02",
    "clips.duration_s=0.5",
    "clips.stride_s=0.5",
    "clips.sample_fps=10",
    "clips.min_frames=3",
    "frames.height=64",
    "frames.width=64",
    "embed.videomae.weights=none",
    "embed.clip.weights=none",
    "device=cpu",
    "work.commit_s=0.05",
)


def make_videos(folder: Path, n: int) -> None:
    folder.mkdir()
    for i in range(n):
        write_video(
            folder / f"{i:05}.mp4", n_frames=20 + i % 11, width=64, height=64, fps=20, gop=10, crf=20 + i % 7
        )
        with (folder / f"{i:05}.mp4").open("ab") as file:  # no two of the same bytes
            file.write(b"\0\0\0\x0cfree" + i.to_bytes(4, "big"))


def planned(source: Path, run_dir: Path) -> RunDir:
    cfg = config.load("folder", [*SETTINGS, f"source.path={source}", f"run_dir={run_dir}"])
    run = RunDir.create_or_resume(run_dir, cfg, pipeline.fingerprint(cfg, []))
    planning.plan(run)
    return run


def one_worker(run_dir: Path) -> None:
    """A worker's life, as ``ego2robot work`` has it."""
    run = RunDir.open(run_dir)
    with Member(run) as member:
        gate = pipeline.calibrate(run, member)
        score = scoring(Scoring(run.config, gate))
        threads = {"decode": 1, "embed": 1}
        work(run, lambda _: (InlinePool(score), threads), {}, [], None, _quiet, _quiet, member)  # type: ignore[arg-type, return-value]
        settle(run, member)


def _quiet(_: object) -> None:
    return


def fork(run_dir: Path) -> int:
    """Starts a worker; returns its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        one_worker(run_dir)
        status = 0
    finally:
        os._exit(status)


def soak(run_dir: Path, kills: int, seed: int, longest_s: float) -> dict[str, Any]:
    """Kills workers until there were so many, or the run is done. ``longest_s``: of a life."""
    draw = random.Random(seed)
    began, killed, errors = time.monotonic(), 0, 0
    lives: dict[int, float] = {}
    done = False
    while killed < kills and not done:
        while len(lives) < WORKERS:
            lives[fork(run_dir)] = time.monotonic() + SHORTEST_S * (longest_s / SHORTEST_S) ** draw.random()
        time.sleep(0.002)
        for child, until in list(lives.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del lives[child]
                errors += status != 0
                done = done or status == 0
            elif time.monotonic() >= until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                del lives[child]
                killed += 1
    for child in lives:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    last = fork(run_dir)
    _, status = os.waitpid(last, 0)
    errors += status != 0
    return {"kills": killed, "errors": errors, "seconds": round(time.monotonic() - began, 1)}


def rows(run: RunDir, table: str) -> list[dict[str, Any]]:
    found = run.table(table)
    return sorted(found.to_pylist(), key=repr)


def leftovers(run: RunDir) -> list[str]:
    """Files that belong to nobody."""
    named = {run.path / file for record in run.records() for file in record.files}
    found = list(run.path.glob("**/.tmp-*"))
    found += [p for p in run.path.glob("**/part-*.parquet") if p not in named]
    found += [p for folder in ("claims", "workers") for p in (run.path / folder).glob("*")]
    return sorted(p.relative_to(run.path).as_posix() for p in found)


def compare(kills: int, seed: int, scratch: Path | None = None) -> dict[str, Any]:
    """Both runs on the same footage. ``wrong`` is empty when they agree."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = Path(folder) / "videos"
        make_videos(source, max(150, 12 * kills))
        clean, killed = planned(source, Path(folder) / "clean"), planned(source, Path(folder) / "killed")
        began = time.monotonic()
        one_worker(clean.path)
        # Many lives end before a first commit and many after some, however fast this machine is; all
        # together are to do about half of the work.
        longest_s = max(0.8, 4 * (time.monotonic() - began) / kills)
        found = soak(killed.path, kills, seed, longest_s)
        killed = RunDir.open(killed.path)
        verdict = verify(killed)
        wrong = list(verdict.problems)
        if verdict.left:
            wrong.append(f"{verdict.left} clips are left")
        wrong += [
            f"{table}: the rows differ"
            for table in ("clips", "hands", "quarantine")
            if rows(killed, table) != rows(clean, table)
        ]
        wrong += [f"left over: {name}" for name in leftovers(killed)]
        if found["errors"]:
            wrong.append(f"{found['errors']} workers ended by an error of their own")
        records = run_records(killed)
        return {**found, "wanted": kills, "seed": seed, "clips": verdict.planned, **records, "wrong": wrong}


def run_records(run: RunDir) -> dict[str, int]:
    return {"commits": len(run.records()), "workers": len({r.info.get("worker") for r in run.records()})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=int(os.environ.get("KILLS", "200")))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for footage and runs; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the result; default: it is only printed")
    args = parser.parse_args()
    found = compare(args.kills, args.seed, args.scratch)
    for text in found["wrong"][:20]:
        print(f"error: {text}", file=sys.stderr)
    print(", ".join(f"{key} {value}" for key, value in found.items() if key != "wrong"), flush=True)
    if found["kills"] < args.kills:
        print(f"the run was done after {found['kills']} kills", file=sys.stderr)
    if args.out:
        write_result("soak", __doc__, found, ("torch", "av", "pyarrow"), args.out)
    return 1 if found["wrong"] or found["kills"] < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
