"""A real Slurm of several nodes on this machine: own munge key, free ports, no systemd, no cgroups.

Debian's ``slurm-wlm munge slurm-client`` are enough (``make slurm`` installs them). All daemons run as the
user who starts them and leave nothing outside their folder.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
CONF = """\
ClusterName=ego2robot
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
SlurmdTimeout=10
MaxArraySize={max_array}
DebugFlags=NO_CONF_HASH
"""


def missing() -> str:
    """Why there can be no cluster here; empty when there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"no Slurm here ({', '.join(lacking)}); `make slurm` installs it on Debian" if lacking else ""


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    """Nodes ``n1`` to ``nN`` of 2 CPUs, 4 GB and 2 pretended GPUs each.

    Partition ``low`` (the default) is preempted by ``high``: its jobs go back to the queue.

    Args:
        root: an empty folder; a short path, since Unix sockets lie in it.
        kill_wait: seconds from SIGTERM to SIGKILL when Slurm ends a job.
        max_array: Slurm's ``MaxArraySize``.
        grace: seconds from a preemption to its SIGTERM.
        parameters: more ``slurm.conf`` lines.
    """

    def __init__(
        self,
        root: Path,
        nodes: int = 4,
        kill_wait: int = 30,
        max_array: int = 1001,
        grace: int = 0,
        parameters: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.names = [f"n{i + 1}" for i in range(nodes)]
        host = socket.gethostname().split(".")[0]
        for name in ("etc", "run", "log", "state", "spool"):
            (root / name).mkdir(parents=True, mode=0o755)
        ports = _free_ports(nodes + 1)
        lines = [
            CONF.format(
                host=host,
                user=getpass.getuser(),
                port=ports[0],
                root=root,
                kill_wait=kill_wait,
                max_array=max_array,
            ),
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
                "CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
                for name, port in zip(self.names, ports[1:], strict=True)
            ),
            "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE "
            f"GraceTime={grace} DefMemPerCPU=500 State=UP",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF DefMemPerCPU=500 State=UP",
            *parameters,
        ]
        self.conf = root / "etc" / "slurm.conf"
        self.conf.write_text("\n".join(lines) + "\n")
        gpus = "".join(f"Name=gpu File=/dev/{device}\n" for device in ("null", "zero"))
        (root / "etc" / "gres.conf").write_text(gpus)
        key = root / "etc" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))
        } | {"SLURM_CONF": str(self.conf), "PATH": _path()}

    def start(self) -> Cluster:
        run, log = self.root / "run", self.root / "log"
        self._daemon(
            "munged",
            "--force",
            f"--key-file={self.root}/etc/munge.key",
            f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log",
            f"--seed-file={run}/munged.seed",
        )
        self._daemon("slurmctld", "-f", str(self.conf))
        for name in self.names:
            self.start_node(name)
        self.wait(
            lambda: (
                self.client("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split().count("idle")
                == len(self.names)
            ),
            "all nodes idle",
        )
        return self

    def stop(self) -> None:
        """Ends all jobs, then all daemons, by their process ids alone."""
        with suppress(subprocess.SubprocessError):
            self.client("scancel", "-f", f"--user={getpass.getuser()}", check=False)
            self.wait(lambda: not self.client("squeue", "-h", check=False).strip(), "no job", 30)
        pids = [_pid(path) for path in sorted(self.root.glob("run/*.pid"))]
        processes = [psutil.Process(pid) for pid in pids if pid and psutil.pid_exists(pid)]
        processes += self._steps()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-f", str(self.conf), "-N", name)

    def kill_node(self, name: str) -> None:
        """Power off: slurmd, the steps that it started, and all that they started, with SIGKILL."""
        daemon = psutil.Process(_pid(self.root / "run" / f"slurmd.{name}.pid"))
        steps = self._steps(name)
        doomed = [daemon, *steps]
        for process in list(doomed):
            with suppress(psutil.NoSuchProcess):
                doomed += process.children(recursive=True)
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def _steps(self, *nodes: str) -> list[psutil.Process]:
        """The slurmstepd processes of some nodes, or of all; they write to the log of their slurmd."""
        logs = {str(self.root / "log" / f"slurmd.{name}.log") for name in nodes or self.names}
        found = []
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.info["name"] == "slurmstepd" and logs & {f.path for f in process.open_files()}:
                    found.append(process)
        return found

    def client(self, *command: str, check: bool = True, timeout: float = 5) -> str:
        """What a Slurm command prints. Raises CalledProcessError, TimeoutExpired."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """``13_0`` or ``13`` to its state, of all jobs that Slurm knows."""
        text = self.client("squeue", "-h", "-r", "-t", "all", "-o", "%F|%K|%T")
        found = {}
        for line in text.splitlines():
            job, index, state = line.split("|")
            found[job if index == "N/A" else f"{job}_{index}"] = state
        return found

    def release(self) -> None:
        """Lets jobs that went back to the queue start at once; Slurm holds them for two minutes."""
        for job, state in self.jobs().items():
            if state == "PENDING":
                self.client("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def wait(self, done: Callable[[], object], what: str, seconds: float = 60, release: bool = False) -> None:
        """Polls until ``done()``. Raises AssertionError with the queue when it takes too long."""
        deadline = time.monotonic() + seconds
        freed = time.monotonic()
        while time.monotonic() < deadline:
            with suppress(subprocess.SubprocessError):
                if done():
                    return
                if release and time.monotonic() - freed > 2:
                    self.release()
                    freed = time.monotonic()
            time.sleep(0.4)
        logs = "\n".join((self.root / "log" / "slurmctld.log").read_text().splitlines()[-20:])
        raise AssertionError(f"waited {seconds:g} s for: {what}; jobs: {self.jobs()}\n{logs}")

    def _daemon(self, program: str, *args: str) -> None:
        done = subprocess.run(
            [program, *args],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program}: exit {done.returncode}: {done.stdout}")


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _pid(path: Path) -> int:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else 0
