"""A run as a chain of Slurm jobs: plan → work array → cluster → export array → finish → report.

Slurm runs each step, puts back what it preempts and keeps the order; which units are done, and by whom, the
run directory knows. So a lost task costs nothing but its share of the speed: ``cluster`` starts when the
array has ended and no unit is left, whatever became of single tasks, and ``finish``, which puts the dataset
in place, does what is missing of it.

Only ``sbatch``, ``squeue``, ``scancel``, ``scontrol`` and, where accounting is on, ``sacct`` are used, in
forms that do not depend on its version. Everything about a submission lies in ``RUN/slurm/<n>/``:
``recipe.yaml``, a script a step, ``submission.json``, logs, and in ``exits/`` how each task ended.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.store import atomic

if TYPE_CHECKING:
    from ego2robot.jobs.status import Status

STEPS = ("plan", "work", "cluster", "export", "finish", "report")
ARRAYS = ("work", "export")
DRAINED = 75  # EX_TEMPFAIL of sysexits.h: `ego2robot work` stopped early, and wants to go on later
WARN_S = 120  # before the time limit; a shorter job is warned at four fifths of its time
MAX_RESTARTS = 200  # of one task by its own wish: one that gets nowhere must end some day
MAX_ARRAY = 1001  # Slurm's own default of MaxArraySize, where there is nobody to ask
TAILED = 32  # a task of an array more than these is left out of the `tail -F` line
CLIENT_S, SUBMIT_S = 20.0, 60.0
TRANSIENT = (
    "Socket timed out",
    "Unable to contact",
    "Temporarily unable",
    "Zero Bytes",
    "Connection refused",
)
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"BOOT_FAIL", "DEADLINE", "REVOKED", "LOST"}
# What a job gets of the environment it was submitted in. No tokens, no proxies: they may hold passwords.
ENVIRONMENT = re.compile(
    r"HOME|USER|LOGNAME|SHELL|PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|PYTHON(PATH|HOME)"
    r"|CUDA_HOME|CUDA_PATH|XDG_(CACHE|CONFIG|DATA)_HOME|HF_HOME|HF_HUB_(CACHE|OFFLINE)|HUGGINGFACE_HUB_CACHE"
    r"|TRANSFORMERS_OFFLINE|TORCH_HOME|TRITON_CACHE_DIR|(OMP|MKL|OPENBLAS)_NUM_THREADS|SSL_CERT_(FILE|DIR)"
    r"|EGO2ROBOT_\w+"
)
HEAD = """\
#!/bin/bash
{directives}
# Written by `ego2robot slurm`.
say() {{ echo "== $(date +%FT%T%z) $(hostname) $*"; }}
"""
STEP = """\
step() { say "$@"; "$@"; }
"""
# Slurm limits an array's size: larger ones are several, each with the first shard as its argument.
SHARD = """\
shard=$((SLURM_ARRAY_TASK_ID + ${1:-0}))
"""
# A signal ends `wait`, not what it waits for.
FORWARD = """\
# USR1 comes before the time limit, TERM when Slurm takes the node away; on either `ego2robot work` commits
# what is complete and exits with 75. `ego2robot export` has committed what is complete, and just ends.
warned='' child=''
forward() {
  warned=$1 interrupted=1
  if [ "$child" ]; then kill -s "$1" "$child" 2>/dev/null; fi
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM
step() {
  say "$@"
  "$@" &
  child=$!
  if [ "$warned" ]; then kill -s "$warned" "$child" 2>/dev/null; fi
  interrupted=1
  while [ "$interrupted" ]; do
    interrupted=''
    wait "$child"
    code=$?
  done
  return "$code"
}
"""
BODY = """\
task={task} record={record}
rm -f "$record"
say "{step} as job $task, start $((${{SLURM_RESTART_COUNT:-0}} + 1))"
{commands}
code=$?
echo "$code $task $(hostname)" >"$record.tmp" && mv "$record.tmp" "$record"
say "exit $code"
"""
# Where Python has no handler, or not yet, USR1 ends it: 138. After TERM it is Slurm that decides.
REQUEUE = f"""\
if [ "$warned" = USR1 ] && {{ [ $code = {DRAINED} ] || [ $code = 138 ]; }} &&
    [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MAX_RESTARTS} ]; then
  scontrol requeue "$task" && say "back in the queue"
fi
"""


@dataclass(frozen=True)
class Request:
    """What the jobs ask Slurm for; None leaves it to the cluster's defaults.

    Attributes:
        array: tasks that work at the same time, if the cluster has room.
        throttle: at most so many of them at once.
        export_tasks: tasks that export at the same time; None: see :func:`export_tasks`.
        gpus_per_task: such as ``2`` or ``a100:2``; ``0`` for none.
        mem: of one task, as Slurm writes it, such as ``64G``.
        time: limit of one task, as Slurm writes it, such as ``4:00:00``.
        sbatch_args: more options, such as ``--reservation=x``; ``cluster:--mem=200G`` is for one step alone.
        environment: names of variables that the jobs get besides ``ENVIRONMENT``.
    """

    array: int
    throttle: int | None = None
    export_tasks: int | None = None
    gpus_per_task: str = "0"
    cpus_per_task: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    sbatch_args: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One job that Slurm accepted. ``shards`` are those of an array; its indices are less ``offset``."""

    step: str
    job_id: str
    log: str  # as sbatch's --output
    shards: tuple[int, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Submission:
    """What one ``submit`` or ``retry`` gave to Slurm. ``jobs`` are in the order of the chain."""

    folder: Path
    id: str
    at: float
    cwd: str
    out: str | None  # where the dataset goes; None: no export
    request: Request
    jobs: tuple[Job, ...] = ()

    def save(self) -> None:
        tree = {key: value for key, value in asdict(self).items() if key != "folder"}
        for job in tree["jobs"]:
            job["shards"] = ranges(job["shards"])
        atomic.write_json(self.folder / "submission.json", tree)

    @classmethod
    def load(cls, folder: Path) -> Submission:
        """Raises UserError when ``submission.json`` is damaged."""
        try:
            tree = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
            asked = tree.pop("request")
            asked |= {key: tuple(asked[key]) for key in ("sbatch_args", "environment")}
            request = Request(**asked)
            jobs = tuple(Job(**{**job, "shards": tuple(expand(job["shards"]))}) for job in tree.pop("jobs"))
            return cls(folder=folder, request=request, jobs=jobs, **tree)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}/submission.json: damaged ({error}); cancel its jobs with scancel, remove {folder} "
                "and submit again"
            ) from None

    @property
    def tail(self) -> str:
        """A command that shows the logs as they come, those of jobs that have not started included."""
        names = []
        for job in self.jobs:
            stem = Path(job.log).name.removesuffix(".log")
            if job.shards:
                parts = ranges(s - job.offset for s in job.shards[:TAILED]).split(",")
                several = [f"{{{part.replace('-', '..')}}}" if "-" in part else part for part in parts]
                tasks = several[0] if len(several) == 1 else "{" + ",".join(several) + "}"
                names.append(stem.replace("%A_%a", f"{job.job_id}_{tasks}"))
            else:
                names.append(stem.replace("%j", job.job_id))
        braces = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        return f"tail -n +1 -F {shlex.quote(str(self.folder))}/{braces}.log 2>/dev/null"


@dataclass(frozen=True)
class Task:
    """A job, or one task of an array, as Slurm or its own record has it.

    Attributes:
        state: Slurm's word, such as ``RUNNING``; ``LOST``: Slurm forgot it, and it left no record.
        code: exit code, 128 + n after signal n; None where nothing tells.
        reason: why Slurm lets it wait.
    """

    step: str
    shard: int | None
    job: str
    state: str
    code: int | None
    node: str
    reason: str
    log: Path

    @property
    def active(self) -> bool:
        return self.state not in ENDED

    @property
    def failed(self) -> bool:
        return self.state in ENDED and self.state != "COMPLETED"

    @property
    def never_began(self) -> bool:
        return self.state == "CANCELLED" and not self.log.exists()

    @property
    def exit_text(self) -> str:
        """``75 (drained, not put back in the queue)``."""
        if self.code is None:
            return ""
        if self.code == DRAINED:
            return "75 (drained, not put back in the queue)"
        if self.code > 128 and self.code - 128 in set(signal.Signals):
            return f"{self.code} ({signal.Signals(self.code - 128).name})"
        return str(self.code)

    def last_lines(self, n: int) -> list[str]:
        """The last lines of its log that say something."""
        if not self.log.is_file():
            return []
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
        lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.splitlines()]
        return [line[:300] for line in lines if line.strip() and not line.startswith("== ")][-n:]


@dataclass(frozen=True)
class Draft:
    """A job that is not submitted yet. ``after``: kind of dependency and label or id of the other job."""

    label: str
    step: str
    script: Path
    after: tuple[tuple[str, str], ...]
    shards: tuple[int, ...] = ()
    offset: int = 0
    throttle: int | None = None

    def comment(self, submission: str) -> str:
        """What tells this job from all others in the queue."""
        return f"ego2robot-{submission}-{self.label}"

    def options(self, submission: str) -> list[str]:
        found = ["--parsable", f"--comment={self.comment(submission)}"]
        if self.shards:
            limit = f"%{self.throttle}" if self.throttle else ""
            found.append(f"--array={ranges(s - self.offset for s in self.shards)}{limit}")
        return found

    def dependency(self, ids: Mapping[str, str]) -> str:
        """``afterok:12,afterany:13:14``: all of them must hold."""
        kinds: dict[str, list[str]] = {}
        for kind, other in self.after:
            kinds.setdefault(kind, []).append(ids.get(other, other))
        return ",".join(":".join([kind, *others]) for kind, others in kinds.items())

    @property
    def arguments(self) -> list[str]:
        return [str(self.script), *([str(self.offset)] if self.offset else [])]


@dataclass(frozen=True)
class Chain:
    """Scripts and jobs of a submission before anything is written or sent."""

    submission: Submission
    recipe: str | None  # the text of recipe.yaml; None: the run is planned
    scripts: Mapping[Path, str]
    drafts: tuple[Draft, ...]
    notes: tuple[str, ...] = ()
    plan_here: tuple[str, ...] = ()  # a command to be run before anything is submitted

    def text(self) -> str:
        """All of it as one shell script, which does what it shows."""
        folder = shlex.quote(str(self.submission.folder))
        lines = ["#!/bin/bash", "set -eu", *(f"# {note}" for note in self.notes), f"mkdir -p {folder}/exits"]
        files: dict[Path, str] = dict(self.scripts)
        if self.recipe is not None:
            files = {self.submission.folder / "recipe.yaml": self.recipe, **files}
        for path, text in files.items():
            lines += ["", f"cat >{shlex.quote(str(path))} <<'ego2robot-end'", text + "ego2robot-end"]
        lines += ["", *([shlex.join(self.plan_here)] if self.plan_here else [])]
        ids = {draft.label: f"${{{draft.label}%;*}}" for draft in self.drafts}
        for draft in self.drafts:
            words = ["sbatch", *map(shlex.quote, draft.options(self.submission.id))]
            if draft.after:
                words.append(f'"--dependency={draft.dependency(ids)}"')
            words += map(shlex.quote, draft.arguments)
            lines.append(f"{draft.label}=$({' '.join(words)})")
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Overview:
    """Slurm's view and the run's own, for people and programs."""

    run: str
    tasks: tuple[Task, ...]
    progress: Mapping[str, Any] | None  # of `ego2robot status`; None before there is a plan

    def states(self, step: str) -> dict[str, int]:
        """Slurm's states of the tasks of a step, and how many are in each."""
        return dict(Counter(t.state for t in self.tasks if t.step == step).most_common())

    def to_dict(self) -> dict[str, Any]:
        tasks = [{**asdict(task), "log": str(task.log)} for task in self.tasks]
        return {"run": self.run, "tasks": tasks, "progress": self.progress}


def ego2robot_command() -> tuple[str, ...]:
    """How a job calls ego2robot: the interpreter that runs now, whatever is first in a node's PATH."""
    return (sys.executable, "-m", "ego2robot.cli")


def draft_run(cfg: config.Config, request: Request, command: Sequence[str], plan_here: bool = False) -> Chain:
    """The whole chain of a recipe; ``plan_here``: planned before its jobs are submitted. Writes nothing.

    Raises:
        UserError: the request or the recipe cannot be meant so.
    """
    config.check_together(cfg)
    run = Path(cfg.run_dir).absolute()
    out = (cfg.export.path or str(run / "dataset")) if cfg.export.enabled else None
    if out and request.export_tasks is None:
        request = replace(request, export_tasks=export_tasks(cfg, request))
    folder = run / "slurm" / str(1 + max((int(s.folder.name) for s in submissions(run)), default=0))
    submission = Submission(folder, secrets.token_hex(4), time.time(), str(Path.cwd()), out, request)
    recipe = yaml.safe_dump({**config.to_dict(cfg), "run_dir": str(run)}, sort_keys=False, allow_unicode=True)
    steps = [step for step in _steps(submission) if not (step == "plan" and plan_here)]
    chain = _draft(submission, recipe, steps, _all_shards(request), {}, command)
    return replace(chain, plan_here=(*command, "plan", str(folder / "recipe.yaml"))) if plan_here else chain


def export_tasks(cfg: config.Config, request: Request) -> int:
    """As many as work, but no more than have units of work for all of their cores.

    How many units there are is known when clips are chosen; of ``export.top`` clips as long as they may be
    there are not more than this takes.
    """
    from ego2robot.export.lerobot import most_units  # brings torch along

    return min(request.array, -(-most_units(cfg) // (request.cpus_per_task or 1)))


def _all_shards(request: Request) -> dict[str, Sequence[int]]:
    return {"work": range(request.array), "export": range(request.export_tasks or 1)}


def _steps(submission: Submission) -> list[str]:
    return [step for step in STEPS if submission.out or step not in ("export", "finish")]


def submit(
    cfg: config.Config, request: Request, plan_here: bool = False, command: Sequence[str] | None = None
) -> Submission:
    """Writes the scripts into ``RUN/slurm/<n>/`` and submits the chain.

    Args:
        plan_here: plan now, in this process's environment, instead of in a job.

    Raises:
        UserError: Slurm is not here or refuses, or jobs of this run are still in its queue.
    """
    _require_slurm()
    command = command or ego2robot_command()
    chain = draft_run(cfg, request, command, plan_here)
    run = chain.submission.folder.parents[1]
    if active := [task for task in tasks_of(run) if task.active]:
        raise UserError(
            f"{run}: {len(active)} of its tasks are in Slurm's queue (such as {active[0].job}); see "
            "`ego2robot slurm status`, and retry or cancel them"
        )
    _write(chain)
    if plan_here:
        done = subprocess.run(chain.plan_here, check=False)
        if done.returncode:
            raise UserError(f"planning ended with exit {done.returncode}; nothing was submitted")
    return _submit(chain)


def draft_retry(run: Path, changes: Mapping[str, Any], command: Sequence[str]) -> tuple[Chain, list[str]]:
    """What is to be submitted again, and the ids of waiting jobs that it replaces.

    Shards that ended badly are worked on again while units are left, all shards when units are left and no
    shard is to blame; shards of an export that ended badly, unless the dataset is being finished or was; then
    the steps after them. What runs or waits and can still succeed stays.

    Args:
        changes: other values for ``Request``.

    Raises:
        UserError: nothing was submitted before, or nothing is to be done again.
    """
    earlier = submissions(run)
    if not earlier:
        raise UserError(f"{run}: no job was submitted for this run; see `ego2robot slurm submit --help`")
    last = earlier[-1]
    more = {"sbatch_args": last.request.sbatch_args + tuple(changes.get("sbatch_args", ()))}
    request = replace(last.request, **{**changes, **more})
    known = tasks_of(run)
    by_step: dict[str, list[Task]] = {step: [t for t in known if t.step == step] for step in STEPS}
    left = units_left(run)
    chain = _steps(last)
    steps: list[str] = []
    shards = _all_shards(request)
    if any(t.active for t in by_step["plan"]):
        raise UserError(f"{run}: the plan is being made (job {by_step['plan'][0].job}); wait for it")
    if left is None or any(t.failed for t in by_step["plan"]):
        steps = chain
    elif left:
        failed = _failed_shards(by_step["work"])
        if failed or not any(t.active for t in by_step["work"]):
            steps, shards["work"] = chain[1:], failed or shards["work"]
    for step in chain[2:]:
        if steps:
            break
        tasks = by_step[step]
        if step == "export":
            failed = _failed_shards(tasks)
            finished = any(t.state != "PENDING" and not t.failed for t in by_step["finish"])
            if not finished and (failed or not tasks):
                steps, shards["export"] = chain[chain.index(step) :], failed or shards["export"]
        elif not any(t.active or t.state == "COMPLETED" for t in tasks):
            steps = chain[chain.index(step) :]
    if not steps:
        waiting = sum(t.active for t in known)
        raise UserError(
            f"{run}: nothing failed"
            + (f"; {waiting} tasks run or wait" if waiting else " and nothing is left")
        )
    active = {step: _jobs(t for t in by_step[step] if t.active) for step in STEPS}
    # What still runs of an array of which some is done again stays: what comes after waits for both.
    stay = {step: jobs for step, jobs in active.items() if step not in steps[steps[0] in ARRAYS :]}
    replaced = [job for step in steps if step not in stay for job in active[step]]
    folder = run / "slurm" / str(int(last.folder.name) + 1)
    submission = replace(
        last, folder=folder, id=secrets.token_hex(4), at=time.time(), request=request, jobs=()
    )
    recipe = None
    if "plan" in steps:
        recipe = next(
            path for s in reversed(earlier) if (path := s.folder / "recipe.yaml").is_file()
        ).read_text(encoding="utf-8")
    return _draft(submission, recipe, steps, shards, stay, command), replaced


def _failed_shards(tasks: Iterable[Task]) -> list[int]:
    return [t.shard for t in tasks if t.failed and t.shard is not None]


def _jobs(tasks: Iterable[Task]) -> list[str]:
    """Each job once, whatever it has of tasks."""
    return list(dict.fromkeys(task.job.split("_")[0] for task in tasks))


def retry(run: Path, changes: Mapping[str, Any], command: Sequence[str] | None = None) -> Submission:
    """Submits what failed or is left, see :func:`draft_retry`."""
    _require_slurm()
    chain, replaced = draft_retry(run, changes, command or ego2robot_command())
    if replaced:
        _client("scancel", *replaced)
    _write(chain)
    return _submit(chain)


def cancel(run: Path) -> list[str]:
    """Takes all jobs of a run out of the queue; what running ones have complete they commit.

    Returns:
        the ids of the jobs that were there.
    """
    _require_slurm()
    active = [task for task in tasks_of(run) if task.active]
    ids = {step: _jobs(t for t in active if t.step == step) for step in STEPS}
    # The last steps first: else `finish` and `cluster` would start, since what they wait for has ended.
    for group in (("report", "finish"), ("export", "cluster"), ("work", "plan")):
        if jobs := [job for step in group for job in ids[step]]:
            _client("scancel", *jobs)
    return [job for jobs in ids.values() for job in jobs]


def overview(run: Path) -> Overview:
    """The tasks of a run in Slurm, and how far the run is."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    state = _progress(run)
    return Overview(str(run), tuple(tasks_of(run)), state.to_dict() if state else None)


def failures(run: Path) -> list[Task]:
    """Tasks that ended badly and were not submitted again."""
    return [task for task in tasks_of(run) if task.failed]


def units_left(run: Path) -> int | None:
    """Units of the plan that are not committed; None before there is a plan."""
    state = _progress(run)
    return state.units - state.units_done if state else None


def _progress(run: Path) -> Status | None:
    from ego2robot.jobs.status import status  # brings torch along, which most of this does not need
    from ego2robot.store.rundir import RunDir

    return status(RunDir.open(run)) if RunDir(run).planned else None


def submissions(run: Path) -> list[Submission]:
    """What was submitted for a run, in order."""
    folders = sorted((p for p in run.glob("slurm/[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))
    return [Submission.load(p) for p in folders if (p / "submission.json").is_file()]


def tasks_of(run: Path) -> list[Task]:
    """Every task in its latest submission, in the order of the chain.

    A job is looked up where it is surest: in the queue, in the accounting, in the record that its script
    left.
    """
    newest: dict[tuple[str, int | None], tuple[Submission, Job]] = {}
    for submission in submissions(run):
        for job in submission.jobs:
            for shard in job.shards or (None,):
                newest[job.step, shard] = (submission, job)
    ids = list(dict.fromkeys(job.job_id for _, job in newest.values()))
    queue = _queue(ids) if ids else {}
    names = {
        key: job.job_id if key[1] is None else f"{job.job_id}_{key[1] - job.offset}"
        for key, (_, job) in newest.items()
    }
    recorded: dict[tuple[str, int | None], tuple[int, str]] = {}
    for (step, shard), (submission, _) in newest.items():
        path = submission.folder / "exits" / (step if shard is None else f"{step}-{shard}")
        words = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
        if len(words) == 3 and words[0].isdigit() and words[1] == names[step, shard]:
            recorded[step, shard] = (int(words[0]), words[2])
    unsure = {
        name.split("_")[0]
        for key, name in names.items()
        if key not in recorded and queue.get(name, ("LOST",))[0] in ENDED
    }
    accounted = _accounting(sorted(unsure)) if unsure else {}
    found = []
    for key, (submission, job) in newest.items():
        name = names[key]
        state, node, reason = queue.get(name, ("LOST", "", ""))
        code: int | None = None
        if state in ENDED and key in recorded:
            code, host = recorded[key]
            node = node or host
            if state == "LOST":
                state = "FAILED" if code else "COMPLETED"
        elif state in ENDED and name in accounted:
            state, code, node = accounted[name]
        index = "" if key[1] is None else str(key[1] - job.offset)
        log = job.log.replace("%A", job.job_id).replace("%a", index).replace("%j", job.job_id)
        path = submission.folder / Path(log).name
        found.append(Task(key[0], key[1], name, state, code, node, reason, path))
    return sorted(found, key=lambda t: (STEPS.index(t.step), t.shard or 0))


def _draft(
    submission: Submission,
    recipe: str | None,
    steps: Sequence[str],
    shards: Mapping[str, Sequence[int]],
    stay: Mapping[str, Sequence[str]],
    command: Sequence[str],
) -> Chain:
    """Scripts and dependencies.

    Args:
        shards: of each array.
        stay: by step, ids of jobs of before that the steps after must wait for.
    """
    request, folder = submission.request, submission.folder
    _check(request, folder, submission.cwd)
    run = str(folder.parents[1])
    limit, notes = _array_limit()
    scripts = {}
    for step in steps:
        arguments = {
            "plan": [["plan", str(folder / "recipe.yaml")]],
            "work": [["work", run, "--shard"]],
            "cluster": [["slurm", "ready", run], ["cluster", run]],
            "export": [["export", "lerobot", run, submission.out or "", "--shard"]],
            "finish": [["export", "lerobot", run, submission.out or ""]],
            "report": [["report", run]],
        }[step]
        scripts[folder / f"{step}.sh"] = _script(submission, step, arguments, command)
    made: dict[str, list[Draft]] = {}

    def after(kind: str, step: str) -> tuple[tuple[str, str], ...]:
        return tuple((kind, job) for job in (*stay.get(step, ()), *(d.label for d in made.get(step, ()))))

    for step in steps:
        before = {
            "plan": (),
            "work": after("afterok", "plan"),
            "cluster": after("afterok", "plan") + after("afterany", "work"),
            "export": after("afterok", "cluster"),
            # Without skills there is no export, and its array has ended too.
            "finish": after("afterok", "cluster") + after("afterany", "export"),
            "report": after("afterok", "finish" if submission.out else "cluster"),
        }[step]
        script = folder / f"{step}.sh"
        if step in ARRAYS:
            made[step] = _arrays(step, script, before, shards[step], limit, request.throttle)
        else:
            made[step] = [Draft(step, step, script, before)]
    drafts = tuple(draft for step in steps for draft in made[step])
    return Chain(submission, recipe, scripts, drafts, tuple(notes))


def _arrays(
    step: str,
    script: Path,
    before: tuple[tuple[str, str], ...],
    shards: Sequence[int],
    limit: int,
    throttle: int | None,
) -> list[Draft]:
    """The arrays of a step, of at most ``limit`` tasks each."""
    chunks: dict[int, list[int]] = {}
    for shard in shards:
        chunks.setdefault(shard // limit * limit, []).append(shard)
    lanes = min(throttle or len(chunks), len(chunks))
    drafts: list[Draft] = []
    for i, (offset, members) in enumerate(sorted(chunks.items())):
        # Lanes of arrays, one after the other in each, keep the sum of what runs below the throttle.
        other = (("afterany", drafts[-lanes].label),) if i >= lanes else ()
        share = throttle and throttle // lanes + (i % lanes < throttle % lanes)
        label = f"{step}_{offset}" if offset else step
        drafts.append(Draft(label, step, script, before + other, tuple(members), offset, share))
    return drafts


def _script(
    submission: Submission, step: str, commands: Sequence[Sequence[str]], command: Sequence[str]
) -> str:
    request, folder = submission.request, submission.folder
    array = step in ARRAYS
    gpus = request.gpus_per_task if step == "work" else ("1" if step == "cluster" else "0")
    if request.gpus_per_task == "0":
        gpus = "0"
    names = {name for name in os.environ if ENVIRONMENT.fullmatch(name)} | set(request.environment)
    warn = int(min(WARN_S, seconds(request.time) / 5)) if request.time else WARN_S
    options = {
        "job-name": f"e2r-{step}-" + re.sub(r"[^\w.-]", "_", folder.parents[1].name),
        "chdir": submission.cwd,
        "output": str(folder).replace("%", "%%") + f"/{step}-" + ("%A_%a" if array else "%j") + ".log",
        "open-mode": "append",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": request.cpus_per_task,
        "mem": request.mem,
        "gres": f"gpu:{gpus}" if gpus != "0" else None,
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "exclude": request.exclude,
        "signal": f"B:USR1@{warn}" if array else None,
        "kill-on-invalid-dep": "yes",
        "export": ",".join(sorted(names)) or "NIL",
    }
    lines = [f"--{key}={_quoted(str(value))}" for key, value in options.items() if value is not None]
    own = [a.removeprefix(f"{step}:") for a in request.sbatch_args if a.startswith(("-", f"{step}:"))]
    lines = [*lines, "--requeue", *own]
    words = [shlex.join([*command, *arguments]) for arguments in commands]
    if array:
        words = [f'{word} "$shard/{len(_all_shards(request)[step])}"' for word in words]
    record = shlex.quote(str(folder / "exits" / step))
    parts = {
        "step": step + (" shard $shard" if array else ""),
        "task": '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if array else '"$SLURM_JOB_ID"',
        "record": f"{record}-$shard" if array else record,
        "commands": " &&\n  ".join(f"step {word}" for word in words),
    }
    head = HEAD.format(directives="\n".join(f"#SBATCH {line}" for line in lines))
    middle = SHARD + FORWARD if array else STEP
    return head + middle + BODY.format(**parts) + (REQUEUE if array else "") + 'exit "$code"\n'


def _check(request: Request, folder: Path, cwd: str) -> None:
    """Raises UserError for what Slurm would refuse later, or take to mean something else."""
    if request.array < 1:
        raise UserError(f"--array {request.array}: at least one task")
    if request.export_tasks is not None and request.export_tasks < 1:
        raise UserError(f"--export-tasks {request.export_tasks}: at least one task")
    if not re.fullmatch(r"0|([\w.-]+:)?[1-9]\d*", request.gpus_per_task):
        raise UserError(f"--gpus-per-task {request.gpus_per_task}: a number, or TYPE:NUMBER such as a100:2")
    if request.time:
        seconds(request.time)
    for arg in request.sbatch_args:
        if not re.fullmatch(rf"(({'|'.join(STEPS)}):)?-[^\r\n]*", arg):
            raise UserError(
                f"--sbatch-arg {arg!r}: looks like --option=value, or STEP:--option=value for one of "
                + ", ".join(STEPS)
            )
    for name in request.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--export-env {name}: the name of a variable, without its value")
        if name not in os.environ:
            raise UserError(f"--export-env {name}: not set here")
    for path in (str(folder), cwd):
        if not path.isprintable() or set(path) & set("\"'\\#"):
            raise UserError(
                f"{path!r}: sbatch takes no quotes, backslashes or # in a path; use another folder"
            )
    values = [
        request.mem,
        request.partition,
        request.account,
        request.qos,
        request.constraint,
        request.exclude,
    ]
    for value in values:
        if value is not None and (not value.isprintable() or set(value) & set("\"'\\#")):
            raise UserError(f"{value!r}: sbatch takes no quotes, backslashes or # in a value")


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"\s", value) else value


def _write(chain: Chain) -> None:
    """Puts the files of a chain into their folder, which nobody else may have made."""
    folder = chain.submission.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"{folder}: another submission is on its way, or was given up; remove it") from None
    (folder / "exits").mkdir()
    if chain.recipe is not None:
        atomic.write_text(folder / "recipe.yaml", chain.recipe)
    for path, text in chain.scripts.items():
        atomic.write_text(path, text)


def _submit(chain: Chain) -> Submission:
    """All jobs of a chain or none: those before one that Slurm refuses are cancelled."""
    submission = chain.submission
    submission.save()
    ids: dict[str, str] = {}
    try:
        for draft in chain.drafts:
            dependency = draft.dependency(ids)
            after = [f"--dependency={dependency}"] if dependency else []
            job_id = _sbatch(
                [*draft.options(submission.id), *after, *draft.arguments], draft.comment(submission.id)
            )
            ids[draft.label] = job_id
            log = f"{draft.step}-" + ("%A_%a" if draft.shards else "%j") + ".log"
            job = Job(draft.step, job_id, log, draft.shards, draft.offset)
            submission = replace(submission, jobs=(*submission.jobs, job))
            submission.save()
    except BaseException:
        if submission.jobs:
            _client("scancel", *(job.job_id for job in reversed(submission.jobs)))
        else:
            shutil.rmtree(submission.folder)
        raise
    return submission


def _sbatch(arguments: Sequence[str], comment: str) -> str:
    """Submits once, though the controller may be too busy to say that it did. Returns the job's id."""
    for wait in (2.0, 5.0, None):
        try:
            done = _call("sbatch", *arguments, timeout=SUBMIT_S)
            if done.returncode == 0:
                found = re.match(r"(\d+)(;|$)", done.stdout.strip())
                if not found:
                    raise UserError(f"sbatch printed {done.stdout.strip()!r} instead of a job's number")
                return found[1]
            cause = _cause(done)
            if wait is None or not any(text in done.stderr for text in TRANSIENT):
                raise UserError(f"sbatch {arguments[-1]}: {cause}; the jobs before it are cancelled")
        except subprocess.TimeoutExpired:
            if wait is None:
                raise UserError(f"sbatch: no answer within {SUBMIT_S:g} s, three times") from None
        assert wait is not None
        time.sleep(wait)
        for line in _client("squeue", "-h", "-o", "%F|%k").splitlines():
            job, _, said = line.partition("|")
            if said == comment:
                return job
    raise AssertionError("the last attempt returns or raises")


def _queue(ids: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """``13_0`` or ``13`` to state, nodes and reason, for jobs that Slurm has in memory."""
    text = _client(
        "squeue",
        "-h",
        "-r",
        "-t",
        "all",
        f"--jobs={','.join(ids)}",
        "-o",
        "%F|%K|%T|%N|%r",
        unknown_is_empty=True,
    )
    found = {}
    for line in text.splitlines():
        job, index, state, node, reason = line.split("|", 4)
        found[f"{job}_{index}" if index.isdigit() else job] = (
            state,
            node,
            "" if reason == "None" else reason,
        )
    return found


def _accounting(ids: Sequence[str]) -> dict[str, tuple[str, int | None, str]]:
    """``13_0`` or ``13`` to state, exit code and nodes; nothing where there is no accounting."""
    try:
        done = _call(
            "sacct", "-n", "-P", "-X", f"--jobs={','.join(ids)}", "-o", "JobID,State,ExitCode,NodeList"
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, tuple[str, int | None, str]] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        fields = line.split("|")
        if len(fields) != 4 or not fields[1]:
            continue
        code, _, by_signal = fields[2].partition(":")
        number = 128 + int(by_signal) if by_signal.isdigit() and int(by_signal) else None
        known = number or (int(code) if code.isdigit() else None)
        found[fields[0]] = (fields[1].split()[0], known, fields[3])  # `CANCELLED by 1000`
    return found


def _array_limit() -> tuple[int, list[str]]:
    """How many tasks an array may have, and what to say about it."""
    try:
        text = _client("scontrol", "show", "config")
    except (UserError, FileNotFoundError):  # for --dry-run; without a controller sbatch says so itself
        return MAX_ARRAY, [f"no Slurm answers here: MaxArraySize is taken to be {MAX_ARRAY}"]
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    limit = int(found[1]) if found else MAX_ARRAY
    fewer = re.search(r"\bmax_array_tasks=(\d+)", text)
    limit = min(limit, int(fewer[1])) if fewer else limit
    if limit < 1:
        raise UserError("this cluster has MaxArraySize=0: it runs no job arrays")
    return limit, []


def _require_slurm() -> None:
    missing = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
    if missing:
        raise UserError(f"no {', '.join(missing)} here; run this where jobs are submitted, or add --dry-run")


def _client(*command: str, unknown_is_empty: bool = False) -> str:
    """What a Slurm client prints; a controller that is too busy is asked three times.

    Raises:
        UserError: it fails, in its own words.
    """
    cause = ""
    for wait in (1.0, 4.0, 0.0):
        try:
            done = _call(*command)
        except subprocess.TimeoutExpired:
            cause = f"no answer within {CLIENT_S:g} s"
        else:
            if done.returncode == 0:
                return done.stdout
            if unknown_is_empty and "Invalid job id" in done.stderr:
                return ""
            cause = _cause(done)
            if not any(text in done.stderr for text in TRANSIENT):
                break
        time.sleep(wait)
    raise UserError(f"{command[0]}: {cause}")


def _call(*command: str, timeout: float = CLIENT_S) -> subprocess.CompletedProcess[str]:
    """A client in an environment that changes neither what it does nor how it prints."""
    own = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_")
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS")
    environment = {k: v for k, v in os.environ.items() if k in kept or not k.startswith(own)}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def _cause(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit {done.returncode}"


def seconds(text: str) -> float:
    """A time limit as Slurm writes it: ``90`` (minutes), ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S``.

    Raises:
        UserError: it is none of these.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(p.isdigit() for p in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise UserError(f"--time {text}: use minutes, H:M:S, or D-H:M:S")
    numbers = [int(p) for p in parts]
    if dash:
        h, m, s = [*numbers, 0, 0][:3]
    else:
        h, m, s = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return int(days or 0) * 86400 + h * 3600 + m * 60 + s


def ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` to ``0-2,5``."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def expand(text: str) -> Iterator[int]:
    """``0-2,5`` to 0, 1, 2, 5."""
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
