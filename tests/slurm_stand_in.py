"""In place of ``ego2robot`` in tests of the chain alone: says what it did, and does what it is told.

``RUN/orders/<name>`` are files that tests make: ``tasks`` (how many there are), ``plan_fails``,
``fail-<shard>`` (once), ``hold`` and ``hold-<shard>`` (until it is gone), where ``<shard>`` is ``3``, or
``export-3`` of an export. ``RUN/did/<name>`` is an account of what was done.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main(args: list[str]) -> int:
    if args[0] == "plan":
        run = Path(yaml.safe_load(Path(args[1]).read_text())["run_dir"])
        return done(run, "plan", 3 if (run / "orders" / "plan_fails").exists() else 0)
    if args[0] == "work":
        return task(Path(args[1]), args[3].split("/")[0], drains=True)
    run = Path(args[2] if args[0] in ("export", "slurm") else args[1])
    tasks = int((run / "orders" / "tasks").read_text())
    left = [i for i in range(tasks) if not (run / "did" / f"work-{i}").exists()]
    if left:
        sys.stderr.write(f"error: {len(left)} units are left\n")
        return 2
    if args[0] == "export":
        shard = args[args.index("--shard") + 1] if "--shard" in args else None
        return task(run, f"export-{shard.split('/')[0]}") if shard else done(run, "finish")
    return 0 if args[0] == "slurm" else done(run, args[0])


def task(run: Path, shard: str, drains: bool = False) -> int:
    def drain(number: int, _frame: object) -> None:
        done(run, f"drained-{shard}-{signal.Signals(number).name}")
        sys.exit(75)

    if drains:
        signal.signal(signal.SIGUSR1, drain)
        signal.signal(signal.SIGTERM, drain)
    began = time.time()
    done(run, f"began-{shard}-{os.environ.get('SLURM_RESTART_COUNT', '0')}")
    order = run / "orders" / f"fail-{shard}"
    if order.exists():
        order.unlink()
        sys.stderr.write("error: the video is on fire\n")
        return 1
    holds = [run / "orders" / "hold", run / "orders" / f"hold-{shard}"]
    while any(hold.exists() for hold in holds):
        time.sleep(0.05)
    time.sleep(0.3)
    return done(run, f"work-{shard}" if drains else shard, began=began)


def done(run: Path, name: str, code: int = 0, began: float = 0.0) -> int:
    (run / "did").mkdir(exist_ok=True)
    what = {"began": began, "ended": time.time(), "cwd": str(Path.cwd()), "environment": dict(os.environ)}
    if code == 0:
        (run / "did" / name).write_text(json.dumps(what))
    print(f"{name}: exit {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
