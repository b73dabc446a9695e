"""Scripts and arithmetic of the Slurm chain without a Slurm: bash, and clients that say what tests want."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.jobs import slurm
from ego2robot.jobs.slurm import Job, Request, Submission
from tests.test_slurm import STAND_IN


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a client that is bash; what it was called with is in ``<name>.calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)

    def make(name: str, body: str) -> Path:
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "$@" >>{folder}/{name}.calls\n{body}\n')
        path.chmod(0o755)
        return folder / f"{name}.calls"

    return make


@pytest.fixture
def no_limit(clients):
    """A cluster that answers nothing but its configuration."""
    clients("scontrol", "echo 'MaxArraySize            = 10'")


def draft(tmp_path: Path, request: Request, *more: str) -> slurm.Chain:
    cfg = config.load("folder", ["source.path=/nowhere", f"run_dir={tmp_path / 'r'}", *more])
    return slurm.draft_run(cfg, request, STAND_IN)


def test_time_limits_are_read_as_slurm_reads_them():
    known = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-0": 86400, "1-12:30": 131400, "0-0:1:5": 65}
    assert {text: slurm.seconds(text) for text in known} == known
    assert slurm.seconds("UNLIMITED") == float("inf")
    for wrong in ("", "soon", "1:2:3:4", "1-", "-5", "1.5"):
        with pytest.raises(UserError, match="--time"):
            slurm.seconds(wrong)


@given(st.sets(st.integers(0, 3000)))
def test_ranges_hold_the_same_numbers(numbers):
    assert list(slurm.expand(slurm.ranges(numbers))) == sorted(numbers)


@given(st.integers(1, 70), st.none() | st.integers(1, 80))
def test_arrays_are_split_and_their_throttles_add_up(array, throttle):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "_array_limit", lambda: (10, []))
        drafts = draft(Path("/tmp/none"), Request(array, throttle=throttle)).drafts
    work = {d.label: d for d in drafts if d.step == "work"}
    assert sorted(s for d in work.values() for s in d.shards) == list(range(array))
    assert all(0 <= s - d.offset < 10 for d in work.values() for s in d.shards)
    # At any moment one array of each lane runs.
    before = {d.label: [other for kind, other in d.after if other in work] for d in work.values()}
    ends = {label for label in work if not any(label in others for others in before.values())}
    lanes = []
    for label in ends:
        lane = [label]
        while before[lane[-1]]:
            lane.append(*before[lane[-1]])
        assert len({work[x].throttle for x in lane}) == 1
        lanes.append(work[label].throttle)
    assert sum(map(len, before.values())) == len(work) - len(ends)
    assert sum(lanes) == throttle if throttle else set(lanes) == {None}
    (cluster,) = [d for d in drafts if d.step == "cluster"]
    assert [other for kind, other in cluster.after if kind == "afterany"] == list(work)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (Request(0), "at least one"),
        (Request(1, export_tasks=0), "--export-tasks 0: at least one"),
        (Request(1, gpus_per_task="many"), "TYPE:NUMBER"),
        (Request(1, time="soon"), "--time soon"),
        (Request(1, partition='x"\n#SBATCH --uid=0'), "no quotes"),
        (Request(1, sbatch_args=("reservation=x",)), "STEP:--option"),
        (Request(1, sbatch_args=("--a=1\n--b",)), "STEP:--option"),
        (Request(1, environment=("NOT_SET_HERE",)), "not set here"),
        (Request(1, environment=("A=B",)), "without its value"),
    ],
)
def test_what_slurm_would_misread_is_refused(tmp_path, no_limit, request_, problem):
    with pytest.raises(UserError, match=problem):
        draft(tmp_path, request_)


def test_a_path_that_sbatch_cannot_take_is_refused(tmp_path, no_limit):
    for name in ('a"b', r"a\b", "a#b"):
        with pytest.raises(UserError, match="another folder"):
            draft(tmp_path / name, Request(1))


def test_options_of_one_step_are_for_it_alone(tmp_path, no_limit):
    args = ("--reservation=all", "cluster:--mem=200G", "work:--exclusive")
    chain = draft(tmp_path, Request(1, gpus_per_task="a100:4", sbatch_args=args))
    scripts = {path.stem: text for path, text in chain.scripts.items()}
    assert set(scripts) == set(slurm.STEPS)
    assert all("#SBATCH --reservation=all\n" in text for text in scripts.values())
    assert [s for s, text in scripts.items() if "--mem=200G" in text] == ["cluster"]
    assert [s for s, text in scripts.items() if "#SBATCH --exclusive\n" in text] == ["work"]
    gpus = {s: text.partition("--gres=")[2].split("\n")[0] for s, text in scripts.items()}
    assert {step: gpu for step, gpu in gpus.items() if gpu} == {"work": "gpu:a100:4", "cluster": "gpu:1"}


def test_without_an_export_the_report_follows_the_clusters(tmp_path, no_limit):
    drafts = draft(tmp_path, Request(1), "export.enabled=false").drafts
    assert [d.label for d in drafts] == ["plan", "work", "cluster", "report"]
    assert drafts[-1].after == (("afterok", "cluster"),)


def test_an_export_is_an_array_of_its_own_that_its_end_waits_for(tmp_path, no_limit):
    drafts = {d.label: d for d in draft(tmp_path, Request(2, throttle=3, export_tasks=12)).drafts}
    assert list(drafts) == ["plan", "work", "cluster", "export", "export_10", "finish", "report"]
    assert [drafts[label].shards for label in ("export", "export_10")] == [tuple(range(10)), (10, 11)]
    assert [drafts[label].throttle for label in ("export", "export_10")] == [2, 1]
    assert drafts["export_10"].after == (("afterok", "cluster"),)
    assert drafts["finish"].dependency({}) == "afterok:cluster,afterany:export:export_10"
    assert drafts["report"].dependency({}) == "afterok:finish"


@pytest.mark.parametrize(
    ("cpus", "more", "tasks"),
    [
        (None, ["export.top=1000000"], 64),  # as many as work
        (None, ["export.top=5"], 5),  # no unit is less than a clip
        (None, ["export.top=50", "clips.policy=windows"], 17),  # 300 s in units of 18
        (8, ["export.top=50", "clips.policy=windows"], 3),
    ],
)
def test_no_more_tasks_export_than_have_something_to_do(tmp_path, no_limit, cpus, more, tasks):
    submission = draft(tmp_path, Request(64, cpus_per_task=cpus), *more).submission
    assert submission.request.export_tasks == tasks


def test_a_dry_run_needs_no_slurm(tmp_path):
    command = [sys.executable, "-m", "ego2robot.cli", "slurm", "submit", "folder", "source.path=/nowhere"]
    command += [f"run_dir={tmp_path / 'a run'}", "--array", "1500", "--throttle", "7", "--cpus-per-task", "3"]
    done = subprocess.run(
        [*command, "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "SLURM_CONF"} | {"PATH": "/nowhere"},
    )
    assert done.returncode == 0, done.stderr
    assert "MaxArraySize is taken to be 1001" in done.stdout
    assert "--array=0-1000%4" in done.stdout and "--array=0-498%3" in done.stdout
    assert "\nworkers: 3\n" in done.stdout and not list(tmp_path.iterdir())
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    real = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/nowhere"})
    assert real.returncode == 2 and "error: no sbatch" in real.stderr and not list(tmp_path.iterdir())


# -- the script of a task --------------------------------------------------------------------------


def start(
    tmp_path: Path, body: str, step: str = "work", **environment: str
) -> tuple[subprocess.Popen[str], Path]:
    """The script of an array with a Python program in place of ego2robot, task 3 of the array from 10 on."""
    program = tmp_path / "program.py"
    program.write_text("import signal, sys, time, pathlib\n" + body)
    cfg = config.load("folder", ["source.path=/nowhere", f"run_dir={tmp_path / 'a run'}"])
    chain = slurm.draft_run(cfg, Request(99, export_tasks=44), (sys.executable, str(program)))
    slurm._write(chain)
    script = chain.submission.folder / f"{step}.sh"
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(
        ["bash", str(script), "10"],
        env={**os.environ, **task, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, chain.submission.folder / "exits" / f"{step}-13"


HOLD = """
def drain(number, frame):
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGUSR1, drain)
signal.signal(signal.SIGTERM, drain)
pathlib.Path(sys.argv[2], "began").touch()
time.sleep(60)
"""


def began(tmp_path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (tmp_path / "a run" / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_script_passes_the_shard_on_and_records_the_exit(tmp_path, no_limit):
    process, record = start(tmp_path, "print(sys.argv[1:]); sys.exit(4)")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 4
    assert f"['work', '{tmp_path / 'a run'}', '--shard', '13/99']" in output
    assert record.read_text().split()[:2] == ["4", "7_3"]


def test_a_task_of_an_export_does_its_share_and_is_put_back_when_it_is_warned(tmp_path, clients):
    calls = clients("scontrol", "echo MaxArraySize = 50")
    body = 'print(sys.argv[1:], flush=True)\npathlib.Path(sys.argv[3], "began").touch()\ntime.sleep(60)'
    process, record = start(tmp_path, body, "export")
    began(tmp_path)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    run = tmp_path / "a run"
    assert f"['export', 'lerobot', '{run}', '{run}/dataset', '--shard', '13/44']" in output
    assert record.read_text().startswith("138 7_3 ") and "requeue 7_3" in calls.read_text()


def test_usr1_reaches_the_work_and_the_task_asks_to_be_put_back_itself(tmp_path, clients):
    calls = clients("scontrol", "echo MaxArraySize = 50")
    process, record = start(tmp_path, HOLD)
    began(tmp_path)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)  # once more while it drains
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and record.read_text().startswith("75 7_3 ")
    # The array's number alone would put all its tasks back, and SLURM_JOB_ID is that in its last one.
    assert calls.read_text().splitlines()[1:] == ["requeue 7_3"] and "back in the queue" in output


def test_usr1_before_python_is_ready_is_a_drain_too(tmp_path, clients):
    calls = clients("scontrol", "echo MaxArraySize = 50")
    body = 'pathlib.Path(sys.argv[2], "began").touch()\ntime.sleep(60)'
    process, _ = start(tmp_path, body)
    began(tmp_path)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 138 and "requeue 7_3" in calls.read_text()


def test_term_drains_and_leaves_the_rest_to_slurm(tmp_path, clients):
    calls = clients("scontrol", "echo MaxArraySize = 50")
    process, _ = start(tmp_path, HOLD)
    began(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75 and "requeue" not in calls.read_text()


def test_a_task_that_was_put_back_too_often_ends(tmp_path, clients):
    calls = clients("scontrol", "echo MaxArraySize = 50")
    process, _ = start(tmp_path, HOLD, SLURM_RESTART_COUNT=str(slurm.MAX_RESTARTS))
    began(tmp_path)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75 and "requeue" not in calls.read_text()


# -- what is done again ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "states", "again", "dependencies", "replaced"),
    [
        (  # shards of an export failed while another runs: its end waits for both
            0,
            {"work": "CC", "cluster": "C", "export": "FRC", "finish": "P", "report": "P"},
            {"export": (0,), "finish": (), "report": ()},
            {"export": "", "finish": "afterany:14:export", "report": "afterok:finish"},
            ["15", "16"],
        ),
        (  # the end does what failed shards left
            0,
            {"work": "CC", "cluster": "C", "export": "FCC", "finish": "R", "report": "P"},
            None,
            {},
            [],
        ),
        (  # the end failed, the shards did not
            0,
            {"work": "CC", "cluster": "C", "export": "CCC", "finish": "F", "report": "X"},
            {"finish": (), "report": ()},
            {"finish": ""},
            [],
        ),
        (  # the disk is full: those that failed, then the end
            0,
            {"work": "CC", "cluster": "C", "export": "CFF", "finish": "F", "report": "X"},
            {"export": (1, 2), "finish": (), "report": ()},
            {"finish": "afterany:export"},
            [],
        ),
        (  # no skills, no export
            0,
            {"work": "CC", "cluster": "F", "export": "XXX", "finish": "X", "report": "X"},
            {"cluster": (), "export": (0, 1, 2), "finish": (), "report": ()},
            {"export": "afterok:cluster", "finish": "afterok:cluster,afterany:export"},
            [],
        ),
        (  # somebody cancelled the export while the work goes on
            1,
            {"work": "RC", "cluster": "P", "export": "XXX", "finish": "X", "report": "X"},
            {"export": (0, 1, 2), "finish": (), "report": ()},
            {"export": "afterok:13", "finish": "afterok:13,afterany:export"},
            [],
        ),
        (  # units are left: what waits for them comes again
            1,
            {"work": "FR", "cluster": "P", "export": "PPP", "finish": "P", "report": "P"},
            {"work": (0,), "cluster": (), "export": (0, 1, 2), "finish": (), "report": ()},
            {"cluster": "afterany:12:work", "export": "afterok:cluster"},
            ["13", "14", "15", "16"],
        ),
    ],
)
def test_a_retry_submits_what_can_no_longer_succeed(
    tmp_path, no_limit, monkeypatch, left, states, again, dependencies, replaced
):
    folder = tmp_path / "r" / "slurm" / "1"
    folder.mkdir(parents=True)
    Submission(folder, "abc", 0.0, "/", "/out", Request(2, export_tasks=3)).save()
    words = {"C": "COMPLETED", "F": "FAILED", "X": "CANCELLED", "R": "RUNNING", "P": "PENDING"}
    tasks = []
    for number, step in enumerate(slurm.STEPS, 11):
        for i, letter in enumerate(states.get(step, "C")):
            shard, job = (i, f"{number}_{i}") if step in slurm.ARRAYS else (None, str(number))
            tasks.append(slurm.Task(step, shard, job, words[letter], None, "", "", folder / "no.log"))
    monkeypatch.setattr(slurm, "tasks_of", lambda run: tasks)
    monkeypatch.setattr(slurm, "units_left", lambda run: left)
    if again is None:
        with pytest.raises(UserError, match="nothing failed; 2 tasks run or wait"):
            slurm.draft_retry(tmp_path / "r", {}, STAND_IN)
        return
    chain, cancelled = slurm.draft_retry(tmp_path / "r", {}, STAND_IN)
    assert {d.step: d.shards for d in chain.drafts} == again and cancelled == replaced
    found = {d.step: d.dependency({}) for d in chain.drafts}
    assert {step: found[step] for step in dependencies} == dependencies


# -- clients ---------------------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path: Path) -> Path:
    """A run of which jobs 11 (plan) and 12 (work, shards 10 to 13) were submitted; some left records."""
    folder = tmp_path / "r" / "slurm" / "1"
    (folder / "exits").mkdir(parents=True)
    jobs = (
        Job("plan", "11", "plan-%j.log"),
        Job("work", "12", "work-%A_%a.log", (10, 11, 12, 13), 10),
    )
    Submission(folder, "abc", 0.0, "/", None, Request(14), jobs).save()
    (folder / "exits" / "plan").write_text("0 11 n1\n")
    (folder / "exits" / "work-11").write_text("75 12_1 n2\n")
    (folder / "exits" / "work-12").write_text("0 9_2 n2\n")  # of another job
    (folder / "work-12_3.log").write_bytes(b"== start\nfirst\n\x1b[31mlast\xff\n== exit 1\n")
    return tmp_path / "r"


def test_what_slurm_forgot_is_told_by_the_records(submitted, clients):
    clients("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    clients("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    tasks = {(t.step, t.shard): t for t in slurm.tasks_of(submitted)}
    assert [(t.state, t.code) for t in tasks.values()] == [
        ("COMPLETED", 0),
        ("LOST", None),
        ("FAILED", 75),
        ("LOST", None),
        ("LOST", None),
    ]
    assert tasks["work", 11].node == "n2" and "drained" in tasks["work", 11].exit_text
    assert tasks["work", 13].last_lines(2) == ["first", " [31mlast�"]


def test_the_queue_comes_first_and_accounting_fills_in(submitted, clients):
    clients("squeue", "echo '12|0|RUNNING|n3|None'; echo '12|1|PENDING||BeginTime'")
    clients(
        "sacct",
        "echo '12_2|CANCELLED by 1000|0:15|n4'; echo '12_3|OUT_OF_MEMORY|0:125|n1'; echo '12_[7]|PENDING||'",
    )
    tasks = {t.shard: t for t in slurm.tasks_of(submitted)}
    assert (tasks[10].state, tasks[10].node) == ("RUNNING", "n3")
    assert (tasks[11].state, tasks[11].reason, tasks[11].code) == ("PENDING", "BeginTime", None)
    assert (tasks[12].state, tasks[12].exit_text) == ("CANCELLED", "143 (SIGTERM)")
    assert (tasks[13].state, tasks[13].failed) == ("OUT_OF_MEMORY", True)


def test_a_busy_controller_is_asked_again_and_a_refusal_is_not(submitted, clients, tmp_path):
    calls = clients(
        "squeue",
        f"if [ $(wc -l <{tmp_path}/bin/squeue.calls) -lt 3 ]; then\n"
        "  echo 'error: Socket timed out' >&2; exit 1\nfi\n"
        "echo '12|0|RUNNING|n3|None'",
    )
    clients("sacct", "exit 1")
    assert slurm.tasks_of(submitted)[1].state == "RUNNING" and len(calls.read_text().splitlines()) == 3
    calls = clients("squeue", "echo 'squeue: error: Access denied' >&2; exit 1")
    calls.unlink()
    with pytest.raises(UserError, match="squeue: squeue: error: Access denied"):
        slurm.tasks_of(submitted)
    assert len(calls.read_text().splitlines()) == 1


def test_a_job_that_was_accepted_without_an_answer_is_not_submitted_twice(tmp_path, clients):
    sbatch = clients("sbatch", 'echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1')
    clients("squeue", f"sed -n 's/.*--comment=\\([^ ]*\\).*/77|\\1/p' {tmp_path}/bin/sbatch.calls")
    assert slurm._sbatch(["--parsable", "--comment=ego2robot-x-plan", "plan.sh"], "ego2robot-x-plan") == "77"
    assert len(sbatch.read_text().splitlines()) == 1


def test_a_damaged_submission_is_one_line(submitted):
    (submitted / "slurm" / "1" / "submission.json").write_text('{"id": "x"}')
    with pytest.raises(UserError, match=r"submission\.json: damaged"):
        slurm.submissions(submitted)
