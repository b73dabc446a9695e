"""The chain of jobs on a real Slurm of four nodes, which runs on this machine while the tests do."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ego2robot import config, pipeline
from ego2robot.errors import UserError
from ego2robot.jobs import slurm
from ego2robot.jobs.slurm import Request
from ego2robot.jobs.verify import verify
from ego2robot.store.rundir import RunDir
from tests import holding, slurm_cluster
from tests.footage import write_video
from tests.slurm_cluster import Cluster
from tests.test_export_scale import contents
from tests.test_pipeline import BASE, rows

STAND_IN = (sys.executable, str(Path(__file__).parent / "slurm_stand_in.py"))
MAX_ARRAY = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="e2r-slurm-") as folder, pytest.MonkeyPatch.context() as patch:
        made = Cluster(Path(folder) / "c", max_array=MAX_ARRAY)
        try:
            made.start()
            for key in ("SLURM_CONF", "PATH"):
                patch.setenv(key, made.environment[key])
            yield made
        finally:
            made.stop()


class Run:
    """A run directory in which stand-ins work, and what the tests ask of it."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.path, self.cluster = folder / "a run", cluster
        self.orders = folder / "a run" / "orders"
        self.orders.mkdir(parents=True)
        self.cfg = config.load("folder", ["source.path=/nowhere", f"run_dir={self.path}"])

    def order(self, name: str, text: str = "") -> None:
        (self.orders / name).write_text(text)

    def drop(self, name: str) -> None:
        (self.orders / name).unlink()

    def submit(self, array: int, **more: Any) -> slurm.Submission:
        self.order("tasks", str(array))
        plan_here = more.pop("plan_here", False)
        return slurm.submit(self.cfg, Request(array, **{"export_tasks": 1, **more}), plan_here, STAND_IN)

    def retry(self, **changes: Any) -> slurm.Submission:
        return slurm.retry(self.path, changes, STAND_IN)

    def did(self, name: str = "") -> Any:
        """All names of what was done, or the account of one of them."""
        if name:
            return json.loads((self.path / "did" / name).read_text())
        return {path.name for path in (self.path / "did").glob("*")}

    def left(self, run: Path) -> int | None:
        """In place of `slurm.units_left`, which reads real plans."""
        if "plan" not in self.did():
            return None
        tasks = int((self.orders / "tasks").read_text())
        return tasks - len([name for name in self.did() if name.startswith("work-")])

    def states(self) -> dict[str, set[str]]:
        tasks = slurm.tasks_of(self.path)
        return {step: {t.state for t in tasks if t.step == step} for step in {t.step for t in tasks}}

    def over(self) -> bool:
        return not any(task.active for task in slurm.tasks_of(self.path))

    def end(self, seconds: float = 90) -> None:
        self.cluster.wait(self.over, "the chain has ended", seconds, release=True)

    def began(self, *names: str) -> None:
        self.cluster.wait(lambda: {f"began-{name}" for name in names} <= self.did(), f"{names} began")


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    made = Run(tmp_path, cluster)
    monkeypatch.setattr(slurm, "units_left", made.left)
    monkeypatch.chdir(tmp_path)
    yield made
    if slurm.submissions(made.path):
        slurm.cancel(made.path)
        made.end()


ALL = {step: {"COMPLETED"} for step in slurm.STEPS}


def test_a_chain_runs_in_order_and_never_more_tasks_than_the_throttle(run):
    submission = run.submit(8, throttle=3, export_tasks=2)
    run.end()
    assert run.states() == ALL
    arrays = [job for job in submission.jobs if job.step == "work"]
    assert [job.shards for job in arrays] == [tuple(range(6)), (6, 7)]  # MaxArraySize is 6
    work = [run.did(f"work-{i}") for i in range(8)]
    assert run.did("plan")["ended"] <= min(w["began"] for w in work)
    exports = [run.did(f"export-{i}") for i in range(2)]
    cluster, finish, report = (run.did(step)["ended"] for step in ("cluster", "finish", "report"))
    assert max(w["ended"] for w in work) <= cluster <= min(e["began"] for e in exports)
    assert max(e["ended"] for e in exports) <= finish <= report
    for w in work:
        assert sum(v["began"] <= w["began"] < v["ended"] for v in work) <= 3
    shown = subprocess.run(
        ["bash", "-c", submission.tail.replace("tail -n +1 -F", "ls").replace("2>/dev/null", "")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()) == 8 + 2 + 4


def test_jobs_get_what_was_asked_for_and_no_secrets(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/cache, with a comma")
    monkeypatch.setenv("WANTED", "yes")
    monkeypatch.setenv("SBATCH_EXPORT", "ALL")  # what a user's profile may hold
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "77")  # as inside of another job
    submission = run.submit(
        1,
        gpus_per_task="2",
        cpus_per_task=2,
        mem="700M",
        partition="high",
        environment=("WANTED",),
        sbatch_args=("work:--comment=mine",),
    )
    run.end()
    assert run.states() == ALL
    seen = run.did("work-0")
    environment = seen["environment"]
    assert "HF_TOKEN" not in environment and environment["WANTED"] == "yes"
    assert environment["HF_HOME"] == "/cache, with a comma"
    assert environment["SLURM_JOB_PARTITION"] == "high"
    assert (environment["SLURM_GPUS_ON_NODE"], environment["SLURM_CPUS_PER_TASK"]) == ("2", "2")
    assert environment["SLURM_MEM_PER_NODE"] == "700" and environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "SLURM_GPUS_ON_NODE" not in run.did("report")["environment"]
    assert seen["cwd"] == submission.cwd == str(Path.cwd())
    everything = [path for path in run.path.rglob("*") if path.is_file() and path.parent.name != "did"]
    assert everything and not any("hf_secret" in path.read_text() for path in everything)


def test_a_task_that_failed_is_shown_and_it_alone_is_tried_again(run):
    run.order("fail-3")
    run.submit(5)
    run.end()
    assert run.states() == {
        "plan": {"COMPLETED"},
        "work": {"COMPLETED", "FAILED"},
        "cluster": {"FAILED"},
        "export": {"CANCELLED"},
        "finish": {"CANCELLED"},
        "report": {"CANCELLED"},
    }
    task, refused, *_ = slurm.failures(run.path)
    assert (task.shard, task.code, task.state) == (3, 1, "FAILED") and task.node in run.cluster.names
    assert task.last_lines(1) == ["error: the video is on fire"]
    assert refused.last_lines(1) == ["error: 1 units are left"]
    again = run.retry(mem="600M")
    assert [(job.step, job.shards) for job in again.jobs] == [
        ("work", (3,)),
        ("cluster", ()),
        ("export", (0,)),
        ("finish", ()),
        ("report", ()),
    ]
    assert again.request.mem == "600M"
    run.end()
    assert run.states() == ALL and not slurm.failures(run.path)
    with pytest.raises(UserError, match="nothing failed and nothing is left"):
        run.retry()


def test_a_failed_task_whose_units_others_did_holds_nothing_up(run):
    run.order("fail-1")
    run.order("hold-0")
    run.submit(2)
    run.began("1-0")
    (run.path / "did" / "work-1").write_text("{}")  # by another
    run.drop("hold-0")
    run.end()
    assert run.states() == {**ALL, "work": {"COMPLETED", "FAILED"}}


def test_a_retry_while_others_still_work_waits_for_both(run):
    run.order("fail-1")
    run.order("hold-0")
    first = run.submit(3)
    run.cluster.wait(lambda: any(task.failed for task in slurm.tasks_of(run.path)), "a failure")
    again = run.retry()
    assert [job.shards for job in again.jobs if job.step == "work"] == [(1,)]
    run.cluster.wait(lambda: "work-1" in run.did(), "the shard again")
    old = {job.job_id for job in first.jobs if job.step in ("cluster", "finish", "report")}
    run.cluster.wait(
        lambda: {run.cluster.jobs()[job] for job in old} == {"CANCELLED"}, "the old chain is cancelled"
    )
    assert "cluster" not in run.did()
    run.drop("hold-0")
    run.end()
    assert run.states() == ALL


def test_an_export_is_shared_and_what_failed_of_it_is_tried_again(run):
    run.order("fail-export-1")
    run.order("hold-export-0")
    run.order("hold-export-2")
    first = run.submit(1, export_tasks=3)
    run.began("export-0-0", "export-2-0")
    (array,) = [job.job_id for job in first.jobs if job.step == "export"]
    run.cluster.client("scancel", "--signal=USR1", "--batch", f"{array}_2")
    run.cluster.wait(lambda: run.cluster.jobs()[f"{array}_2"] == "PENDING", "it waits again")
    run.drop("hold-export-2")
    run.cluster.wait(lambda: "export-2" in run.did(), "it was done then", release=True)
    (task,) = slurm.failures(run.path)
    assert (task.step, task.shard, task.code) == ("export", 1, 1)
    again = run.retry()
    assert [(job.step, job.shards) for job in again.jobs] == [
        ("export", (1,)),
        ("finish", ()),
        ("report", ()),
    ]
    run.cluster.wait(lambda: "export-1" in run.did(), "the shard again")
    assert "finish" not in run.did() and slurm.overview(run.path).states("export")["RUNNING"] == 1
    run.drop("hold-export-0")
    run.end()
    assert run.states() == ALL and not slurm.failures(run.path)
    assert max(run.did(f"export-{i}")["ended"] for i in range(3)) <= run.did("finish")["ended"]


def test_a_failed_task_of_an_export_holds_nothing_up(run):
    run.order("fail-export-0")
    run.submit(1, export_tasks=2)
    run.end()
    assert run.states() == {**ALL, "export": {"COMPLETED", "FAILED"}}
    with pytest.raises(UserError, match="nothing failed and nothing is left"):  # the end did its share
        run.retry()


def test_a_warning_drains_a_task_and_it_puts_itself_back(run):
    run.order("hold")
    submission = run.submit(2)
    run.began("0-0", "1-0")
    (array,) = [job.job_id for job in submission.jobs if job.step == "work"]
    run.cluster.client("scancel", "--signal=USR1", "--batch", f"{array}_1")
    run.cluster.wait(lambda: "drained-1-SIGUSR1" in run.did(), "it drained")
    run.cluster.wait(lambda: run.cluster.jobs()[f"{array}_1"] == "PENDING", "it waits again")
    assert run.cluster.jobs()[f"{array}_0"] == "RUNNING"  # the other task is left alone
    run.drop("hold")
    run.end()
    assert run.states() == ALL and "began-1-1" in run.did()
    log = (submission.folder / f"work-{array}_1.log").read_text()
    assert "start 1" in log and "exit 75" in log and "start 2" in log


@pytest.mark.slow
def test_the_warning_comes_before_the_time_limit(run):
    run.order("hold")
    submission = run.submit(1, time="1")
    run.began("0-0")
    (array,) = [job.job_id for job in submission.jobs if job.step == "work"]
    run.cluster.wait(lambda: "drained-0-SIGUSR1" in run.did(), "the warning", 90)
    run.cluster.wait(lambda: run.cluster.jobs()[f"{array}_0"] == "PENDING", "it waits again")
    run.drop("hold")
    run.end()
    assert run.states() == ALL


def test_a_preempted_task_drains_and_goes_on_later(run):
    run.order("hold")
    submission = run.submit(2)
    run.began("0-0", "1-0")
    (array,) = [job.job_id for job in submission.jobs if job.step == "work"]
    urgent = run.cluster.client(
        *("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null"),
        *("--wrap", "sleep 3"),
    ).strip()
    run.cluster.wait(lambda: run.cluster.jobs()[urgent] == "COMPLETED", "the urgent job", release=True)
    assert {"drained-0-SIGTERM", "drained-1-SIGTERM"} <= run.did()
    assert "cluster" not in run.did()
    run.drop("hold")
    run.end()
    assert run.states() == ALL and {"began-0-1", "began-1-1"} <= run.did()
    assert run.did("work-0")["environment"]["SLURM_ARRAY_JOB_ID"] == array


def test_the_warning_of_a_grace_time_is_used(cluster, tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="e2r-slurm-") as folder:
        parameters = ["SlurmctldParameters=preempt_send_user_signal"]
        graceful = Cluster(Path(folder) / "c", nodes=1, grace=60, parameters=parameters)
        run = Run(tmp_path, graceful)
        monkeypatch.setenv("SLURM_CONF", str(graceful.conf))
        monkeypatch.setattr(slurm, "units_left", run.left)
        try:
            graceful.start()
            run.order("hold")
            run.submit(1)
            run.began("0-0")
            urgent = graceful.client(
                *("sbatch", "--parsable", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "true")
            ).strip()
            graceful.wait(lambda: "drained-0-SIGUSR1" in run.did(), "the warning", 30)
            graceful.wait(lambda: graceful.jobs()[urgent] == "COMPLETED", "the urgent job", 30)
            run.drop("hold")
            run.end()
            assert run.states() == ALL and "began-0-1" in run.did()
        finally:
            graceful.stop()


def test_a_dead_node_costs_its_tasks_a_restart(run):
    run.order("hold-1")
    submission = run.submit(2, cpus_per_task=2)  # one task a node
    run.began("1-0")
    run.cluster.wait(lambda: "work-0" in run.did(), "the other task")
    (task,) = [t for t in slurm.tasks_of(run.path) if (t.step, t.shard) == ("work", 1)]
    run.cluster.kill_node(task.node)
    try:
        run.cluster.wait(lambda: "began-1-1" in run.did(), "a start elsewhere", release=True)
        assert run.did("began-1-1")["environment"]["SLURMD_NODENAME"] != task.node
        run.drop("hold-1")
        run.end()
    finally:
        run.cluster.start_node(task.node)
    assert run.states() == ALL
    assert len(slurm.submissions(run.path)) == 1 and submission.jobs


def test_cancel_ends_everything_and_retry_goes_on(run):
    run.order("hold")
    run.submit(3)
    run.began("0-0", "1-0", "2-0")
    assert len(slurm.cancel(run.path)) == 5  # the plan was made
    run.end()
    assert run.states() == {step: {"CANCELLED"} for step in slurm.STEPS[1:]} | {"plan": {"COMPLETED"}}
    assert {f"drained-{i}-SIGTERM" for i in range(3)} <= run.did() and "cluster" not in run.did()
    assert slurm.cancel(run.path) == []
    run.drop("hold")
    again = run.retry()
    assert [job.step for job in again.jobs] == list(slurm.STEPS[1:])
    run.end()
    assert run.states() == ALL


def test_a_failed_plan_ends_the_chain_and_is_made_again_by_retry(run):
    run.order("plan_fails")
    run.submit(2)
    run.end()
    assert run.states() == {"plan": {"FAILED"}} | {step: {"CANCELLED"} for step in slurm.STEPS[1:]}
    assert slurm.failures(run.path)[0].code == 3 and not run.did()
    run.drop("plan_fails")
    run.retry()
    run.end()
    assert run.states() == ALL


def test_what_slurm_refuses_leaves_nothing_behind(run):
    with pytest.raises(UserError, match=r"cluster\.sh: .*[Ii]nvalid partition"):
        run.submit(2, sbatch_args=("cluster:--partition=nowhere",))
    run.cluster.wait(lambda: not run.cluster.client("squeue", "-h").strip(), "an empty queue")
    assert "cluster" not in run.did()
    run.submit(2)
    with pytest.raises(UserError, match="in Slurm's queue"):
        run.submit(2)
    run.end()
    assert run.states() == ALL


def test_planning_here_leaves_slurm_the_rest(run):
    submission = run.submit(2, plan_here=True)
    assert "SLURM_JOB_ID" not in run.did("plan")["environment"]
    assert [job.step for job in submission.jobs] == list(slurm.STEPS[1:])
    run.end()
    assert run.states() == {step: {"COMPLETED"} for step in slurm.STEPS[1:]}


def test_a_dry_run_prints_what_submit_does(run):
    run.order("tasks", "7")
    text = slurm.draft_run(run.cfg, Request(7, throttle=1), STAND_IN).text()
    assert not (run.path / "slurm").exists()
    subprocess.run(["bash", "-c", text], check=True, capture_output=True)
    run.cluster.wait(lambda: "report" in run.did(), "the end of the chain")
    work = sorted((run.did(f"work-{i}") for i in range(7)), key=lambda w: w["began"])
    assert all(a["ended"] <= b["began"] for a, b in pairwise(work))


# -- the real commands -----------------------------------------------------------------------------

REPOSITORY = Path(__file__).parents[1]
HOLDING = """\
import pathlib, sys
from ego2robot import cli, pipeline
from tests import holding
if sys.argv[1] == "work" and pathlib.Path(sys.argv[2], "slurm", "fail").exists():
    sys.exit("error: this node is broken")
pipeline.scoring = holding.scoring
cli.main()
"""
UNITS = 6  # one of each video
HELD = (sys.executable, "-c", HOLDING)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    for i in range(UNITS):
        write_video(folder / f"{i}.mp4", n_frames=240 + 15 * i, gop=30)
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:20_000])
    return folder


@pytest.fixture(scope="module")
def local(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("local")
    return pipeline.run(config.load("folder", arguments(footage, folder / "r"))).run


def arguments(footage: Path, run_dir: Path) -> list[str]:
    return [
        *BASE,
        "workers=1",
        "work.lease_s=5",
        "work.commit_s=1",
        "export.top=2",
        f"source.path={footage}",
        f"run_dir={run_dir}",
    ]


def ego2robot(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ego2robot.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def assert_same(run_dir: Path, local: RunDir) -> None:
    """The rows of a local run, a sound ledger, a dataset, and nothing that is left over."""
    run = RunDir.open(run_dir)
    verdict = verify(run)
    assert verdict.ok and verdict.left == 0, verdict.problems
    assert rows(run) == rows(local)
    assert [(row["name"], row["error_class"]) for row in rows(run, "quarantine")] == [
        (row["name"], row["error_class"]) for row in rows(local, "quarantine")
    ]
    info, expected = (r.read_json("dataset/meta/info.json") for r in (run, local))
    assert info and expected and info["total_frames"] == expected["total_frames"] > 0
    assert contents(run_dir / "dataset/videos") == contents(local.path / "dataset/videos")
    assert (run_dir / "report.html").is_file() and not list(run_dir.glob("**/.tmp-*"))


@pytest.mark.timeout(900)
def test_from_submit_to_dataset_with_the_rows_of_a_local_run(cluster, footage, local, tmp_path):
    run_dir = tmp_path / "r"
    done = ego2robot(
        *("slurm", "submit", "folder", *arguments(footage, run_dir)),
        *("--array", "8", "--throttle", "3", "--cpus-per-task", "1", "--time", "10", "--mem", "400M"),
    )
    assert done.returncode == 0, done.stderr
    tasks = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(("6 tasks", "2 tasks"))]
    assert tasks == ["work", "work", "export"] and "logs     tail -n +1 -F" in done.stdout, done.stdout
    cluster.wait(lambda: not any(t.active for t in slurm.tasks_of(run_dir)), "the end of the chain", 280)
    seen = ego2robot("slurm", "status", str(run_dir)).stdout
    assert "8 completed" in seen and "report   job" in seen and " units: " in seen, seen
    failed = ego2robot("slurm", "failed", str(run_dir))
    assert (failed.returncode, failed.stdout) == (0, "no task failed\n")
    assert_same(run_dir, local)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preempted_robbed_of_a_node_broken_and_cancelled_a_run_ends_with_the_same_rows(
    cluster, footage, local, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    run_dir = tmp_path / "r"
    cfg = config.load("folder", arguments(footage, run_dir))

    def left() -> int:
        return slurm.units_left(run_dir) or 0

    def over() -> bool:
        return not any(task.active for task in slurm.tasks_of(run_dir))

    def held() -> None:
        """Until tasks are in the middle of units."""
        (run_dir / "slurm" / "held").unlink(missing_ok=True)
        cluster.wait((run_dir / "slurm" / "held").exists, "units in work", 120, release=True)

    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "slurm" / "fail").touch()
    slurm.submit(cfg, Request(3, cpus_per_task=2), command=HELD)
    cluster.wait(over, "the failed chain", 200)
    failed = ego2robot("slurm", "failed", str(run_dir))
    assert failed.returncode == 1 and failed.stdout.count("this node is broken") == 3, failed.stdout
    assert f"{UNITS} units are left" in failed.stdout

    (run_dir / "slurm" / "fail").unlink()
    (run_dir / "slurm" / "hold").touch()
    slurm.retry(run_dir, {}, HELD)
    cluster.wait(lambda: left() == len(holding.VIDEOS), "the units that are not held", 120)
    held()
    urgent = cluster.client(
        *("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    ).strip()
    cluster.wait(lambda: cluster.jobs()[urgent] == "COMPLETED", "the urgent job", 60)
    logs = [path.read_text() for path in run_dir.glob("slurm/2/work-*.log")]
    assert len(logs) == 3 and all("exit 75" in log for log in logs), logs

    held()
    task = next(t for t in slurm.tasks_of(run_dir) if t.step == "work" and t.state == "RUNNING")
    cluster.kill_node(task.node)
    try:
        cluster.wait(lambda: "down" in cluster.client("sinfo", "-h", "-n", task.node, "-o", "%T"), "its end")
        cluster.wait(lambda: cluster.jobs()[task.job] == "PENDING", "its task waits again")
        assert slurm.cancel(run_dir)
        cluster.wait(over, "an empty queue", 60)
    finally:
        cluster.start_node(task.node)
    assert left() == len(holding.VIDEOS) and not (run_dir / "report.html").exists()

    (run_dir / "slurm" / "hold").unlink()
    slurm.retry(run_dir, {}, HELD)
    cluster.wait(over, "the end", 400, release=True)
    assert not slurm.failures(run_dir)
    assert_same(run_dir, local)
