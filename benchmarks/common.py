"""What every benchmark shares: the machine it ran on, parts in processes of their own, files of results."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parents[1] / "runs" / "bench"  # footage and scratch; never committed
# Scripts import each other by name, and the package where it is not installed; what the tests keep
# (MediaPipe's own detector) is imported as `tests.…`.
ROOTS = (str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels"))
sys.path.extend(ROOTS)


class Skip(Exception):
    """A part cannot be measured here; the message says why."""


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """CPU model, cores, memory, GPU where there is one, versions of ``packages``, the measured commit."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", "../ego2robot", "../kernels", "."],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": model[1].strip() if model else platform.machine(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **_gpu(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changed.stdout.strip()),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> dict[str, Any]:
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm"
    try:
        found = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = found.stdout.strip().splitlines() if found.returncode == 0 else []
    if not lines:
        return {}
    name, driver, memory, clock = (part.strip() for part in lines[0].split(","))
    return {"gpu": name, "gpus": len(lines), "driver": driver, "gpu_memory": memory, "gpu_max_clock": clock}


def slug(about: Mapping[str, Any], gpu: bool = False) -> str:
    """The kind of a machine in a file's name: its GPU where that was measured, else CPU and cores."""
    text = about["gpu"] if gpu else f"{about['cpu']} {about['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_result(
    name: str, question: str | None, body: Mapping[str, Any], packages: Sequence[str], folder: Path = RESULTS
) -> Path:
    """Writes ``<date>-<machine>-<name>.json``: the question (a docstring's first line) and the figures."""
    about = machine(packages)
    first = (question or "").splitlines()[0] if question else ""
    return _write(folder, f"{slug(about)}-{name}", {"question": first, "machine": about, **body})


def write_report(
    question: str, about: Mapping[str, Any], body: Mapping[str, Any], gpu: bool, folder: Path
) -> Path:
    """Writes ``<date>-<machine>.json``, which ``ego2robot bench`` compares and draws."""
    return _write(folder, slug(about, gpu), {"question": question, "machine": dict(about), **body})


def _write(folder: Path, name: str, body: Mapping[str, Any]) -> Path:
    path = folder / f"{datetime.date.today().isoformat()}-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


# -- parts in processes of their own --------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A question with a process of its own, so that a crash or a hang costs this part alone.

    Attributes:
        module: beside this file; ``function(quick)`` of it returns what was measured.
        budget_s: it is ended, with all its children, when this is over.
        quick: always the short form of it.
    """

    name: str
    module: str
    budget_s: float
    function: str = "run"
    quick: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a part: its figures, or why there are none."""

    name: str
    seconds: float
    figures: dict[str, Any] | None
    reason: str | None = None


def run_part(part: Part, quick: bool) -> Outcome:
    """Runs one part to its end, or ends it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        answer = Path(folder) / "part.json"
        command = [sys.executable, str(Path(__file__)), part.module, part.function, str(answer)]
        status, last = run_group(command + ["--quick"] * quick, part.budget_s)
        seconds = time.monotonic() - began
        told: dict[str, Any] = json.loads(answer.read_text("utf-8")) if answer.is_file() else {}
    if "skipped" in told:
        return Outcome(part.name, seconds, None, told["skipped"])
    if status is None:
        return Outcome(part.name, seconds, None, f"failed: no answer within {part.budget_s:.0f} s")
    if status or "figures" not in told:
        return Outcome(part.name, seconds, None, f"failed: {_ended(status)}{last}")
    return Outcome(part.name, seconds, told["figures"])


def _ended(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit {status}: "


def run_group(command: Sequence[str], budget_s: float) -> tuple[int | None, str]:
    """Runs a command in a process group that is ended whole. Its output is shown here as it comes.

    Its children find the benchmarks and the package too, by ``PYTHONPATH``.

    Returns:
        The exit status (None: the time was up) and the last line of its standard error.
    """
    roots = [str(Path(__file__).parent), *ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=os.pathsep.join(roots))
    with tempfile.TemporaryFile() as errors:
        job = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        try:
            status: int | None = job.wait(budget_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(job)
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip()
    if status != 0 and text:
        print(text[-3000:], file=sys.stderr, flush=True)
    return status, (text.splitlines() or [""])[-1][:300]


def end_group(job: subprocess.Popen[Any]) -> None:
    """Ends what is left of a job that was started with ``start_new_session``: itself, its session, and
    what it started in sessions of their own."""
    others = descendants(job.pid)
    with suppress(ProcessLookupError):  # all of it is gone already
        os.killpg(job.pid, signal.SIGKILL)
    for pid in others:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.wait()


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` started, and those that they started, as far as all still live."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            # The name may hold anything; after it come the state and the parent.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, look = [], [pid]
    while look:
        look = [child for one in look for child in children.get(one, [])]
        found += look
    return found


def main(arguments: Sequence[str]) -> int:
    """The child's side of ``run_part``: MODULE FUNCTION ANSWER [--quick]."""
    module, function, answer, *rest = arguments
    path = Path(answer)

    def tell(key: str, value: Any) -> int:
        path.write_text(json.dumps({key: value}), encoding="utf-8")
        return 0

    if not (Path(__file__).parent / f"{module}.py").is_file():
        return tell("skipped", f"not there: benchmarks/{module}.py")
    try:
        found = getattr(importlib.import_module(module), function, None)
        if found is None:
            return tell("skipped", f"not there: {function}() in benchmarks/{module}.py")
        return tell("figures", found("--quick" in rest))
    except ModuleNotFoundError as error:
        return tell("skipped", f"not installed: {error.name}")
    except Skip as error:
        return tell("skipped", str(error))


# -- measuring ------------------------------------------------------------------------------------


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def cpu_seconds() -> float:
    """Of this process, its children and theirs, those that have ended too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(u.ru_utime + u.ru_stime for u in used)
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            seconds += sum(child.cpu_times()[:4])  # user, system, and both of its own ended children
    return seconds


def figure(tree: Any, name: str) -> float | None:
    """The first number called ``name`` anywhere in what a part measured."""
    if isinstance(tree, Mapping):
        value = tree.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        for child in tree.values():
            if (found := figure(child, name)) is not None:
                return found
    return None


if __name__ == "__main__":
    import common  # by the name that the parts know it by: their Skip is to be ours

    sys.exit(common.main(sys.argv[1:]))
