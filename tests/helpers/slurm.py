"""A real two-node Slurm on one machine, for tests. Knows Slurm's daemons and commands, not our templates.

Needs root and the distribution's packages slurm-wlm and munge, but no cgroups and no systemd: both nodes
are slurmd processes of this host under their own names and ports, with everything else in one folder.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.gloo import free_port
from tests.helpers.process import poll

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("srun", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONF = """
ClusterName=clipyard
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PriorityType=priority/basic
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
KillWait=30
KillOnBadExit=1
MinJobAge=3600
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={port0} {node}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} {node}
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""
NODE = "CPUs=8 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [program for program in (*DAEMONS, *CLIENTS) if _find(program) is None]
    if absent:
        return f"Slurm is not installed (no {', '.join(absent)}): packages slurm-wlm and munge"
    if os.geteuid() != 0:
        return "a Slurm cluster of our own needs root"
    return None


@dataclass(frozen=True)
class SlurmCluster:
    """Two idle nodes, n0 and n1, of 8 (claimed) cores each. `env` holds SLURM_CONF."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """This process's environment, pointing Slurm's commands to this cluster."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path, timeout_s: float = 60.0, env: dict[str, str] | None = None) -> str:
        """The output of a Slurm command; AssertionError with it when the command fails."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, (
            f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def submit(self, script: Path, *options: str | Path, env: dict[str, str] | None = None) -> str:
        """sbatch; the job's id."""
        return self.run("sbatch", "--parsable", *options, script, env=env).strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a dict: JobState, Restarts, ExitCode, EndTime and so on."""
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", self.run("scontrol", "show", "job", job_id)))

    def wait_state(self, job_id: str, states: set[str], timeout_s: float = 120.0) -> dict[str, str]:
        """Waits until the job is in one of `states`; a requeued job waits three seconds instead of two minutes.

        Not less: within the second of its end a node takes a job's new credential for the revoked one.
        """
        hurried: set[str] = set()

        def probe() -> dict[str, str] | None:
            job = self.job(job_id)
            restart = job.get("Restarts", "0")
            if job["JobState"] == "PENDING" and job.get("Reason") == "BeginTime" and restart not in hurried:
                hurried.add(restart)
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+3")
            return job if job["JobState"] in states else None

        try:
            return poll(probe, timeout_s, f"job {job_id} in {sorted(states)}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.job(job_id)}\n{self.logs()}") from None

    def wait_end(self, job_id: str, timeout_s: float = 300.0) -> dict[str, str]:
        """Waits until the job has ended, requeues included."""
        return self.wait_state(job_id, ENDED, timeout_s)

    def logs(self, chars: int = 3000) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-chars:]}" for log in self.folder.glob("*.log")
        )


@contextmanager
def two_nodes(timeout_s: float = 60.0) -> Iterator[SlurmCluster]:
    """Starts munged, slurmctld and two slurmd; waits for both nodes; ends all of them on leaving."""
    folder = Path(tempfile.mkdtemp(prefix="clipyard-slurm-"))
    folder.chmod(0o755)  # munged refuses a socket in a folder that others cannot enter
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _write_configuration(folder)
        cluster = SlurmCluster(folder)
        _start(stack, folder, "munged", "--foreground", "--force", *_munge_files(folder))
        poll((folder / "munge.socket").exists, timeout_s, "munge.socket")
        _start(stack, folder, "slurmctld", "-D", "-i", "-f", str(folder / "slurm.conf"))
        for node in ("n0", "n1"):
            _start(stack, folder, "slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", node, log=node)
        _wait_idle(cluster, timeout_s)
        stack.callback(_cancel_all, cluster)
        yield cluster


def _write_configuration(folder: Path) -> None:
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    ports = dict(zip(("control_port", "port0", "port1"), _distinct_ports(3), strict=True))
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, node=NODE, **ports))


def _distinct_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


def _munge_files(folder: Path) -> list[str]:
    names = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log"}
    names |= {"pid-file": "munged.pid", "seed-file": "munge.seed"}
    return [f"--{option}={folder / name}" for option, name in names.items()]


def _start(stack: ExitStack, folder: Path, program: str, *arguments: str, log: str | None = None) -> None:
    path = _find(program)
    assert path is not None
    with open(folder / f"{log or program}-out.log", "wb") as output:
        process = subprocess.Popen(
            [path, *arguments],
            env=SlurmCluster(folder).env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_idle(cluster: SlurmCluster, timeout_s: float) -> None:
    def idle() -> bool:
        shown = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=cluster.env, capture_output=True, text=True)
        return shown.stdout.split() == ["idle", "idle"]

    try:
        poll(idle, timeout_s, "two idle nodes")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.logs()}") from None


def _cancel_all(cluster: SlurmCluster) -> None:
    subprocess.run(["scancel", "--state=RUNNING"], env=cluster.env, capture_output=True)
    subprocess.run(["scancel", "--state=PENDING"], env=cluster.env, capture_output=True)
